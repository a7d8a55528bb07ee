"""Attention for training on a CPU without a C++ compiler: batched matmuls over blocks of queries.

A CPU's matmul library runs at full rate, while the backward pass of torch's fused attention takes a third of a small
model's step. So each block of queries is multiplied with just the keys that its mask can show, and autograd computes
the gradients. The attention weights of the blocks are kept for the backward pass: half a score matrix, if causal.

Shapes: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D head size, R rows of a block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.dropout import dropout
from kernels.reference_attention import DocumentBounds, MaskSpec

BLOCK = 64  # queries: with fewer, matmuls are too small to be efficient; with more, more masked scores are computed
BLOCKS = 8  # maximum number, since torch.compile unrolls the loop


def spans(T: int, S: int, mask_spec: MaskSpec, rows: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first query, number of queries, first key, last key + 1) of each block of `rows` queries."""
    for first in range(0, T, rows):
        R = min(rows, T - first)
        at, low, high = S - T + first, 0, S
        if mask_spec.window is not None:
            low, high = max(0, at - mask_spec.window + 1), min(S, at + R + mask_spec.window - 1)
        if mask_spec.causal:
            high = at + R
        yield first, R, low, high


def block_mask(mask_spec: MaskSpec, at: int, R: int, low: int, high: int, device: torch.device | None = None) -> Tensor:
    """Which of the queries at + 0 ... R attends to which of the keys low ... high, by position; bool (R, keys)."""
    distance = torch.arange(at, at + R, device=device)[:, None] - torch.arange(low, high, device=device)
    mask = (distance >= 0) | (not mask_spec.causal)
    return mask if mask_spec.window is None else mask & (distance.abs() < mask_spec.window)


def blocks_attention(
    q: Tensor, k: Tensor, v: Tensor, mask_spec: MaskSpec, softmax_scale: float, dropout_p: float,
    dropout_seed: Tensor | None, documents: DocumentBounds | None = None
) -> Tensor:  # fmt: skip
    """q (B, T, H, D), k and v (B, S, K, D) -> (B, T, H, D), as `kernels.attention`; T at most S, no softcap.

    documents: the bounds (B, S) of packed documents.

    Scores are rounded to the dtype of the matmuls; the softmax is computed in at least fp32.
    """
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    q = (q * softmax_scale).view(B, T, K, H // K, D).permute(0, 2, 3, 1, 4)  # (B, T, H, D) -> (B, K, G, T, D)
    k, v = (x.transpose(1, 2).reshape(B * K, S, D) for x in (k, v))  # (B, S, K, D) -> (B * K, S, D)
    out = []
    for first, R, low, high in spans(T, S, mask_spec, max(BLOCK, -(-T // BLOCKS))):
        at = S - T + first  # the position of the block's first query
        block = q[:, :, :, first : first + R].reshape(B * K, -1, D)  # (B, K, G, R, D) -> (B * K, G * R, D)
        hidden = ~block_mask(mask_spec, at, R, low, high)  # (R, keys)
        if documents is not None:  # (B, R, 1) > (keys,) -> (B, R, keys) -> (B * K, R, keys)
            keys = torch.arange(low, high, dtype=torch.int32, device=q.device)
            starts, ends = (x[:, at : at + R, None] for x in documents)
            hidden = (hidden | (keys < starts) | (keys >= ends)).repeat_interleave(K, 0)
        # Added by the matmul itself, the mask costs no pass over the scores, forward or backward.
        bias = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill(hidden, float("-inf"))
        bias = bias.repeat(*[1] * (bias.ndim - 2), H // K, 1)  # (1 or B * K, R, keys) -> (., G * R, keys)
        scores = torch.baddbmm(bias, block, k[:, low:high].mT)  # bias + (B * K, G * R, D) (B * K, D, keys)
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))  # (B * K, G * R, keys)
        if dropout_seed is not None:  # (B * K, G * R, keys) -> (B, H, R, keys), K, G -> H
            weights = dropout(weights.view(B, H, R, -1), dropout_p, dropout_seed, at, low).view_as(weights)
        weighed = torch.bmm(weights.to(v.dtype), v[:, low:high])  # -> (B * K, G * R, D)
        out.append(weighed.view(B, H, R, D))  # K, G -> H
    return torch.cat(out, dim=2).transpose(1, 2)  # (B, H, T, D) -> (B, T, H, D)
