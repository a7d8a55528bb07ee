"""Training of a small model for an experiment: train.py's optimizers, schedule and layers, without runs and files.

Always on the CPU and in fp32, so that a result depends neither on the machine's load nor on a GPU.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.reference_attention import IGNORE_INDEX
from model import GPT, ModelConfig
from training import device
from training.apply_fused_layers import optimize_layers
from training.config import OptimConfig, TrainConfig
from training.optimizers import build_optimizers, lr_factor, set_learning_rate

Batch = tuple[Tensor, Tensor]


def machine() -> device.Machine:
    """Where models are trained: see above."""
    return device.choose(TrainConfig(steps=1, device="cpu", dtype="float32"))


def how() -> str:
    """A paragraph below a table: the implementation of all members."""
    return (
        f"\n\nTrained on a CPU, one thread per model, fp32, {machine().reasons[2]}, except what C++ does not support."
    )


def task_optim(lr: float, steps: int) -> OptimConfig:
    """Optimizers for synthetic tasks, with `lr` times the learning rates at which softmax attention learns them."""
    return OptimConfig(lr=1e-2 * lr, muon_lr=1e-2 * lr, warmup_steps=steps // 20)


def fit(
    config: ModelConfig, batch: Callable[[int], Batch], steps: int, optim: OptimConfig, seed: int,
    loss_of: Callable[[GPT, int, Tensor, Tensor], Tensor] = lambda model, step, x, y: model.loss(x, y),
) -> GPT:  # fmt: skip
    """Train a new model and return it, in evaluation mode. Training ends early if the loss is not finite.

    Args:
        batch: inputs and targets (B, T) of a step, counted from 0.
        seed: of the weights.
        loss_of: sum of the cross-entropies of a step's targets.
    """
    where = machine()
    torch.manual_seed(seed)
    model = GPT(config)
    optimize_layers(model, where)
    optimizers = build_optimizers(model, optim, where.dtype)
    for step in range(steps):
        set_learning_rate(optimizers, lr_factor(step, steps, optim))
        x, y = batch(step)
        loss = loss_of(model, step, x, y) / (y != IGNORE_INDEX).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        if not math.isfinite(float(loss.detach()) + float(norm)):
            break
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


@torch.inference_mode()
def accuracy(model: GPT, x: Tensor, y: Tensor) -> float:
    """The fraction of targets that have the largest logit. x, y (B, T)."""
    return float((model(x).argmax(-1) == y)[y != IGNORE_INDEX].float().mean())
