"""Attention's one door. Every layer of every model calls `attention`; only this file chooses who computes it.

Backends: `reference` (kernels/reference.py, the definition) and `sdpa` (torch's fused attention, the default).
Shapes: B batch, T queries, S keys, H query heads, K key/value heads, D head size.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kernels.reference import CAUSAL, FULL, Pattern, reference_attention, visible

__all__ = ["CAUSAL", "FULL", "Pattern", "attention"]

BACKENDS = ("reference", "sdpa")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = CAUSAL,
    *,
    scale: float | None = None,
    lengths: Tensor | None = None,
    documents: Tensor | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> Any:
    """Grouped-query attention.

    Args:
        q: (B, T, H, D). k, v: (B, S, K, D), H a multiple of K; query head h reads key/value head h // (H / K).
        pattern: what may be seen, see `Pattern`. The queries stand at the last T positions: query T-1 at key S-1.
        scale: multiplies the scores; D ** -0.5 if None.
        lengths: (B,) integers: k and v are a cache that has seen so many tokens, the queries' own last; see `visible`.
        documents: (B, S) integers: a query sees only keys with its own number (packed documents).
        backend: None chooses; a name demands, and is an error where that backend cannot do what is asked.
        return_lse: also return the log-sum-exp of every row's scaled scores, (B, T, H), fp32 or wider.
    Returns:
        Tensor (B, T, H, D) in q's dtype, 0 in rows that see no key; with return_lse a pair, it and the log-sum-exp.
    Raises:
        ValueError: shapes that do not fit, or a backend that cannot run this call; the message says which and why.
    """
    _check(q, k, v, lengths, documents)
    if backend is None:
        backend = "reference" if return_lse else "sdpa"
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r} is not one of {', '.join(BACKENDS)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    if backend == "reference":
        out, lse, _ = reference_attention(q, k, v, pattern, scale, lengths, documents)
        return (out, lse) if return_lse else out
    if return_lse:
        raise ValueError("backend = 'sdpa' cannot return the log-sum-exp: torch's attention does not hand it out")
    return _sdpa(q, k, v, pattern, scale, lengths, documents)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float, lengths: Tensor | None, documents: Tensor | None
) -> Tensor:
    """torch's scaled_dot_product_attention. It has fast paths for no mask and for the square causal one: use them."""
    T, S, gqa = q.shape[1], k.shape[1], q.shape[2] != k.shape[2]
    plain = pattern.window is None and lengths is None and documents is None
    square_causal = plain and pattern.causal and T == S
    unmasked = plain and (not pattern.causal or T == 1)
    # (B or 1, T, S) -> (B or 1, 1, T, S): one mask for all heads
    mask = None if square_causal or unmasked else visible(pattern, T, S, q.device, lengths, documents)[:, None]
    # (B, T, H, D) -> (B, H, T, D): the layout that SDPA wants, a view
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=square_causal, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2)  # (B, H, T, D) -> (B, T, H, D)


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, documents: Tensor | None) -> None:
    """A caller's mistakes with shapes, in the caller's terms; nothing here waits for the device."""
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        got = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"attention wants q (B, T, H, D) and k, v (B, S, K, D); got {got}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} key/value heads do not divide {q.shape[2]} query heads")
    if lengths is not None and lengths.shape != q.shape[:1]:
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}; one number a sequence is ({q.shape[0]},)")
    if documents is not None and (documents.shape != k.shape[:2] or q.shape[1] > k.shape[1]):
        raise ValueError(
            f"documents has shape {tuple(documents.shape)}; it must number all keys, {tuple(k.shape[:2])}, "
            f"of which the {q.shape[1]} queries are the last"
        )
    if lengths is not None and documents is not None:
        raise ValueError("lengths (a cache) and documents (a packed batch) do not go together")
