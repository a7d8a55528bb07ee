"""Compare runs: their curves in one picture, their results in one table, from metrics.jsonl.

    python -m evals.compare runs/shakespeare runs/mamba
    python -m evals.compare runs/*/ --out curves.png

A run that is being trained can be compared, too. The validation loss is that of the evaluations in training, or of the
whole split at the end, where there is one (train.eval_tokens). Losses in nats/token can be compared between runs with
one tokenizer, bits per byte between any tokenizers, both on one text only.
"""

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import table
from sample import RUNS
from training import metrics
from training.command_line import Parser
from training.config import Config
from training.config_files import load as load_recipe
from training.flops import count_parameters

COLUMNS = ["run", "parameters", "steps", "tokens", "minutes", "final loss", "best loss", "bits/byte"]


class Run(NamedTuple):
    """What a run's folder says about it."""

    name: str
    config: Config
    tokenizer: str  # hash of its file
    records: list[dict[str, Any]]

    def series(self, name: str) -> list[tuple[int, float]]:
        """Steps and values of the records that have `name`."""
        return [(record["step"], record[name]) for record in self.records if name in record]

    def row(self) -> list[str]:
        """Of the table, COLUMNS. bits/byte belong to the best loss."""
        losses = self.series("val_loss")
        steps = max(record["step"] for record in self.records)
        full = [dict(self.series(name)).get(steps) for name in ("full_val_loss", "full_val_bpb")]  # resumed: of the end
        seconds = self.series("seconds")
        numbers = f"{count_parameters(self.config.model):,}", f"{steps:,}", f"{steps * self.batch:,}"
        minutes = f"{seconds[-1][1] / 60:.1f}" if seconds else "-"
        if None not in full:
            loss, bpb = (f"{number:.4f}" for number in full)
            return [self.name, *numbers, minutes, loss, loss, bpb]
        if not losses:
            return [self.name, *numbers, minutes, "-", "-", "-"]
        step, best = min(losses, key=lambda pair: pair[1])
        bits = dict(self.series("val_bpb"))[step]
        return [self.name, *numbers, minutes, f"{losses[-1][1]:.4f}", f"{best:.4f}", f"{bits:.4f}"]

    @property
    def batch(self) -> int:
        """Tokens per step."""
        return self.config.train.batch_tokens

    @property
    def text(self) -> dict[str, Any]:
        """The fields that say which text the run learned and was evaluated on."""
        fields = self.config.data.preparation.items()
        return {f"data.{name}": value for name, value in fields if name not in ("tokenizer", "vocab_size")}

    @property
    def measure(self) -> dict[str, Any]:
        """The fields that say what of that text an evaluation predicts, and from how many tokens."""
        data, train, model = self.config.data, self.config.train, self.config.model
        return {
            "data.document_mask": data.document_mask,
            "train.eval_tokens": train.eval_tokens,
            "model.context": model.context,
        }


def read(folder: Path, name: str) -> Run:
    """The run in a folder. Raises ValueError if it is none, or has no metrics yet."""
    for path in (folder, folder / "config.toml", folder / "tokenizer.json", folder / metrics.NAME):
        if not path.exists():
            raise ValueError(f"{folder}: is not the folder of a run: there is no {path}")
    records = metrics.read(folder / metrics.NAME)
    if not records:
        raise ValueError(f"{folder / metrics.NAME}: has no record: the run has not made a step yet")
    tokenizer = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    return Run(name, load_recipe(str(folder / "config.toml")), tokenizer, records)


def notes(runs: list[Run]) -> list[str]:
    """What must not be compared."""
    found = []
    if fields := differing([run.text for run in runs]):
        found.append(f"the runs have different texts ({', '.join(fields)}): their losses cannot be compared")
    elif len({run.tokenizer for run in runs}) > 1:
        found.append("the runs have different tokenizers: compare bits per byte, not nats per token")
    if fields := differing([run.measure for run in runs]):
        found.append(f"the runs differ in {', '.join(fields)}: their losses are not measured alike")
    return found


def differing(configs: list[dict[str, Any]]) -> list[str]:
    """The fields that do not have one value in all."""
    return [name for name, value in configs[0].items() if any(config[name] != value for config in configs)]


def draw(path: Path, runs: list[Run]) -> None:
    """Write a PNG: losses against tokens, and bits per byte against minutes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    lowest = []
    for number, run in enumerate(runs):
        color = f"C{number % 10}"
        for name, style in (("loss", {"alpha": 0.3, "linewidth": 0.8}), ("val_loss", {"marker": "o", "markersize": 3})):
            if points := run.series(name):
                left.plot([step * run.batch for step, _ in points], [y for _, y in points], color=color, **style)
                lowest += [y for _, y in points[len(points) // 20 :]]
        bits, seconds = run.series("val_bpb"), dict(run.series("seconds"))
        right.plot([seconds[step] / 60 for step, _ in bits], [y for _, y in bits], "o-", color=color, markersize=3,
                   label=run.name)  # fmt: skip
    if lowest:  # the first steps would fill the picture
        spread = max(lowest) - min(lowest)
        left.set_ylim(min(lowest) - 0.05 * spread, max(lowest) + 0.05 * spread)
    left.set(xlabel="tokens", ylabel="loss (nats/token)", title="training (pale) and validation loss")
    right.set(xlabel="minutes of training", ylabel="bits per byte", title="validation")
    for axis in (left, right):
        axis.grid(alpha=0.25)
    right.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    p = Parser("python -m evals.compare", "Compare runs.")
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    p.add_argument("--out", type=Path, default=RUNS / "compare.png", metavar="FILE", help="the picture, a .png; "
        "default: runs/compare.png")  # fmt: skip
    return p.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Run the command. A user error is one line on stderr and exit status 2, without a traceback."""
    a = arguments(words)
    try:
        folders = list(dict.fromkeys(path.resolve() for path in a.runs))
        names = [folder.name for folder in folders]
        # Runs of one name are told apart by their folders.
        runs = [
            read(folder, folder.name if names.count(folder.name) == 1 else "/".join(folder.parts[-2:]))
            for folder in folders
        ]
        if a.out.suffix != ".png" or not a.out.parent.is_dir():
            raise ValueError(f"--out {a.out}: must be a .png in a folder that exists")
        print(table(COLUMNS, [run.row() for run in runs]))
        for note in notes(runs):
            print(note)
        draw(a.out, runs)
        print(f"wrote {a.out}")
    except ValueError as error:
        print(f"evals.compare: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"evals.compare: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
