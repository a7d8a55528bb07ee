"""python -m benchmarks step: its arithmetic with a clock of our own, and its errors."""

import itertools
import re

import pytest

from benchmarks import __main__ as bench
from benchmarks import training_step
from model import ModelConfig
from training.config import ConfigError
from training.flops import flops_per_token

SIZE = {"context": 8, "n_layer": 1, "n_embd": 32, "n_head": 1, "n_kv_head": 1, "head_dim": 32, "n_ffn": 32}


def run(*words: str) -> int:
    return bench.main(bench.arguments(["step", *words]))


def test_rates_of_a_step(monkeypatch, capsys):
    """A step of 32 tokens takes 0.5 s, a matmul of 16 x 16 x 16 0.25 s."""
    calls = []
    durations = itertools.cycle((0.5, 0.25))

    def timed(call, where):
        calls.append(call)
        return next(durations)

    monkeypatch.setattr(training_step, "seconds", timed)
    monkeypatch.setattr(training_step, "WARMUP", 1)
    monkeypatch.setattr(training_step, "MATMUL", 16)
    settings = [f"model.{name}={value}" for name, value in SIZE.items()]
    batch = ["train.batch_tokens=32", "train.micro_batch_size=2", "data.vocab_size=300", "train.dtype=float32"]
    assert run("shakespeare", *settings, *batch, "--pairs", "3") == 0
    found = dict(re.findall(r"(\S+) ([\d.]+)", capsys.readouterr().out))
    assert len(calls) == 6
    assert (found["step"], found["tok/s"]) == ("500.0", "64")
    flops = flops_per_token(ModelConfig(vocab_size=300, **SIZE)) * 32
    assert float(found["mfu"]) == pytest.approx(flops / 0.5 / (2 * 16**3 / 0.25), rel=1e-4)


def test_a_step_has_the_documents_and_the_checkpointing_of_the_recipe(monkeypatch, capsys):
    seen = []
    real = training_step.optimize_layers
    monkeypatch.setattr(
        training_step, "optimize_layers", lambda model, machine: (seen.append(model), real(model, machine))
    )
    monkeypatch.setattr(training_step, "WARMUP", 1)
    monkeypatch.setattr(training_step, "MATMUL", 16)
    small = [f"model.{name}={value}" for name, value in SIZE.items()]
    small += ["train.batch_tokens=16", "train.dtype=float32", "data.vocab_size=300", "--pairs", "1"]
    for mask, checkpointing in (("true", "false"), ("false", "true")):
        settings = [f"data.document_mask={mask}", f"train.activation_checkpointing={checkpointing}"]
        assert run("shakespeare", *settings, *small) == 0
        decoder = seen.pop().model
        assert decoder.document_start == (0 if mask == "true" else None)
        assert decoder.activation_checkpointing == (checkpointing == "true")


def test_a_wrong_setting_is_named():
    with pytest.raises(ConfigError, match=r"^train.context_parallel = 2: must be 1, the step is that of one device$"):
        run("shakespeare", "train.context_parallel=2")
    with pytest.raises(ValueError, match=r"model\.n_embt: no such field; did you mean model\.n_embd"):
        run("shakespeare", "model.n_embt=3")
    with pytest.raises(ConfigError, match=r"^n_embd=3: must be SECTION.FIELD=VALUE$"):
        run("shakespeare", "n_embd=3")
    with pytest.raises(ConfigError, match=r"^--pairs 0: must be at least 1$"):
        run("shakespeare", "--pairs", "0")
    with pytest.raises(ValueError, match="no such recipe"):
        run("hamlet")
