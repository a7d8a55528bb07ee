"""--resume: what it restores, what it keeps, what flags change, what it refuses and begins again."""

import dataclasses
import json

import pytest
import torch

from model import GPT
from tests.conftest import TINY, losses, train_here, weights
from training import checkpoint, metrics, time_budget
from training.checkpoint import CheckpointError
from training.config import Config, OptimConfig, TrainConfig
from training.optimizers import build_optimizers
from training.time_budget import SaveTimer, StepBudget, resumed


def test_the_settings_of_the_optimizers_are_those_of_the_configuration(tmp_path):
    model = GPT(TINY)
    folder = checkpoint.save(tmp_path, 1, model, build_optimizers(model, OptimConfig(), torch.float32), {})
    changed = OptimConfig(lr=1e-9, muon_lr=2e-9, weight_decay=0.7, beta1=0.5, beta2=0.6, muon_momentum=0.3)
    adamw, muon = optimizers = build_optimizers(model, changed, torch.float32)
    checkpoint.load_optimizers(folder, optimizers)
    assert [(g["lr"], g["peak"], g["weight_decay"], g["betas"]) for g in adamw.param_groups] == [
        (1e-9, 1e-9, 0.7, (0.5, 0.6)),
        (1e-9, 1e-9, 0.0, (0.5, 0.6)),
    ]
    assert [(g["lr"], g["peak"], g["weight_decay"], g["momentum"]) for g in muon.param_groups] == [
        (2e-9, 2e-9, 0.7, 0.3)
    ]


def test_changed_learning_rates_are_in_force_and_logged(run_training, capsys):
    run_training("slow", "--train.steps=6", "--train.num_evals=1")
    words = ("--train.steps=9", "--train.num_evals=1", "--optim.lr=1e-9", "--optim.muon_lr=1e-9")
    run = run_training("slow", *words, "--resume")
    said = capsys.readouterr().out
    assert "changed optim.lr 0.03 -> 1e-09, optim.muon_lr 0.015 -> 1e-09, train.steps 6 -> 9\n" in said
    assert "lr = 1e-09" in (run / "config.toml").read_text()
    trained = checkpoint.find(run, "step-000006"), checkpoint.find(run, "step-000009")
    before, after = (checkpoint.load_file(folder / "model.safetensors") for folder in trained)
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-7) for name in before)
    run_training("slow", *words, "--resume")
    assert "changed nothing\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--train.batch_tokens=512", "train.batch_tokens was 256, is 512"),
        ("--train.seed=1", "train.seed was 0, is 1"),
        ("--optim.optimizer=adamw", "optim.optimizer was 'muon', is 'adamw'"),
        ("--train.steps=2", r"train.steps = 2: runs/fixed has made 3 steps already"),
    ],
)
def test_what_a_resumed_run_may_not_change_is_refused_by_name(run_training, flag, says):
    run = run_training("fixed", "--train.steps=3", "--train.num_evals=1")
    before = weights(run), losses(run)
    with pytest.raises(CheckpointError, match=says):
        run_training("fixed", "--train.steps=6", "--train.num_evals=1", flag, "--resume")
    assert (weights(run), losses(run)) == before


def test_a_resumed_run_has_its_own_settings_not_the_recipes(run_training, tmp_path, capsys):
    words = ("--train.steps=6", "--train.num_evals=2", "--optim.lr=0.01", "--train.eval_tokens=200")
    whole, run = run_training("whole", *words), run_training("own", *words)
    before = (run / "config.toml").read_text()
    (run / "latest").write_text("step-000003\n")
    train_here(tmp_path, "shakespeare", "--name=own", "--resume")
    assert weights(run) == weights(whole) and losses(run) == losses(whole)
    assert (run / "config.toml").read_text() == before
    said = capsys.readouterr().out
    assert "step-000003 with its own settings, 3 steps left\nchanged nothing\n" in said
    train_here(tmp_path, "shakespeare", "--name=own", "--resume", "--optim.lr=0.02", "--train.steps=7")
    assert "changed optim.lr 0.01 -> 0.02, train.steps 6 -> 7\n" in capsys.readouterr().out
    train_here(tmp_path, "shakespeare", "--name=own", "--resume")
    assert "changed nothing\n" in capsys.readouterr().out


def test_a_renamed_run_is_resumed_under_its_new_name(run_training, tmp_path):
    run = run_training("old", "--train.steps=2", "--train.num_evals=1").rename(tmp_path / "new")
    assert train_here(tmp_path, "shakespeare", "--name=new", "--resume", "--train.steps=3") == run
    assert max(losses(run)) == 3 and not (tmp_path / "old").exists()


def test_another_text_is_refused_with_the_setting_that_differs(run_training, text, tmp_path):
    run_training("mine", "--train.steps=1", "--train.num_evals=1")
    (tmp_path / "other.txt").write_text(text.read_text()[:9000])
    with pytest.raises(CheckpointError, match=rf"data.source was '{text}', is '{tmp_path}/other.txt'"):
        train_here(tmp_path, "shakespeare", "--name=mine", "--resume", f"--data.source={tmp_path / 'other.txt'}",
                   "--data.vocab_size=280")  # fmt: skip


def budgeted(minutes: float) -> Config:
    return Config("x", train=TrainConfig(steps=0, minutes=minutes))


def test_a_resumed_budget_has_the_minutes_that_are_left(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time_budget.time, "perf_counter", lambda: clock[0])
    left = StepBudget(budgeted(10), 700, val_tokens=0, seconds=480)
    clock[0] += 20
    assert left.elapsed == 500
    left.durations = [1.0] * time_budget.TIMED_STEPS
    assert left.is_due(612)
    assert left.steps_in_time(612, 1) == 612 + int(0.98 * 600 - 500 - 2)


@pytest.mark.parametrize(
    ("config", "state", "expected"),
    [
        (budgeted(5), {"seconds": 120}, (900, 120)),  # the number it had, until steps are timed
        (budgeted(8), {"seconds": 120}, (0, 120)),  # more time: timed again
        (budgeted(1), {"seconds": 120}, (300, 120)),  # used up
        (Config("x", train=TrainConfig(steps=400)), {"seconds": 120}, (400, 120)),
        (budgeted(5), {}, (900, 100)),  # format 1: a third of the steps, a third of the time
    ],
)
def test_the_length_of_a_resumed_run(config, state, expected):
    state = {"step": 300, "steps": 900, "config": {"train": {"minutes": 5.0}}} | state
    assert resumed(config, state) == pytest.approx(expected)


def test_minutes_on_resume_are_honoured(run_training, monkeypatch):
    """A budget that is used up ends the run; a larger one goes on with the seconds counted together."""
    monkeypatch.setattr(StepBudget, "steps_in_time", lambda self, step, evals_left: step + 3)
    monkeypatch.setattr(time_budget, "TIMED_STEPS", 4)
    run = run_training("timed", "--train.minutes=10", "--train.num_evals=1")
    assert max(losses(run)) == 7
    state = checkpoint.read_state(checkpoint.find(run, "latest"))
    assert state["seconds"] > 0
    run_training("timed", "--train.minutes=1e-9", "--train.num_evals=1", "--resume")
    assert max(losses(run)) == 7
    run_training("timed", "--train.minutes=20", "--train.num_evals=1", "--resume")
    assert max(losses(run)) == 14 and list(losses(run, "val_loss")) == [7, 14]
    assert checkpoint.read_state(checkpoint.find(run, "latest"))["seconds"] > state["seconds"]


def test_saving_by_time():
    now = [0.0]
    timer = SaveTimer(5.0, clock=lambda: now[0])
    due = []
    for second in range(0, 1000, 10):
        now[0] = second
        if timer.due:
            due.append(second)
            timer.restart()
    assert due == [30, 330, 630, 930]
    assert not SaveTimer(0.0, clock=lambda: 1e9).due
    assert TrainConfig(steps=1).save_minutes <= 5


def test_saving_after_every_step_changes_nothing(run_training, monkeypatch):
    words = ("--train.steps=6", "--train.num_evals=2", "--model.dropout=0.1", "--model.attention_dropout=0.1")
    plain = run_training("plain", *words)
    saved, save = [], checkpoint.Saver.save
    monkeypatch.setattr(checkpoint.Saver, "save", lambda self, step, *a: (saved.append(step), save(self, step, *a))[1])
    often = run_training("often", *words, "--train.save_minutes=1e-9")
    assert saved == [1, 2, 3, 4, 5, 6]
    assert weights(often) == weights(plain)
    for key in ("loss", "grad_norm", "lr", "val_loss", "val_bpb"):
        assert losses(often, key) == losses(plain, key)


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_again(run_training, monkeypatch, capsys, runs):
    words = ("--train.steps=4", "--train.num_evals=1")
    whole = run_training("whole", *words)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Saver, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run_training("early", *words)
    run = run_training("early", *words, "--resume")
    assert "early: it was stopped before its first checkpoint and begins again at step 0\n" in capsys.readouterr().out
    assert weights(run) == weights(whole) and losses(run) == losses(whole)


def test_such_a_run_remembers_where_its_weights_came_from(runs, text, tmp_path, monkeypatch):
    flags = ("--model.context=32", "--train.batch_tokens=256", "--train.micro_batch_size=4", "--train.compile=off",
             "--train.dtype=float32", "--data.val_fraction=0.2", "--train.prompt=", "--train.num_evals=1",
             "--train.steps=2", f"--data.source={text}")  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Saver, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            train_here(tmp_path, "shakespeare", "--name=tuned", f"--init-from={runs / 'songs'}", *flags)
    run = train_here(tmp_path, "shakespeare", "--name=tuned", "--resume", *flags)
    assert f'init_from = "{runs / "songs"}"' in (run / "config.toml").read_text()
    assert losses(run)[1] < losses(runs / "songs")[1] - 1


def test_a_damaged_latest_is_passed_over_for_the_newest_intact_one(run_training, capsys):
    words = ("--train.num_evals=2", "--optim.lr_decay_frac=0")
    run = run_training("hurt", "--train.steps=4", *words)
    expected = weights(run), losses(run)
    (run / "step-000004" / "optimizer.pt").write_bytes(b"noise")
    run_training("hurt", "--train.steps=4", *words, "--resume")
    assert "optimizer.pt: damaged, its SHA-256 differs from state.json; using step-000002\n" in capsys.readouterr().out
    assert (weights(run), losses(run)) == expected


def test_metrics_are_repaired_without_a_moment_in_which_they_can_be_lost(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    content = "".join(json.dumps({"step": step, "loss": 1.5}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo'
    path.write_text(content)
    with monkeypatch.context() as patch:  # killed before the last of the calls that change the disk
        patch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            metrics.Metrics(tmp_path, 3, Config("run"))
    assert path.read_text() == content
    record = metrics.Metrics(tmp_path, 3, Config("run"))
    record.log(4, loss=2.0)
    record.close()
    assert [r["step"] for r in metrics.read(path)] == [1, 2, 3, 4]
    inode = path.stat().st_ino
    metrics.Metrics(tmp_path, 4, Config("run")).close()  # nothing to repair: the file is not touched
    assert path.stat().st_ino == inode and not (tmp_path / metrics.DAMAGED).exists()


@pytest.mark.parametrize(
    "noise", [b"\xff\xfe\x00\n", b"[]\n", b'{"step": "1"}\n', b'{"loss": 2.0}\n', b"[" * 99_999 + b"\n"]
)
def test_damaged_lines_are_left_out_and_kept_beside(tmp_path, noise, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content := b'{"step": 1, "loss": 2.0}\n' + noise + b'{"step": 2, "loss": 1.5}\n')
    assert [r["step"] for r in metrics.read(path)] == [1, 2]
    metrics.Metrics(tmp_path, 2, Config("run")).close()
    assert [r["step"] for r in metrics.read(path)] == [1, 2]
    assert (tmp_path / metrics.DAMAGED).read_bytes() == content
    assert "1 of 3 lines are damaged and left out" in capsys.readouterr().out


def test_the_best_is_named_before_its_record_is_written(run_training, monkeypatch):
    """A run killed between the two evaluates again; the other way round the best would be forgotten."""
    words = ("--train.steps=4", "--train.num_evals=2")
    real = metrics.Metrics.log

    def killed(self, step, **values):
        if "val_loss" in values and step == 4:
            raise KeyboardInterrupt
        real(self, step, **values)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Metrics, "log", killed)
        with pytest.raises(KeyboardInterrupt):
            run_training("between", *words)
    run = run_training("between", *words, "--resume")
    found = losses(run, "val_loss")
    assert list(found) == [2, 4]
    assert checkpoint.find(run, "best").name == f"step-{min(found, key=found.get):06d}"


def test_the_fields_that_resuming_needs_are_in_the_state(run_training):
    state = checkpoint.read_state(
        checkpoint.find(run_training("kept", "--train.steps=1", "--train.num_evals=1"), "latest")
    )
    assert state.keys() >= {"format_version", "step", "steps", "seconds", "dtype", "identity", "config", "sha256"}
    assert state["config"]["train"] == dataclasses.asdict(TrainConfig(**state["config"]["train"]))


def test_records_that_cannot_be_written_leave_the_configuration_as_it_was(run_training):
    words = ("--train.num_evals=1",)
    run = run_training("refused", "--train.steps=2", *words)
    before = (run / "config.toml").read_bytes()
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        run_training("refused", "--train.steps=3", *words, "--resume")
    assert (run / "config.toml").read_bytes() == before
