"""The length of a run: `train.steps`, or as many steps as end within `train.minutes`; when to evaluate and to save."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

from training.config import Config

# Steps to time before the number is first set, and steps between two adjustments of it.
TIMED_STEPS, ADJUST_EVERY = 12, 50
RESERVE = 0.02  # share of the time that is kept back
FIRST_SAVE = 30.0  # seconds after the start, or train.save_minutes if that is less


class StepBudget:
    """Times the steps and sets `num_steps`; 0 means not known yet.

    A machine's speed changes, so the number is adjusted again and again until a few steps before the end. A resumed
    run continues for the minutes that are left.

    Args:
        config: of the run.
        num_steps: known from the configuration or the checkpoint; 0 if there is none.
        val_tokens: tokens of an evaluation: evaluations take part of the time.
        seconds: training time before this process, in a resumed run.
        final_tokens: tokens of the additional evaluation at the end, 0 if there is none.
    """

    def __init__(
        self, config: Config, num_steps: int, val_tokens: int, seconds: float = 0.0, final_tokens: int = 0
    ) -> None:
        self.config, self.num_steps, self.val_tokens = config, num_steps, val_tokens
        self.seconds, self.final_tokens = seconds, final_tokens
        self.started = time.perf_counter()
        self.durations: list[float] = []

    @property
    def elapsed(self) -> float:
        """Seconds of training: since the loop began, and before, in a resumed run."""
        return self.seconds + time.perf_counter() - self.started

    @property
    def step_seconds(self) -> float:
        """Median duration of the latest steps."""
        return statistics.median(self.durations[-20:])

    def add_step(self, seconds: float) -> None:
        """Record the duration of a step."""
        self.durations.append(seconds)

    def is_due(self, step: int) -> bool:
        """Whether `num_steps` is to be set or adjusted after this step."""
        if self.config.train.steps:
            return False
        if len(self.durations) <= TIMED_STEPS:
            return len(self.durations) == TIMED_STEPS
        return step % ADJUST_EVERY == 0 and step + ADJUST_EVERY < self.num_steps

    def steps_in_time(self, step: int, evals_left: int) -> int:
        """Number of steps, those already done included, that end in time with `evals_left` evaluations to come.

        A validation token costs a third of a training token: a forward pass without a backward pass.
        """
        evals_left = max(1, evals_left)
        mean = statistics.mean(self.durations[4:][-2 * ADJUST_EVERY :])  # the first steps are not typical
        token_seconds = mean / self.config.train.batch_tokens / 3
        eval_seconds = token_seconds * self.val_tokens + 2  # 2 to save, sample and plot
        left = (1 - RESERVE) * self.config.train.minutes * 60 - self.elapsed - evals_left * eval_seconds
        return step + max(evals_left, int((left - token_seconds * self.final_tokens) / mean))


def resumed(config: Config, state: dict[str, Any]) -> tuple[int, float]:
    """Number of steps (0: not known) and seconds of training so far, of a run resumed from a checkpoint's `state`.

    A run with a budget keeps the number of steps that it had, until its steps are timed again. With another budget the
    number is not known, or, where that is used up, reached.
    """
    then, minutes = state["config"]["train"], config.train.minutes
    used = state["step"] / state["steps"] * then["minutes"] * 60 if state["steps"] else 0.0  # format 1 has no seconds
    seconds = float(state.get("seconds", used))
    if config.train.steps:
        return config.train.steps, seconds
    if then["minutes"] == minutes:
        return state["steps"], seconds
    return (state["step"] if seconds >= minutes * 60 else 0), seconds


class SaveTimer:
    """Whether a checkpoint is due by time: FIRST_SAVE seconds after the start, then every `minutes`; 0: never."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock = minutes * 60, clock
        self.next = clock() + min(self.seconds, FIRST_SAVE)

    @property
    def due(self) -> bool:
        """Whether the time has come."""
        return self.seconds > 0 and self.clock() >= self.next

    def restart(self) -> None:
        """Count from now: a checkpoint was written."""
        self.next = self.clock() + self.seconds


def evaluation_due(step: int, steps: int, num_evals: int, validated: Iterable[int]) -> bool:
    """Whether to evaluate at `step`: `num_evals` times, evenly spread over `steps`, the last time at the end.

    When the number of steps changes, an evaluation that was passed is made up for, and none is made twice.
    """
    last = max(validated, default=0)
    if steps == 0 or step <= last:
        return False
    return step == steps or step * num_evals // steps > round(last * num_evals / steps)
