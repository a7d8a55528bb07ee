"""Evaluate a run: perplexity and bits per byte on any text, accuracy on tasks.

    python -m evals runs/shakespeare                           the run's validation text
    python -m evals runs/shakespeare --text kjv my-notes/      any text that data.source takes
    python -m evals runs/shakespeare --tasks example_tasks.jsonl   last words, cloze, multiple choice

A text is evaluated like the validation text in training: documents are separated by an end-of-text token and cut into
sequences of model.context tokens; every token is predicted once. The computation is in fp32. Task formats: see
evals/tasks.py. For lm-eval's tasks, see evals/lm_eval_adapter.py.
"""

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.report import table
from data.chunking import Piece
from data.prepare import Splitter, prepare, write
from data.shards import Shards
from data.sources import Corpus, CorpusError, open_corpus
from data.tokenizer import Tokenizer
from evals import tasks
from model import GPT
from sample import load
from training import device
from training.checkpoint import CheckpointError, find, read_state
from training.config import Config, TrainConfig
from training.distributed import World
from training.evaluation import validate
from training.recipes import load as load_recipe


class AllValidation(Splitter):
    """All pieces of a corpus in the validation split."""

    def __init__(self, corpus: Corpus):
        self.corpus = corpus

    def __iter__(self) -> Iterator[tuple[str | None, Piece]]:
        return (("val", piece) for piece in self.corpus.pieces())


def tokens_of(source: str, text_column: str, limit: int, tokenizer: Tokenizer, folder: Path) -> Shards:
    """Tokenize a whole text into `folder`. Raises CorpusError and TokenizerError."""
    try:
        corpus = open_corpus(source, text_column=text_column, limit=limit)
        manifest = write(folder, AllValidation(corpus), tokenizer, log=lambda _: None)
    except CorpusError as error:  # replace config keys by this command's options
        raise CorpusError(
            str(error).replace("data.source =", "--text").replace("data.text_column =", "--text-column")
        ) from None
    (folder / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest)))
    return Shards(folder, "val")


def own_validation(run: Path, config: Config) -> Shards:
    """The validation text of a run, cached or tokenized again. Raises CheckpointError if the text has changed."""
    folder = prepare(**dataclasses.asdict(config.data))
    if folder.name != read_state(find(run, "latest"))["identity"]["text"]:
        raise CheckpointError(f"{run}: data.source = {config.data.source!r} has changed since; name a --text")
    return Shards(folder, "val")


def measure(model: GPT, text: Shards, config: Config, machine: device.Machine) -> list[str]:
    """Tokens, bytes, documents, nats/token, perplexity and bits per byte, formatted."""
    loss = validate(model, text, config, World(), machine, text.manifest.eot)
    assert loss is not None  # nothing stops it
    model.eval()
    bits = loss * text.num_targets / text.bytes / math.log(2)
    counts = [f"{count:,}" for count in (text.num_targets, text.bytes, text.manifest.splits["val"]["documents"])]
    return [*counts, f"{loss:.4f}", f"{math.exp(loss):,.2f}", f"{bits:.4f}"]


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    p = argparse.ArgumentParser(
        prog="python -m evals", description="Evaluate a run on texts and tasks.", allow_abbrev=False
    )
    p.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    p.add_argument("--checkpoint", default="best", help="best, latest or a step such as step-000500; default: best")
    p.add_argument(
        "--text", nargs="+", default=[], metavar="SOURCE", help="shakespeare | kjv | wiki, a file, a folder, a glob or "
        "hf:NAME; default: the run's validation text, unless --tasks is given",
    )  # fmt: skip
    p.add_argument("--text-column", default="text", help="column with the text in tables; default: text")
    p.add_argument("--limit", type=int, default=0, help="maximum number of documents per text; default: 0, all")
    p.add_argument(
        "--tasks",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="JSONL of lambada, cloze and choice items, see docs/8-evaluation.md",
    )
    return p.parse_args(words)


def run(a: argparse.Namespace) -> None:
    """Evaluate and print the results as tables."""
    if a.limit < 0:
        raise ValueError(f"--limit {a.limit}: must be at least 0")
    items = {path: tasks.read(path) for path in a.tasks}  # a malformed line fails before any slow step
    model, tokenizer = load(a.run, a.checkpoint)
    config = load_recipe(str(a.run / "config.toml"))
    machine = device.choose(TrainConfig(steps=1, dtype="float32", compile="off"))
    model.to(machine.device)
    rows = []
    if not a.text and not a.tasks:
        text = own_validation(a.run, config)
        rows.append([f"{config.data.source} (validation)", *measure(model, text, config, machine)])
    for source in a.text:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            text = tokens_of(source, a.text_column, a.limit, tokenizer, Path(folder))
            rows.append([source, *measure(model, text, config, machine)])
    if rows:
        print(table(["text", "tokens", "bytes", "documents", "nats/token", "perplexity", "bits/byte"], rows))
    rows = [
        [str(path), *map(str, result[:3]), *(str(value or "-") for value in result[3:])]
        for path, own in items.items()
        for result in tasks.evaluate(model, tokenizer, own)
    ]
    if rows:
        print(table(["file", "task", "items", "accuracy", "accuracy per byte", "perplexity"], rows))


def main(words: list[str] | None = None) -> int:
    """Run the command. A user error is one line on stderr and exit status 2, without a traceback."""
    a = arguments(words)
    try:
        run(a)
    except ValueError as error:
        print(f"evals: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
