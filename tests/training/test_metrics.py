"""Metrics of a run, with and without wandb."""

import json

import pytest

from tests.conftest import losses
from training import metrics
from training.config import Config, ConfigError, TrainConfig


def test_truncated_line_is_ignored_and_lost_steps_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    assert [r["step"] for r in metrics.read(path)] == [1, 2]
    metrics.Metrics(tmp_path, 1, Config("run")).close()
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


def scalars(run, name):
    """What TensorBoard shows: {step: value}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events.Tags()["scalars"], {event.step: event.value for event in events.Scalars(name)}


def test_tensorboard_and_wandb_have_the_names_and_values_of_metrics_jsonl(run_training, monkeypatch):
    import wandb

    seen = []

    class Recorder:
        def log(self, values, step):
            seen.append({"step": step, **values})

        def finish(self):
            seen.append("finished")

    monkeypatch.setattr(wandb, "init", lambda **_: Recorder())
    words = ("--train.num_evals=2", "--train.tensorboard=true", "--train.wandb=offline")
    run = run_training("shown", "--train.steps=4", *words)
    records = metrics.read(run / "metrics.jsonl")
    assert seen == [*records, "finished"]
    names, loss = scalars(run, "loss")
    assert set(names) == {name for record in records for name in record} - {"step"}
    for name in names:
        assert scalars(run, name)[1] == pytest.approx(losses(run, name))
    assert list(loss) == [1, 2, 3, 4]


def test_a_resumed_run_replaces_what_tensorboard_showed(tmp_path):
    config = Config("run", train=TrainConfig(steps=9, tensorboard=True))
    for begin, value in ((0, 1.0), (2, 5.0)):
        record = metrics.Metrics(tmp_path, begin, config)
        for step in range(begin + 1, begin + 5):
            record.log(step, loss=value)
        record.close()
    assert scalars(tmp_path, "loss")[1] == {1: 1.0, 2: 1.0, 3: 5.0, 4: 5.0, 5: 5.0, 6: 5.0} == losses(tmp_path)


def test_tensorboard_has_what_a_kill_leaves_in_metrics_jsonl(tmp_path, monkeypatch):
    """With the checkpoint come the records before it, and an evaluation at once, as no resumed run repeats them."""
    record = metrics.Metrics(tmp_path, 0, Config("run", train=TrainConfig(steps=9, tensorboard=True)))
    writer, unwritten = record.trackers["TensorBoard"].writer, []
    add, flush = writer.add_scalar, writer.flush
    monkeypatch.setattr(writer, "add_scalar", lambda name, *what: (unwritten.append(name), add(name, *what)))
    monkeypatch.setattr(writer, "flush", lambda: (unwritten.clear(), flush()))
    record.log(1, loss=3.0)
    record.log(2, loss=2.0)
    assert unwritten == ["loss", "loss"]
    record.sync()
    assert not unwritten and scalars(tmp_path, "loss")[1] == {1: 3.0, 2: 2.0}  # nothing was closed
    record.log(2, val_loss=2.5, val_bpb=1.0)
    assert not unwritten and scalars(tmp_path, "val_loss")[1] == {2: 2.5}
    record.close()


def test_a_flush_that_fails_turns_tensorboard_off(tmp_path, monkeypatch, capsys):
    record = metrics.Metrics(tmp_path, 0, Config("run", train=TrainConfig(steps=9, tensorboard=True)))
    with monkeypatch.context() as patch:
        patch.setattr(record.trackers["TensorBoard"].writer, "flush", lambda: 1 / 0)
        record.sync()
        record.sync()
    record.log(1, loss=1.0)
    record.close()
    assert capsys.readouterr().out == "TensorBoard stopped logging: division by zero\n"
    assert list(losses(tmp_path)) == [1]


def test_a_failure_of_tensorboard_turns_it_off(tmp_path, monkeypatch, capsys):
    record = metrics.Metrics(tmp_path, 0, Config("run", train=TrainConfig(steps=9, tensorboard=True)))
    monkeypatch.setattr(record.trackers["TensorBoard"].writer, "add_scalar", lambda *_: 1 / 0)
    record.log(1, loss=1.0)
    record.log(2, loss=1.0)
    record.close()
    assert capsys.readouterr().out == "TensorBoard stopped logging: division by zero\n"
    assert list(losses(tmp_path)) == [1, 2]


def test_without_tensorboard_nothing_begins(run_training, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^train.tensorboard = True: needs the package tensorboard, which is not"):
        run_training("none", "--train.steps=2", "--train.tensorboard=true")
    assert not (tmp_path / "none").exists()
