"""What a run says of itself: metrics.jsonl always, a progress line, the loss curve as a picture, wandb when asked.

metrics.jsonl has one JSON object a line: {"step": 12, "loss": 3.41, ...} for a step, with losses in nats a token, and
{"step": 100, "val_loss": ..., "bits_per_byte": ...} for a validation.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


class Metrics:
    """The records of one run folder."""

    def __init__(self, run: Path, step: int, wandb_mode: str, config: dict[str, Any]) -> None:
        """Records beyond `step`, of work that was lost and will be done again, are dropped."""
        self.path = run / "metrics.jsonl"
        kept = [r for r in read(self.path) if r["step"] <= step] if step else []
        self.path.write_text("".join(json.dumps(r) + "\n" for r in kept))
        self.file = self.path.open("a", buffering=1)
        self.wandb = _start_wandb(run, wandb_mode, config)
        self.last_line = 0.0

    def log(self, step: int, **values: float) -> None:
        """One record."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.wandb:
            try:
                self.wandb.log(values, step=step)
            except Exception as error:  # whatever wandb does, the run goes on
                print(f"wandb stopped logging: {error}")
                self.wandb = None

    def progress(self, text: str, *, now: bool = False) -> None:
        """A line that replaces itself on a terminal; elsewhere a line every ten seconds, or now."""
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


def say(text: str) -> None:
    """A line that stays, in place of the progress line."""
    print(f"\r\x1b[K{text}" if sys.stdout.isatty() else text, flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that a kill cut short is left out."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def plot(run: Path, title: str) -> None:
    """Draw run/loss.png from run/metrics.jsonl: loss in nats a token against steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read(run / "metrics.jsonl")
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    val = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    if train:
        axes.plot(*zip(*train, strict=True), color="#9db4d0", linewidth=0.8, label="training, each step")
    if val:
        axes.plot(*zip(*val, strict=True), color="#c0392b", marker="o", markersize=4, label="validation, all of it")
        axes.annotate(
            f"{val[-1][1]:.3f}", val[-1], textcoords="offset points", xytext=(-4, 10), ha="right", color="#c0392b"
        )
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.25)
    if train or val:
        axes.legend(frameon=False)
    draft = run / ".draft-loss.png"
    figure.savefig(draft, dpi=120)
    plt.close(figure)
    draft.replace(run / "loss.png")


def _start_wandb(run: Path, mode: Any, config: dict[str, Any]) -> Any:
    """A wandb run, or None with the reason said. The mode is settled before wandb starts: a failed online start would
    spoil the offline one after it."""
    if mode == "off":
        return None
    try:
        import wandb

        if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            print("wandb: no API key (wandb login), so this run is logged offline; wandb sync sends it later")
            mode = "offline"
        settings = wandb.Settings(silent=True, init_timeout=30)
        return wandb.init(project="heed", name=run.name, dir=run, mode=mode, config=config, settings=settings)
    except Exception as error:
        print(f"wandb did not start, so it is off: {' '.join(str(error).split())[:200]}")
        return None
