"""How much can a state of fixed size recall? Multi-query associative recall, against the state's size.

A sequence lists n pairs of a key and a value. Then the keys come again among random values, more often soon than late,
and at each the model must predict the key's value (MQAR, Arora et al. 2023, arXiv 2312.04927). The model is a layer of
short convolution, so that a token knows the one before it, and a layer of the member. It trains on n = 2, 4, 8 and 16
together. Measured: the fraction of values predicted at each n, on new sequences. The state's size follows head_dim.
"""

import time
from pathlib import Path

import torch
from torch import Generator, Tensor

from benchmarks.zoo import members
from benchmarks.zoo.fit import Batch, accuracy, fit, how, task_optim
from benchmarks.zoo.pictures import Curves, Panel, curves, draw
from benchmarks.zoo.results import Point, Row, best_rate, groups, markdown, mean, span
from kernels.reference_attention import IGNORE_INDEX
from model import ModelConfig
from training.flops import count_parameters

EXCLUSIVE = False
PAIRS = (2, 4, 8, 16)
MEASURES = (*(f"accuracy at {n}" for n in PAIRS), "parameters", "state bytes", "seconds")
LENGTH, VOCAB = 64, 128  # tokens; the first half of the vocabulary are keys, the second half values
HEAD_DIMS = (32, 16, 8)
RATES = (1.0, 1 / 3, 3.0)  # see fit.task_optim
TARGETS = 64  # of each n in a step, so that the 60 sequences include many short lists, which are learned first


# Members of one layer; in a text as short as this BigBird reads everything.
ASKED = [n for n, fields in members.MEMBERS.items() if len(fields["layer_pattern"]) == 1 and n != "BigBird"]


def points(scale: str, seeds: int) -> list[Point]:
    steps = {"full": 1500, "short": 500, "quick": 2}[scale]
    sizes, rates = (HEAD_DIMS, RATES) if scale == "full" else (HEAD_DIMS[:1], RATES[:1])
    return [
        {"member": member, "head_dim": head_dim, "lr": lr, "seed": seed, "steps": steps}
        for head_dim in sizes
        for seed in range(seeds)
        for lr in rates
        for member in ASKED[: 3 if scale == "quick" else None]
    ]


def base(head_dim: int) -> ModelConfig:
    """The sizes of the model, as `members.config` needs them."""
    return ModelConfig(
        vocab_size=VOCAB, context=LENGTH, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, head_dim=head_dim, n_ffn=176
    )


def measure(member: str, head_dim: int, lr: float, seed: int, steps: int) -> dict[str, float]:
    start = time.perf_counter()
    config = members.config(member, base(head_dim), first="C")
    generator = Generator().manual_seed(seed)

    def batch(step: int) -> Batch:
        x, y = zip(*(sequences(generator, TARGETS // n, n) for n in PAIRS), strict=True)
        return torch.cat(x), torch.cat(y)

    model = fit(config, batch, steps, task_optim(lr, steps), seed)
    tests = ((n, sequences(Generator().manual_seed(n), 256, n)) for n in PAIRS)
    return {
        **{f"accuracy at {n}": accuracy(model, x, y) for n, (x, y) in tests},
        "parameters": count_parameters(config),
        "state bytes": members.state_bytes(config, LENGTH),
        "seconds": time.perf_counter() - start,
    }


def sequences(generator: Generator, count: int, n: int) -> Batch:
    """Inputs and targets (count, LENGTH) with n pairs; targets are IGNORE_INDEX except where a key comes again."""
    keys = torch.rand(count, VOCAB // 2, generator=generator).argsort(1)[:, :n]  # distinct

    def random_values(size: int) -> Tensor:
        return torch.randint(VOCAB // 2, VOCAB, (count, size), generator=generator)

    values, rest = random_values(n), random_values(LENGTH - 2 * n)
    # n places, without replacement, with probabilities as 1 / place: the largest log probabilities plus Gumbel noise
    noise = -torch.empty(rest.shape).exponential_(generator=generator).log()
    places = (noise - torch.arange(1, LENGTH - 2 * n + 1).log()).topk(n).indices
    places = places.gather(1, torch.rand(places.shape, generator=generator).argsort(1))
    rest.scatter_(1, places, keys)
    y = torch.full((count, LENGTH), IGNORE_INDEX)
    y[:, 2 * n :].scatter_(1, places, values)
    return torch.cat((torch.stack((keys, values), 2).flatten(1), rest), 1), y


def best(rows: list[Row]) -> dict[tuple[str, int], list[Row]]:
    """The rows of each member and head size at the learning rate with the best accuracy at the most pairs."""
    measure = f"accuracy at {PAIRS[-1]}"
    return {kind: best_rate(own, measure, largest=True) for kind, own in groups(rows, "member", "head_dim").items()}


def table(rows: list[Row]) -> str:
    header = ["values recalled of", "head size", "state, bytes", *(f"n = {n}" for n in PAIRS), "best rate", "seconds"]
    lines = []
    for (member, head_dim), own in best(rows).items():
        accuracies = (span(own, f"accuracy at {n}", 2) for n in PAIRS)
        size, lr, seconds = f"{own[0]['state bytes']:,}", f"{own[0]['lr']:.2g}", f"{mean(own, 'seconds'):.0f}"
        lines.append([member, head_dim, size, *accuracies, lr, seconds])
    return markdown(header, lines) + how()


def picture(rows: list[Row], path: Path) -> None:
    shown = best(rows)
    largest: Curves = {
        member: (PAIRS, [mean(own, f"accuracy at {n}") for n in PAIRS])
        for (member, head_dim), own in shown.items()
        if head_dim == HEAD_DIMS[0]
    }
    sizes = curves([row for own in shown.values() for row in own], ["member"], "state bytes", MEASURES[len(PAIRS) - 1])
    y = "fraction of values recalled"
    panels = [Panel(largest, "n", y, f"head size {HEAD_DIMS[0]}")]
    draw(path, [[*panels, Panel(sizes, "bytes of the state", y, f"n = {PAIRS[-1]}, all head sizes", log="x")]])
