"""Reference attention: the definition in plain PyTorch, slow and simple. Every kernel is tested against it.

`MaskSpec` is the part of a mask that is fixed when a kernel is compiled. `attention_mask` defines which query attends
to which key. Every other backend calls it or is tested against it.

Shapes: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K query heads per group, D head size.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dropout import dropout

IGNORE_INDEX = -100  # targets with this value do not contribute to the loss, as in torch


@dataclass(frozen=True)
class MaskSpec:
    """The mask of a layer as a function of distance, and the softcap of its scores.

    causal: a query does not attend to later keys. window: a query attends to keys less than `window` positions away,
    itself included: a causal window of W has W keys, a non-causal one 2 W - 1; None is no limit. softcap: scaled scores
    become softcap * tanh(score / softcap), as in Gemma 2 (arXiv 2408.00118, section 2); None is off.
    """

    causal: bool = True
    window: int | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap = {self.softcap}: must be above 0")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window = {self.window}: must be at least 1, the query's own key")


CAUSAL = MaskSpec()
FULL = MaskSpec(causal=False)


class DocumentBounds(NamedTuple):
    """The packed documents of a batch: the keys of a position's document are first ... last - 1, (B, S) int32 each."""

    first: Tensor
    last: Tensor


def document_bounds(document_ids: Tensor) -> DocumentBounds:
    """The bounds of each position's document, from (B, S) integers: each document is a run of one number."""
    S = document_ids.shape[1]
    # (B, S) true where a document starts, except at position 0
    new = document_ids.diff(dim=1, prepend=document_ids[:, :1]) != 0
    here = torch.arange(S, dtype=torch.int32, device=document_ids.device).expand_as(document_ids)  # (B, S)
    first = torch.where(new, here, 0).cummax(1).values
    ends = torch.where(new, here, S).roll(-1, 1)  # (B, S) at a document's last position: the start of the next
    ends[:, -1] = S
    last = ends.flip(1).cummin(1).values.flip(1)  # the nearest end to the right
    return DocumentBounds(first.int(), last.int())


def relative_positions(
    queries: int, keys: int, device: torch.device, cache_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Query position minus key position, int (B or 1, T, S), and which cache slots hold a key, bool (B or 1, S).

    Without `cache_seqlens`, key j is at position j and the queries are the last T of the S positions: the causal
    diagonal ends in the lower right corner. With `cache_seqlens` (B,), the keys are a cache that holds that many
    tokens, including the queries' own. Slot s holds the latest position congruent to s modulo S: position s up to S
    tokens, and beyond that the cache is a ring buffer. One formula covers both.
    """
    last = torch.full((1,), keys - 1, device=device) if cache_seqlens is None else cache_seqlens - 1  # (B or 1,)
    last = last.view(-1, 1)
    key_at = last - (last - torch.arange(keys, device=device)) % keys  # (B, S) position in each slot; < 0: empty
    query_at = last + 1 - queries + torch.arange(queries, device=device)  # (B, T)
    return query_at[:, :, None] - key_at[:, None, :], key_at >= 0


def attention_mask(
    mask_spec: MaskSpec,
    queries: int,
    keys: int,
    device: torch.device,
    cache_seqlens: Tensor | None,
    document_ids: Tensor | None,
) -> Tensor:
    """Which query attends to which key, bool (B or 1, T, S). Positions: see `relative_positions`."""
    distance, written = relative_positions(queries, keys, device, cache_seqlens)
    mask = written[:, None, :].expand_as(distance)
    if mask_spec.causal:
        mask = mask & (distance >= 0)
    if mask_spec.window is not None:
        mask = mask & (distance.abs() < mask_spec.window)
    if document_ids is not None:
        changes = document_ids.diff(dim=1, prepend=document_ids[:, :1]) != 0
        run = changes.cumsum(1)  # (B, S) number of the document
        mask = mask & (run[:, keys - queries :, None] == run[:, None, :])
    return mask


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_spec: MaskSpec,
    softmax_scale: float,
    cache_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(q k^T * scale) v, computed in at least fp32 (Vaswani et al. 2017, section 3.2.1).

    Args:
        q: (B, T, H, D); k, v: (B, S, K, D) with K dividing H (GQA: Ainslie et al. 2023).
        mask_spec, cache_seqlens, document_ids: see `attention_mask`.
        alibi_slopes, sinks: (H,), see `kernels.attention`.
        dropout_p, dropout_seed: see `kernels.attention`; without a cache.
    Returns:
        out (B, T, H, D) in q's dtype, the log-sum-exp of each row's scores (B, T, H), and the weights (B, H, T, S)
        before dropout.
        A row without a key has out 0, weights 0 and log-sum-exp -inf, or with sinks the sink.
    """
    B, T, H, D = q.shape
    S, K = k.shape[1], k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(dtype).view(B, T, K, H // K, D)  # (B, T, H, D) -> (B, T, K, G, D): query head h uses kv head h // G
    scores = torch.einsum("btkgd,bskd->bkgts", grouped, k.to(dtype)).reshape(B, H, T, S) * softmax_scale  # k, g -> h
    if mask_spec.softcap is not None:
        scores = mask_spec.softcap * torch.tanh(scores / mask_spec.softcap)
    if alibi_slopes is not None:
        distance, _ = relative_positions(T, S, q.device, cache_seqlens)  # (B or 1, T, S)
        scores = scores - alibi_slopes.to(dtype)[:, None, None] * distance.abs()[:, None]  # (B, H, T, S)
    mask = attention_mask(mask_spec, T, S, q.device, cache_seqlens, document_ids)[:, None]  # (B or 1, 1, T, S)
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)  # (B, H, T)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(dtype)[:, None])
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()  # without a key all weights are 0
    read = weights if dropout_seed is None else dropout(weights, dropout_p, dropout_seed, S - T, 0)
    weighed = read.view(B, K, H // K, T, S)  # h -> k, g
    out = torch.einsum("bkgts,bskd->btkgd", weighed, v.to(dtype)).reshape(B, T, H, D)  # k, g -> h
    return out.to(q.dtype), lse.transpose(1, 2), weights  # (B, H, T) -> (B, T, H)


def reference_backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask_spec: MaskSpec, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv (Dao 2023, arXiv 2307.08691, section 2.3), without a softcap.

    If k and v are only some of the keys over which out (B, T, H, D) and lse (B, T, H) were computed, these are the dk
    and dv of those, and what they contribute to dq.
    """
    K, dtype = k.shape[2], lse.dtype
    k, v = k.to(dtype), v.to(dtype)
    q, dout, out = (x.to(dtype).unflatten(2, (K, -1)) for x in (q, dout, out))  # (B, T, H, D) -> (B, T, K, G, D)
    mask = attention_mask(mask_spec, q.shape[1], k.shape[1], q.device, None, None)[:, None, None]  # (1, 1, 1, T, S)
    scores = (torch.einsum("btkgd,bskd->bkgts", q, k) * softmax_scale).masked_fill(~mask, float("-inf"))
    lse, delta = (x.unflatten(2, (K, -1)).movedim(1, 3)[..., None] for x in (lse, (out * dout).sum(-1).flatten(2)))
    weights = (scores - lse).exp()  # (B, K, G, T, S) - (B, K, G, T, 1)
    dscores = weights * (torch.einsum("btkgd,bskd->bkgts", dout, v) - delta) * softmax_scale
    dq = torch.einsum("bkgts,bskd->btkgd", dscores, k).flatten(2, 3)  # (B, T, K, G, D) -> (B, T, H, D)
    return dq, torch.einsum("bkgts,btkgd->bskd", dscores, q), torch.einsum("bkgts,btkgd->bskd", weights, dout)
