"""Flash-decoding in Triton: attention of a few queries over a long KV cache.

Decoding a token is B * K small matmuls over S keys each, far fewer than a GPU has processors. Therefore the keys of a
sequence are split among several programs, and a second kernel combines their results (Flash-Decoding: Dao, Haziza,
Massa and Sizov 2023). Split i of the keys has output o_i and log-sum-exp l_i. The output over all keys is the mean of
the o_i weighted by exp(l_i), since o_i was divided by exp(l_i).

The split kernel. Grid (B * K * row blocks, splits). The queries that share one key/value head are the rows of one
matrix, row t * G + g for query t of the group's query head g, so keys are loaded once per group. A program computes
BLOCK_M rows over one split of the positions that any of them attends to, BLOCK_N at a time with an online softmax
(Milakov and Gimelshein 2018), and writes o_i and l_i. The bounds of a split depend on the length of the sequence, which
only the GPU reads; the number of splits depends on shapes alone.

The combine kernel. Grid (B * T * H,). A program computes one row. With a single split there is nothing to combine, and
the split kernel writes the results.

Programs iterate over positions, not slots: position p is in slot p % S, including when the cache is a full ring buffer.
With a block table (PagedAttention: Kwon et al. 2023, section 4.3), slot s is in page block_table[b, s // page]. A cache
without pages is treated as a pool whose pages have S slots, and sequence b has page b.

Shapes: B batch, T queries, S slots, H query heads, K key/value heads, G = H / K, D head size.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference_attention import MaskSpec
from kernels.triton.flash_attention import accurate_tanh
from kernels.triton.tiles import tile

RESIDENT = 2  # programs per processor at a time: one computes while the other waits for memory
MOST_SPLITS = 256
INTERPRETED = 8  # number of processors assumed without a GPU: enough to split small inputs


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, mask_spec: MaskSpec, softmax_scale: float, cache_seqlens: Tensor,
    block_table: Tensor | None = None, alibi_slopes: Tensor | None = None, sinks: Tensor | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over a cache, forward only. All arguments but the last are those of `kernels.attention`.

    Args:
        q: (B, T, H, D). k, v: (B, S, K, D), or with block_table (B, N) a pool (P, page, K, D), S = N * page.
        cache_seqlens, alibi_slopes, sinks: (B,), (H,), (H,). The host does not read cache_seqlens, so it never
            synchronizes with the GPU.
        splits: number of splits of the keys; None chooses, see `choose_splits`.
    Returns:
        out (B, T, H, D) in q's dtype and the log-sum-exp (B, T, H) in fp32, sink included. A row without a key
        has out 0 and log-sum-exp -inf, or the sink.
    Raises:
        ValueError: dtypes differ or are not fp32, fp16 or bf16; an input requires a gradient; D is above 256.
    """
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"decode needs one dtype, fp32, fp16 or bf16; q is {q.dtype}, k {k.dtype}, v {v.dtype}")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, alibi_slopes, sinks)):
        raise ValueError("decode has no gradients: call it under torch.no_grad() or use another backend")
    return _op(
        q,
        k,
        v,
        mask_spec.causal,
        mask_spec.window,
        mask_spec.softcap,
        softmax_scale,
        cache_seqlens,
        block_table,
        alibi_slopes,
        sinks,
        splits,
    )


@functools.cache
def choose_splits(programs: int, blocks: int, processors: int) -> int:
    """The number of splits of the keys with the shortest estimated time; of equal ones, the smallest.

    Without splits there are `programs` programs of `blocks` blocks of keys each. RESIDENT programs run at a time on
    each of the GPU's processors: a wave. A wave takes as long as one program: its share of the blocks, plus about one
    block for startup and output. One sequence of 8,192 tokens with 8 key/value heads, in blocks of 64, becomes 8 * 32
    programs on an H100, one wave on its 132 processors.
    """

    def time(splits: int) -> int:
        waves = math.ceil(programs * splits / (RESIDENT * processors))
        return waves * (math.ceil(blocks / splits) + 1)

    return min(range(1, min(max(blocks, 1), MOST_SPLITS) + 1), key=time)


def launch(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, softcap: float | None, softmax_scale: float,
    cache_seqlens: Tensor, block_table: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    splits: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the kernels. Arguments and results are those of `decode_attention`."""
    B, T, H, D = q.shape
    page, K = k.shape[1:3]
    G, S = H // K, page if block_table is None else page * block_table.shape[1]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    t, block_d = tile("decode", D, q.device), max(triton.next_power_of_2(D), 16)
    # Tensor cores need at least 16 rows. fp32 does not use them and keeps its rows in registers.
    block_m = 16 if q.dtype == torch.float32 else min(max(triton.next_power_of_2(T * G), 16), t.M)
    programs = B * K * triton.cdiv(T * G, block_m)
    if splits is None:
        seen = S if window is None else min(S, (window if causal else 2 * window) + T)  # upper bound for any row
        gpu = torch.cuda.get_device_properties(q.device) if q.is_cuda else None
        splits = choose_splits(programs, triton.cdiv(seen, t.N), gpu.multi_processor_count if gpu else INTERPRETED)
    new = functools.partial(torch.empty, device=q.device)
    out, lse = new(q.shape, dtype=q.dtype), new(q.shape[:3], dtype=torch.float32)
    parts, lses = out, lse
    if splits > 1:
        parts, lses = (new(splits, *x.shape, dtype=torch.float32) for x in (out, lse))
    optional = (None if x is None else x.contiguous() for x in (block_table, alibi_slopes, sinks))
    _split[(programs, splits)](
        q, k, v, cache_seqlens.contiguous(), *optional, parts, lses, softmax_scale, B, T, S, K,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        G=G, D=D, PAGE=None if block_table is None else page, CAUSAL=causal, WINDOW=window, SOFTCAP=softcap,
        BLOCK_M=block_m, BLOCK_N=t.N, BLOCK_D=block_d, num_warps=t.warps,
        # The page number is loaded before the page: twice as many stages give the same number of loads in flight.
        num_stages=t.stages if block_table is None else 2 * t.stages - 1,
    )  # fmt: skip
    if splits > 1:
        t = tile("decode_combine", D, q.device)
        _combine[(B * T * H,)](
            parts, lses, out, lse, splits, D=D, BLOCK_SPLITS=triton.next_power_of_2(splits), BLOCK_N=t.N,
            BLOCK_D=block_d, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return out, lse


@triton.jit
def _split(  # type: ignore[no-untyped-def]
    q, k, v, lengths, pages, slopes, sinks, parts, lses, scale, B, T, S, K,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one sequence and key/value head over one split of the positions; q_b ... v_h are strides."""
    row_blocks, split = tl.cdiv(T * G, BLOCK_M), tl.program_id(1)
    block, pair = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    b, kv = (pair // K).to(tl.int64), (pair % K).to(tl.int64)  # 64 bits: a cache may have over 2**31 elements
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,) in the matrix of T * G rows
    t, h = row // G, kv * G + row % G
    exists = row < T * G
    column = tl.arange(0, BLOCK_D)  # (BLOCK_D,)

    # The positions [low, high) to which rows of the block may attend; positions below length - S are overwritten.
    length = tl.load(lengths + b).to(tl.int32)
    query = length - T + t  # (BLOCK_M,) positions of the rows
    first = length - T + block * BLOCK_M // G
    last = length - T + tl.minimum((block * BLOCK_M + BLOCK_M - 1) // G, T - 1)
    low, high = tl.maximum(length - S, 0), length
    if WINDOW is not None:
        low = tl.maximum(low, first - WINDOW + 1)
    if CAUSAL:
        high = tl.minimum(high, last + 1)
    elif WINDOW is not None:
        high = tl.minimum(high, last + WINDOW)
    # This program's split of them in whole blocks: [start, stop), empty if there are fewer blocks than splits.
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), BLOCK_N), tl.num_programs(1)) * BLOCK_N
    start, stop = low + split * share, tl.minimum(low + (split + 1) * share, high)

    real = exists[:, None] & (column < D)[None, :]  # (BLOCK_M, BLOCK_D)
    at = b * q_b + t.to(tl.int64)[:, None] * q_t + h[:, None] * q_h + column[None, :]
    queries = tl.load(q + at, mask=real, other=0.0)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = total - float("inf")
    if sinks is not None:  # an additional score without a value, in the first split
        sink = tl.load(sinks + h, mask=exists, other=0.0).to(tl.float32)
        top, total = tl.where(split == 0, sink, top), tl.where(split == 0, 1.0, total)
    if slopes is not None:
        slope = tl.load(slopes + h, mask=exists, other=0.0).to(tl.float32)
    sum_of_values = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    lap = low // S * S  # [low, high) is at most S long: its slots wrap around once at most

    for here in range(start, stop, BLOCK_N):
        position = here + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        inside = position < stop
        slot = position - lap
        slot = tl.where(slot < S, slot, slot - S)  # position % S
        if pages is None:
            page = b
        else:
            page = tl.load(pages + b * (S // PAGE) + slot // PAGE, mask=inside, other=0).to(tl.int64)
            slot = slot % PAGE
        slot = slot.to(tl.int64)
        # Values are masked as well as scores: an unused slot may hold NaN, and 0 * NaN is NaN.
        read = inside[:, None] & (column < D)[None, :]
        keys = tl.load(k + (page * k_b + slot * k_s + kv * k_h)[:, None] + column[None, :], mask=read, other=0.0)
        values = tl.load(v + (page * v_b + slot * v_s + kv * v_h)[:, None] + column[None, :], mask=read, other=0.0)

        # (BLOCK_M, BLOCK_D) (BLOCK_D, BLOCK_N) -> (BLOCK_M, BLOCK_N); "ieee": fp32 is not rounded to TF32
        score = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        distance = query[:, None] - position[None, :]
        if SOFTCAP is not None:
            score = SOFTCAP * accurate_tanh(score / SOFTCAP)
        if slopes is not None:
            score -= slope[:, None] * tl.abs(distance)
        visible = inside[None, :]
        if CAUSAL:
            visible = visible & (distance >= 0)
        if WINDOW is not None:
            visible = visible & (tl.abs(distance) < WINDOW)
        score = tl.where(visible, score, float("-inf"))

        # Online softmax: total and sum_of_values are relative to the largest score so far.
        higher = tl.maximum(top, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no key so far: exp(-inf - 0) = 0, not NaN
        weight = tl.exp(score - base[:, None])
        rescale = tl.exp(top - base)
        total = total * rescale + tl.sum(weight, 1)
        # (BLOCK_M, BLOCK_N) (BLOCK_N, BLOCK_D) -> (BLOCK_M, BLOCK_D)
        sum_of_values *= rescale[:, None]
        sum_of_values = tl.dot(weight.to(values.dtype), values, sum_of_values, input_precision="ieee")
        top = higher

    o = sum_of_values / tl.where(total == 0, 1.0, total)[:, None]  # no key: 0
    at = ((split * B + b) * T + t) * (K * G) + h  # (BLOCK_M,) in (splits, B, T, H)
    tl.store(lses + at, top + tl.log(total), mask=exists)  # no key: -inf
    tl.store(parts + at[:, None] * D + column[None, :], o.to(parts.dtype.element_ty), mask=real)


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    parts, lses, out, lse, splits,
    D: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row: the mean of parts (splits, rows, D) with weights exp(lses) (splits, rows)."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    each, column = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_D)
    lses += row
    found = tl.load(lses + each * rows, mask=each < splits, other=float("-inf"))  # (BLOCK_SPLITS,)
    top = tl.max(found, 0)
    base = tl.where(top == float("-inf"), 0.0, top)  # no key in any split
    total = tl.sum(tl.exp(found - base), 0)
    tl.store(lse + row, top + tl.log(total))
    mean = tl.zeros((BLOCK_D,), tl.float32)
    for here in range(0, splits, BLOCK_N):
        split = here + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        weight = tl.exp(tl.load(lses + split * rows, mask=split < splits, other=float("-inf")) - base)
        at = (split * rows + row)[:, None] * D + column[None, :]  # (BLOCK_N, BLOCK_D) in (splits, rows, D)
        part = tl.load(parts + at, mask=(split < splits)[:, None] & (column < D)[None, :], other=0.0)
        mean += tl.sum(weight[:, None] * part, 0)
    mean /= tl.where(total == 0, 1.0, total)
    tl.store(out + row * D + column, mean.to(out.dtype.element_ty), mask=column < D)


_op = torch.library.custom_op("heed::decode", launch, mutates_args=())


@_op.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
