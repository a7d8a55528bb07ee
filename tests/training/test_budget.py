"""A run with a budget of minutes: how many steps it settles on, and when it evaluates."""

import re

import train
from tests.conftest import losses
from training import metrics
from training.recipes import load


def test_the_number_of_steps_is_fixed_to_end_in_time(learn, capsys):
    run = learn("timed", "--train.minutes=0.15", "--train.num_evals=2")
    # Settled after the first steps and then again and again: what the last line says holds.
    said = capsys.readouterr().out
    assert "steps end in 0.15 minutes at this speed" in said
    steps = int(re.findall(r"step ([\d,]+): validation", said)[-1].replace(",", ""))
    assert steps > train.TIMED_STEPS
    assert max(losses(run)) == steps
    assert max(losses(run, "val_loss")) == steps
    rates = [r["lr"] for r in metrics.read(run / "metrics.jsonl") if "lr" in r]
    assert rates[-1] < 0.1 * max(rates)  # the schedule reached its end


def test_the_number_of_steps_follows_the_machines_speed(learn, monkeypatch):
    asked = []

    def fit(config, val_text, pace, step, evals, elapsed):
        asked.append((step, evals))
        return 60 if step < 20 else 40  # the machine became slower

    monkeypatch.setattr(train, "steps_in_time", fit)
    monkeypatch.setattr(train, "SETTLED_EVERY", 5)
    run = learn("drifting", "--train.minutes=1", "--train.num_evals=2")
    assert asked == [(12, 2), (15, 2), (20, 2), (25, 1), (30, 1)]  # after the first steps, then every five
    assert list(losses(run, "val_loss")) == [20, 40]
    assert max(losses(run)) == 40


def test_steps_in_time_is_what_the_budget_leaves():
    config = load("shakespeare", {"train.minutes": "2", "train.num_evals": "3", "train.batch_tokens": "8192"})
    val = type("Val", (), {"tokens": 8192})()
    # 120 s * 0.98, less 10 s spent, less 2 evaluations of 0.5 * 8192 / 8192 / 3 + 2 s, at 0.5 s a step, after 7 steps
    assert train.steps_in_time(config, val, 0.5, 7, 2, 10.0) == 7 + int((117.6 - 10 - 2 * (0.5 / 3 + 2)) / 0.5)
    assert train.steps_in_time(config, val, 500.0, 7, 2, 10.0) == 9  # at least one step for each evaluation


def test_evaluations_are_spread_evenly_and_none_is_lost_when_the_steps_change():
    def made(steps_at, end, validated=()):
        validated = list(validated)
        for step in range(max(validated, default=0), end + 1):
            if train.evaluation_due(step, steps_at(step), 2, validated):
                validated.append(step)
        return validated

    assert made(lambda step: 100, 100) == [50, 100]
    assert made(lambda step: 0, 12) == []  # not yet known
    assert made(lambda step: 120 if step < 55 else 90, 90) == [55, 90]  # fewer: 45 was passed
    assert made(lambda step: 100 if step < 60 else 130, 130) == [50, 130]  # more: 65 comes too soon after 50
    assert made(lambda step: 100 if step < 51 else 52, 52) == [50, 52]  # the last is never left out
    assert made(lambda step: 200, 200, [50, 100]) == [50, 100, 200]  # a finished run goes on
