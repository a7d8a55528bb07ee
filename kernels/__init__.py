"""The attention dispatcher: every layer of every model calls `attention`, which chooses the backend.

Backends:
    reference   kernels/reference_attention.py: the definition, in plain torch
    sdpa        torch's scaled_dot_product_attention
    cpp         kernels/cpu/bindings.py: training on a CPU, in C++
    blocks      kernels/cpu/blockwise_attention.py: training on a CPU without a C++ compiler
    flash       kernels/triton/flash_attention.py: whole sequences on a GPU, with gradients
    decode      kernels/triton/flash_decoding.py: over a KV cache on a GPU

Shapes: B batch, T queries, S keys, H query heads, K key/value heads, D head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu
from kernels.cpu import bindings
from kernels.cpu.blockwise_attention import BLOCK, block_mask, blocks_attention, spans
from kernels.dropout import draw_seed
from kernels.gpu_choices import faster_backend, gpu_capability
from kernels.reference_attention import (
    CAUSAL,
    FULL,
    DocumentBounds,
    MaskSpec,
    attention_mask,
    document_bounds,
    reference_attention,
    relative_positions,
)

__all__ = ["CAUSAL", "FULL", "DocumentBounds", "MaskSpec", "attention", "document_bounds", "preferred"]

BACKENDS = ("reference", "sdpa", "cpp", "blocks", "flash", "decode")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_spec: MaskSpec = CAUSAL,
    *,
    softmax_scale: float | None = None,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    document_ids: Tensor | DocumentBounds | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> Any:
    """Grouped-query attention.

    Args:
        q: (B, T, H, D). k, v: (B, S, K, D), H a multiple of K; query head h uses key/value head h // (H / K).
        mask_spec: causal mask, sliding window and softcap. The queries are the last T positions of the keys.
        softmax_scale: multiplies the scores; default: D ** -0.5.
        cache_seqlens: (B,) integers: k and v are a KV cache that holds so many tokens, the queries' last; see
            `relative_positions`.
        block_table: (B, N) int32, with cache_seqlens: k and v are a pool of pages (P, page, K, D); position p of
            sequence b is in page block_table[b, p // page] (PagedAttention: Kwon et al. 2023, section 4.1). Entries
            beyond the length of a sequence are not read.
        document_ids: (B, S) integers: packed documents, each a run of one number; a query attends to its own run only.
            A model of several layers passes their `document_bounds` instead, computed once per batch.
        alibi_slopes: (H,) fp32: subtracts |distance| times the slope from the scores (ALiBi: Press et al. 2022,
            section 3).
        sinks: (H,) fp32: an additional score in every row's softmax, without a value (gpt-oss: arXiv 2508.10925,
            section 2.3).
        dropout_p: probability of zeroing an attention weight; the other weights are divided by 1 - dropout_p. For
            training. The log-sum-exp is that of all weights.
        dropout_seed: (2,) int32: which weights are zeroed is a function of it, the same for every backend (see
            kernels/dropout.py). Default: drawn from torch's generator.
        backend: None chooses; a name is used, or is an error if it cannot run this call.
        return_lse: also return the log-sum-exp of each row's scores, sink included, (B, T, H), in at least fp32.
    Returns:
        Tensor (B, T, H, D) in q's dtype, 0 in rows without a key; with return_lse the pair of it and the log-sum-exp.
    Raises:
        ValueError: mismatched shapes, or a backend that cannot run this call, with the reason.
    """
    # The start of a document identifies it.
    ids = document_ids.first if isinstance(document_ids, DocumentBounds) else document_ids
    _check(q, k, v, cache_seqlens, block_table, ids, alibi_slopes, sinks, dropout_p, dropout_seed)
    drops = dropout_p > 0
    extras = return_lse or mask_spec.softcap is not None or sinks is not None
    plain = cache_seqlens is None and alibi_slopes is None and not extras
    whole = plain and mask_spec.causal and q.shape[1] == k.shape[1]
    unlimited = mask_spec.window is None and document_ids is None
    maskless = plain and not drops and unlimited and (whole or not mask_spec.causal)  # fast in SDPA
    if torch.is_autocast_enabled(q.device.type):  # as torch's own attention does
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if backend is None:
        backend, _ = preferred(q.device)
        if backend == "flash" and maskless:
            backend = faster_backend(q.device, q.shape[-1], torch.is_grad_enabled() and q.requires_grad)
        if backend == "flash" and cache_seqlens is not None:
            backend = "decode"
        if backend == "cpp" and (drops or not (whole and q.dtype in (torch.float32, torch.bfloat16))):
            backend = "blocks"
        if backend in ("cpp", "blocks") and not (plain and q.requires_grad and q.shape[1] <= k.shape[1]):
            backend = "sdpa"
        if backend == "sdpa" and (extras or drops):
            backend = "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r} is not one of {', '.join(BACKENDS)}")
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    seed = None
    if drops:
        if backend in ("sdpa", "cpp", "decode"):
            raise ValueError(f"backend = {backend!r} does not support dropout_p; reference, blocks and flash do")
        seed = draw_seed(q.device) if dropout_seed is None else dropout_seed

    if backend == "cpp":
        if not whole:
            raise ValueError(
                "backend = 'cpp' supports causal masks, windows and documents only, with as many queries as keys"
            )
        cpu.require(q)
        return bindings.Attend.apply(q, k, v, softmax_scale, mask_spec.window or 0, _bounds(document_ids))
    if backend == "blocks":
        if not plain or q.shape[1] > k.shape[1]:
            raise ValueError(
                "backend = 'blocks' supports causal masks, windows and documents only, with at most as many queries as "
                "keys"
            )
        return blocks_attention(q, k, v, mask_spec, softmax_scale, dropout_p, seed, _bounds(document_ids))
    if backend in ("flash", "decode") and not torch.compiler.is_compiling():
        _need_triton(backend, q.device)
    if backend == "flash":
        if cache_seqlens is not None:
            raise ValueError("backend = 'flash' computes whole sequences; for a cache (cache_seqlens) use 'decode'")
        from kernels.triton.flash_attention import flash_attention

        extra = document_ids, alibi_slopes, sinks, dropout_p, seed
        out, lse = flash_attention(q, k, v, mask_spec, softmax_scale, *extra)
    elif backend == "decode":
        if cache_seqlens is None:
            raise ValueError("backend = 'decode' needs a cache: pass cache_seqlens")
        from kernels.triton.flash_decoding import decode_attention

        out, lse = decode_attention(q, k, v, mask_spec, softmax_scale, cache_seqlens, block_table, alibi_slopes, sinks)
    else:
        if block_table is not None:
            pages = block_table.clamp(0, k.shape[0] - 1)  # entries beyond the length of a sequence may be anything
            # (P, page, K, D)[(B, N)] -> (B, N, page, K, D) -> (B, N * page, K, D): one cache per sequence
            k, v = k[pages].flatten(1, 2), v[pages].flatten(1, 2)
        if backend == "sdpa":
            if return_lse:
                raise ValueError("backend = 'sdpa' cannot return the log-sum-exp")
            if mask_spec.softcap is not None or sinks is not None:
                raise ValueError("backend = 'sdpa' supports neither softcap nor sinks")
            return _sdpa(q, k, v, mask_spec, softmax_scale, cache_seqlens, ids, alibi_slopes)
        extra = ids, alibi_slopes, sinks, dropout_p, seed
        out, lse, _ = reference_attention(q, k, v, mask_spec, softmax_scale, cache_seqlens, *extra)
    return (out, lse) if return_lse else out


def _bounds(document_ids: Tensor | DocumentBounds | None) -> DocumentBounds | None:
    return document_bounds(document_ids) if isinstance(document_ids, Tensor) else document_ids


def _need_triton(backend: str, device: torch.device) -> None:
    """Raise ValueError where Triton's kernels cannot run."""
    try:
        import triton
    except ImportError:
        raise ValueError(f"backend = {backend!r} needs triton, which is not installed") from None
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(f"backend = {backend!r} needs a GPU, or TRITON_INTERPRET=1; the tensors are on {device}")


def preferred(device: torch.device) -> tuple[str, str]:
    """The backend for training on a device, and the reason, which a run logs.

    "flash" is subject to `faster_backend` where SDPA has a fast path.
    """
    if device.type == "cpu":
        # torch.compile cannot trace a function that calls C++.
        if torch.compiler.is_compiling() or not cpu.trains(torch.float32):
            return "blocks", "on a CPU batched matmuls train faster than torch's sdpa"
        return "cpp", "on a CPU heed's kernel in C++ trains faster than batched matmuls"
    if device.type != "cuda":
        return "sdpa", f"heed has no kernels for a device of type {device.type}"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "sdpa", "triton is not installed"
    if torch.version.hip is not None:
        return "flash", "an AMD GPU"
    major, minor = gpu_capability(device)
    name = f"an NVIDIA GPU of compute capability {major}.{minor}"
    if major < 8:
        return "sdpa", f"{name}; heed's kernels need 8.0"
    return "flash", f"{name}; sdpa where kernels/gpu_choices.py names it"


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_spec: MaskSpec,
    softmax_scale: float,
    cache_seqlens: Tensor | None,
    document_ids: Tensor | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """torch's scaled_dot_product_attention. It has fast paths without a mask and with the square causal one. With a
    window, each block of queries is computed with the keys that it can see: no mask is (T, S)."""
    T, S, gqa = q.shape[1], k.shape[1], q.shape[2] != k.shape[2]
    plain = cache_seqlens is None and document_ids is None and alibi_slopes is None
    if plain and mask_spec.window is not None and T <= S:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # as below
        parts = []
        for first, R, low, high in spans(T, S, mask_spec, rows=max(BLOCK, mask_spec.window, -(-T // 32))):
            seen = block_mask(mask_spec, S - T + first, R, low, high, q.device)  # (R, keys)
            block, keys, values = q[:, :, first : first + R], k[:, :, low:high], v[:, :, low:high]  # (B, H or K, ., D)
            parts.append(F.scaled_dot_product_attention(block, keys, values, seen, scale=softmax_scale, enable_gqa=gqa))
        return torch.cat(parts, 2).transpose(1, 2)  # (B, H, T, D) -> (B, T, H, D)
    plain = plain and mask_spec.window is None
    square_causal = plain and mask_spec.causal and T == S
    unmasked = plain and (not mask_spec.causal or T == 1)
    # (B or 1, T, S) -> (B or 1, 1, T, S): one mask for all heads
    mask = None
    if not (square_causal or unmasked):
        mask = attention_mask(mask_spec, T, S, q.device, cache_seqlens, document_ids)[:, None]
    if alibi_slopes is not None and mask is not None:
        distance, _ = relative_positions(T, S, q.device, cache_seqlens)  # (B or 1, T, S)
        bias = -alibi_slopes[:, None, None] * distance.abs()[:, None]  # (B or 1, H, T, S)
        mask = bias.masked_fill(~mask, float("-inf")).to(q.dtype)
    # (B, T, H, D) -> (B, H, T, D): the layout of SDPA, a view
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=square_causal, scale=softmax_scale, enable_gqa=gqa)
    return out.transpose(1, 2)  # (B, H, T, D) -> (B, T, H, D)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor | None,
    block_table: Tensor | None,
    document_ids: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> None:
    """Raise ValueError for mismatched shapes; nothing here synchronizes with the device."""
    fits = q.ndim == 4 == k.ndim and k.shape == v.shape and q.shape[3] == k.shape[3]
    if not fits or (block_table is None and q.shape[0] != k.shape[0]):
        got = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"attention needs q (B, T, H, D) and k, v (B, S, K, D); got {got}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not divisible by {k.shape[2]} key/value heads")
    if cache_seqlens is not None and cache_seqlens.shape != q.shape[:1]:
        raise ValueError(
            f"cache_seqlens has shape {tuple(cache_seqlens.shape)}; must be one number per sequence, ({q.shape[0]},)"
        )
    if block_table is not None and (
        cache_seqlens is None or block_table.ndim != 2 or block_table.shape[0] != q.shape[0]
    ):
        raise ValueError(
            f"block_table has shape {tuple(block_table.shape)}; must be ({q.shape[0]}, pages per sequence), "
            "with cache_seqlens"
        )
    if document_ids is not None and (document_ids.shape != k.shape[:2] or q.shape[1] > k.shape[1]):
        raise ValueError(
            f"document_ids has shape {tuple(document_ids.shape)}; must be {tuple(k.shape[:2])}, one number per key, "
            f"of which the {q.shape[1]} queries are the last"
        )
    if cache_seqlens is not None and document_ids is not None:
        raise ValueError("cache_seqlens (a cache) and document_ids (a packed batch) exclude each other")
    for name, x in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if x is not None and x.shape != q.shape[2:3]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; must be one number per query head, ({q.shape[2]},)")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p = {dropout_p}: must be at least 0 and below 1")
    if dropout_p > 0 and cache_seqlens is not None:
        raise ValueError(f"dropout_p = {dropout_p} is for training, without a cache (cache_seqlens)")
    if dropout_seed is not None and (dropout_seed.shape != (2,) or dropout_seed.dtype != torch.int32):
        got = f"{tuple(dropout_seed.shape)} and dtype {dropout_seed.dtype}"
        raise ValueError(f"dropout_seed has shape {got}; must be two words, (2,) int32")
