"""Metrics of a run: metrics.jsonl, the progress line, the loss curve as a picture, and Weights & Biases.

metrics.jsonl has one JSON object per line. For a training step: step, loss, grad_norm, lr, tok_per_s, and mfu where the
peak of the device is known. For an evaluation: step, val_loss, val_bpb, seconds. Losses are in nats/token, bpb is bits
per byte.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


class Metrics:
    """Writes the metrics of one run."""

    def __init__(self, run: Path, step: int, wandb_mode: str, config: dict[str, Any]) -> None:
        """Records after `step` are dropped: the resumed run computes those steps again."""
        self.path = run / "metrics.jsonl"
        kept = [r for r in read(self.path) if r["step"] <= step] if step else []
        self.path.write_text("".join(json.dumps(r) + "\n" for r in kept))
        self.file = self.path.open("a", buffering=1)
        self.wandb = _start_wandb(run, wandb_mode, config)
        self.last_line = 0.0

    def log(self, step: int, **values: float) -> None:
        """Write one record."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.wandb:
            try:
                self.wandb.log(values, step=step)
            except Exception as error:  # the run continues whatever wandb raises
                print(f"wandb stopped logging: {error}")
                self.wandb = None

    def progress(self, text: str, *, now: bool = False) -> None:
        """Print a line that overwrites itself on a terminal; elsewhere one line every ten seconds, or `now`."""
        terminal = sys.stdout.isatty()
        if now or time.monotonic() - self.last_line > (0.2 if terminal else 10):
            self.last_line = time.monotonic()
            print(f"\r\x1b[K{text}" if terminal else text, end="" if terminal else "\n", flush=True)

    def close(self) -> None:
        self.file.close()
        if self.wandb:
            try:
                self.wandb.finish()
            except Exception as error:
                print(f"wandb did not finish: {error}")


def log(text: str) -> None:
    """Print a line, in place of the progress line."""
    print(f"\r\x1b[K{text}" if sys.stdout.isatty() else text, flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A truncated last line, left by a killed process, is dropped."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def plot(run: Path, title: str) -> None:
    """Plot the loss against steps as run/loss.png, from run/metrics.jsonl."""
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
    figure.savefig(draft, dpi=120)
    plt.close(figure)
    draft.replace(run / "loss.png")


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
