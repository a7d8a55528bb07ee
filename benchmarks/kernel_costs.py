"""Roofline bounds of the kernels: FLOP, exp2 and bytes (`Work`), and the least time on a GPU (`Bound`).

A kernel performs matmuls, exp2, other fp32 arithmetic and memory transfers. Each has a separate unit in a GPU, so a
kernel takes at least as long as the unit that is busy longest (`overlap`: all units run in parallel). Two other bounds
assume less overlap: matmuls and exp2 in series (`matmul_exp2_series`), and in addition the other arithmetic in series
(`series`). The benchmark computes TFLOP/s and GB/s from the same counts.

Shapes: B batch, T queries, S keys, H query heads, K key/value heads, D head size; N tokens, C width, V vocabulary.
Units: FLOP, bytes, seconds. bf16 unless stated otherwise.
"""

import math
import re
from typing import NamedTuple

FP32_PER_SCORE = 4  # approximate: scale and subtract, maximum, sum, conversion to bf16; one exp2 in addition
ROWS = 16  # minimum rows of a matrix unit: a single query costs as much


class Gpu(NamedTuple):
    """Specifications of a GPU. Rates are per processor (SM or CU) and clock."""

    name: str
    matmuls: float  # dense bf16, FLOP/s
    memory: float  # bytes/s
    processors: int
    clock: float  # Hz, for the peak matmul rate
    exp2_rate: int
    fp32_rate: int  # instructions
    pattern: str  # regular expression for torch.cuda.get_device_name

    @property
    def exp2(self) -> float:
        """exp2 per second."""
        return self.exp2_rate * self.processors * self.clock

    @property
    def fp32(self) -> float:
        """fp32 instructions per second."""
        return self.fp32_rate * self.processors * self.clock


# Peaks, bandwidths, processors: NVIDIA's data sheets (A100 80GB SXM, H100 SXM, HGX B200) and AMD's (MI300X). Clocks:
# peak / processors / FLOP per clock, which is 2,048, 4,096 and 8,192 (NVIDIA's A100 and H100 white papers; B200:
# FlashAttention-4, Zadouri et al. 2026) and 2,048 (AMD's CDNA 3 white paper). exp2 and fp32 per clock: the CUDA
# programming guide's table of arithmetic throughput, with FlashAttention-4 for B200; AMD's fp32 peak. exp2 on MI300X:
# assumed a quarter of a 64-wide unit, as on the older GCN.
GPUS = {
    "sm_80": Gpu("A100 SXM", 312e12, 2.039e12, 108, 1.41e9, 16, 64, r"A100.SXM4.80GB"),
    "sm_90": Gpu("H100 SXM", 989e12, 3.35e12, 132, 1.83e9, 16, 128, r"H100 80GB HBM3"),
    "sm_100": Gpu("B200", 2250e12, 8e12, 148, 1.86e9, 16, 128, r" B200"),
    "gfx942": Gpu("MI300X", 1307e12, 5.3e12, 304, 2.1e9, 16, 128, r"MI300X"),
}


# A card with the processor of another and faster memory: 4.8 TB/s by NVIDIA's data sheet.
CARDS = [*GPUS.values(), GPUS["sm_90"]._replace(name="H200 SXM", memory=4.8e12, pattern=r"H200")]


class Work(NamedTuple):
    """The work of one kernel: `counted` FLOP, as counted in papers, and the work actually required."""

    counted: float
    matmuls: float  # FLOP
    exp2: float
    fp32: float
    bytes: float


class Bound(NamedTuple):
    """Bounds in seconds, see above."""

    overlap: float
    matmul_exp2_series: float
    series: float


def bound(works: list[Work], gpu: Gpu) -> Bound:
    """The least time of kernels that run in sequence."""
    overlap = two = series = 0.0
    for w in works:
        matmuls, exp2, fp32 = w.matmuls / gpu.matmuls, w.exp2 / gpu.exp2, w.fp32 / gpu.fp32
        memory = w.bytes / gpu.memory
        overlap += max(matmuls, exp2 + fp32, memory)  # exp2 and fp32 instructions wait for the same issue slots
        two += max(matmuls + exp2, exp2 + fp32, memory)
        series += max(matmuls + exp2 + fp32, memory)
    return Bound(overlap, two, series)


def gpu_of(device_name: str) -> Gpu | None:
    """The GPU with this device name, None if it is not in the table."""
    return next((gpu for gpu in CARDS if re.search(gpu.pattern, device_name)), None)


def scores(B: int, T: int, H: int, S: int, causal: bool) -> float:
    """Unmasked query-key pairs. Causal as counted in papers: half of all pairs."""
    return B * H * T * S / (2 if causal else 1)


def forward(B: int, T: int, S: int, H: int, K: int, D: int, causal: bool) -> list[Work]:
    """Two matmuls of 2 D FLOP per score. Reads q, k, v and writes out and log-sum-exp once."""
    n = scores(B, T, H, S, causal)
    moved = 2 * (2 * B * T * H * D + 2 * B * S * K * D) + 4 * B * T * H
    return [Work(4 * D * n, 4 * D * n, n, FP32_PER_SCORE * n, moved)]


def dq(B: int, T: int, S: int, H: int, K: int, D: int, causal: bool) -> list[Work]:
    """Three matmuls: recomputed scores, dp, dq. Reads q, out, dout, k, v and the log-sum-exp; writes dq and delta."""
    n = scores(B, T, H, S, causal)
    moved = 2 * (4 * B * T * H * D + 2 * B * S * K * D) + 8 * B * T * H
    return [Work(6 * D * n, 6 * D * n, n, FP32_PER_SCORE * n, moved)]


def dkdv(B: int, T: int, S: int, H: int, K: int, D: int, causal: bool) -> list[Work]:
    """Four matmuls: recomputed scores and dp, dv, dk. Reads q, dout, k, v and two numbers per row; writes dk, dv."""
    n = scores(B, T, H, S, causal)
    moved = 2 * (2 * B * T * H * D + 4 * B * S * K * D) + 8 * B * T * H
    return [Work(8 * D * n, 8 * D * n, n, FP32_PER_SCORE * n, moved)]


def backward(B: int, T: int, S: int, H: int, K: int, D: int, causal: bool) -> list[Work]:
    """dq, then dk/dv: seven matmuls, counted as five (2.5 times the forward pass), as in papers."""
    first, second = (kernel(B, T, S, H, K, D, causal)[0] for kernel in (dq, dkdv))
    n = scores(B, T, H, S, causal)
    return [first._replace(counted=10 * D * n), second._replace(counted=0)]


def decode(B: int, T: int, S: int, H: int, K: int, D: int) -> list[Work]:
    """The queries of a group against S keys, padded to the rows of a matrix unit. The cache is read once."""
    rows = math.ceil(T * H / K / ROWS) * ROWS
    n = B * K * rows * S
    return [Work(4 * B * T * H * S * D, 4 * D * n, n, FP32_PER_SCORE * n, 4 * B * S * K * D + 4 * B * T * H * D)]


def cross_entropy_step(N: int, V: int) -> list[Work]:
    """The step between the matmuls, over N rows of V logits: two exp2 per logit, read once and written once.

    The kernel reads each logit twice; the second read is assumed to hit the L2 cache.
    """
    n = N * V
    return [Work(0, 0, 2 * n, 2 * FP32_PER_SCORE * n, 4 * n)]


def cross_entropy(N: int, C: int, V: int) -> list[Work]:
    """Three matmuls for logits, dx and dW, and the step. The logits are written, and read by two matmuls."""
    matmuls = 6 * N * C * V
    return [Work(matmuls, matmuls, 0, 0, 2 * (2 * N * C + 2 * V * C) + 6 * N * V), *cross_entropy_step(N, V)]


def rate(works: list[Work], seconds: float, unit: str) -> float:
    """TFLOP/s of the counted FLOP, or GB/s of the bytes."""
    if unit == "TFLOP/s":
        return sum(w.counted for w in works) / seconds / 1e12
    return sum(w.bytes for w in works) / seconds / 1e9


def causal_waste(T: int, M: int, N: int) -> float:
    """The share of computed scores that the causal mask removes: T queries and keys in blocks of M x N.

    Fully masked blocks are skipped. The others are computed completely, including positions beyond T.
    """
    blocks = sum(math.ceil(min(first + M, T) / N) for first in range(0, T, M))
    return 1 - T * (T + 1) / 2 / (blocks * M * N)


def split_bytes(splits: int, B: int, T: int, H: int, D: int) -> int:
    """Bytes that split decoding transfers in addition to the cache: output and log-sum-exp of each split in fp32,
    written and read."""
    return 0 if splits == 1 else 2 * 4 * splits * B * T * H * (D + 1)
