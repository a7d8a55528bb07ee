"""Does one vector suffice for a sentence? Copying, against length.

A sequence is x1 ... xn SEP x1 ... xn, and the loss is over its second half. A recurrent network that reads the first
half and the separator is an encoder; its state after the separator is the fixed-length vector of Bahdanau et al. (2015,
arXiv 1409.0473), whose figure 2 this repeats as a language model: LSTMs (the paper has GRUs), alone and with additive
attention over all their states. Measured: the fraction of symbols predicted, given those before, for several n, also
beyond the longest in training.
"""

import time
from pathlib import Path

import torch
from torch import Generator, Tensor

from benchmarks.zoo import members
from benchmarks.zoo.fit import Batch, accuracy, fit, how, task_optim
from benchmarks.zoo.pictures import Curves, Panel, draw
from benchmarks.zoo.results import Point, Row, best_rate, groups, markdown, mean, span
from kernels.reference_attention import IGNORE_INDEX
from model import ModelConfig

EXCLUSIVE = False
LONGEST = 30  # symbols, in training
SIZES = (5, 10, 20, 30, 40, 50)
MEASURES = (*(f"accuracy at {n}" for n in SIZES), "seconds")
SYMBOLS = 32
RATES = (1.0, 1 / 3, 3.0)  # see fit.task_optim
SEQUENCES = 64  # per step
COMPARED = (
    "softmax attention", "LSTM", "LSTM, additive attention", "additive attention", "dot product, unscaled", "Mamba-2",
    "Gated DeltaNet",
)  # fmt: skip


def points(scale: str, seeds: int) -> list[Point]:
    steps = {"full": 1000, "short": 300, "quick": 2}[scale]
    compared = members.chosen(COMPARED[: 2 if scale == "quick" else None])
    # the LSTM a second time: it may just need more training
    runs = [
        *((member, steps) for member in compared),
        *((member, 3 * steps) for member in compared if member == "LSTM"),
    ]
    return [
        {"member": member, "lr": lr, "seed": seed, "steps": number}
        for seed in range(seeds)
        for lr in (RATES if scale == "full" else RATES[:1])
        for member, number in runs
    ]


def measure(member: str, lr: float, seed: int, steps: int) -> dict[str, float]:
    start = time.perf_counter()
    base = ModelConfig(
        vocab_size=SYMBOLS + 1, context=2 * max(SIZES), n_layer=2, n_head=2, n_kv_head=2, n_embd=64, head_dim=32,
        n_ffn=176,
    )  # fmt: skip
    generator = Generator().manual_seed(seed)

    def batch(step: int) -> Batch:
        return sequences(generator, torch.randint(1, LONGEST + 1, (SEQUENCES,), generator=generator), LONGEST)

    model = fit(members.config(member, base), batch, steps, task_optim(lr, steps), seed)
    tests = ((n, sequences(Generator().manual_seed(n), torch.full((256,), n), n)) for n in SIZES)
    found = {f"accuracy at {n}": accuracy(model, x, y) for n, (x, y) in tests}
    return found | {"seconds": time.perf_counter() - start}


def sequences(generator: Generator, sizes: Tensor, longest: int) -> Batch:
    """Inputs and targets (B, 2 * longest) of sequences with `sizes` (B,) symbols; a short one repeats itself up to the
    end. Targets are IGNORE_INDEX except in the second half."""
    n, t = sizes[:, None], torch.arange(2 * longest + 1)
    symbols = torch.randint(SYMBOLS, (len(sizes), longest + 1), generator=generator).scatter_(1, n, SYMBOLS)
    tokens = symbols.gather(1, t % (n + 1))  # (B, 2 * longest + 1)
    copied = (n < t) & (t <= 2 * n)
    return tokens[:, :-1], torch.where(copied, tokens, IGNORE_INDEX)[:, 1:]


def best(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each member, and number of steps, at the learning rate that is best at n = LONGEST."""
    measure, least = f"accuracy at {LONGEST}", min(row["steps"] for row in rows)
    found = {}
    for (member, steps), own in groups(rows, "member", "steps").items():
        times = f", {steps // least} times the steps" if steps > least else ""
        found[member + times] = best_rate(own, measure, largest=True)
    return found


def table(rows: list[Row]) -> str:
    header = ["symbols predicted of", *(f"n = {n}" for n in SIZES), "best rate", "seconds"]
    lines = (
        [name, *(span(own, m, 2) for m in MEASURES[:-1]), f"{own[0]['lr']:.2g}", f"{mean(own, 'seconds'):.0f}"]
        for name, own in best(rows).items()
    )
    return markdown(header, lines) + how()


def picture(rows: list[Row], path: Path) -> None:
    lines: Curves = {name: (SIZES, [mean(own, m) for m in MEASURES[:-1]]) for name, own in best(rows).items()}
    draw(path, [[Panel(lines, f"n; in training up to {LONGEST}", "fraction of symbols predicted")]])
