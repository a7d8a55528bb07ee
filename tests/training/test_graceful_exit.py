"""Signals: two within ten seconds are one stop, a later one ends the process; a stop is honoured while validating."""

import inspect
import os
import signal

import pytest

import train
from tests.conftest import losses, weights
from training import checkpoint, graceful_exit
from training.graceful_exit import GracefulExit


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def killed(monkeypatch):
    sent = []
    monkeypatch.setattr(graceful_exit.os, "kill", lambda pid, number: sent.append((pid, number)))
    return sent


def test_signals_within_ten_seconds_are_one_stop_and_a_later_one_ends_at_once(killed):
    now = [50.0]
    exit = GracefulExit(clock=lambda: now[0])
    assert not exit.requested
    for now[0], number in (
        (50.0, signal.SIGTERM),
        (50.1, signal.SIGTERM),
        (53.0, signal.SIGINT),
        (60.0, signal.SIGTERM),
    ):
        signal.raise_signal(number)
    assert exit.requested and exit.signal == signal.SIGTERM and not killed
    now[0] = 60.1
    signal.raise_signal(signal.SIGTERM)
    assert killed == [(os.getpid(), signal.SIGTERM)]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_handler_only_sets_flags():
    source = inspect.getsource(GracefulExit._receive)
    assert not any(word in source for word in ("print", "log", "write", "flush", "raise"))


def test_a_stop_is_honoured_within_a_validation_and_the_run_goes_on_exactly(run_training, monkeypatch):
    words = ("--train.steps=6", "--train.num_evals=2")
    whole = run_training("whole", *words)
    real, batches = train.validate, []

    def signalled(model, *a):
        loss = type(model).loss

        def counted(self, *batch):
            batches.append(self.training)
            if len(batches) == 2:
                signal.raise_signal(signal.SIGTERM)
            return loss(self, *batch)

        with monkeypatch.context() as patch:
            patch.setattr(type(model), "loss", counted)
            return real(model, *a)

    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", signalled)
        with pytest.raises(SystemExit) as left:
            run_training("stopped", *words)
    assert left.value.code == 128 + signal.SIGTERM
    assert batches == [False, False]  # and not the rest of the validation text
    run = whole.parent / "stopped"
    assert checkpoint.read_state(checkpoint.find(run, "latest"))["step"] == 3 and not losses(run, "val_loss")
    run_training("stopped", *words, "--resume")
    assert weights(run) == weights(whole)
    assert (losses(run), losses(run, "val_loss")) == (losses(whole), losses(whole, "val_loss"))


def test_a_stop_within_the_last_validation_of_the_whole_text_leaves_it_to_the_resumed_run(run_training, monkeypatch):
    words = ("--train.steps=2", "--train.num_evals=1", "--train.eval_tokens=200")
    real, texts = train.validate, []

    def signalled(model, text, *a):
        texts.append(text.tokens)
        if len(texts) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(model, text, *a)

    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", signalled)
        with pytest.raises(SystemExit) as left:
            run_training("whole-text", *words)
    assert left.value.code == 128 + signal.SIGTERM and texts[0] < texts[1]
    run = run_training("whole-text", *words, "--resume")
    assert list(losses(run, "val_loss")) == list(losses(run, "full_val_loss")) == [2]


def test_a_signal_in_the_last_step_leaves_the_evaluation_to_the_resumed_run(run_training, monkeypatch, capsys):
    real = train.check_finite

    def signalled(step, *numbers):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        real(step, *numbers)

    with monkeypatch.context() as patch:
        patch.setattr(train, "check_finite", signalled)
        with pytest.raises(SystemExit) as left:
            run_training("last", "--train.steps=3", "--train.num_evals=1")
    assert left.value.code == 128 + signal.SIGINT
    assert "stopped and saved at step 3; --resume continues" in capsys.readouterr().out
    assert list(losses(run_training("last", "--train.steps=3", "--train.num_evals=1", "--resume"), "val_loss")) == [3]
