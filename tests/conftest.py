"""Shared fixtures: a small text on disk, a small run trained on it, and the command-line programs."""

import importlib.util
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

assert "triton" not in sys.modules, "triton reads TRITON_INTERPRET when it is imported"
os.environ["TRITON_INTERPRET"] = "1"  # heed's kernels run on the CPU, see tests/kernels/interpreter.py

if importlib.util.find_spec("triton"):  # not available on every system
    from tests.kernels.interpreter import install

    install()

import pytest
import torch

import train
from kernels import cpu
from model import GPT, ModelConfig
from training import checkpoint, metrics

ROOT = Path(__file__).resolve().parent.parent
USER_ENV = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


TINY = ModelConfig(vocab_size=97, context=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=16, n_ffn=48)


def randomized(config: ModelConfig, seed: int = 0) -> GPT:
    """A model in evaluation mode whose weights, gains included, are random and large enough to affect the result."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.3 if p.ndim == 1 else 0.15)
    return model


def command(program: str, *words: str, where: Path, stdin: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Run a command-line program as a user does, with the folder `where` as runs/."""
    env = USER_ENV | {"HEED_RUNS": str(where), "OMP_NUM_THREADS": "1"} | environment
    started = [str(ROOT / program)] if program.endswith(".py") else ["-m", program]
    return subprocess.run(
        [sys.executable, *started, *words], cwd=ROOT, env=env, input=stdin, capture_output=True, text=True
    )


SMALL = [
    "--model.n_layer=2", "--model.n_embd=32", "--model.n_head=2", "--model.n_kv_head=1", "--model.head_dim=16",
    "--model.n_ffn=64", "--model.context=32", "--train.batch_tokens=256", "--train.micro_batch_size=4",
    "--train.compile=off", "--train.dtype=float32", "--data.val_fraction=0.2", "--data.vocab_size=300",
    "--train.prompt=", "--optim.warmup_steps=2", "--train.save_minutes=0",
]  # fmt: skip


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 200 short documents with a pattern that a model can learn."""
    path = tmp_path_factory.mktemp("text") / "songs.txt"
    lines = (
        f"Song {n}: the {n % 7} birds sing to the {n % 5} bees, and the bees to the {n % 3} ants.\n" for n in range(600)
    )
    path.write_text("<|endoftext|>\n".join("".join(next(lines) for _ in range(3)) for _ in range(200)))
    return path


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A folder with one small finished run, `songs`."""
    where = tmp_path_factory.mktemp("runs")
    train_here(
        where, "shakespeare", "--name=songs", *SMALL, f"--data.source={text}", "--train.steps=30", "--train.num_evals=2"
    )
    return where


@pytest.fixture(scope="session")
def chat_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small run trained on conversations, `assistant`."""
    where = tmp_path_factory.mktemp("chat-runs")
    roles, texts = ("user", "assistant") * 2, ("what is {} plus one?", "it is {}.", "and two more?", "then {}.")
    rows = (
        {"messages": [{"role": role, "content": text.format(n)} for role, text in zip(roles, texts, strict=True)]}
        for n in range(300)
    )
    (where / "chat.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = ("--data.format=chat", f"--data.source={where / 'chat.jsonl'}", "--model.context=128")
    train_here(where, "shakespeare", "--name=assistant", *SMALL, *data, "--train.steps=30", "--train.num_evals=1")
    return where


def train_here(where: Path, *words: str) -> Path:
    """`python train.py` with these arguments in this process, with `where` as runs/. Returns the run's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "RUNS", where)
        args = train.parse_args(list(words))
        assert args
        train.train(*args)
    return where / args[0].name


@pytest.fixture
def run_training(text, tmp_path):
    """run_training(name, "--train.steps=8", ...) is `train_here` with a small model and the text."""
    small = (*SMALL, f"--data.source={text}")
    return lambda name, *words: train_here(tmp_path, "shakespeare", f"--name={name}", *small, *words)


@pytest.fixture
def clear_compiled():
    """clear_compiled() clears the cache of compiled C++ files. It is also cleared after the test."""

    def clear() -> None:
        cpu.library.cache_clear()
        cpu.trains.cache_clear()

    clear()
    yield clear
    clear()


@pytest.fixture
def sample_py(monkeypatch, capfd):
    """sample_py(*words, where=runs) is `command("sample.py", ...)` in this process, where torch is already imported.
    This takes a tenth of the time."""

    def run(*words: str, where: Path, stdin: str = "") -> subprocess.CompletedProcess:
        monkeypatch.setenv("HEED_RUNS", str(where))
        monkeypatch.setattr(sys, "argv", ["sample.py", *words])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
        except SystemExit as error:
            code = error.code
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return run


def losses(run: Path, key: str = "loss") -> dict[int, float]:
    return {r["step"]: r[key] for r in metrics.read(run / "metrics.jsonl") if key in r}


def weights(run: Path, which: str = "latest") -> bytes:
    return (checkpoint.find(run, which) / "model.safetensors").read_bytes()


def pytest_terminal_summary(terminalreporter):
    """Print how many mutants were caught (tests/kernels/test_mutants.py), over all processes."""
    found = {
        outcome: [x for x in terminalreporter.getreports(outcome) if "::test_a_mutant_is_caught" in x.nodeid]
        for outcome in ("passed", "failed")
    }
    if tried := len(found["passed"]) + len(found["failed"]):
        terminalreporter.write_line(f"{len(found['passed'])} of {tried} mutants caught")
