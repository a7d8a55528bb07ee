"""python -m benchmarks step RECIPE [SECTION.FIELD=VALUE ...]: tokens per second and MFU of a training step.

A step is forward, backward, gradient clipping and both optimizers on random tokens, with the implementation that
train.py chooses, without evaluation and logging. With data.document_mask a document begins at each token 0, so that it
has, on average, as many tokens as the vocabulary has entries. Steps alternate with a large matmul in the same dtype.
MFU is the median over these pairs of the model's FLOP/s by the matmul's: the share of what this machine multiplies at,
measured, not of a data sheet.
"""

import dataclasses
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from model import GPT
from training import device
from training.apply_fused_layers import optimize_layers
from training.config import ConfigError
from training.config_files import load
from training.flops import flops_per_token
from training.optimizers import build_optimizers

MATMUL = 2048  # rows and columns of both operands
WARMUP = 5  # steps, not measured
VOCABULARIES = {"char": 65, "byte": 256}  # char: tiny Shakespeare's characters


def run(recipe: str, settings: list[str], pairs: int) -> int:
    """Print the time of a step of a recipe, its tokens/s and its MFU.

    Args:
        recipe: as for train.py.
        settings: changes to it, such as "model.n_embd=256".
        pairs: steps and matmuls to time.
    Raises:
        ConfigError: an invalid recipe, setting or number of pairs.
    """
    if pairs < 1:
        raise ConfigError(f"--pairs {pairs}: must be at least 1")
    for setting in settings:
        if not re.match(r"\w+\.\w+=", setting):
            raise ConfigError(f"{setting}: must be SECTION.FIELD=VALUE")
    config = load(recipe, dict(setting.partition("=")[::2] for setting in settings))
    if (n := config.train.context_parallel) > 1:
        raise ConfigError(f"train.context_parallel = {n}: must be 1, the step is that of one device")
    vocab_size = config.model.vocab_size or VOCABULARIES.get(config.data.tokenizer, config.data.vocab_size)
    model_config = dataclasses.replace(config.model, vocab_size=vocab_size)
    machine = device.choose(config.train)
    torch.manual_seed(0)
    model = GPT(model_config).to(machine.device)
    model.model.activation_checkpointing = config.train.activation_checkpointing
    model.model.document_start = 0 if config.data.document_mask else None
    optimize_layers(model, machine)
    optimizers = build_optimizers(model, config.optim, machine.dtype)
    context, sequences = config.model.context, config.train.micro_batch_size
    micro_batches = max(config.train.batch_tokens // context // sequences, 1)
    sequences = min(sequences, config.train.batch_tokens // context)
    tokens = torch.randint(vocab_size, (sequences, context), device=machine.device)

    def step() -> None:
        for _ in range(micro_batches):
            with machine.autocast():
                loss = model.loss(tokens, tokens) / (tokens.numel() * micro_batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    a, b = (torch.randn(MATMUL, MATMUL, device=machine.device).to(machine.dtype) for _ in range(2))
    for _ in range(WARMUP):
        step()
        torch.mm(a, b)
    times = [(seconds(step, machine.device), seconds(lambda: torch.mm(a, b), machine.device)) for _ in range(pairs)]
    count = tokens.numel() * micro_batches
    step_flops, matmul_flops = flops_per_token(model_config) * count, 2 * MATMUL**3
    median = statistics.median(took for took, _ in times)
    mfu = statistics.median(step_flops / took / (matmul_flops / product) for took, product in times)
    rate = matmul_flops / statistics.median(product for _, product in times)
    print(
        f"step {median * 1000:.1f} ms | {count:,} tokens | tok/s {count / median:,.0f} | "
        f"{step_flops / median / 1e9:,.0f} GFLOP/s | matmul {rate / 1e9:,.0f} GFLOP/s | mfu {mfu:.3f} | "
        f"{str(machine.dtype).removeprefix('torch.')}, layers {machine.layer_impl}"
    )
    return 0


def seconds(call: Callable[[], Any], where: torch.device) -> float:
    """Duration of a call, on a GPU until it has finished."""
    start = time.perf_counter()
    call()
    if where.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
