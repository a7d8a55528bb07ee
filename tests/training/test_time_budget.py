"""The time budget: number of steps of a run with a budget of minutes, and when it evaluates."""

import re
from types import SimpleNamespace

import pytest

import train
from tests.conftest import losses
from training import metrics, time_budget
from training.config_files import load
from training.time_budget import StepBudget, evaluation_due


def test_number_of_steps_fits_the_budget(run_training, monkeypatch, capsys):
    """On a clock that the run itself moves on: 0.5 s a step, 0.4 s from step 30 on, and 6 s an evaluation."""
    now, learning_rate, validate = [0.0], train.set_learning_rate, train.validate

    def passes(seconds, result):
        now[0] += seconds
        return result

    clock = SimpleNamespace(perf_counter=lambda: now[0])
    for module in (train, time_budget):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(train, "set_learning_rate", lambda *a: passes(0.5 if now[0] < 15 else 0.4, learning_rate(*a)))
    monkeypatch.setattr(train, "validate", lambda *a: passes(6.0, validate(*a)))
    run = run_training("timed", "--train.minutes=1", "--train.num_evals=2")
    # Set after the first steps and adjusted repeatedly: the last line is final.
    out = capsys.readouterr().out
    assert "budget 1 min = " in out
    steps = int(re.findall(r"step (\d+) \| val_loss", out)[-1])
    assert steps > (60 - 2 * 6) / 0.5  # it became faster
    assert 57 < now[0] <= 60 and f"training_seconds: {now[0]:.1f}\n" in out
    assert max(losses(run)) == steps
    assert max(losses(run, "val_loss")) == steps
    assert f"num_steps: {steps}\n" in out
    rates = [r["lr"] for r in metrics.read(run / "metrics.jsonl") if "lr" in r]
    assert rates[-1] < 0.1 * max(rates)  # the schedule is complete


def test_number_of_steps_is_adjusted_to_the_speed(run_training, monkeypatch):
    asked = []

    def fit(self, step, evals_left):
        asked.append((step, evals_left))
        return 60 if step < 20 else 40  # steps became slower

    monkeypatch.setattr(StepBudget, "steps_in_time", fit)
    monkeypatch.setattr(time_budget, "ADJUST_EVERY", 5)
    run = run_training("drifting", "--train.minutes=1", "--train.num_evals=2")
    assert asked == [(12, 2), (15, 2), (20, 2), (25, 1), (30, 1)]  # after the first steps, then every five
    assert list(losses(run, "val_loss")) == [20, 40]
    assert max(losses(run)) == 40


def test_steps_in_the_remaining_time(monkeypatch):
    config = load("shakespeare", {"train.minutes": "2", "train.num_evals": "3", "train.batch_tokens": "8192"})
    monkeypatch.setattr(StepBudget, "elapsed", 10.0)

    def steps(seconds: float) -> int:
        timed = StepBudget(config, 0, val_tokens=8192)
        timed.durations = [9.0] * 4 + [seconds] * 3  # the first ones are excluded
        return timed.steps_in_time(7, 2)

    # 120 s * 0.98, less 10 s spent, less 2 evaluations of 0.5 * 8192 / 8192 / 3 + 2 s, at 0.5 s per step, after 7 steps
    assert steps(0.5) == 7 + int((117.6 - 10 - 2 * (0.5 / 3 + 2)) / 0.5)
    assert steps(500.0) == 9  # at least one step for each evaluation


@pytest.mark.parametrize(
    ("num_steps", "given", "due"),
    [(0, "0", [12]), (200, "0", [12, 50, 100]), (200, "200", [])],
)
def test_when_the_number_of_steps_is_adjusted(num_steps, given, due):
    config = load("shakespeare", {"train.steps": given} if given != "0" else {})
    timed, found = StepBudget(config, num_steps, 1), []
    for step in range(1, 200):
        timed.add_step(1.0)
        found += [step] if timed.is_due(step) else []
    assert found == due


def test_evaluations_are_spread_evenly_when_the_number_of_steps_changes():
    def made(steps_at, end, validated=()):
        validated = list(validated)
        for step in range(max(validated, default=0), end + 1):
            if evaluation_due(step, steps_at(step), 2, validated):
                validated.append(step)
        return validated

    assert made(lambda step: 100, 100) == [50, 100]
    assert made(lambda step: 0, 12) == []  # not yet known
    assert made(lambda step: 120 if step < 55 else 90, 90) == [55, 90]  # fewer: 45 was passed
    assert made(lambda step: 100 if step < 60 else 130, 130) == [50, 130]  # more: 65 comes too soon after 50
    assert made(lambda step: 100 if step < 51 else 52, 52) == [50, 52]  # the last evaluation always runs
    assert made(lambda step: 200, 200, [50, 100]) == [50, 100, 200]  # a finished run continues
