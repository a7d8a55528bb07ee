"""Part `pretraining`: a training step of GPT-2's 124M shape: tokens/s, MFU, memory, at contexts of 1K, 8K and 32K.

heed beside nanoGPT on the same GPU, both compiled, in bf16, each in a process of its own. Forward and backward of one
micro-batch and the optimizers' step are timed apart; tokens/s are of a batch of 524,288 tokens: as many micro-batches
as it needs, and one step of the optimizers. heed's attention is run both ways, SDPA and heed's kernels.
"""

import dataclasses
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import kernels
from benchmarks import subprocess_runner
from benchmarks.gpu.part import Task
from benchmarks.inference import SIZES, TINY
from model import GPT, ModelConfig
from training import device
from training.apply_fused_layers import optimize_layers
from training.config import OptimConfig, TrainConfig
from training.flops import flops_per_token, peak_flops
from training.optimizers import build_optimizers

BATCH, MICRO_BATCH = 524_288, 32_768  # tokens
WARMUP, FEWEST, MOST, SECONDS = 3, 5, 20, 6.0
RUNS = [  # system, attention, context: the most important first
    ("heed", "flash", 1024), ("nanoGPT", "", 1024), ("heed", "sdpa", 1024), ("heed", "flash", 8192),
    ("heed", "flash", 32768), ("nanoGPT", "", 8192), ("heed", "sdpa", 8192), ("nanoGPT", "", 32768),
    ("heed", "sdpa", 32768),
]  # fmt: skip
Step = tuple[Callable[[torch.Tensor, torch.Tensor], None], Callable[[], None]]
"""(forward and backward of tokens and targets (B, T); the optimizers' step)"""


def run(task: Task) -> None:
    """Run after run, until the time is over."""
    for system, attention, context in [("heed", "sdpa", 32), ("nanoGPT", "", 32)] if task.dry else RUNS:
        about: dict[str, Any] = {"system": system, "attention": attention, "context": context}
        if system == "nanoGPT" and not task.nanogpt:
            task.emit(**about, error="skipped: needs --nanogpt DIR")
            continue
        if task.left() < 30 and not task.dry:
            task.emit(**about, error="skipped: out of time")
            continue
        given = {**about, "nanogpt": task.nanogpt, "dry": task.dry}
        try:
            found = measure(**given) if task.dry else subprocess_runner.measure(system, __name__, json.dumps(given))
            task.emit(**about, **found)
        except Exception as error:  # such as out of memory
            task.emit(**about, error=str(error))


def measure(system: str, attention: str, context: int, nanogpt: str, dry: bool) -> dict[str, float]:
    """Time one system at one context, in this process."""
    config = dataclasses.replace(TINY if dry else SIZES["124M"], context=context)
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    if system == "heed":
        with patch.object(kernels, "faster_backend", lambda *_: attention):
            return _time(*heed(config), config, where, dry)
    config = dataclasses.replace(config, vocab_size=64 * -(-config.vocab_size // 64))  # as nanoGPT's train.py: 50,304
    return _time(*nano(config, Path(nanogpt), where), config, where, dry)


def heed(config: ModelConfig) -> Step:
    """As train.py builds it."""
    machine = device.choose(TrainConfig(steps=1))
    model = GPT(config).to(machine.device)
    optimize_layers(model, machine)
    optimizers = build_optimizers(model, OptimConfig(), machine.dtype)

    def gradients(x: torch.Tensor, y: torch.Tensor) -> None:
        with machine.autocast():
            loss = model.loss(x, y) / y.numel()
        loss.backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return gradients, update


def nano(config: ModelConfig, folder: Path, where: torch.device) -> Step:
    """As nanoGPT's train.py builds it: compiled, bf16, TF32 for what stays in fp32, its AdamW."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec and spec.loader
    sys.modules["nanogpt_model"] = theirs = importlib.util.module_from_spec(spec)  # needed by dataclasses
    spec.loader.exec_module(theirs)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    model = theirs.GPT(
        theirs.GPTConfig(block_size=config.context, vocab_size=config.vocab_size, **sizes, dropout=0.0, bias=False)
    ).to(where)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), where.type)
    if where.type == "cuda":
        model = torch.compile(model)

    def gradients(x: torch.Tensor, y: torch.Tensor) -> None:
        with torch.autocast(where.type, torch.bfloat16):
            _, loss = model(x, y)
        loss.backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return gradients, update


def _time(
    gradients: Callable[..., None], update: Callable[[], None], config: ModelConfig, where: torch.device, dry: bool
) -> dict[str, float]:
    """Medians of both halves of a step on random tokens, and what follows from them."""
    sequences = 2 if dry else max(MICRO_BATCH // config.context, 1)
    micro_batch = sequences * config.context

    def seconds(call: Callable[..., None], *inputs: torch.Tensor) -> float:
        if where.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call(*inputs)
        if where.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = time.perf_counter()
    took, updates = list[float](), list[float]()
    began = first
    while len(took) < (2 if dry else WARMUP + FEWEST) or (
        not dry and len(took) < WARMUP + MOST and time.perf_counter() - began < SECONDS
    ):
        if len(took) == WARMUP:
            began = time.perf_counter()
        x, y = (torch.randint(config.vocab_size, (sequences, config.context), device=where) for _ in range(2))
        took.append(seconds(gradients, x, y))
        updates.append(seconds(update))
    warmup = 1 if dry else WARMUP
    step, optimizer = statistics.median(took[warmup:]), statistics.median(updates[warmup:])
    rate = BATCH / (BATCH / micro_batch * step + optimizer)
    found = {"tokens_per_second": rate, "micro_batch_seconds": step, "optimizer_seconds": optimizer}
    found |= {"micro_batch_tokens": micro_batch, "first_step_seconds": took[0], "repetitions": len(took) - warmup}
    if peak := peak_flops(where):
        found["mfu"] = rate * flops_per_token(config) / peak
    if where.type == "cuda":
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
