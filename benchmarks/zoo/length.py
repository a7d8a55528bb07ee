"""What happens beyond the training length? Loss by position, trained on 256 tokens and tested on 1,024.

Compared are the position schemes of softmax attention and the recurrent members, which all could go on forever. The
recipe is text.py's; the eight rows of a batch go through the text window by window. "yarn" is "rope" with its angles
slowed for four times the context after training. With state passing a window begins with the last states of the one
before, without gradients, for four windows; otherwise with states of zero (Buitrago & Gu 2025, arXiv 2507.02782, cure
recurrent models' failure so). Measured: nats per token over the validation text in sequences of 1,024 tokens. Numbers
of parameters are equal but for the table of "learned".
"""

import dataclasses
import itertools
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.zoo import members
from benchmarks.zoo.fit import Batch, fit, how
from benchmarks.zoo.pictures import Curves, Panel, draw
from benchmarks.zoo.results import Point, Row, best_rate, groups, markdown, mean, span
from benchmarks.zoo.text import corpus, optim
from kernels.cross_entropy import linear_cross_entropy
from kernels.kv_cache import KVCache
from model import GPT

EXCLUSIVE = False
WINDOW, LENGTH = 256, 1024  # tokens, in training and in the test
BOUNDS = (0, 64, 128, 256, 320, 512, 768, 1024)
BUCKETS = tuple(itertools.pairwise(BOUNDS))
MEASURES = (*(f"loss at {first}" for first in BOUNDS[:-1]), "seconds")
RATES = (1.0, 1 / 3, 3.0)
POSITIONS = ("rope", "yarn", "alibi", "none", "sinusoidal", "learned")
RECURRENT = ("Gated DeltaNet", "Mamba-2", "linear attention", "retention", "RWKV-7", "LSTM")


def points(scale: str, seeds: int) -> list[Point]:
    quick = scale == "quick"
    steps, source = {"full": 300, "short": 60, "quick": 2}[scale], "README.md" if quick else "shakespeare"
    variants = [(members.BASELINE, positions, 0) for positions in POSITIONS[: 3 if quick else None]]
    recurrent = members.chosen(RECURRENT)[: 1 if quick else None]
    variants += [
        ("sliding window", "rope", 0),
        *((member, "rope", passing) for passing in (0, 1) for member in recurrent),
    ]
    names = ("member", "positions", "passing", "lr", "seed", "steps", "source")
    return [
        dict(zip(names, (*variant, lr, seed, steps, source), strict=True))
        for seed in range(seeds)
        for lr in (RATES if scale == "full" else RATES[:1])
        for variant in variants
    ]


class PassedStates(KVCache):
    """A cache for training: gives a window the states of the one before, without their gradients."""

    def replace(self, layer: int, *states: Tensor) -> None:
        self.layers[layer] = tuple(state.detach() for state in states)


def measure(
    member: str, positions: str, passing: int, lr: float, seed: int, steps: int, source: str
) -> dict[str, float]:
    start = time.perf_counter()
    recipe, train_text, val_text = corpus(source)
    trained = "rope" if positions == "yarn" else positions
    config = dataclasses.replace(members.config(member, recipe.model), context=LENGTH, positions=trained)
    rows = recipe.train.batch_tokens // WINDOW
    cache = PassedStates(config, rows) if member in RECURRENT else None

    def batch(step: int) -> Batch:
        starts = range(0, train_text.tokens, train_text.tokens // rows)[:rows]
        windows = (train_text.read(at + (seed + step) * WINDOW, WINDOW + 1) for at in starts)
        tokens = torch.stack([torch.from_numpy(window) for window in windows])
        return tokens[:, :-1], tokens[:, 1:]

    def loss_of(model: GPT, step: int, x: Tensor, y: Tensor) -> Tensor:
        if cache is None:
            return model.loss(x, y)
        if not passing or step * WINDOW % LENGTH == 0:
            cache.reset()
        hidden = model.model(x, cache).flatten(0, 1)  # (B, T, C) -> (B * T, C)
        cache.advance(WINDOW)
        return linear_cross_entropy(hidden, model.head_weight, y.flatten())

    model = fit(config, batch, steps, optim(recipe, lr), seed, loss_of)
    if positions == "yarn":
        stretched = GPT(dataclasses.replace(config, yarn_factor=LENGTH / WINDOW, yarn_original_context=WINDOW)).eval()
        stretched.load_state_dict(model.state_dict())
        model = stretched
    losses = []
    with torch.inference_mode():
        for at in range(0, max(val_text.tokens - LENGTH, 1), LENGTH):
            tokens = torch.from_numpy(val_text.read(at, LENGTH + 1))
            losses.append(F.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="none"))  # (LENGTH,)
    by_position = torch.stack(losses).mean(0)
    found = {f"loss at {low}": float(by_position[low:high].mean()) for low, high in BUCKETS}
    return found | {"seconds": time.perf_counter() - start}


def best(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each variant at the learning rate that is best at the end of the training length."""
    found = {}
    for (member, positions, passing), own in groups(rows, "member", "positions", "passing").items():
        attends = member == members.BASELINE
        name = f"{member}, {positions}" if attends else f"{member}, state passing" if passing else member
        found[name] = best_rate(own, "loss at 128")
    return found


def table(rows: list[Row]) -> str:
    header = ["nats per token at positions", *(f"{low} to {high - 1}" for low, high in BUCKETS), "best rate"]
    lines = (
        [name, *(span(own, m, 2) for m in MEASURES[:-1]), f"{own[0]['lr']:.2g}"] for name, own in best(rows).items()
    )
    return markdown(header, lines) + how()


def picture(rows: list[Row], path: Path) -> None:
    middles = [(low + high) / 2 for low, high in BUCKETS]
    panels = (Curves(), Curves())
    for name, own in best(rows).items():
        panels[own[0]["member"] in RECURRENT][name] = middles, [mean(own, measure) for measure in MEASURES[:-1]]
    titles = ("position schemes", "recurrent members")
    draw(path, [[Panel(c, "position", "nats per token", title) for c, title in zip(panels, titles, strict=True) if c]])
