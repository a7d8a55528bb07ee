"""How does the time of training grow with the length of the text? Forward and backward pass, against the length.

Attention compares all pairs of tokens, a recurrent layer adds a constant amount of work per token. Measured for a model
of `shakespeare`'s size and a small vocabulary, on random tokens: microseconds per token of a forward and backward pass
over 2,048 tokens, or over one sequence if that is longer. The exponent is that of the growth of the time of a sequence,
over the longer lengths: 1 is linear, 2 is quadratic.

All members run in PyTorch, attention by batched matmuls; "C++ layers" is softmax attention as train.py runs it on a
CPU, and shows how much an implementation can change. A length at which a pass would take too long is left out.
"""

import dataclasses
import functools
import math
import statistics
import time
from pathlib import Path

import torch

from benchmarks.scaling import exponent
from benchmarks.zoo import members
from benchmarks.zoo.decoding import BASE, SAME
from benchmarks.zoo.pictures import Panel, curves, draw
from benchmarks.zoo.results import Point, Row, groups, markdown
from kernels import attention, cpu
from model import GPT, Attention
from training.apply_fused_layers import apply_fused_layers

EXCLUSIVE = True
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
TOKENS = 2048  # per pass, at least
TIME_LIMIT = 60.0  # seconds of a pass
TORCH, CPP = "PyTorch", "C++ layers"
MEASURES = ("us per token",)


def points(scale: str, seeds: int) -> list[Point]:
    """The weights are random, and all seeds alike."""
    lengths = {"full": LENGTHS, "short": LENGTHS[::2], "quick": (32, 64)}[scale]
    least = 64 if scale == "quick" else TOKENS
    kinds = [(name, TORCH) for name in members.MEMBERS if name not in SAME]
    if cpu.trains(torch.float32):
        kinds.insert(1, (members.BASELINE, CPP))
    return [
        {"member": name, "implementation": implementation, "length": length, "tokens": max(least, length)}
        for length in lengths
        for name, implementation in kinds
    ]


def measure(member: str, implementation: str, length: int, tokens: int) -> dict[str, float]:
    config = dataclasses.replace(members.config(member, BASE), context=length, vocab_size=256)  # a window does not grow
    torch.manual_seed(0)
    model = GPT(config)
    if implementation == CPP:
        apply_fused_layers(model)
    else:
        for mixer in (layer.self_attn for layer in model.model.layers):
            if isinstance(mixer, Attention):
                mixer.attend = functools.partial(attention, backend="blocks")
    warmup = seconds(model, tokens // 2 // (length // 2), length // 2)
    if 4 * warmup > TIME_LIMIT:  # quadratic growth, the worst case
        return {"us per token": math.nan}
    took = [seconds(model, tokens // length, length)]
    while len(took) < 5 and sum(took) < 5:
        took.append(seconds(model, tokens // length, length))
    return {"us per token": statistics.median(took) / tokens * 1e6}


def seconds(model: GPT, sequences: int, length: int) -> float:
    """Time of a forward and backward pass over random tokens."""
    tokens = torch.randint(model.config.vocab_size, (sequences, length))
    start = time.perf_counter()
    model.loss(tokens, tokens).backward()
    took = time.perf_counter() - start
    model.zero_grad()
    return took


def table(rows: list[Row]) -> str:
    lengths, body = sorted({row["length"] for row in rows}), []
    for kind, own in groups(rows, "member", "implementation").items():
        at = {row["length"]: row["us per token"] for row in own if not math.isnan(row["us per token"])}
        measured = sorted(at)
        growth = exponent(measured, [at[n] * n for n in measured]) if len(at) > 1 else math.nan
        body.append([*kind, *(f"{at[n]:.0f}" if n in at else "" for n in lengths), f"{growth:.2f}"])
    heads = [f"us per token at {length:,}" for length in lengths]
    return markdown(["member", "implementation", *heads, "exponent"], body)


def picture(rows: list[Row], path: Path) -> None:
    times = curves(rows, ["member", "implementation"], "length", MEASURES[0])
    draw(path, [[Panel(times, "tokens of a sequence", "microseconds per token", log="xy")]])
