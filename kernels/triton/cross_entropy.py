"""Triton kernel for the step between the matmuls of kernels/cross_entropy.py: losses, and logits to their gradient.

Grid (rows,). A program handles one row of the chunk of logits: it reads the row twice and overwrites it.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.reference_attention import IGNORE_INDEX
from kernels.triton.flash_attention import accurate_tanh
from kernels.triton.tiles import tile


def cross_entropy_step(
    logits: Tensor, targets: Tensor, losses: Tensor, z_loss: float, softcap: float | None, gradient: bool
) -> None:
    """See `_step_in_torch` of kernels/cross_entropy.py."""
    rows, V = logits.shape
    t = tile("cross_entropy", V, logits.device)
    _row[(rows,)](
        logits, targets.contiguous(), losses, V, logits.stride(0), z_loss, 1.0 if softcap is None else softcap,
        SOFTCAP=softcap is not None, GRADIENT=gradient, IGNORE_INDEX=IGNORE_INDEX, BLOCK_N=t.N, num_warps=t.warps,
        num_stages=t.stages,
    )  # fmt: skip


@triton.jit
def _row(  # type: ignore[no-untyped-def]
    logits, targets, losses, V, stride, z_loss, softcap,
    SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, IGNORE_INDEX: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row. The first pass over blocks of the vocabulary computes the statistics, the second the gradient."""
    row = tl.program_id(0).to(tl.int64)  # row * stride may exceed 2**31
    logits += row * stride  # (V,); padding up to the stride is read and written but has no effect
    target = tl.load(targets + row)
    in_vocabulary = (target >= 0) & (target < V)
    at_target = tl.load(logits + target, mask=in_vocabulary, other=float("nan")).to(tl.float32)
    if SOFTCAP:
        at_target = softcap * accurate_tanh(at_target / softcap)

    # Online softmax (Milakov and Gimelshein 2018): `total` is relative to the largest score so far.
    top = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        score = tl.load(logits + column, mask=column < stride).to(tl.float32)
        if SOFTCAP:
            score = softcap * accurate_tanh(score / softcap)
        score = tl.where(column < V, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(score - higher), 0)
        top = higher
    lse = top + tl.log(total)
    counts = target != IGNORE_INDEX
    loss = tl.log(total) + (top - at_target) + z_loss * lse * lse  # difference first: small next to large scores
    tl.store(losses + row, tl.where(counts, loss, 0.0))

    if GRADIENT:
        factor = (1 + 2 * z_loss * lse) / total
        for start in range(0, V, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
            score = tl.load(logits + column, mask=column < stride).to(tl.float32)
            if SOFTCAP:
                score = softcap * accurate_tanh(score / softcap)
            g = factor * tl.exp(score - top) - tl.where(column == target, 1.0, 0.0)
            if SOFTCAP:
                g *= 1 - (score / softcap) * (score / softcap)  # dscore/dlogit
            g = tl.where(counts & (column < V), g, 0.0)  # zero the padding, which a matmul may read
            tl.store(logits + column, g.to(logits.dtype.element_ty), mask=column < stride)
