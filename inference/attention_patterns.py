"""What heads do, in numbers: entropy, distance, and three patterns that have names.

Weights are (..., T, T), a row for each query, as of attention_weights.py. A map of zoo/ has entries of any sign and
size: `shares` are its absolute values, divided by their sum over a row. Attention's weights are their own shares.

    previous token      a token attends to the one before it
    first token         it attends to the first token, whatever that is: an attention sink (Xiao et al. 2024, arXiv
                        2309.17453), where a head that has nothing to say puts its weight
    induction           it attends to the token after the last one that was equal to it, and so can repeat what
                        followed (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits")

The last is found with a random text that is repeated once: nothing but its first occurrence predicts the second
(`repeated` and `induction`; the prefix-matching score of Olsson et al. 2022, arXiv 2209.11895).
"""

import torch
from torch import Tensor


def shares(weights: Tensor) -> Tensor:
    """Each entry's absolute value as a share of its row's; a row of zeros stays."""
    size = weights.abs()
    return size / size.sum(-1, keepdim=True).clamp(min=1e-30)


def entropy(share: Tensor) -> Tensor:
    """Mean entropy of the rows in nats, (...)."""
    return torch.special.entr(share).sum(-1).mean(-1)


def evenness(share: Tensor, window: int | None = None) -> Tensor:
    """Mean entropy of the rows after the first, relative to that of equal weights: 1 is even, 0 is one-hot. (...).

    window: keys that a query sees at most; None is no limit.
    """
    T = share.shape[-1]
    seen = torch.arange(2, T + 1, device=share.device).clamp(max=window or T)  # (T - 1,) keys of each query
    most = seen.log().clamp(min=1e-9)  # a single key has no entropy: 0
    return (torch.special.entr(share[..., 1:, :]).sum(-1) / most).mean(-1)


def distance(share: Tensor) -> Tensor:
    """Mean number of tokens from a query back to what it attends to, (...)."""
    t = torch.arange(share.shape[-1], device=share.device)
    return (share * (t[:, None] - t)).sum(-1).mean(-1)


def previous_token(share: Tensor) -> Tensor:
    """Mean weight of the token before a query, for T of at least 2. (...)."""
    return share.diagonal(-1, -2, -1).mean(-1)


def first_token(share: Tensor) -> Tensor:
    """Mean weight of the first token, of the queries after it. (...)."""
    return share[..., 1:, 0].mean(-1)


def repeated(tokens: Tensor, length: int, seed: int) -> Tensor:
    """Some of the tokens, all different, in random order, and then repeated: (2 * length,)."""
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    return tokens[order[:length]].repeat(2)


def induction(share: Tensor) -> Tensor:
    """Over `repeated` tokens and any before them: the mean weight of the token after the first occurrence, of the
    queries that are second ones. (...)."""
    length = share.shape[-1] // 2
    return share[..., -length:, -2 * length :].diagonal(1, -2, -1).mean(-1)  # query length + i, key i + 1
