"""Evaluate a run: perplexity and bits per byte on any text, accuracy on tasks.

    python -m evals runs/shakespeare                           the run's validation text
    python -m evals runs/shakespeare --text kjv my-notes/      any text that data.source takes
    python -m evals runs/shakespeare --tasks example_tasks.jsonl   last words, cloze, multiple choice
    python -m evals runs/shakespeare --needle                  a needle in a haystack, by length and depth

A text is evaluated like the validation text in training: documents are separated by an end-of-text token and cut into
sequences of model.context tokens; every token is predicted once. The computation is in fp32. Task formats: see
evals/tasks.py, and for --needle evals/needle.py. For lm-eval's tasks, see evals/lm_eval_adapter.py.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.report import table
from data.tokenizer import Tokenizer
from evals import needle, tasks
from evals.perplexity import measure, own_validation, tokens_of
from model import GPT
from sample import load
from training import device
from training.command_line import Parser
from training.config import Config, TrainConfig
from training.config_files import load as load_recipe


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    p = Parser("python -m evals", "Evaluate a run on texts and tasks.")
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
    p.add_argument("--needle", action="store_true", help="find a sentence in the run's validation text, or in --text")
    p.add_argument(
        "--lengths", nargs="+", type=int, default=[], metavar="N", help="of --needle, in tokens; default: the context, "
        "half, a quarter and an eighth of it",
    )  # fmt: skip
    p.add_argument("--items", type=int, metavar="N", help="of --needle, per length and depth; default: 20")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder for needle.json and needle.png")
    return p.parse_args(words)


def run(a: argparse.Namespace) -> None:
    """Evaluate and print the results as tables."""
    if a.limit < 0:
        raise ValueError(f"--limit {a.limit}: must be at least 0")
    if a.items is not None and a.items < 1:
        raise ValueError(f"--items {a.items}: must be at least 1")
    if not a.needle and (a.lengths or a.items or a.out):
        raise ValueError("--lengths, --items and --out: go with --needle")
    a.items = a.items or 20
    if a.out:
        a.out.mkdir(parents=True, exist_ok=True)  # before any slow step
    items = {path: tasks.read(path) for path in a.tasks}  # a malformed line fails before any slow step
    model, tokenizer = load(a.run, a.checkpoint)
    if not (file := a.run / "config.toml").is_file():
        raise ValueError(f"{a.run}: is not the folder of a run: there is no {file}")
    config = load_recipe(str(file))
    machine = device.choose(TrainConfig(steps=1, dtype="float32", compile="off"))
    model.to(machine.device)
    model.model.document_start = config.data.document_start(tokenizer)
    if config.data.document_mask:
        print("attention within documents (data.document_mask)")
    if a.needle:
        find_needles(a, model, tokenizer, config)
        return
    rows = []
    if not a.text and not a.tasks:
        text = own_validation(a.run, config)
        for part, _ in text.parts if len(text.parts) > 1 else ():
            rows.append([f"{part.manifest.source} (validation)", *measure(model, part, config, machine)])
        rows.append([f"{config.data.name} (validation)", *measure(model, text, config, machine)])
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


def find_needles(a: argparse.Namespace, model: GPT, tokenizer: Tokenizer, config: Config) -> None:
    """Evaluate --needle, and print its table."""
    if a.tasks or len(a.text) > 1:
        raise ValueError("--needle: goes with one --text at most, and without --tasks")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if a.text:
            text = tokens_of(a.text[0], a.text_column, a.limit, tokenizer, Path(folder))
        else:
            text, _ = own_validation(a.run, config).parts[0]
        lengths = a.lengths or needle.default_lengths(model.config.context)
        cells = needle.evaluate(model, tokenizer, text, lengths, a.items)
    print(f"{text.manifest.source}: {a.items} items, choice of {needle.CANDIDATES} words, gain in nats")
    print(table(["tokens", "", *(f"{depth:.0%}" for depth in needle.DEPTHS)], needle.rows(cells)))
    if a.out:
        needle.save(a.out, cells, {"run": str(a.run), "text": text.manifest.source, "items": a.items})


def main(words: list[str] | None = None) -> int:
    """Run the command. A user error is one line on stderr and exit status 2, without a traceback."""
    a = arguments(words)
    try:
        run(a)
    except ValueError as error:
        print(f"evals: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"evals: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
