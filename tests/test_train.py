"""The training loop on a small text: resuming, signals, several processes, errors."""

import dataclasses
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.utils.checkpoint
from safetensors.torch import load_file

import train
from data.loader import Loader
from data.shards import Shards
from data.tokenizer import Tokenizer
from model import GPT, ModelConfig
from sample import load
from tests.conftest import ROOT, SMALL, TINY, losses, randomized, weights
from training import checkpoint, metrics
from training.flops import count_parameters


def test_run_writes_everything_to_its_folder(runs):
    run = runs / "songs"
    names = {p.name for p in run.iterdir()}
    assert {"config.toml", "tokenizer.json", "metrics.jsonl", "loss.png", "latest", "best"} <= names
    curve = losses(run)
    assert list(curve) == list(range(1, 31))
    assert curve[1] == pytest.approx(math.log(300), abs=0.2)
    assert curve[30] < curve[1] - 1.5
    assert list(losses(run, "val_loss")) == [15, 30]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_validation_covers_every_token_and_reports_bits_per_byte(runs, monkeypatch, tmp_path, text):
    """Compared with the definition: sequences of at most `context` tokens, one at a time."""
    run = runs / "songs"
    folder = checkpoint.find(run, "latest")
    model = GPT(ModelConfig(**checkpoint.read_state(folder)["config"]["model"])).eval()
    checkpoint.load_weights(folder, model)
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    prepared = train.prepare(**train.load(str(run / "config.toml")).data.preparation)
    val = Shards(prepared, "val")
    stream = [tokenizer.eot, *val.read(0, val.tokens).tolist()]
    nats, context = 0.0, model.config.context
    for start in range(0, val.tokens, context):
        piece = torch.tensor(stream[start : start + context + 1])
        with torch.no_grad():
            logs = model(piece[None, :-1])[0].double().log_softmax(-1)
        nats -= logs.gather(1, piece[1:, None]).sum().item()
    last = [r for r in metrics.read(run / "metrics.jsonl") if "val_loss" in r][-1]
    assert last["val_loss"] == pytest.approx(nats / val.tokens, rel=1e-5)
    size = len(tokenizer.decode(stream).encode())
    assert last["val_bpb"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_the_run(text, tmp_path, number):
    words = ("--train.steps=1000000", "--train.num_evals=1")
    started = [
        sys.executable,
        "-u",
        str(ROOT / "train.py"),
        "shakespeare",
        "--name=stopped",
        *SMALL,
        f"--data.source={text}",
    ]
    process = subprocess.Popen(
        [*started, *words], cwd=ROOT, env=os.environ | {"HEED_RUNS": str(tmp_path)}, stdout=subprocess.PIPE, text=True
    )
    assert any(line.startswith("step 1/1000000") for line in process.stdout)
    process.send_signal(number)
    output = process.stdout.read()
    assert process.wait() == 128 + number
    run = tmp_path / "stopped"
    step = checkpoint.read_state(checkpoint.find(run, "latest"))["step"]
    assert step >= 1
    assert f"stopped and saved at step {step}; --resume continues" in output
    assert "Traceback" not in output
    assert list(losses(run)) == list(range(1, step + 1))


def test_micro_batch_size_does_not_change_the_result(run_training):
    at_once = run_training("at-once", "--train.steps=4", "--train.micro_batch_size=8")
    one_by_one = run_training("one-by-one", "--train.steps=4", "--train.micro_batch_size=1")
    for step, loss in losses(at_once).items():
        assert losses(one_by_one)[step] == pytest.approx(loss, rel=1e-4)


def test_nonfinite_loss_stops_the_run_and_keeps_the_last_checkpoint(run_training, monkeypatch, tmp_path):
    loss = GPT.loss
    calls = 0

    def poisoned(self, tokens, targets):
        nonlocal calls
        calls += self.training
        return loss(self, tokens, targets) * (math.nan if calls == 2 * 7 else 1.0)  # two micro-batches per step

    monkeypatch.setattr(GPT, "loss", poisoned)
    with pytest.raises(train.Diverged, match="step 7: the loss is nan"):
        run_training("bad", "--train.steps=12", "--train.num_evals=4")
    run = tmp_path / "bad"
    folder = checkpoint.find(run, "latest")
    assert checkpoint.read_state(folder)["step"] == 6
    assert all(p.isfinite().all() for p in load_file(folder / "model.safetensors").values())
    assert max(losses(run)) == 6


def test_a_validation_loss_that_is_not_finite_stops_before_sampling(run_training, monkeypatch, tmp_path):
    sampled = []
    monkeypatch.setattr(train, "validate", lambda *_: math.nan)
    monkeypatch.setattr(train, "sample_text", lambda *_: sampled.append(1) or "")
    with pytest.raises(train.Diverged, match="step 2: the loss is nan"):
        run_training("nan", "--train.steps=4", "--train.num_evals=2")
    assert not sampled and not losses(tmp_path / "nan", "val_loss") and not (tmp_path / "nan" / "best").exists()


def test_save_before_validate(run_training, monkeypatch, tmp_path):
    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(train, "validate", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_training("kept", "--train.steps=4", "--train.num_evals=1")
    assert checkpoint.read_state(checkpoint.find(tmp_path / "kept", "latest"))["step"] == 4
    monkeypatch.undo()


def test_missed_validation_runs_on_resume(run_training, monkeypatch):
    real = train.validate
    monkeypatch.setattr(train, "validate", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError):
        run_training("missed", "--train.steps=4", "--train.num_evals=2")
    monkeypatch.setattr(train, "validate", real)
    run = run_training("missed", "--train.steps=4", "--train.num_evals=2", "--resume")
    assert list(losses(run, "val_loss")) == [2, 4]


def test_existing_run_is_not_overwritten_by_default(run_training):
    run = run_training("mine", "--train.steps=2", "--train.num_evals=1")
    before = weights(run)
    with pytest.raises(checkpoint.CheckpointError, match="runs/mine exists: --resume continues"):
        run_training("mine", "--train.steps=3", "--train.num_evals=1")
    assert weights(run) == before
    run_training("mine", "--train.steps=3", "--train.num_evals=1", "--overwrite")
    assert max(losses(run)) == 3
    finished = run_training("mine", "--train.steps=3", "--train.num_evals=1", "--resume")  # changes nothing
    assert max(losses(finished)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--model.n_ffn=96", "model.n_ffn was 64, is 96"),
        ("--data.vocab_size=290", "the tokenizer's hash was"),
        ("--data.val_fraction=0.3", "the text's hash was"),
    ],
)
def test_resume_with_another_model_tokenizer_or_text_raises(run_training, change, message):
    run_training("mine", "--train.steps=2", "--train.num_evals=1")
    with pytest.raises(checkpoint.CheckpointError, match=message):
        run_training("mine", "--train.steps=4", "--train.num_evals=1", change, "--resume")


def test_best_checkpoint_is_kept_and_old_ones_are_deleted(run_training, monkeypatch):
    scores = iter([3.0, 1.0, 2.0, 2.5, 2.2])
    monkeypatch.setattr(train, "validate", lambda *_: next(scores))
    run = run_training("five", "--train.steps=5", "--train.num_evals=5", "--train.keep_checkpoints=1")
    assert sorted(p.name for p in run.glob("step-*")) == ["step-000002", "step-000005"]
    assert checkpoint.find(run, "best").name == "step-000002"


def test_compiled_blocks_give_the_same_losses(run_training):
    eager = run_training("eager", "--train.steps=3", "--train.num_evals=1")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = run_training("compiled", "--train.steps=3", "--train.num_evals=1", "--train.compile=on")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # a block in training, none to evaluate
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-3)
    assert set(load_file(checkpoint.find(compiled, "latest") / "model.safetensors")) == set(
        load_file(checkpoint.find(eager, "latest") / "model.safetensors")
    )


def test_bf16_training_keeps_fp32_weights(run_training):
    exact = run_training("fp32", "--train.steps=3", "--train.num_evals=1")
    half = run_training("bf16", "--train.steps=3", "--train.num_evals=1", "--train.dtype=bfloat16")
    assert losses(half) == pytest.approx(losses(exact), rel=0.02)
    assert losses(half) != losses(exact)
    assert all(
        p.dtype == torch.float32 for p in load_file(checkpoint.find(half, "latest") / "model.safetensors").values()
    )


def test_adamw_alone_reduces_the_loss(run_training):
    curve = losses(run_training("adamw", "--train.steps=10", "--train.num_evals=1", "--optim.optimizer=adamw"))
    assert curve[10] < curve[1] - 0.3


def test_batches_are_requested_by_step(run_training, monkeypatch):
    """Resume needs only the step: the loop requests batches by step number."""
    asked = []
    batch = Loader.batch
    monkeypatch.setattr(Loader, "batch", lambda self, *a: (asked.append(a), batch(self, *a))[1])
    run_training("asks", "--train.steps=3", "--train.num_evals=1")
    assert asked == [(0, 8, 0, 1), (1, 8, 0, 1), (2, 8, 0, 1)]


def test_activation_checkpointing_gives_the_same_gradients():
    """Also with dropout: the recomputed layer draws the same masks."""
    gradients = []
    tokens = torch.randint(97, (2, 32), generator=torch.Generator().manual_seed(0))
    for checkpointing in (False, True):
        model = randomized(dataclasses.replace(TINY, dropout=0.3, attention_dropout=0.3)).train()
        model.model.activation_checkpointing = checkpointing
        torch.manual_seed(1)
        model.loss(tokens, tokens).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


def test_activation_checkpointing_config_field(run_training, monkeypatch):
    layers, real = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr("model.checkpoint", lambda layer, *a, **how: (layers.append(layer), real(layer, *a, **how))[1])
    run_training("recomputed", "--train.steps=1", "--train.num_evals=1", "--train.activation_checkpointing=true")
    assert len(layers) == 2 * 2  # layers x micro-batches; not in validation


def test_summary_has_one_key_and_value_per_line(run_training, capsys):
    run = run_training("summed-up", "--train.steps=4", "--train.num_evals=2")
    summary = dict(line.split(": ") for line in capsys.readouterr().out.splitlines()[-6:])
    assert list(summary) == ["val_loss", "val_bpb", "training_seconds", "peak_memory_mb", "num_steps", "num_params"]
    records = [r for r in metrics.read(run / "metrics.jsonl") if "val_loss" in r]
    assert float(summary["val_loss"]) == pytest.approx(min(r["val_loss"] for r in records), abs=1e-4)
    assert float(summary["val_bpb"]) == pytest.approx(min(r["val_bpb"] for r in records), abs=1e-4)
    assert (summary["num_steps"], int(summary["num_params"])) == ("4", count_parameters(load(run)[0].config))
    assert float(summary["training_seconds"]) > 0 and float(summary["peak_memory_mb"]) > 100
    steps = [r for r in metrics.read(run / "metrics.jsonl") if "loss" in r]
    assert all(r.keys() == {"step", "loss", "grad_norm", "lr", "tok_per_s"} for r in steps)
