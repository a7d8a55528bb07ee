"""Attention as its definition: a softmax-weighted sum, in plain torch. Slow, obvious, and what every kernel is held to.

`Pattern` is the part of a mask that is fixed when a kernel is compiled. `visible` is the one statement of who may see
whom: every other backend either calls it or is tested against it.

Shapes: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K query heads a group, D head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """Which keys a query may see, by distance alone.

    causal: a query sees no later key. window: it sees fewer than `window` positions away, itself included, so that a
    causal window of W shows exactly W keys (both sides count when not causal); None is no limit.
    """

    causal: bool = True
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window = {self.window}: a window counts the query's own key, so it is at least 1")


CAUSAL = Pattern()
FULL = Pattern(causal=False)


def visible(
    pattern: Pattern, queries: int, keys: int, device: torch.device, lengths: Tensor | None, documents: Tensor | None
) -> Tensor:
    """Which query may see which key: bool (B or 1, T, S).

    Without `lengths`, key j stands at position j and the queries are the last T of the S positions, so that the causal
    diagonal ends in the lower right corner. With `lengths` (B,) the keys are a cache into which `lengths` tokens have
    been written, the queries' own last: slot s holds the latest position that is congruent to s modulo S. While
    fewer than S tokens are written that is simply position s; later the cache is a ring. One formula serves both.
    """
    last = torch.full((1,), keys - 1, device=device) if lengths is None else lengths - 1  # (B or 1,)
    last = last.view(-1, 1)
    key_at = last - (last - torch.arange(keys, device=device)) % keys  # (B, S) position in each slot; < 0: empty
    query_at = last + 1 - queries + torch.arange(queries, device=device)  # (B, T)
    distance = query_at[:, :, None] - key_at[:, None, :]  # (B, T, S) how far back the key lies

    mask = (key_at >= 0)[:, None, :].expand_as(distance)
    if pattern.causal:
        mask = mask & (distance >= 0)
    if pattern.window is not None:
        mask = mask & (distance.abs() < pattern.window)
    if documents is not None:
        mask = mask & (documents[:, keys - queries :, None] == documents[:, None, :])
    return mask


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    scale: float,
    lengths: Tensor | None,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(q k^T * scale) v, computed in at least fp32 (Vaswani et al. 2017, section 3.2.1).

    Args:
        q: (B, T, H, D); k, v: (B, S, K, D) with K dividing H (GQA: Ainslie et al. 2023).
        pattern, lengths, documents: see `visible`.
    Returns:
        out (B, T, H, D) in q's dtype, the log-sum-exp of each row's scores (B, T, H), and the weights (B, H, T, S).
        A row that sees no key gives out 0, weights 0 and log-sum-exp -inf.
    """
    B, T, H, D = q.shape
    S, K = k.shape[1], k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(dtype).view(B, T, K, H // K, D)  # (B, T, H, D) -> (B, T, K, G, D): query head h reads kv head h // G
    scores = torch.einsum("btkgd,bskd->bkgts", grouped, k.to(dtype)) * scale  # (B, K, G, T, S)
    mask = visible(pattern, T, S, q.device, lengths, documents)[:, None, None]  # (B or 1, 1, 1, T, S)
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1).masked_fill(~mask, 0.0)  # an all -inf row is NaN after softmax, and 0 by definition
    out = torch.einsum("bkgts,bskd->btkgd", weights, v.to(dtype)).reshape(B, T, H, D)  # (B, T, K, G, D) -> heads
    lse = scores.logsumexp(-1).permute(0, 3, 1, 2).reshape(B, T, H)  # (B, K, G, T) -> (B, T, K, G) -> (B, T, H)
    return out.to(q.dtype), lse, weights.reshape(B, H, T, S)  # (B, K, G, T, S) -> (B, H, T, S)
