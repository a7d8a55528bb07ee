"""Does attention become one-hot in training, and what prevents it? Entropy collapse, in deep models at high rates.

When scores grow without bound, each query attends to one key: the entropy of attention's weights falls to 0, which goes
with unstable training (Zhai et al. 2023, arXiv 2303.06296). It is not rank collapse (rank_collapse.py), in which all
tokens become alike; so both are measured. A model of 24 layers trains with AdamW at a high learning rate, without
warmup. Measured at several steps on one batch:

- the loss in nats per character;
- the entropy of the weights, relative to that of equal weights: 1 is equal weights, 0 is one-hot;
- the cosine similarity of the tokens after the last norm: 1 is rank collapse;

and a spike: by how much the training loss of a step was above the lowest one before, at most, after 10% of the steps.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.zoo.characters import characters
from benchmarks.zoo.fit import fit
from benchmarks.zoo.pictures import Curves, Panel, draw
from benchmarks.zoo.rank_collapse import similarity, use_blocks
from benchmarks.zoo.results import Point, Row, groups, markdown, mean
from kernels.reference_attention import MaskSpec, reference_attention
from model import GPT, Attention, ModelConfig
from training.config import OptimConfig

EXCLUSIVE = False
RATES = (1e-2, 3e-2, 3e-3)  # of AdamW
STAGES = (0, 5, 10, 25, 50, 100)  # percent of the steps
QUANTITIES = ("loss", "entropy", "similarity")
MEASURES = (*(f"{quantity} at {stage}%" for quantity in QUANTITIES for stage in STAGES), "largest spike")
ALL: dict[str, dict[str, Any]] = {
    "plain": {"qk_norm": False},
    "QK-norm": {"qk_norm": True},
    "gate": {"qk_norm": False, "gate": True},
    "QK-norm and gate": {"qk_norm": True, "gate": True},
    "attention dropout": {"qk_norm": False, "attention_dropout": 0.1},
}
VARIANTS = {
    name: fields for name, fields in ALL.items() if fields.keys() <= {f.name for f in dataclasses.fields(ModelConfig)}
}


def points(scale: str, seeds: int) -> list[Point]:
    layers, steps = {"full": (24, 400), "short": (24, 100), "quick": (2, 20)}[scale]
    return [
        {"blocks": blocks, "attention": name, "layers": layers, "lr": lr, "seed": seed, "steps": steps}
        for lr in (RATES if scale == "full" else RATES[:1])
        for seed in range(seeds)
        for blocks in ("pre-norm", "post-norm")
        for name in VARIANTS
    ]


def measure(blocks: str, attention: str, layers: int, lr: float, seed: int, steps: int) -> dict[str, float]:
    vocab_size, batch = characters(64, 8, seed)
    config = ModelConfig(
        vocab_size=vocab_size, context=64, n_layer=layers, n_embd=64, n_head=4, n_kv_head=4, head_dim=16, n_ffn=176,
        **VARIANTS[attention],
    )  # fmt: skip
    held_out = batch(steps)
    found, losses = dict.fromkeys(MEASURES, math.nan), list[float]()

    def look(model: GPT, step: int) -> None:
        for stage in STAGES:
            if steps * stage // 100 == step:
                found.update({f"{name} at {stage}%": value for name, value in inside(model, *held_out).items()})

    def loss_of(model: GPT, step: int, x: Tensor, y: Tensor) -> Tensor:
        if step == 0:
            use_blocks(model, blocks)
        look(model, step)
        loss = model.loss(x, y)
        losses.append(float(loss.detach()) / y.numel())
        return loss

    optim = OptimConfig(optimizer="adamw", lr=lr, warmup_steps=0, lr_decay_frac=0.0)
    model = fit(config, batch, steps, optim, seed, loss_of)
    if len(losses) == steps and math.isfinite(losses[-1]):
        look(model, steps)
    settled = torch.tensor(losses[steps // 10 :] or [math.nan])
    found["largest spike"] = float((settled - settled.cummin(0).values).max())
    return found


@torch.no_grad()
def inside(model: GPT, x: Tensor, y: Tensor) -> dict[str, float]:
    """QUANTITIES of a model in training, on inputs and targets (B, T)."""
    model.eval()
    with recorded(model, entropy) as entropies:
        hidden = model.model(x)  # (B, T, C)
    model.train()
    loss = F.cross_entropy(model.head(hidden).flatten(0, 1), y.flatten())
    return dict(zip(QUANTITIES, (float(loss), sum(entropies) / len(entropies), similarity(hidden)), strict=True))


@contextmanager
def recorded(model: GPT, of: Callable[[Tensor], float]) -> Iterator[list[float]]:
    """A list of what `of` returns for the weights (B, H, T, S) of each layer of attention that runs meanwhile, without
    fused layers and without a cache."""
    found = list[float]()

    def attention(
        q: Tensor, k: Tensor, v: Tensor, mask_spec: MaskSpec, *, softmax_scale: float, alibi_slopes: Tensor | None,
        **others: Any,
    ) -> Tensor:  # fmt: skip
        out, _, weights = reference_attention(q, k, v, mask_spec, softmax_scale, alibi_slopes=alibi_slopes)
        found.append(of(weights))
        return out

    with ExitStack() as patches:
        for mixer in (layer.self_attn for layer in model.model.layers):
            if isinstance(mixer, Attention):
                patches.enter_context(mock.patch.object(mixer, "attend", attention))
        yield found


def entropy(weights: Tensor) -> float:
    """Mean entropy of the rows of causal weights (B, H, T, T), relative to that of equal weights."""
    equal = torch.arange(1, weights.shape[2] + 1).log().mean()
    return float(torch.special.entr(weights).sum(3).mean() / equal)


def table(rows: list[Row]) -> str:
    """The picture and the CSV have all stages."""
    shown = [*(f"{quantity} at {stage}%" for quantity in QUANTITIES for stage in STAGES[-3::2]), "largest spike"]
    body = [
        [*kind, *(f"{mean(own, name):.2f}" for name in shown)]
        for kind, own in groups(rows, "blocks", "attention", "lr").items()
    ]
    return markdown(["blocks", "attention", "lr", *shown], body)


def picture(rows: list[Row], path: Path) -> None:
    def panel(quantity: str, blocks: str, lr: float, own: list[Row]) -> Panel:
        curves: Curves = {
            name: (STAGES, [mean(same, f"{quantity} at {stage}%") for stage in STAGES])
            for (name,), same in groups(own, "attention").items()
        }
        return Panel(curves, "% of the steps", quantity, f"{blocks}, lr {lr:g}")

    kinds = groups(rows, "blocks", "lr").items()
    draw(path, [[panel(quantity, blocks, lr, own) for (blocks, lr), own in kinds] for quantity in QUANTITIES])
