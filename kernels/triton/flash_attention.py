"""Flash attention in Triton, forward and backward: exact attention without storing the (T, S) matrix.

A program holds a block of queries and iterates over blocks of keys, with an online softmax (Milakov and Gimelshein
2018) that rescales its sums when a larger score occurs. Only the output and each row's log-sum-exp are written. The
backward pass recomputes the weights from them (FlashAttention-2: Dao 2023, arXiv 2307.08691, sections 3.1 and 3.2).

There are three kernels, each with its own tile of M queries x N keys (kernels/triton/tiles.py):

    _forward  grid (blocks of queries, H, B)  writes M rows of out and lse, iterates over keys
    _dq       grid (blocks of queries, H, B)  writes M rows of dq and delta, iterates over keys
    _dkdv     grid (blocks of keys, K, B)     writes N rows of dk and dv, iterates over the group's G heads and queries

No element is written by two programs, so no atomics are needed and gradients are bitwise deterministic. With scores s,
weights p = exp(s - lse), output o, and incoming gradients do and dlse:

    dv = p^T do    dp = do v^T    delta = rowsum(do * o) - dlse    ds = p * (dp - delta)    dq = ds k    dk = ds^T q

With dropout of the weights, r = 1 / (1 - probability) for those that are kept and 0 for others: o = (r * p) v,
dv = (r * p)^T do and dp = r * (do v^T). The rest is the same. Each kernel computes the mask (kernels/dropout.py).

Blocks that are fully masked are skipped. Scores are in base 2, since the hardware has an exp2 instruction: the scale
includes log2(e).

Shapes: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D head size (padded to BLOCK_D, a power
of two). Query t is at position t + S - T, key s at s. lse and delta are (B, T, H), fp32. q_b ... v_h are strides.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dropout import dropped_numbers
from kernels.reference_attention import DocumentBounds, MaskSpec, document_bounds
from kernels.triton.dropout import keep, row_hashes
from kernels.triton.tiles import FLASH_FP32, INTERPRETED, tile

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, mask_spec: MaskSpec, softmax_scale: float,
    document_ids: Tensor | DocumentBounds | None = None, alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None, dropout_p: float = 0.0, dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over whole sequences, differentiable. The arguments are those of `kernels.attention`.

    Args:
        q: (B, T, H, D); k, v: (B, S, K, D), all fp32, fp16 or bf16; with document_ids (B, S), T is at most S.
        document_ids: one number per document, from lengths: torch.repeat_interleave(lengths); or their
            `document_bounds`, computed once for all layers.
        alibi_slopes, sinks: (H,), converted to fp32.
        dropout_seed: (2,) int32; None is no dropout.
    Returns:
        out (B, T, H, D) in q's dtype and the log-sum-exp (B, T, H) in fp32, base e, sink included; both are
        differentiable. A row without a key has out 0 and log-sum-exp -inf, or the sink.
    Raises:
        ValueError: dtypes differ or are not supported; D is above 256.
    """
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"flash needs one dtype, fp32, fp16 or bf16; q is {q.dtype}, k {k.dtype}, v {v.dtype}")
    if q.shape[-1] > 256:
        raise ValueError(f"flash supports head sizes up to 256, not {q.shape[-1]}")
    first, last = None, None
    if document_ids is not None:
        first, last = document_ids if isinstance(document_ids, DocumentBounds) else document_bounds(document_ids)
    alibi_slopes, sinks = (None if x is None else x.float().contiguous() for x in (alibi_slopes, sinks))
    return _forward_op(
        q, k, v, mask_spec.causal, mask_spec.window, mask_spec.softcap, softmax_scale, dropout_p, first, last,
        alibi_slopes, sinks, dropout_seed,
    )  # fmt: skip


# 1. Shared device functions -----------------------------------------------------------------------------------------


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    product, query, key, first, last, slope, scale, S,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr = True,
):  # fmt: skip
    """q k^T -> the scores in base 2, -inf where masked; and tanh, which the softcap's derivative needs.

    query, first, last and slope have the shape of the query dimension, (M, 1) or (1, M), key that of the key dimension.
    """
    distance = query - key
    tanh = product
    if SOFTCAP is None:
        score = product * (scale * LOG2E)
    else:
        tanh = accurate_tanh(product * (scale / SOFTCAP))
        score = tanh * (SOFTCAP * LOG2E)
    if slope is not None:
        score -= slope * LOG2E * tl.abs(distance)
    if not MASKED:
        return score, tanh
    visible = key < S
    if CAUSAL:
        visible = visible & (distance >= 0)
    if WINDOW is not None:
        visible = visible & (tl.abs(distance) < WINDOW)
    if first is not None:
        visible = visible & (key >= first) & (key < last)
    return tl.where(visible, score, float("-inf")), tanh


@triton.jit
def accurate_tanh(x):  # type: ignore[no-untyped-def]
    """tanh by exp for large |x|. Near 0, where that loses precision, five terms of Lambert's continued fraction."""
    square = x * x
    near = x * (945 + square * (105 + square)) / (945 + square * (420 + square * 15))
    return tl.where(tl.abs(x) < 0.6, near, 2 * tl.sigmoid(2 * x) - 1)


@triton.jit
def _key_range(  # type: ignore[no-untyped-def]
    start, b, first, last, T, S, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """The keys [low, high) to which queries start ... start + M - 1 may attend; low is a multiple of N."""
    least = start + S - T  # positions of the block's first and last query
    most = tl.minimum(start + M, T) - 1 + S - T
    low, high = 0, S
    if CAUSAL:
        high = tl.minimum(high, most + 1)
    elif WINDOW is not None:
        high = tl.minimum(high, most + WINDOW)
    if WINDOW is not None:
        low = tl.maximum(low, least - WINDOW + 1)
    if first is not None:
        low = tl.maximum(low, tl.load(first + b * S + least))
        high = tl.minimum(high, tl.load(last + b * S + most))
    return low // N * N, high


@triton.jit
def _query_range(  # type: ignore[no-untyped-def]
    start, b, first, last, T, S, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """The queries [low, high) that may attend to keys start ... start + N - 1; low is a multiple of M."""
    end = tl.minimum(start + N, S) - 1  # the block's last key
    low, high = S - T, S  # positions of all queries
    if CAUSAL:
        low = start
    elif WINDOW is not None:
        low = tl.maximum(low, start - WINDOW + 1)
    if WINDOW is not None:
        high = tl.minimum(high, end + WINDOW)
    if first is not None:
        low = tl.maximum(low, tl.load(first + b * S + start))
        high = tl.minimum(high, tl.load(last + b * S + end))
    return tl.maximum(low - (S - T), 0) // M * M, high - (S - T)


@triton.jit
def _rows(x, at, stride, limit, start, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pointers to rows start ... start + BLOCK - 1 of x, (BLOCK, BLOCK_D), and the mask of those in range.

    `at` is the offset of the head's row 0. The offset of the block is 64 bits: a long sequence has over 2**31 elements.
    """
    row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    pointers = x + (at + tl.cast(start, tl.int64) * stride) + row[:, None] * stride + column[None, :]
    return pointers, (start + row < limit)[:, None] & (column < D)[None, :]


@triton.jit
def _load(x, at, stride, limit, start, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """The rows, (BLOCK, BLOCK_D), zero-padded."""
    pointers, real = _rows(x, at, stride, limit, start, BLOCK, D, BLOCK_D)
    return tl.load(pointers, mask=real, other=0.0)


@triton.jit
def _store(rows, x, at, stride, limit, start, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    pointers, real = _rows(x, at, stride, limit, start, BLOCK, D, BLOCK_D)
    tl.store(pointers, rows.to(x.dtype.element_ty), mask=real)


# 2. Forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    q, k, v, first, last, slopes, sinks, seed, out, lse, scale, T, S, H,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    G: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPPED: tl.constexpr, RESCALE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of M queries of one head."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * M  # late queries have the most keys: start with them
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)  # 64 bits: offsets may exceed 2**31
    t = start + tl.arange(0, M)  # (M,)
    query = (t + S - T)[:, None]  # (M, 1) positions
    of_row = (b * T + t) * H + h  # (M,) in (B, T, H)

    queries = _load(q, b * q_b + h * q_h, q_t, T, start, M, D, BLOCK_D)  # (M, BLOCK_D)
    slope = None if slopes is None else tl.load(slopes + h)
    row = None if seed is None else row_hashes(seed, b * H + h, query)
    begin, end = None, None
    if first is not None:
        begin = tl.load(first + b * S + query, mask=query < S, other=0)  # (M, 1)
        end = tl.load(last + b * S + query, mask=query < S, other=0)
    total = tl.zeros((M,), tl.float32)
    top = total - float("inf")
    if sinks is not None:  # an additional first score without a value
        top, total = total + tl.load(sinks + h) * LOG2E, total + 1.0
    sums = tl.zeros((M, BLOCK_D), tl.float32)

    low, high = _key_range(start, b, first, last, T, S, CAUSAL, WINDOW, M, N)
    # If only the diagonal and the end mask keys, earlier blocks need no mask. The backward pass has one loop for all
    # blocks: two loops need more registers than it has.
    clear = low
    if WINDOW is None and first is None:
        clear = tl.maximum(tl.minimum(high, start + S - T + 1) if CAUSAL else high, 0) // N * N
    for MASKED in tl.static_range(2):
        for here in range(clear if MASKED else low, high if MASKED else clear, N):
            keys = _load(k, b * k_b + h // G * k_h, k_s, S, here, N, D, BLOCK_D)  # (N, BLOCK_D)
            product = tl.dot(queries, tl.trans(keys), input_precision="ieee")  # (M, BLOCK_D) (BLOCK_D, N) -> (M, N)
            key = (here + tl.arange(0, N))[None, :]
            score, _ = _scores(product, query, key, begin, end, slope, scale, S, CAUSAL, WINDOW, SOFTCAP, MASKED)

            # total and sums are relative to the largest score so far
            higher = tl.maximum(top, tl.max(score, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # no key so far: exp2(-inf - 0) = 0, not NaN
            weight = tl.exp2(score - base[:, None])
            rescale = tl.exp2(top - base)
            total = total * rescale + tl.sum(weight, 1)
            if seed is not None:
                weight = tl.where(keep(row, key, DROPPED), weight, 0.0)
            values = _load(v, b * v_b + h // G * v_h, v_s, S, here, N, D, BLOCK_D)  # (N, BLOCK_D)
            sums = tl.dot(weight.to(values.dtype), values, sums * rescale[:, None], input_precision="ieee")
            top = higher

    if seed is not None:
        sums *= RESCALE
    _store(sums / tl.where(total == 0, 1.0, total)[:, None], out, (b * T * H + h) * D, H * D, T, start, M, D, BLOCK_D)
    tl.store(lse + of_row, (top + tl.log2(total)) * LN2, mask=t < T)  # no key: -inf


# 3. Backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _dq(  # type: ignore[no-untyped-def]
    q, k, v, first, last, slopes, seed, out, lse, dout, dlse, dq, delta, dslopes, scale, T, S, H,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    G: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPPED: tl.constexpr, RESCALE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient and delta of M queries of one head, and their contributions to the gradient of the head's slope."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)  # 64 bits: offsets may exceed 2**31
    t = start + tl.arange(0, M)  # (M,)
    query = (t + S - T)[:, None]  # (M, 1) positions
    of_row = (b * T + t) * H + h  # (M,) in (B, T, H)

    queries = _load(q, b * q_b + h * q_h, q_t, T, start, M, D, BLOCK_D)  # (M, BLOCK_D)
    douts = _load(dout, (b * T * H + h) * D, H * D, T, start, M, D, BLOCK_D)  # (M, BLOCK_D)
    outs = _load(out, (b * T * H + h) * D, H * D, T, start, M, D, BLOCK_D)  # (M, BLOCK_D)
    d = tl.sum(outs.to(tl.float32) * douts.to(tl.float32), 1) - tl.load(dlse + of_row, mask=t < T, other=0.0)
    base = _base(lse, of_row, t < T)
    d = tl.where(base == float("inf"), 0.0, d)  # no key, no gradient: dlse may be NaN there
    tl.store(delta + of_row, d, mask=t < T)

    slope = None if slopes is None else tl.load(slopes + h)
    row = None if seed is None else row_hashes(seed, b * H + h, query)
    begin, end = None, None
    if first is not None:
        begin = tl.load(first + b * S + query, mask=query < S, other=0)  # (M, 1)
        end = tl.load(last + b * S + query, mask=query < S, other=0)
    sums = tl.zeros((M, BLOCK_D), tl.float32)
    distance_sums = tl.zeros((M,), tl.float32)

    low, high = _key_range(start, b, first, last, T, S, CAUSAL, WINDOW, M, N)
    for here in range(low, high, N):
        keys = _load(k, b * k_b + h // G * k_h, k_s, S, here, N, D, BLOCK_D)  # (N, BLOCK_D)
        values = _load(v, b * v_b + h // G * v_h, v_s, S, here, N, D, BLOCK_D)  # (N, BLOCK_D)
        product = tl.dot(queries, tl.trans(keys), input_precision="ieee")  # (M, BLOCK_D) (BLOCK_D, N) -> (M, N)
        key = (here + tl.arange(0, N))[None, :]
        score, tanh = _scores(product, query, key, begin, end, slope, scale, S, CAUSAL, WINDOW, SOFTCAP)
        dweight = tl.dot(douts, tl.trans(values), input_precision="ieee")  # (M, BLOCK_D) (BLOCK_D, N) -> (M, N)
        if seed is not None:
            dweight = tl.where(keep(row, key, DROPPED), dweight * RESCALE, 0.0)
        dscore = tl.exp2(score - base[:, None]) * (dweight - d[:, None])
        if slopes is not None:
            distance_sums += tl.sum(dscore * tl.abs(query - key), 1)
        if SOFTCAP is not None:
            dscore *= 1 - tanh * tanh
        sums = tl.dot(dscore.to(keys.dtype), keys, sums, input_precision="ieee")  # (M, N) (N, BLOCK_D)

    _store(sums * scale, dq, (b * T * H + h) * D, H * D, T, start, M, D, BLOCK_D)
    if slopes is not None:
        tl.store(dslopes + of_row, -distance_sums, mask=t < T)


@triton.jit
def _dkdv(  # type: ignore[no-untyped-def]
    q, k, v, first, last, slopes, seed, lse, delta, dout, dk, dv, scale, T, S, H,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    G: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPPED: tl.constexpr, RESCALE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of N keys and values of one head. The matrices of weights are transposed: (N, M)."""
    start, K = tl.program_id(0) * N, H // G
    kv, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    key = (start + tl.arange(0, N))[:, None]  # (N, 1)
    keys = _load(k, b * k_b + kv * k_h, k_s, S, start, N, D, BLOCK_D)  # (N, BLOCK_D)
    values = _load(v, b * v_b + kv * v_h, v_s, S, start, N, D, BLOCK_D)  # (N, BLOCK_D)
    dkeys = tl.zeros((N, BLOCK_D), tl.float32)
    dvalues = tl.zeros((N, BLOCK_D), tl.float32)

    # One loop over all blocks of queries of all heads of the group: loads for the next head begin before the last ends.
    low, high = _query_range(start, b, first, last, T, S, CAUSAL, WINDOW, M, N)
    blocks = tl.maximum(tl.cdiv(high - low, M), 0)
    for i in range(0, G * blocks):
        h, here = kv * G + i // blocks, low + i % blocks * M
        t = here + tl.arange(0, M)  # (M,)
        slope = None if slopes is None else tl.load(slopes + h)
        query = (t + S - T)[None, :]  # (1, M) positions
        of_row = (b * T + t) * H + h  # (M,) in (B, T, H)
        begin, end = None, None
        if first is not None:
            begin = tl.load(first + b * S + query, mask=query < S, other=0)  # (1, M)
            end = tl.load(last + b * S + query, mask=query < S, other=0)
        queries = _load(q, b * q_b + h * q_h, q_t, T, here, M, D, BLOCK_D)  # (M, BLOCK_D)
        product = tl.dot(keys, tl.trans(queries), input_precision="ieee")  # (N, BLOCK_D) (BLOCK_D, M) -> (N, M)
        score, tanh = _scores(product, query, key, begin, end, slope, scale, S, CAUSAL, WINDOW, SOFTCAP)
        weight = tl.exp2(score - _base(lse, of_row, t < T)[None, :])
        douts = _load(dout, (b * T * H + h) * D, H * D, T, here, M, D, BLOCK_D)  # (M, BLOCK_D)
        d = tl.load(delta + of_row, mask=t < T, other=0.0)  # early: loaded late it makes Triton 3.6 spill
        read = weight
        if seed is not None:
            kept = keep(row_hashes(seed, b * H + h, query), key, DROPPED)
            read = tl.where(kept, weight, 0.0)
        dvalues = tl.dot(read.to(douts.dtype), douts, dvalues, input_precision="ieee")  # (N, M) (M, BLOCK_D)
        dweight = tl.dot(values, tl.trans(douts), input_precision="ieee")  # (N, BLOCK_D) (BLOCK_D, M) -> (N, M)
        if seed is not None:
            dweight = tl.where(kept, dweight * RESCALE, 0.0)
        dscore = weight * (dweight - d[None, :])
        if SOFTCAP is not None:
            dscore *= 1 - tanh * tanh
        dkeys = tl.dot(dscore.to(queries.dtype), queries, dkeys, input_precision="ieee")  # (N, M) (M, BLOCK_D)

    if seed is not None:
        dvalues *= RESCALE
    _store(dkeys * scale, dk, (b * S * K + kv) * D, K * D, S, start, N, D, BLOCK_D)
    _store(dvalues, dv, (b * S * K + kv) * D, K * D, S, start, N, D, BLOCK_D)


@triton.jit
def _base(lse, of_row, real):  # type: ignore[no-untyped-def]
    """The base-2 log-sum-exp to subtract from scores; +inf for rows without keys or out of range: weights are 0."""
    base = tl.load(lse + of_row, mask=real, other=float("inf"))
    return tl.where(base == float("-inf"), float("inf"), base * LOG2E)


# 4. Launch, and registration as custom operators --------------------------------------------------------------------


def _arguments(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, softcap: float | None,
    dropout_p: float,
) -> tuple[list[int], dict[str, Any]]:  # fmt: skip
    """The trailing arguments of every kernel: sizes and strides, and constants including the tile."""
    D, t = q.shape[3], tile(kernel, q.shape[3], q.device)
    if q.dtype == torch.float32 and t != INTERPRETED:
        t = FLASH_FP32[min(size for size in FLASH_FP32 if size >= D)]
    numbers = [q.shape[1], k.shape[1], q.shape[2], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]]
    constants = {
        "G": q.shape[2] // k.shape[2], "D": D, "CAUSAL": causal, "WINDOW": window, "SOFTCAP": softcap,
        "DROPPED": dropped_numbers(dropout_p), "RESCALE": 1 / (1 - dropout_p), "M": t.M, "N": t.N,
        "BLOCK_D": max(triton.next_power_of_2(D), 16), "num_warps": t.warps, "num_stages": t.stages,
    }  # fmt: skip
    return numbers, constants


@torch.library.custom_op("heed::flash_forward", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, softcap: float | None, softmax_scale: float,
    dropout_p: float, first: Tensor | None, last: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    numbers, constants = _arguments("flash_forward", q, k, v, causal, window, softcap, dropout_p)
    grid = (triton.cdiv(q.shape[1], constants["M"]), q.shape[2], q.shape[0])
    _forward[grid](q, k, v, first, last, alibi_slopes, sinks, seed, out, lse, softmax_scale, *numbers, **constants)
    return out, lse


@torch.library.custom_op("heed::flash_backward", mutates_args=())
def _backward_op(
    dout: Tensor, dlse: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool,
    window: int | None, softcap: float | None, softmax_scale: float, dropout_p: float, first: Tensor | None,
    last: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, and the gradients of alibi_slopes and sinks, empty tensors if those are None."""
    B, T, H, _ = q.shape
    S, K = k.shape[1:3]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    dout, dlse = dout.contiguous(), dlse.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
    of_rows = None if alibi_slopes is None else torch.empty_like(delta)
    numbers, constants = _arguments("flash_dq", q, k, v, causal, window, softcap, dropout_p)
    _dq[(triton.cdiv(T, constants["M"]), H, B)](
        q, k, v, first, last, alibi_slopes, seed, out, lse, dout, dlse, dq, delta, of_rows, softmax_scale, *numbers,
        **constants,
    )  # fmt: skip
    numbers, constants = _arguments("flash_dkdv", q, k, v, causal, window, softcap, dropout_p)
    _dkdv[(triton.cdiv(S, constants["N"]), K, B)](
        q, k, v, first, last, alibi_slopes, seed, lse, delta, dout, dk, dv, softmax_scale, *numbers, **constants
    )
    dslopes = q.new_empty(0) if of_rows is None else of_rows.sum((0, 1))  # (B, T, H) -> (H,)
    # A sink's weight is exp(sink - lse). It has no value: dp = 0.
    dsinks = q.new_empty(0) if sinks is None else -((sinks - lse).exp() * delta).sum((0, 1))
    return dq, dk, dv, dslopes, dsinks


@_forward_op.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward_op.register_fake
def _(dout: Tensor, dlse: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    alibi_slopes, sinks, _ = rest[-3:]
    gradients = [x.new_empty(x.shape) for x in rest[:3]]
    return *gradients, *(dout.new_empty(0) if x is None else lse.new_empty(x.shape) for x in (alibi_slopes, sinks))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.plain, first, last, alibi_slopes, sinks, seed = inputs
    ctx.save_for_backward(*output, q, k, v, first, last, alibi_slopes, sinks, seed)


def _backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    out, lse, q, k, v, first, last, alibi_slopes, sinks, seed = ctx.saved_tensors
    dq, dk, dv, dslopes, dsinks = _backward_op(
        dout, dlse, out, lse, q, k, v, *ctx.plain, first, last, alibi_slopes, sinks, seed
    )
    nothing = [None] * 7  # causal, window, softcap, scale, dropout_p, first, last
    return dq, dk, dv, *nothing, None if alibi_slopes is None else dslopes, None if sinks is None else dsinks, None


_forward_op.register_autograd(_backward, setup_context=_keep)
