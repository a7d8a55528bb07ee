"""Look at a run's attention: a picture, a page, and what each head does, in numbers.

    python -m evals.attention_maps runs/shakespeare --prompt "To be, or not to be"
    python -m evals.attention_maps runs/shakespeare --repeated      random tokens, twice: induction heads show

attention.png and attention.html are written into the run's folder: the maps of all layers and heads, one of them large,
with the tokens. The table has each head's entropy and mean distance over the text, and the patterns of
inference/attention_patterns.py, of which those with at least 0.4 of the weight are named. Weights are those of the
reference kernel; that they are what the model's own kernel computed is checked, and printed. Mixers of zoo/ show their
implied map, if there is one. The computation is in fp32.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import table
from evals.attention_heads import Head, difference, inspect, losses, random_text
from evals.attention_pictures import draw, write_page
from inference.attention_patterns import shares
from inference.attention_weights import attention_weights
from inference.implied_maps import NONE
from model import ModelConfig
from sample import load
from training.command_line import Parser
from zoo import MIXERS

LARGEST = 4_000_000  # entries of all maps: what a page can hold
TOLERANCE = 1e-2  # of the largest output; kernels for GPUs multiply in TF32


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    p = Parser("python -m evals.attention_maps", "Look at a run's attention.")
    p.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    text = p.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="the text to look at; - reads standard input")
    text.add_argument("--repeated", action="store_true", help="random tokens, repeated: shows induction heads")
    p.add_argument("--head", metavar="LAYER.HEAD", default="", help="the map that is large at first, numbers from 1; "
        "default: the one with the highest induction score")  # fmt: skip
    p.add_argument("--checkpoint", default="best", help="best, latest or a step such as step-000500; default: best")
    return p.parse_args(words)


def large(words: str, heads: list[Head]) -> Head:
    """The head that --head names, by default the one with the highest induction score. Raises ValueError."""
    if not words:
        return max(heads, key=lambda head: head.induction)
    named = {f"{head.layer}.{head.head}": head for head in heads}
    if words not in named:
        first, last = (f"{head.layer}.{head.head}" for head in (heads[0], heads[-1]))
        raise ValueError(f"--head {words}: must be a layer with a map and its head, from {first} to {last}")
    return named[words]


def number_of_maps(config: ModelConfig) -> int:
    """One for each head; Mamba-2 has two for each of the others'."""
    mixers = [config.mixer(layer) for layer in range(config.n_layer)]
    return sum(config.n_head * (2 if mixer is MIXERS["M"] else 1) for mixer in mixers if mixer not in NONE)


def run(a: argparse.Namespace) -> None:
    """Write the picture and the page, and print what each head does."""
    model, tokenizer = load(a.run, a.checkpoint)
    device = model.model.cos.device
    if a.repeated:
        tokens = random_text(model, tokenizer, seed=0)
    else:
        tokens = torch.tensor(tokenizer.encode_prompt(sys.stdin.read() if a.prompt == "-" else a.prompt), device=device)
    if not 2 <= len(tokens) <= model.config.context:
        raise ValueError(f"--prompt: has {len(tokens)} tokens, must have 2 to model.context = {model.config.context}")
    if (size := number_of_maps(model.config) * len(tokens) ** 2) > LARGEST:
        raise ValueError(f"--prompt: {len(tokens)} tokens make {size:,} weights, at most {LARGEST:,} fit into a page")
    maps = attention_weights(model, tokens)
    for layer, found in enumerate(maps):
        if found is None:
            kind = model.config.mixer(layer)
            print(f"layer {layer + 1}, {kind.__name__}: no map ({NONE[kind]})")
    heads = inspect(model, tokenizer, maps)
    if not heads:
        raise ValueError(f"{a.run}: no layer has a map")
    chosen = large(a.head, heads)
    print(table(["head", "entropy", "evenness", "distance", "previous", "first", "induction", ""], rows(heads)))
    before, after = losses(model, tokenizer)
    print(f"random tokens cost {before:.2f} nats/token, at their second occurrence {after:.2f}")
    if not (wrong := difference(model, tokens)) <= TOLERANCE:  # nor NaN
        raise ValueError(f"{a.run}: weights times values differ from the kernel's output by {wrong:.1e} of the largest")
    print(f"weights times values equal the output of the model's kernel within {wrong:.0e} of the largest output")
    pieces = [tokenizer.decode([token]) for token in tokens.tolist()]
    signed = [None if found is None else (found.sign() * shares(found)).cpu() for found in maps]
    names = {(head.layer, head.head): head.name for head in heads}
    picture, page = a.run / "attention.png", a.run / "attention.html"
    title = f"attention maps of {a.run.name}"
    draw(picture, signed, names, (chosen.layer, chosen.head), pieces, title)
    write_page(page, signed, names, (chosen.layer, chosen.head), pieces, title)
    print(f"wrote {picture} and {page}")


def rows(heads: list[Head]) -> list[list[Any]]:
    """Of the table: a line for each head."""
    return [
        [
            f"{h.layer}.{h.head}",
            *(f"{x:.2f}" for x in h[2:4]),
            f"{h.distance:.1f}",
            *(f"{x:.2f}" for x in h[5:]),
            h.name,
        ]
        for h in heads
    ]


def main(words: list[str] | None = None) -> int:
    """Run the command. A user error is one line on stderr and exit status 2, without a traceback."""
    a = arguments(words)
    try:
        run(a)
    except ValueError as error:
        print(f"evals.attention_maps: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"evals.attention_maps: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
