"""What does the next token cost after a long text? Time and memory of decoding, against the length of the context.

Attention reads the keys and values of all tokens, a recurrent layer a state of constant size. Measured for a batch of
sequences and a model of `shakespeare`'s size with random weights: the median milliseconds of a step, which gives each
sequence one token, at the end of the context; the bytes that a sequence keeps; and those that KVCache allocates for it.
The cache is filled with random numbers, not by a prefill. All members run in PyTorch: heed's C++ engine has attention
only, and would decide by its code, not by the mechanism.
"""

import dataclasses
import statistics
import time
from pathlib import Path

import torch

from benchmarks.zoo import members
from benchmarks.zoo.pictures import Panel, curves, draw
from benchmarks.zoo.results import Point, Row, groups, markdown
from inference.engine import EagerEngine
from model import GPT, KVCache, ModelConfig

EXCLUSIVE = True
BASE = ModelConfig(
    vocab_size=4096, context=256, n_layer=4, n_head=4, n_kv_head=4, n_embd=128, head_dim=32, n_ffn=352
)  # of the recipe `shakespeare`
CONTEXTS = (16384, 256, 4096, 1024)
WARMUP, STEPS = 3, 32
TIME_LIMIT = 20.0  # seconds, after which three measured steps are enough
SAME = ("dot product, unscaled",)  # computes what softmax attention computes
MEASURES = ("ms per step", "state bytes", "cache bytes")


def points(scale: str, seeds: int) -> list[Point]:
    """The weights are random, and all seeds alike."""
    contexts = {"full": CONTEXTS, "short": CONTEXTS[1:3], "quick": (64, 128)}[scale]
    batch = 2 if scale == "quick" else 8
    names = [name for name in members.MEMBERS if name not in SAME]
    return [{"member": name, "context": context, "batch": batch} for context in contexts for name in names]


@torch.inference_mode()
def measure(member: str, context: int, batch: int) -> dict[str, float]:
    config = dataclasses.replace(members.config(member, BASE), context=context)  # a window does not grow
    torch.manual_seed(0)
    engine, cache = EagerEngine(GPT(config).eval()), KVCache(config, batch)
    states = [state for layer in cache.layers for state in layer]
    for state in states:
        state.uniform_()  # positive: the denominators of linear attention are sums of it
    cache.lengths.fill_(context - WARMUP - STEPS)
    took = list[float]()
    while len(took) < WARMUP + 3 or (len(took) < WARMUP + STEPS and sum(took) < TIME_LIMIT):
        tokens = torch.randint(config.vocab_size, (batch, 1))
        start = time.perf_counter()
        engine(tokens, cache)
        took.append(time.perf_counter() - start)
    return {
        "ms per step": 1000 * statistics.median(took[WARMUP:]),
        "state bytes": members.state_bytes(config, context),
        "cache bytes": sum(state.nbytes for state in states) / batch,
    }


def table(rows: list[Row]) -> str:
    contexts = sorted({row["context"] for row in rows})
    body = []
    for (member,), own in groups(rows, "member").items():
        at = {row["context"]: row for row in own}
        cells = [f"{at[c]['ms per step']:.1f}" if c in at else "" for c in contexts]
        cells += [f"{at[c][kind] / 1024:,.0f}" if c in at else "" for kind in MEASURES[1:] for c in contexts]
        body.append([member, *cells])
    heads = [f"{what} at {c:,}" for what in ("ms per step", "KiB kept", "KiB allocated") for c in contexts]
    return markdown(["member", *heads], body)


def picture(rows: list[Row], path: Path) -> None:
    shown = {"ms per step": "milliseconds per step", "state bytes": "bytes per sequence"}
    x = "tokens of context"
    draw(path, [[Panel(curves(rows, ["member"], "context", y), x, label, log="xy") for y, label in shown.items()]])
