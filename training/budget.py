"""The number of steps of a run: `train.steps`, or as many as end within `train.minutes` of wall-clock time."""

import statistics
import time
from collections.abc import Iterable

from training.config import Config

# Steps to time before the number is first set, and steps between two adjustments of it.
TIMED_STEPS, ADJUST_EVERY = 12, 50
RESERVE = 0.02  # share of the time that is kept back


class StepBudget:
    """Times the steps and sets `num_steps`; 0 means not known yet.

    A machine's speed changes, so the number is adjusted again and again until a few steps before the end. A resumed
    run keeps the number that it was saved with.

    Args:
        config: of the run.
        num_steps: known from the configuration or the checkpoint; 0 if there is none.
        resumed: whether the run continues from a checkpoint.
        val_tokens: length of the validation text: evaluations take part of the time.
    """

    def __init__(self, config: Config, num_steps: int, resumed: bool, val_tokens: int) -> None:
        self.config, self.num_steps, self.val_tokens = config, num_steps, val_tokens
        self.adjustable = config.train.steps == 0 and not resumed
        self.started = time.perf_counter()
        self.durations: list[float] = []

    @property
    def elapsed(self) -> float:
        """Seconds since the training loop began."""
        return time.perf_counter() - self.started

    @property
    def step_seconds(self) -> float:
        """Median duration of the latest steps."""
        return statistics.median(self.durations[-20:])

    def add_step(self, seconds: float) -> None:
        """Record the duration of a step."""
        self.durations.append(seconds)

    def is_due(self, step: int) -> bool:
        """Whether `num_steps` is to be set or adjusted after this step."""
        if self.num_steps == 0:
            return len(self.durations) == TIMED_STEPS
        return self.adjustable and step % ADJUST_EVERY == 0 and step + ADJUST_EVERY < self.num_steps

    def steps_in_time(self, step: int, evals_left: int) -> int:
        """Number of steps, those already done included, that end in time with `evals_left` evaluations to come.

        A validation token costs a third of a training token: a forward pass without a backward pass.
        """
        mean = statistics.mean(self.durations[4:][-2 * ADJUST_EVERY :])  # the first steps are not typical
        eval_seconds = mean * self.val_tokens / self.config.train.batch_tokens / 3 + 2  # 2 to save, sample and plot
        left = (1 - RESERVE) * self.config.train.minutes * 60 - self.elapsed - evals_left * eval_seconds
        return step + max(evals_left, int(left / mean))


def evaluation_due(step: int, steps: int, num_evals: int, validated: Iterable[int]) -> bool:
    """Whether to evaluate at `step`: `num_evals` times, evenly spread over `steps`, the last time at the end.

    When the number of steps changes, an evaluation that was passed is made up for, and none is made twice.
    """
    last = max(validated, default=0)
    if steps == 0 or step <= last:
        return False
    return step == steps or step * num_evals // steps > round(last * num_evals / steps)
