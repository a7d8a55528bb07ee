"""python -m benchmarks training with a mock of nanoGPT that has the same output and a known loss."""

import csv
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks import training
from benchmarks.training import HEED, NANOGPT, Run, Setting
from tests.conftest import SMALL, command

TEXT = "To be, or not to be, that is the question.\n" * 300

MODEL = """
import dataclasses
import torch

@dataclasses.dataclass
class GPTConfig:
    block_size: int
    vocab_size: int

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
    def forward(self, x, y):
        logits = self.table(x)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
"""

TRAIN = """
import os, pickle, sys, time
import torch
from model import GPT, GPTConfig
import configurator
assert "--device=cpu" in sys.argv and "--compile=False" in sys.argv
assert sys.argv[1] == "config/train_shakespeare_char.py"
V = pickle.load(open("data/shakespeare_char/meta.pkl", "rb"))["vocab_size"]
model = GPT(GPTConfig(8, V))
torch.nn.init.zeros_(model.table.weight)
print("number of parameters: few")
print("step 0: train loss 4.0, val loss 4.1")
for i in range(11):
    time.sleep(0.01)
    if i == 10:
        print("step 10: train loss 3.0, val loss 3.25")
    print(f"iter {i}: loss 3.5, time {1000 if i == 0 else 20}.00ms, mfu -100.00%")
os.makedirs("out-shakespeare-char")
kept = {"model": {"_orig_mod.table.weight": model.table.weight.data}, "model_args": {"block_size": 8, "vocab_size": V}}
torch.save(kept, "out-shakespeare-char/ckpt.pt")
"""


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    folder = tmp_path / "nanoGPT"
    (folder / "config").mkdir(parents=True)
    for name, text in (("model.py", MODEL), ("train.py", TRAIN), ("configurator.py", "")):
        (folder / name).write_text(text)
    (folder / "config" / "train_shakespeare_char.py").write_text("")
    (tmp_path / "input.txt").write_text(TEXT)
    return folder


def test_both_have_the_same_text(tmp_path):
    training.split("cabbage" * 10, tmp_path)
    characters = "abceg"
    for name, expected in (("train", ("cabbage" * 10)[:63]), ("val", "cabbage")):
        numbers = np.fromfile(tmp_path / "nanogpt/data/shakespeare_char" / f"{name}.bin", dtype=np.uint16)
        assert "".join(characters[n] for n in numbers) == (tmp_path / f"{name}.txt").read_text() == expected


def test_benchmark(peer, tmp_path, capsys):
    words = [*SMALL, "--train.steps=6", "--train.num_evals=2", "--data.tokenizer=char"]
    out = tmp_path / "out"
    asked = [
        "training",
        "--nanogpt",
        str(peer),
        "--text",
        str(tmp_path / "input.txt"),
        "--seeds",
        "1",
        "--out",
        str(out),
    ]
    assert bench.main(bench.arguments([*asked, "--", *words])) == 0
    printed = capsys.readouterr().out
    uniform = f"{math.log(len(set(TEXT))):.4f}"
    assert next(line.split()[2] for line in printed.splitlines() if line.startswith(NANOGPT)) == uniform
    rows = list(csv.DictReader((out / "training.csv").open()))
    assert [row["loss"] for row in rows if row["system"] == NANOGPT] == ["3.2500", uniform]
    assert len([row for row in rows if row["system"] == HEED]) == 2
    assert (out / "training.png").stat().st_size > 1000
    assert {path.name for path in peer.iterdir()} == {"model.py", "train.py", "configurator.py", "config"}  # unchanged


def test_validation_loss_covers_every_character(peer, tmp_path):
    """Compared with a direct computation, over full sequences and the last, shorter one."""
    training.split("abcab" * 50, tmp_path)
    work = tmp_path / "nanogpt"
    (work / "model.py").write_text(MODEL)
    (work / "out-shakespeare-char").mkdir()
    table = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    kept = {"model": {"table.weight": table}, "model_args": {"block_size": 8, "vocab_size": 3}}
    torch.save(kept, work / "out-shakespeare-char" / "ckpt.pt")
    val = ["abc".index(character) for character in "abcab" * 5]
    logs = table.double().log_softmax(1)
    expected = -sum(logs[a, b].item() for a, b in pairwise(val)) / 24
    assert training.validation_loss(work, "cpu") == pytest.approx(expected, rel=1e-6)


def test_time_is_estimated_from_the_first_steps(peer, tmp_path):
    training.split(TEXT, tmp_path)
    for name in ("model.py", "train.py", "configurator.py"):
        (tmp_path / "nanogpt" / name).write_text((peer / name).read_text())
    made = training.train_nanogpt(Setting(1.0, (), (), total_steps=2000), tmp_path, 0, "cpu")
    assert made.estimated and made.loss is None
    assert made.seconds == pytest.approx(2000 * 0.020)


def test_report():
    runs = [Run(NANOGPT, s, 100.0 + s, 1.9 + s / 10, [(50.0, 2.0), (100.0, 1.9 + s / 10)]) for s in range(3)]
    runs += [Run(HEED, s, 10.0, 1.85, [(4.0, 1.95), (8.0 + s, 1.86), (10.0, 1.85)]) for s in range(3)]
    first, second, last = training.report(Setting(1.88, (), ()), runs).splitlines()[1:]
    assert first.split() == [NANOGPT, "101", "2.0000", "1.9000", "to", "2.1000", "-"]
    assert second.split() == [HEED, "10", "1.8500", "1.8500", "to", "1.8500", "9"]
    assert last == "training time of nanoGPT / heed: 10.1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nanogpt", "nowhere", "--text", "README.md"], "--nanogpt nowhere: no train.py"),
        (["--nanogpt", "{peer}", "--text", "nothing.txt"], "--text nothing.txt: no such file"),
    ],
)
def test_invalid_arguments(peer, words, message):
    with pytest.raises(ValueError, match=message):
        bench.main(bench.arguments(["training", *(word.format(peer=peer) for word in words)]))


def test_invalid_option_of_train_py_is_one_line(peer, tmp_path):
    words = ["--nanogpt", str(peer), "--text", "README.md", "--", "--model.n_layre=2"]
    done = command("benchmarks", "training", *words, where=tmp_path)
    assert done.returncode == 2
    assert "did you mean --model.n_layer?" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
