"""Why are attention's scores divided by sqrt(head_dim)? What large scores do to a softmax, and to training.

Without training: scores of queries and keys whose components are independent and normal have a variance of head_dim
(Vaswani et al. 2017, section 3.2.1, footnote 4). Measured: that variance, the largest of a query's weights p, and the
Frobenius norm of the softmax's Jacobian diag(p) - p p^T. It is the root mean square of the gradient that arrives at a
query's scores if its weights get normal gradients of variance 1. With one weight near 1 it is near 0; it is largest
not for equal weights, but for two of 1/2. So its median over the queries says more than its mean.

In training: the loss of the first steps of a small model, and the largest weight of its own attention before and after,
with and without scale and QK-norm. In one variant, q_proj begins smaller by sqrt(head_dim) instead of a scale, as in T5
(Raffel et al. 2019, arXiv 1910.10683): if it trains like the scaled one, the scale is a matter of initialization. All
models have the same size: fewer heads if they are larger.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from benchmarks.zoo.characters import characters
from benchmarks.zoo.entropy_collapse import recorded
from benchmarks.zoo.fit import fit
from benchmarks.zoo.pictures import Panel, curves, draw
from benchmarks.zoo.results import Point, Row, groups, markdown, mean
from model import GPT, ModelConfig
from training.config import OptimConfig


class Variant(NamedTuple):
    scale_scores: bool
    qk_norm: bool
    small_queries: bool = False


VARIANTS = {
    "scaled": Variant(True, False),
    "unscaled": Variant(False, False),
    "unscaled, small q_proj": Variant(False, False, True),
    "scaled, QK-norm": Variant(True, True),
    "unscaled, QK-norm": Variant(False, True),
}
EXCLUSIVE = False
HEAD_DIMS = (256, 16, 1024, 64)
QUERIES, KEYS = 4096, 256
WIDTH = 1024  # of all heads
STAGES = (5, 25, 50, 100)  # percent of the steps
STATISTICS = ("score variance", "largest weight", "mean Jacobian", "median Jacobian")
TRAINING = (*(f"loss at {stage}%" for stage in STAGES), "largest weight before", "largest weight after")
MEASURES = (*STATISTICS, *TRAINING)


def points(scale: str, seeds: int) -> list[Point]:
    steps = {"full": 200, "short": 100, "quick": 20}[scale]
    return [
        {"attention": name, "head_dim": head_dim, "seed": seed, "steps": steps}
        for head_dim in (HEAD_DIMS if scale == "full" else HEAD_DIMS[:1])
        for seed in range(seeds)
        for name in VARIANTS
    ]


def measure(attention: str, head_dim: int, seed: int, steps: int) -> dict[str, float]:
    variant = VARIANTS[attention]
    return {**statistics(variant, head_dim, seed), **training(variant, head_dim, seed, steps)}


def statistics(variant: Variant, head_dim: int, seed: int) -> dict[str, float]:
    """STATISTICS of the softmax over the scores of normal queries and keys."""
    q, k = torch.randn(QUERIES + KEYS, head_dim, generator=Generator().manual_seed(seed)).split((QUERIES, KEYS))
    if variant.qk_norm:
        q, k = (F.rms_norm(x, (head_dim,)) for x in (q, k))
    scores = q @ k.T * (head_dim**-0.5 if variant.scale_scores or variant.small_queries else 1.0)  # (QUERIES, KEYS)
    weights = scores.softmax(1)
    norms = jacobian_norm(weights)
    found = scores.var(), weights.amax(1).mean(), norms.mean(), norms.median()
    return dict(zip(STATISTICS, map(float, found), strict=True))


def jacobian_norm(p: Tensor) -> Tensor:
    """Frobenius norm of diag(p) - p p^T for each row of p (N, S) -> (N,)."""
    square = p.square().sum(1)
    return (square - 2 * p.pow(3).sum(1) + square.square()).clamp(min=0).sqrt()


def training(variant: Variant, head_dim: int, seed: int, steps: int) -> dict[str, float]:
    """TRAINING: losses in nats per character, each the mean of 5% of the steps."""
    vocab_size, batch = characters(128, 4, seed)
    config = ModelConfig(
        vocab_size=vocab_size, context=128, n_layer=2, n_embd=128, n_head=WIDTH // head_dim, n_ffn=352,
        n_kv_head=WIDTH // head_dim, head_dim=head_dim, scale_scores=variant.scale_scores, qk_norm=variant.qk_norm,
    )  # fmt: skip
    losses, before = list[float](), 0.0

    def loss_of(model: GPT, step: int, x: Tensor, y: Tensor) -> Tensor:
        nonlocal before
        if step == 0:
            if variant.small_queries:
                with torch.no_grad():
                    for name, p in model.named_parameters():
                        p.mul_(head_dim**-0.5 if name.endswith("q_proj.weight") else 1.0)
            before = largest_weight(model, x)
        loss = model.loss(x, y)
        losses.append(float(loss.detach()) / y.numel())
        return loss

    model = fit(config, batch, steps, OptimConfig(optimizer="adamw", warmup_steps=0), seed, loss_of)
    losses += [torch.nan] * (steps - len(losses))
    ends = [steps * stage // 100 for stage in STAGES]
    means = [torch.tensor(losses[end - steps // 20 : end]).mean() for end in ends]
    return dict(zip(TRAINING, [*map(float, means), before, largest_weight(model, batch(steps)[0])], strict=True))


@torch.no_grad()
def largest_weight(model: GPT, tokens: Tensor) -> float:
    """The mean largest weight of the queries in the last half of a sequence, which have many keys. tokens (B, T)."""
    eager = GPT(model.config).eval()  # fused layers do not show their weights
    eager.load_state_dict(model.state_dict())
    with recorded(eager, lambda weights: float(weights[:, :, weights.shape[2] // 2 :].amax(3).mean())) as found:
        eager(tokens)
    return sum(found) / len(found)


def table(rows: list[Row]) -> str:
    body = [
        [name, head_dim, *(f"{mean(own, measure):.3g}" for measure in MEASURES)]
        for (name, head_dim), own in groups(rows, "attention", "head_dim").items()
    ]
    return markdown(["attention", "head_dim", *MEASURES], body)


def picture(rows: list[Row], path: Path) -> None:
    shown = {"largest weight": "x", "median Jacobian": "xy", f"loss at {STAGES[-1]}%": "x"}
    x = "head_dim"
    draw(path, [[Panel(curves(rows, ["attention"], x, y), x, y, log=log) for y, log in shown.items()]])
