"""python -m benchmarks scale --paper: memory and time of a training step on 8, 64 and 512 GPUs, on paper.

Nothing here was measured. Bytes and FLOPs are counted from what the code does (training/distributed.py,
training/matrix_owners.py), for the first device, which owns the most; a test compares them with what torch counts under
a fake process group of up to 512 processes. Times are those bytes and FLOPs, divided by rates that are assumed.

Shapes: N = S R devices, S per copy of the model, R copies; P parameters, P_l of them in layers, m micro-batches.

    state       weights and gradients 8 P, momentum 4 bytes for Muon's matrices and 8 for the rest, divided by S
    gathered    with S > 1: weights and gradients of two layers and of what is in no layer
    weights     4 m (P + P_l) (S - 1) / S: gathered before the forward pass, layers again before the backward pass
    gradients   4 m P (S - 1) / S within a copy, and 2 4 P / S (R - 1) / R across copies
    Muon        every matrix to its owner and back within a copy, then all results across copies, in bf16
    time        matmuls + messages beyond what hides them + orthogonalization + Muon's messages
"""

import functools
import math
from typing import Any, NamedTuple

import torch

from benchmarks.report import table
from model import GPT, ModelConfig
from training.flops import PEAK_FLOPS, flops_per_token
from training.matrix_owners import owned, rows_of

# Assumed rates of an H100 SXM in a node of 8 with NVLink and a 400 Gb/s network card for each.
PEAK = PEAK_FLOPS[r"H100 (80GB HBM3|SXM)"]  # dense bf16 FLOP/s
MATMULS, ORTHOGONALIZATION = 0.55, 0.45  # shares of the peak
NODE, NVLINK, CARD = 8, 360e9, 45e9  # devices; bytes/s per device and direction: 80% of 450e9, 90% of 50e9
HOP = 3e-6  # seconds per device of a ring
# Bytes per token, layer and unit of width: of all activations (measured on a CPU), of a layer's fp32 input.
ACTIVATIONS, KEPT = 70, 4
flops = functools.cache(flops_per_token)


class Model(NamedTuple):
    """A model, tokens of a micro-batch on a device, and tokens of a step by number of devices."""

    name: str
    config: ModelConfig
    micro_batch: int
    batch: dict[int, int]


GPUS = (8, 64, 512)
HEADER = [
    "", "GPUs", "copies x devices", "tokens", "state, GB", "gathered, GB", "activations, GB", "matmuls, ms",
    "communication, ms", "exposed of it, ms", "Muon: compute, ms", "Muon: communication, ms", "matmul share of step",
]  # fmt: skip
MODELS = (
    Model(
        "124M",
        ModelConfig(50257, 1024, n_layer=12, n_head=12, n_kv_head=12, n_embd=768, n_ffn=2048),
        16_384, {8: 1 << 19, 64: 1 << 19, 512: 1 << 19},
    ),
    Model(
        "1.5B",
        ModelConfig(50304, 4096, n_layer=28, n_head=16, n_kv_head=8, n_embd=2048, head_dim=128, n_ffn=6144),
        16_384, {8: 1 << 20, 64: 1 << 20, 512: 1 << 22},
    ),
    Model(
        "8B",
        ModelConfig(
            128256, 8192, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, head_dim=128, n_ffn=14336,
            tie_embeddings=False,
        ),
        8192, {8: 1 << 22, 64: 1 << 22, 512: 1 << 22},
    ),
)  # fmt: skip
# What others have published; MFU as they count it.
PUBLISHED = [
    ["torchtitan, Llama 3.1 8B, FSDP", "8 H100", "5,762 tokens/s per GPU, compiled 6,667", "its results, 2024-12"],
    [
        "torchtitan, Llama 3.1 8B, FSDP",
        "128 H100",
        "5,605 tokens/s per GPU: 97% of the rate on 8",
        "its results, 2024-12",
    ],
    ["Llama 3 405B, 4D parallelism", "8,192 to 16,384 H100", "38 to 43% MFU", "arXiv 2407.21783, table 4"],
]


class Sizes(NamedTuple):
    """Shapes of the matrices that Muon trains, and the numbers of parameters: in layers, in one of them, elsewhere."""

    matrices: tuple[tuple[int, ...], ...]
    layers: int
    layer: int
    rest: int

    @property
    def muon(self) -> int:
        return sum(math.prod(shape) for shape in self.matrices)

    @property
    def all(self) -> int:
        return self.layers + self.rest


@functools.cache
def sizes(config: ModelConfig) -> Sizes:
    """Counted from the model, without allocating it."""
    with torch.device("meta"):
        model = GPT(config)
    inside = list(model.model.layers.parameters())
    layers = sum(p.numel() for p in inside)
    one = sum(p.numel() for p in model.model.layers[0].parameters())
    matrices = tuple(tuple(p.shape) for p in inside if p.ndim == 2)
    return Sizes(matrices, layers, one, sum(p.numel() for p in model.parameters()) - layers)


def memory(config: ModelConfig, S: int, tokens: int, checkpointing: bool) -> dict[str, float]:
    """Bytes of a device: state, gathered, and activations of `tokens` tokens."""
    n, C, L = sizes(config), config.n_embd, config.n_layer
    kept = (KEPT * L + ACTIVATIONS if checkpointing else ACTIVATIONS * L) * C * tokens
    gathered = 0 if S == 1 else 8 * (2 * n.layer + n.rest)
    return {"state": (16 * n.all - 4 * n.muon) / S, "gathered": gathered, "activations": kept}


def sent(config: ModelConfig, S: int, R: int, m: int, muon_bytes: int = 2) -> dict[str, float]:
    """Bytes that the first device sends in a step, rows not padded. muon_bytes: of a number in Muon's messages."""
    n = sizes(config)
    numbers = owned(n.matrices, R, S)

    def size(number: int, part: int) -> int:
        rows = rows_of(n.matrices[number][0], S, part)
        return muon_bytes * (rows.stop - rows.start) * n.matrices[number][1]

    ours = [number for owner in numbers[0] for number in owner]
    mine = numbers[0][0]
    there = sum(size(number, 0) for number in ours if number not in mine)
    back = sum(size(number, part) for number in mine for part in range(1, S))
    largest = max(sum(size(number, 0) for owner in copy for number in owner) for copy in numbers)
    return {
        "weights": 4 * m * (n.all + n.layers) * (S - 1) / S,
        "gradients": 4 * m * n.all * (S - 1) / S,
        "gradients across": 2 * 4 * n.all / S * (R - 1) / R,
        "Muon": there + back,
        "Muon across": largest * (R - 1),
    }


def orthogonalization(config: ModelConfig, S: int, R: int) -> int:
    """FLOPs of the owner with the most work: five iterations of 4 s^2 l + 2 s^3 for a matrix (s, l), s <= l."""
    matrices = sizes(config).matrices

    def cost(number: int) -> int:
        s, l = sorted(matrices[number])  # noqa: E741
        return 5 * (4 * s * s * l + 2 * s**3)

    return max(sum(map(cost, owner)) for copy in owned(matrices, R, S) for owner in copy)


def seconds(config: ModelConfig, S: int, R: int, m: int, tokens: int) -> dict[str, float]:
    """Times of a step of `tokens` tokens per device: matmuls, messages, what of them is not hidden, Muon, kept.

    Messages within a copy are hidden by all matmuls, those across copies by the backward pass of the last micro-batch.
    kept: the share of the step that is matmuls.
    """
    bytes_, groups = sent(config, S, R, m), config.n_layer + 1
    within = NVLINK if S <= NODE else min(NVLINK, NODE * CARD)  # a ring over whole nodes enters each by all its cards
    across = NVLINK if S * R <= NODE else CARD if S >= NODE else min(NVLINK, NODE * CARD)
    matmuls = tokens * flops(config) / (PEAK * MATMULS)
    inside = (bytes_["weights"] + bytes_["gradients"]) / within + 3 * m * groups * (S - 1) * HOP
    between = bytes_["gradients across"] / across + (2 * groups * math.log2(R) * 10e-6 if R > 1 else 0)
    exposed = max(0.0, inside - matmuls) + max(0.0, between - 2 / 3 * matmuls / m)
    alone = CARD if S > NODE else NVLINK  # of an all-to-all beyond a node every device uses its own card
    muon = orthogonalization(config, S, R) / (PEAK * ORTHOGONALIZATION)
    messages = bytes_["Muon"] / alone + bytes_["Muon across"] / across + 2 * (S - 1) * HOP + (R - 1) * HOP
    total = matmuls + exposed + muon + messages
    return {
        "matmuls": matmuls, "messages": inside + between, "exposed": exposed, "Muon": muon, "its messages": messages,
        "step": total, "kept": matmuls / total,
    }  # fmt: skip


def rows() -> list[list[Any]]:
    """A row for each model, number of GPUs and mesh: R x S, memory in GB, times in ms."""
    found = []
    for name, config, micro_batch, batches in MODELS:
        for N in GPUS:
            tokens = max(batches[N] // N, config.context)  # a device computes one sequence at least
            m = max(1, tokens // micro_batch)
            for S in dict.fromkeys((1, NODE, N)):
                bytes_ = memory(config, S, min(tokens, micro_batch), checkpointing=name != "124M")
                GB = [bytes_[part] / 1e9 for part in ("state", "gathered", "activations")]
                row = [name, N, f"{N // S} x {S}", f"{tokens * N / 2**20:.3g} Mi", *(f"{x:.2f}" for x in GB)]
                if sum(GB) > 80:
                    found.append([*row, "does not fit", *[None] * 5])
                    continue
                times = seconds(config, S, N // S, m, tokens)
                ms = [times[part] * 1000 for part in ("matmuls", "messages", "exposed", "Muon", "its messages")]
                found.append([*row, *ms, f"{times['kept']:.0%}"])
    return found


def run() -> int:
    """Print what is counted, what is published, and the assumptions."""
    print("counted, not measured: a step on H100 with 80 GB; 1.5B and 8B with activation checkpointing")
    print(table(HEADER, rows()))
    print("\npublished by others")
    print(table(["", "on", "reached", "source"], PUBLISHED))
    print(
        f"\nassumed: matmuls at {MATMULS:.0%} and orthogonalization at {ORTHOGONALIZATION:.0%} of {PEAK / 1e12:.0f} "
        f"TFLOP/s, NVLink {NVLINK / 1e9:.0f} GB/s,\nnetwork {CARD / 1e9:.0f} GB/s per GPU, {HOP * 1e6:.0f} us per hop; "
        "messages within a copy are hidden by all matmuls, those across\ncopies by the backward pass of the last "
        f"micro-batch; activations {ACTIVATIONS} bytes per token, layer and width, with checkpointing {KEPT} and\none "
        "layer."
    )
    return 0
