"""Metrics of a run: metrics.jsonl, the progress line, the loss curve as a picture, Weights & Biases and TensorBoard.

metrics.jsonl has one JSON object per line. For a training step: step, loss, grad_norm, lr, tok_per_s, and mfu where the
peak of the device is known. For an evaluation: step, val_loss, val_bpb, seconds; with train.eval_tokens at the end
full_val_loss and full_val_bpb, over the whole split; and the signs of collapse.py. Losses are in nats/token, bpb is
bits per byte. A running process only appends to the file; a resumed one first replaces it by one without the records
that it will write again. wandb and TensorBoard get the same records under the same names.
"""

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.checkpoint import replace_file
from training.config import Config
from training.tensorboard import TensorBoard
from training.time_budget import StepBudget

NAME, DAMAGED = "metrics.jsonl", "metrics.damaged.jsonl"


class Metrics:
    """Writes the metrics of one run."""

    def __init__(self, run: Path, step: int, config: Config) -> None:
        """Records after `step` are dropped: the resumed run computes those steps again."""
        if note := repair(run, step):
            log(note)
        self.file = (run / NAME).open("a", buffering=1, encoding="utf-8")
        self.trackers = {"wandb": _start_wandb(run, config.train.wandb, dataclasses.asdict(config))}
        if config.train.tensorboard:
            self.trackers["TensorBoard"] = TensorBoard(run, step)
        self.last_line = 0.0

    def log(self, step: int, **values: float) -> None:
        """Write one record."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self._tell(lambda tracker: tracker.log(values, step=step))
        if "loss" not in values:  # an evaluation: a resumed run does not repeat it
            self.sync()

    def sync(self) -> None:
        """Wait until all records are on the disk, and with TensorBoard: a checkpoint must not be newer than
        they are."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self._tell(lambda tracker: tracker.flush() if isinstance(tracker, TensorBoard) else None)

    def _tell(self, call: Callable[[Any], Any]) -> None:
        """Call with each tracker. One that fails is not called again: the run continues whatever it raises."""
        for name, tracker in self.trackers.items():
            try:
                if tracker:
                    call(tracker)
            except Exception as error:
                print(f"{name} stopped logging: {error}")
                self.trackers[name] = None

    def progress(self, text: str, *, now: bool = False) -> None:
        """Print a line that overwrites itself on a terminal; elsewhere one line every ten seconds, or `now`."""
        terminal = sys.stdout.isatty()
        if now or time.monotonic() - self.last_line > (0.2 if terminal else 10):
            self.last_line = time.monotonic()
            print(f"\r\x1b[K{text}" if terminal else text, end="" if terminal else "\n", flush=True)

    def close(self) -> None:
        self.file.close()
        self._tell(lambda tracker: tracker.finish())


def log(text: str) -> None:
    """Print a line, in place of the progress line."""
    print(f"\r\x1b[K{text}" if sys.stdout.isatty() else text, flush=True)


def progress_line(step: int, budget: StepBudget, loss: float, grad_norm: float, lr: float, tok_per_s: float) -> str:
    """What is logged after a step."""
    of = f"/{budget.num_steps}" if budget.num_steps else ""
    eta = f"{(budget.num_steps - step) * budget.step_seconds / 60:.1f} min" if budget.num_steps else "unknown"
    numbers = f"loss {loss:.3f} | grad_norm {grad_norm:.2f} | lr {lr:.2g} | tok/s {tok_per_s:,.0f}"
    return f"step {step}{of} | {numbers} | eta {eta}"


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, without lines that are not records: truncated by a kill, or damaged."""
    return [record for record in _lines(path) if record]


def repair(run: Path, step: int) -> str:
    """Drop the records after `step` from metrics.jsonl, and what is not a record; "" or a line that says so.

    A truncated last line is what a kill leaves. If other lines are damaged, the file is kept as DAMAGED.
    """
    path, lines = run / NAME, _lines(run / NAME)
    kept = [record for record in lines if record and record["step"] <= step]
    bad = lines.count(None)
    if bad > (bool(lines) and lines[-1] is None):
        shutil.copyfile(path, run / DAMAGED)
    if len(kept) < len(lines):
        replace_file(path, "".join(json.dumps(record) + "\n" for record in kept))
        if bad > (lines[-1] is None):
            return f"{path}: {bad} of {len(lines)} lines are damaged and left out; the file as it was is {DAMAGED}"
    return ""


def _lines(path: Path) -> list[dict[str, Any] | None]:
    """Each line of a metrics.jsonl: its record, or None."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    return [_record(line) for line in lines[:-1]] + [None] * bool(lines[-1])  # every record ends with a newline


def _record(line: bytes) -> dict[str, Any] | None:
    """A line as a record: numbers by name, among them the step. None if it is not one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not all(type(value) in (int, float) for value in record.values()):
        return None
    return record if type(record.get("step")) is int else None


def plot(run: Path, title: str) -> None:
    """Plot the loss against steps as run/loss.png, from run/metrics.jsonl. A failure is one line: training goes on."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read(run / "metrics.jsonl")
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    val = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    if train:
        axes.plot(*zip(*train, strict=True), color="#9db4d0", linewidth=0.8, label="training loss")
    if val:
        axes.plot(*zip(*val, strict=True), color="#c0392b", marker="o", markersize=4, label="validation loss")
        axes.annotate(
            f"{val[-1][1]:.3f}", val[-1], textcoords="offset points", xytext=(-4, 10), ha="right", color="#c0392b"
        )
    axes.set(xlabel="step", ylabel="loss (nats/token)", title=title)
    axes.grid(alpha=0.25)
    if train or val:
        axes.legend(frameon=False)
    draft = run / ".draft-loss.png"
    try:
        figure.savefig(draft, dpi=120)
        draft.replace(run / "loss.png")
    except OSError as error:
        draft.unlink(missing_ok=True)
        log(f"{run / 'loss.png'}: not drawn ({error.strerror})")
    plt.close(figure)


def _start_wandb(run: Path, mode: Any, config: dict[str, Any]) -> Any:
    """Start wandb; None, with the reason printed, if that fails.

    The mode is decided first: after a failed online start, an offline one fails, too.
    """
    if mode == "off":
        return None
    try:
        import wandb

        if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            print("wandb: no API key (see wandb login): logging offline, upload later with wandb sync")
            mode = "offline"
        settings = wandb.Settings(silent=True, init_timeout=30)
        return wandb.init(project="heed", name=run.name, dir=run, mode=mode, config=config, settings=settings)
    except Exception as error:
        print(f"wandb is off, it failed to start: {' '.join(str(error).split())[:200]}")
        return None
