"""Dropout of attention weights (Radford et al. 2018, section 4.1), with a counter-based random number generator.

Whether a weight is kept is a function of a seed, of the weight's sequence and head, and of the positions of its query
and key. No mask is stored: a kernel computes it for a block of any size, and its backward pass computes it again.
`keep` is the definition. kernels/triton/dropout.py computes the same bits.

`mix` is the finalizer of the hash function MurmurHash3 (Appleby 2011). A row of weights, that is a query of a head, has
two hashes, a salt and an odd factor, each of one word of the seed, the head and the query's position. The random number
of a key is mix((salt ^ key) * factor): 32 bits, different for all keys of a row. Arithmetic is modulo 2**32.

Not salt + key * factor: Triton's compiler would replace the product by sums that are kept in registers over the loop,
255 and spills in place of 203 (compiled: forward, D = 128, sm_80).
"""

import torch
from torch import Tensor


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator for the device: two words, (2,) int32.

    Each layer draws one for each micro-batch. So, as with torch's dropout, the masks of a step depend on how its batch
    is split into micro-batches and processes.
    """
    return torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, device=device)


def mix(x: Tensor) -> Tensor:
    """Hash int32 numbers, one to one. torch has no unsigned shifts: the masks remove copies of the sign bit."""
    x = (x ^ x >> 16 & 0xFFFF) * (0x85EBCA6B - 2**32)
    x = (x ^ x >> 13 & 0x7FFFF) * (0xC2B2AE35 - 2**32)
    return x ^ x >> 16 & 0xFFFF


def dropped_numbers(p: float) -> int:
    """How many of the 2**32 numbers drop a weight: the smallest ones, as signed numbers."""
    return int(p * 2**32)


def keep(seed: Tensor, p: float, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Which weights are kept, bool, each with probability 1 - p.

    seed: (2,) int32. head (of sequence b: b * H + h), query and key (positions): int32, of shapes that broadcast to
    that of the result.
    """
    salt, factor = (mix(mix(mix(word) + head) + query) for word in seed)
    return mix((salt ^ key) * (factor | 1)) >= dropped_numbers(p) - 2**31


def dropout(weights: Tensor, p: float, seed: Tensor, first_query: int, first_key: int) -> Tensor:
    """The weights (B, H, T, S) of consecutive queries and keys: 0 with probability p, otherwise divided by 1 - p."""
    B, H, T, S = weights.shape

    def count(first: int, n: int) -> Tensor:
        return torch.arange(first, first + n, dtype=torch.int32, device=weights.device)

    kept = keep(seed, p, count(0, B * H).view(B, H, 1, 1), count(first_query, T)[:, None], count(first_key, S))
    return (weights / (1 - p)).masked_fill(~kept, 0.0)
