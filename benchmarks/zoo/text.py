"""Which token mixer models text best? Bits per byte of held-out text.

The recipe is configs/shakespeare.toml, with fewer steps: its text, tokenizer, sizes, optimizers and batches, so that
every member sees the same tokens in the same order. A learning rate is a factor on both of the recipe's.
"""

import dataclasses
import math
import sys
import time
from pathlib import Path

import torch

from benchmarks.zoo import members
from benchmarks.zoo.fit import fit, how
from benchmarks.zoo.pictures import Panel, curves, draw
from benchmarks.zoo.results import Point, Row, best_rate, groups, markdown, mean, span
from data.loader import Loader, validation
from data.prepare import prepare
from data.shards import Shards
from data.tokenizer import Tokenizer
from training.config import Config, OptimConfig
from training.config_files import load
from training.flops import count_parameters

EXCLUSIVE = False
MEASURES = ("bits per byte", "parameters", "state bytes", "seconds")
RATES = (1.0, 1 / 3, 3.0)


def points(scale: str, seeds: int) -> list[Point]:
    steps = {"full": 300, "short": 60, "quick": 1}[scale]
    source = "README.md" if scale == "quick" else "shakespeare"
    return [
        {"member": member, "lr": lr, "seed": seed, "steps": steps, "source": source}
        for seed in range(seeds)
        for lr in (RATES if scale == "full" else RATES[:1])
        for member in list(members.MEMBERS)[: 2 if scale == "quick" else None]
    ]


def measure(member: str, lr: float, seed: int, steps: int, source: str) -> dict[str, float]:
    start = time.perf_counter()
    recipe, train_text, val_text = corpus(source)
    config = members.config(member, recipe.model)
    loader = Loader(train_text, context=config.context, seed=seed)
    batch = recipe.train.batch_tokens // config.context
    model = fit(config, lambda step: loader.batch(step, batch), steps, optim(recipe, lr), seed)
    with torch.inference_mode():
        batches = validation(val_text, config.context, batch, val_text.manifest.eot)
        nats = sum(float(model.loss(x, y)) for x, y in batches)
    return {
        "bits per byte": nats / val_text.bytes / math.log(2),
        "parameters": count_parameters(config),
        "state bytes": members.state_bytes(config, config.context),
        "seconds": time.perf_counter() - start,
    }


def corpus(source: str) -> tuple[Config, Shards, Shards]:
    """The recipe with the size of its vocabulary, its training text, and its validation text."""
    recipe = load("shakespeare", {"data.source": source})
    folder = prepare(**recipe.data.preparation, log=lambda line: print(line, file=sys.stderr))
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    model = dataclasses.replace(recipe.model, vocab_size=tokenizer.vocab_size)
    return dataclasses.replace(recipe, model=model), Shards(folder, "train"), Shards(folder, "val")


def optim(recipe: Config, lr: float) -> OptimConfig:
    """The recipe's optimizers with `lr` times its learning rates."""
    old = recipe.optim
    return dataclasses.replace(old, lr=lr * old.lr, muon_lr=lr * old.muon_lr)


def table(rows: list[Row]) -> str:
    lines = []
    for (member,), own in groups(rows, "member").items():
        best = best_rate(own, "bits per byte")
        seconds, size = f"{mean(best, 'seconds'):.0f}", (f"{best[0][name]:,}" for name in ("parameters", "state bytes"))
        lines.append([member, span(best, "bits per byte"), f"{best[0]['lr']:.2g}", *size, seconds])
    lines.sort(key=lambda line: line[1])
    return markdown(["", "bits per byte", "best rate", "parameters", "state, bytes", "seconds"], lines) + how()


def picture(rows: list[Row], path: Path) -> None:
    rates = sorted(rows, key=lambda row: row["lr"])
    draw(
        path,
        [[Panel(curves(rates, ["member"], "lr", MEASURES[0]), "learning rate / shakespeare's", MEASURES[0], log="x")]],
    )
