"""Metrics of a run, with and without wandb."""

import json

from tests.conftest import losses
from training import metrics


def test_truncated_line_is_ignored_and_lost_steps_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    assert [r["step"] for r in metrics.read(path)] == [1, 2]
    metrics.Metrics(tmp_path, 1, "off", {}).close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1, "loss": 2.0}]


def test_wandb_offline_and_failing_to_start(run_training, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = run_training("watched", "--train.steps=2", "--train.num_evals=1", "--train.wandb=offline")
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("no such project")))
    run = run_training("unwatched", "--train.steps=2", "--train.num_evals=1", "--train.wandb=offline")
    assert "wandb is off, it failed to start: no such project" in capsys.readouterr().out
    assert list(losses(run)) == [1, 2]


def test_wandb_online_without_a_key_falls_back_to_offline(run_training, monkeypatch, capsys):
    import wandb

    asked = []
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(type(wandb.api), "api_key", None, raising=False)
    monkeypatch.setattr(wandb, "init", lambda **how: asked.append(how["mode"]))
    run_training("keyless", "--train.steps=1", "--train.num_evals=1", "--train.wandb=online")
    assert asked == ["offline"]
    assert "no API key" in capsys.readouterr().out


def test_wandb_failure_during_a_run_turns_it_off(run_training, monkeypatch, capsys):
    import wandb

    class Broken:
        def log(self, *_, **__):
            raise OSError("disk full")

    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    run = run_training("broken", "--train.steps=2", "--train.num_evals=1", "--train.wandb=offline")
    assert capsys.readouterr().out.count("wandb stopped logging: disk full") == 1
    assert list(losses(run)) == [1, 2]


def test_a_picture_that_cannot_be_written_is_one_line_and_training_goes_on(run_training, monkeypatch, capsys):
    def full(self, path, **_):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    run = run_training("unpictured", "--train.steps=2", "--train.num_evals=2")
    assert list(losses(run, "val_loss")) == [1, 2]
    assert f"{run / 'loss.png'}: not drawn (No space left on device)\n" in capsys.readouterr().out
    assert not list(run.glob(".draft*")) and not (run / "loss.png").exists()
