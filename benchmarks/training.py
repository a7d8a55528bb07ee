"""python -m benchmarks training: seconds of training to a validation loss, heed against nanoGPT, on the same bytes.

The text is split as nanoGPT splits it, the first 90% to train on and the last 10% to validate on, in characters. Both
train in processes of their own, in turns. Their losses at the end are of the whole validation text, in windows of the
context that do not overlap; nanoGPT's while it trains are its own estimate, on random batches. Seconds count from the
first step to the last, with all that happens between: compiling, evaluating, saving.

A setting names what nanoGPT's own README does on a CPU or a GPU, the loss that it states for that, and heed's recipe.
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
    """A loss to reach, and how each of the two goes about it. `whole`: nanoGPT's steps if only some are to be run."""

    target: float
    nanogpt: tuple[str, ...]
    heed: tuple[str, ...]
    whole: int = 0


SMALL = "n_layer=4 n_head=4 n_embd=128 block_size=64 batch_size=12 eval_iters=20 max_iters=2000 lr_decay_iters=2000"
SETTINGS = {
    "cpu": Setting(1.88, (*SMALL.split(), "dropout=0.0", "log_interval=10"), ("shakespeare-quick",)),
    # two thousand steps would take hours on a CPU: a few are timed
    "gpu": Setting(
        1.4697, ("max_iters=10", "eval_iters=1", "log_interval=1"), ("shakespeare-char-laptop",), whole=2000
    ),
}


@dataclass
class Run:
    """One training: its curve of (seconds, validation loss), and how it ended."""

    who: str
    seed: int
    seconds: float
    loss: float | None
    curve: list[tuple[float, float]]
    estimated: bool = False

    def reached(self, target: float) -> float | None:
        """Seconds until a loss no higher than the target had been seen."""
        return next((seconds for seconds, loss in self.curve if loss <= target), None)


def split(text: str, where: Path) -> None:
    """Write the two parts, for heed as text and for nanoGPT as its data/shakespeare_char/prepare.py leaves them."""
    characters = {character: number for number, character in enumerate(sorted(set(text)))}
    folder = where / "nanogpt" / "data" / "shakespeare_char"
    folder.mkdir(parents=True)
    cut = int(len(text) * 0.9)
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        (where / f"{name}.txt").write_text(part, newline="")
        np.array([characters[character] for character in part], dtype=np.uint16).tofile(folder / f"{name}.bin")
    names = {number: character for character, number in characters.items()}
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(characters), "stoi": characters, "itos": names}))


def train_heed(setting: Setting, where: Path, seed: int, extra: list[str]) -> Run:
    """Raises ValueError when train.py fails."""
    words = [*setting.heed, "--name", "bench", "--overwrite", f"--train.seed={seed}", *extra]
    words += [f"--data.source={where / 'train.txt'}", f"--data.val_source={where / 'val.txt'}"]
    environment = {"HEED_RUNS": str(where / "runs"), "HEED_CACHE": str(where / "cache")}
    for _ in _lines([str(ROOT / "train.py"), *words], ROOT, environment):
        pass
    records = [r for r in read(where / "runs" / "bench" / "metrics.jsonl") if "val_loss" in r]
    curve = [(r["seconds"], r["val_loss"]) for r in records]
    return Run(HEED, seed, *curve[-1], curve)


def train_nanogpt(setting: Setting, where: Path, seed: int, device: str) -> Run:
    """nanoGPT's own train.py with its own configuration; it has one seed alone. Raises ValueError when it fails."""
    folder = where / "nanogpt"
    flags = [f"--{word}" for word in (*setting.nanogpt, f"device={device}", f"compile={device != 'cpu'}")]
    start, now, curve = 0.0, 0.0, []
    paces = []
    for line in _lines(["-u", "train.py", "config/train_shakespeare_char.py", *flags], folder, {}):
        now = time.perf_counter()
        if line.startswith("step 0:"):  # its first evaluation is before its first step
            start = now
        elif line.startswith("step "):
            curve.append((now - start, float(line.split("val loss ")[1])))
        elif line.startswith("iter ") and not line.startswith("iter 0:"):
            paces.append(float(line.split("time ")[1].split("ms")[0]) / 1000)
    if setting.whole:
        return Run(NANOGPT, seed, statistics.median(paces) * setting.whole, None, [], estimated=True)
    loss = whole_loss(folder, device)
    return Run(NANOGPT, seed, now - start, loss, [*curve, (now - start, loss)])


def whole_loss(folder: Path, device: str) -> float:
    """The mean loss of nanoGPT's last checkpoint over all validation characters but the first, in nats."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec and spec.loader
    sys.modules["nanogpt_model"] = theirs = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    spec.loader.exec_module(theirs)
    kept = torch.load(folder / "out-shakespeare-char" / "ckpt.pt", map_location=device, weights_only=True)
    with contextlib.redirect_stdout(io.StringIO()):  # it tells its number of parameters
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
    """What a Python script prints, line by line as it comes. Raises ValueError with its last words when it fails."""
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
    """Train both `seeds` times in turns, print the table, write training.csv and training.png into `out`."""
    setting, device = SETTINGS[name], "cuda" if torch.cuda.is_available() else "cpu"
    if not (nanogpt / "train.py").is_file():
        raise ValueError(f"--nanogpt {nanogpt}: there is no train.py; a clone of nanoGPT is wanted")
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: at least 1")
    if not text.is_file():
        raise ValueError(f"--text {text}: no such file; nanoGPT's input.txt, tiny Shakespeare, is wanted")
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        split(text.read_text(), where)
        for script in ("train.py", "model.py", "configurator.py"):
            shutil.copy(nanogpt / script, where / "nanogpt")
        shutil.copytree(nanogpt / "config", where / "nanogpt" / "config")
        for seed in range(seeds):
            for made in (train_nanogpt(setting, where, seed, device), train_heed(setting, where, seed, extra)):
                runs.append(made)
                loss = f"loss {made.loss:.4f}" if made.loss else "estimated from its first steps"
                print(f"seed {seed}, {made.who}: {made.seconds:,.1f} s, {loss}", file=sys.stderr)
    print(report(setting, runs))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write(out, setting, runs)
        print(f"wrote {out / 'training.csv'} and {out / 'training.png'}")
    return 0


def report(setting: Setting, runs: list[Run]) -> str:
    """A line for each of the two: medians over the seeds, and how many times faster heed got to the target."""
    rows, took = [], {}
    for who in (NANOGPT, HEED):
        own = [r for r in runs if r.who == who]
        losses = [r.loss for r in own if r.loss is not None]
        times = [r.reached(setting.target) or float("inf") for r in own]
        took[who] = statistics.median(r.seconds for r in own)
        spread = f"{min(losses):.4f} to {max(losses):.4f}" if losses else None
        middle = f"{statistics.median(losses):.4f}" if losses else None
        there = statistics.median(times)
        rows.append([who, took[who], middle, spread, there if there < float("inf") else None])
    what = "seconds (estimated)" if any(r.estimated for r in runs) else "seconds"
    head = table(["", what, "loss", "losses", f"seconds to {setting.target}"], rows)
    return f"{head}\nnanoGPT trains {took[NANOGPT] / took[HEED]:.1f} times as long as heed"


def write(out: Path, setting: Setting, runs: list[Run]) -> None:
    """Every point of every curve, and a picture of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with (out / "training.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["who", "seed", "seconds", "loss"])
        writer.writerows([r.who, r.seed, f"{s:.2f}", f"{loss:.4f}"] for r in runs for s, loss in r.curve)
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for r in runs:
        colour = "tab:red" if r.who == HEED else "tab:grey"
        if r.curve:
            axis.plot(*zip(*r.curve, strict=True), "o-", color=colour, markersize=3, label=None if r.seed else r.who)
        if r.estimated:  # the loss that nanoGPT states, at the time that its steps would take
            axis.plot(r.seconds, setting.target, "x", color=colour, label=None if r.seed else f"{r.who} (estimated)")
    axis.axhline(setting.target, color="black", linestyle=":", label=f"{setting.target}")
    axis.set_xscale("log")
    axis.set_xlabel("seconds since the first step")
    axis.set_ylabel("validation loss, nats/character")
    axis.legend()
    figure.savefig(out / "training.png", dpi=80)
    plt.close(figure)
