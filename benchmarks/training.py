"""python -m benchmarks training: training time to a validation loss, heed against nanoGPT, on the same text.

The text is split as in nanoGPT: the first 90% of the characters for training, the last 10% for validation. Both train
in separate processes, alternating. Final losses are over the whole validation text, in non-overlapping sequences; the
losses of nanoGPT during training are its estimates on random batches. The time is from the first step to the last,
including compilation, evaluation and checkpoints.

A setting is the configuration in nanoGPT's README for a CPU or a GPU, the loss stated there, and heed's recipe.
"""

import contextlib
import csv
import importlib.util
import io
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import table
from training.metrics import read

ROOT = Path(__file__).resolve().parent.parent
HEED, NANOGPT = "heed", "nanoGPT"


@dataclass(frozen=True)
class Setting:
    """A target loss and the configuration of both. `total_steps`: nanoGPT's steps, if only some are run and timed."""

    target: float
    nanogpt: tuple[str, ...]
    heed: tuple[str, ...]
    total_steps: int = 0


SMALL = "n_layer=4 n_head=4 n_embd=128 block_size=64 batch_size=12 eval_iters=20 max_iters=2000 lr_decay_iters=2000"
SETTINGS = {
    "cpu": Setting(1.88, (*SMALL.split(), "dropout=0.0", "log_interval=10"), ("shakespeare-quick",)),
    "gpu-full": Setting(1.4697, (), ("shakespeare-char",)),  # on a GPU: all steps of both
    # 2,000 steps take hours on a CPU: only a few are timed
    "gpu": Setting(
        1.4697, ("max_iters=10", "eval_iters=1", "log_interval=1"), ("shakespeare-char-laptop",), total_steps=2000
    ),
}


@dataclass
class Run:
    """One training run: its time, final loss and curve of (seconds, validation loss)."""

    system: str
    seed: int
    seconds: float
    loss: float | None
    curve: list[tuple[float, float]]
    estimated: bool = False

    def reached(self, target: float) -> float | None:
        """Seconds until the target loss is reached, None if it is not."""
        return next((seconds for seconds, loss in self.curve if loss <= target), None)


def split(text: str, where: Path) -> None:
    """Write both splits: text for heed, and for nanoGPT the output of its data/shakespeare_char/prepare.py."""
    characters = {character: number for number, character in enumerate(sorted(set(text)))}
    folder = where / "nanogpt" / "data" / "shakespeare_char"
    folder.mkdir(parents=True)
    boundary = int(len(text) * 0.9)
    for name, part in (("train", text[:boundary]), ("val", text[boundary:])):
        (where / f"{name}.txt").write_text(part, newline="")
        np.array([characters[character] for character in part], dtype=np.uint16).tofile(folder / f"{name}.bin")
    names = {number: character for character, number in characters.items()}
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(characters), "stoi": characters, "itos": names}))


def prepare(nanogpt: Path, text: Path, where: Path) -> None:
    """Split the text, and copy what nanoGPT needs, into the folder `where`."""
    split(text.read_text(), where)
    for script in ("train.py", "model.py", "configurator.py"):
        shutil.copy(nanogpt / script, where / "nanogpt")
    shutil.copytree(nanogpt / "config", where / "nanogpt" / "config")


def train_heed(setting: Setting, where: Path, seed: int, extra: list[str]) -> Run:
    """Train heed. Raises ValueError if train.py fails."""
    words = [*setting.heed, "--name", "bench", "--overwrite", f"--train.seed={seed}", *extra]
    words += [f"--data.source={where / 'train.txt'}", f"--data.val_source={where / 'val.txt'}"]
    environment = {"HEED_RUNS": str(where / "runs"), "HEED_CACHE": str(where / "cache")}
    for _ in _lines([str(ROOT / "train.py"), *words], ROOT, environment):
        pass
    records = [r for r in read(where / "runs" / "bench" / "metrics.jsonl") if "val_loss" in r]
    curve = [(r["seconds"], r["val_loss"]) for r in records]
    return Run(HEED, seed, *curve[-1], curve)


def train_nanogpt(setting: Setting, where: Path, seed: int, device: str) -> Run:
    """Train nanoGPT with its train.py and configuration, which has one fixed seed. Raises ValueError if it fails."""
    folder = where / "nanogpt"
    flags = [f"--{word}" for word in (*setting.nanogpt, f"device={device}", f"compile={device != 'cpu'}")]
    start, now, curve = 0.0, 0.0, []
    paces = []
    for line in _lines(["-u", "train.py", "config/train_shakespeare_char.py", *flags], folder, {}):
        now = time.perf_counter()
        if line.startswith("step 0:"):  # the evaluation before the first step
            start = now
        elif line.startswith("step "):
            curve.append((now - start, float(line.split("val loss ")[1])))
        elif line.startswith("iter ") and not line.startswith("iter 0:"):
            paces.append(float(line.split("time ")[1].split("ms")[0]) / 1000)
    if setting.total_steps:
        return Run(NANOGPT, seed, statistics.median(paces) * setting.total_steps, None, [], estimated=True)
    loss = validation_loss(folder, device)
    return Run(NANOGPT, seed, now - start, loss, [*curve, (now - start, loss)])


def validation_loss(folder: Path, device: str) -> float:
    """The mean loss of nanoGPT's last checkpoint over all validation characters except the first, in nats."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec and spec.loader
    sys.modules["nanogpt_model"] = theirs = importlib.util.module_from_spec(spec)  # needed by dataclasses
    spec.loader.exec_module(theirs)
    kept = torch.load(folder / "out-shakespeare-char" / "ckpt.pt", map_location=device, weights_only=True)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its number of parameters
        model = theirs.GPT(theirs.GPTConfig(**kept["model_args"])).to(device).eval()
    model.load_state_dict({name.removeprefix("_orig_mod."): x for name, x in kept["model"].items()})
    data = np.fromfile(folder / "data" / "shakespeare_char" / "val.bin", dtype=np.uint16)
    tokens = torch.from_numpy(data.astype(np.int64)).to(device)
    context, total = kept["model_args"]["block_size"], 0.0
    with torch.inference_mode():
        for at in range(0, len(tokens) - 1, context):
            x, y = tokens[at : at + context], tokens[at + 1 : at + 1 + context]
            total += float(model(x[None, : len(y)], y[None])[1]) * len(y)
    return total / (len(tokens) - 1)


def _lines(words: list[str], where: Path, environment: dict[str, str]) -> Any:
    """Run a Python script and yield its output by line. Raises ValueError with the last line if it fails."""
    process = subprocess.Popen(
        [sys.executable, *words], cwd=where, env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    last = ""
    assert process.stdout
    for line in process.stdout:
        last = line.strip() or last
        yield line
    if process.wait():
        raise ValueError(f"{words[-1] if words[0] == '-u' else words[0]} failed: {last}")


def run(nanogpt: Path, text: Path, name: str, seeds: int, out: Path | None, extra: list[str]) -> int:
    """Train both `seeds` times, alternating. Prints the table and writes training.csv and training.png to `out`."""
    setting, device = SETTINGS[name], "cuda" if torch.cuda.is_available() else "cpu"
    if not (nanogpt / "train.py").is_file():
        raise ValueError(f"--nanogpt {nanogpt}: no train.py; must be the folder of a clone of nanoGPT")
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: at least 1")
    if not text.is_file():
        raise ValueError(f"--text {text}: no such file; must be nanoGPT's input.txt, tiny Shakespeare")
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        prepare(nanogpt, text, where)
        for seed in range(seeds):
            for made in (train_nanogpt(setting, where, seed, device), train_heed(setting, where, seed, extra)):
                runs.append(made)
                loss = f"loss {made.loss:.4f}" if made.loss else "estimated from its first steps"
                print(f"seed {seed}, {made.system}: {made.seconds:,.1f} s, {loss}", file=sys.stderr)
    print(report(setting, runs))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write(out, setting, runs)
        print(f"wrote {out / 'training.csv'} and {out / 'training.png'}")
    return 0


def report(setting: Setting, runs: list[Run]) -> str:
    """Format one row for each system, medians over the seeds, and the ratio of training times."""
    rows, took = [], {}
    for system in (NANOGPT, HEED):
        own = [r for r in runs if r.system == system]
        losses = [r.loss for r in own if r.loss is not None]
        times = [r.reached(setting.target) or float("inf") for r in own]
        took[system] = statistics.median(r.seconds for r in own)
        spread = f"{min(losses):.4f} to {max(losses):.4f}" if losses else None
        middle = f"{statistics.median(losses):.4f}" if losses else None
        reached = statistics.median(times)
        rows.append([system, took[system], middle, spread, reached if reached < float("inf") else None])
    what = "seconds (estimated)" if any(r.estimated for r in runs) else "seconds"
    head = table(["", what, "loss", "range", f"seconds to {setting.target}"], rows)
    return f"{head}\ntraining time of nanoGPT / heed: {took[NANOGPT] / took[HEED]:.1f}"


def write(out: Path, setting: Setting, runs: list[Run]) -> None:
    """Write all points of all curves, and a plot."""
    import matplotlib.ticker

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with (out / "training.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["system", "seed", "seconds", "loss"])
        writer.writerows([r.system, r.seed, f"{s:.2f}", f"{loss:.4f}"] for r in runs for s, loss in r.curve)
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for r in runs:
        colour = "tab:red" if r.system == HEED else "tab:grey"
        if r.curve:
            axis.plot(*zip(*r.curve, strict=True), "o-", color=colour, markersize=4, label=None if r.seed else r.system)
        if r.estimated:  # the loss stated by nanoGPT at the estimated time
            axis.plot(r.seconds, setting.target, "x", color=colour, label=None if r.seed else f"{r.system} (estimated)")
    axis.axhline(setting.target, color="black", linestyle=":", label=f"{setting.target}")
    axis.set_xscale("log")
    seconds = [s for r in runs for s, _ in r.curve] + [r.seconds for r in runs]
    ticks = [n * 10**power for power in range(6) for n in (1, 2, 5)]
    axis.set_xticks([t for t in ticks if min(seconds) / 2 <= t <= max(seconds) * 2])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.set_xlabel("seconds of training, log scale")
    axis.set_ylabel("validation loss, nats/character")
    axis.legend()
    figure.savefig(out / "training.png", dpi=80)
    plt.close(figure)
