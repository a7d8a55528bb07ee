"""python -m benchmarks scaling: time and memory of a training step against context, width, batch and vocabulary.

One of the four is doubled repeatedly while the others are constant. Each point runs in a separate process, for a
separate peak of memory. A step is forward, backward and both optimizers, with the implementation that train.py chooses.
Memory is what the process needs in addition to torch itself; on a GPU, the memory allocated by torch. The exponent is
the slope of a line through the upper half of the points on logarithmic axes: 1 is linear, 2 is quadratic.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # imported lazily by torch's optimizers; not part of a step's memory

from benchmarks import subprocess_runner
from benchmarks.report import table, write_csv
from model import GPT, ModelConfig
from training import device
from training.apply_fused_layers import optimize_layers
from training.config import OptimConfig, TrainConfig
from training.device_memory import peak_memory
from training.optimizers import build_optimizers

HEAD = 64  # head size; width / HEAD heads (MHA)
BASE = {"context": 256, "width": 256, "batch": 8, "vocabulary": 4096}
AXES = {
    "context": [256 << n for n in range(7)],  # to 16,384
    "width": [128 << n for n in range(5)],
    "batch": [1 << n for n in range(7)],
    "vocabulary": [1024 << n for n in range(8)],  # to 131,072
}
QUICK = {"context": [64, 128], "width": [64, 128], "batch": [1, 2], "vocabulary": [256, 512]}
LAYERS, STEPS = 4, 3
TIME_LIMIT = 20.0  # seconds, after which one measured step is enough


def step(context: int, width: int, batch: int, vocabulary: int, checkpointing: bool) -> dict[str, float]:
    """Median seconds of several steps after a warm-up step, and the peak of memory in bytes."""
    machine = device.choose(TrainConfig(steps=1))
    config = ModelConfig(
        vocab_size=vocabulary, context=context, n_layer=LAYERS, n_embd=width, head_dim=HEAD, n_head=width // HEAD,
        n_kv_head=width // HEAD, n_ffn=width * 8 // 3,
    )  # fmt: skip
    on_gpu, before = machine.device.type == "cuda", peak_memory()
    model = GPT(config).to(machine.device)
    model.model.activation_checkpointing = checkpointing
    optimize_layers(model, machine)
    optimizers = build_optimizers(model, OptimConfig(), machine.dtype)
    took = list[float]()
    while len(took) < 2 or (len(took) <= STEPS and sum(took) < TIME_LIMIT):
        start = time.perf_counter()
        tokens = torch.randint(vocabulary, (batch, context), device=machine.device)
        with machine.autocast():
            loss = model.loss(tokens, tokens) / tokens.numel()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory() - before
    return {"seconds": statistics.median(took[1:]), "bytes": max(peak, 1)}


def measure(**size: Any) -> dict[str, float]:
    """`step` in a separate process. Raises ValueError if it fails, such as out of memory."""
    return subprocess_runner.measure(str(size), "benchmarks.scaling", json.dumps(size))


def exponent(sizes: list[int], values: list[float]) -> float:
    """The exponent of the growth of values, by least squares over the upper half of the sizes."""
    half = len(sizes) // 2
    x, y = (torch.tensor(v[half:] if len(sizes) > 3 else v, dtype=torch.float64).log() for v in (sizes, values))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def run(quick: bool, out: Path | None) -> int:
    """Run all measurements, print the table and the exponents, write scaling.csv and scaling.png to `out`."""
    rows: list[dict[str, Any]] = []
    for axis, sizes in (QUICK if quick else AXES).items():
        for checkpointing in (False, True) if axis == "context" else (False,):
            for size in sizes:
                # batch size 1 for the context
                sizes_of_point = {**(dict.fromkeys(BASE, 64) if quick else BASE), axis: size}
                sizes_of_point |= {"batch": 1} if axis == "context" else {}
                found = (step if quick else measure)(**sizes_of_point, checkpointing=checkpointing)
                series = f"{axis}, activation checkpointing" if checkpointing else axis
                tokens = sizes_of_point["batch"] * sizes_of_point["context"]
                rows.append({"series": series, "size": size, "tokens": tokens, **found})
                print(f"{series} {size:,}: {found['seconds']:.3f} s", file=sys.stderr)
    powers = []
    for name in dict.fromkeys(row["series"] for row in rows):
        own = [row for row in rows if row["series"] == name]
        sizes = [row["size"] for row in own]
        powers.append([name, *(f"{exponent(sizes, [r[what] for r in own]):.2f}" for what in ("seconds", "bytes"))])
    body = [[r["series"], f"{r['size']:,}", r["seconds"] * 1000, r["bytes"] / 2**20] for r in rows]
    print(table(["", "size", "ms/step", "MiB"], body))
    print()
    print(table(["exponent", "time", "memory"], powers))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_csv(out / "scaling.csv", rows)
        picture(out / "scaling.png", rows)
        print(f"wrote {out / 'scaling.csv'} and {out / 'scaling.png'}")
    return 0


def picture(path: Path, rows: list[dict[str, Any]]) -> None:
    """Plot one column for each of the four: time above, memory below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(AXES), figsize=(3 * len(AXES), 5), sharex="col", layout="constrained")
    for column, axis in zip(axes.T, AXES, strict=True):
        for name in dict.fromkeys(row["series"] for row in rows if row["series"].split(",")[0] == axis):
            own = [row for row in rows if row["series"] == name]
            sizes = [row["size"] for row in own]
            column[0].plot(sizes, [row["seconds"] for row in own], "o-", markersize=3, label=name)
            column[1].plot(sizes, [row["bytes"] / 2**30 for row in own], "o-", markersize=3, label=name)
        for panel in column:
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
        column[0].legend(fontsize="small")
        column[1].set_xlabel(axis)
    axes[0, 0].set_ylabel("seconds per step")
    axes[1, 0].set_ylabel("GiB")
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    print(json.dumps(step(**json.loads(sys.argv[1]))))
