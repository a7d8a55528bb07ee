"""Counters, gauges and histograms, as text in Prometheus' format (version 0.0.4).

All are changed and read in the event loop, so nothing is locked.
"""

from bisect import bisect_left
from collections import Counter as Counts
from collections.abc import Callable

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)  # seconds


class Counter:
    """A number that grows, one for each combination of labels such as `status="200"`."""

    kind = "counter"

    def __init__(self) -> None:
        self.counts: Counts[str] = Counts()

    def add(self, amount: int = 1, **labels: str | int) -> None:
        """Add to the number with these labels."""
        self.counts[",".join(f'{name}="{value}"' for name, value in labels.items())] += amount

    def lines(self, name: str) -> list[str]:
        """Its samples."""
        return [f"{name}{{{labels}}} {count}" if labels else f"{name} {count}" for labels, count in self.counts.items()]


class Gauge:
    """A number that is read when it is asked for."""

    kind = "gauge"

    def __init__(self, read: Callable[[], int]) -> None:
        self.read = read

    def lines(self, name: str) -> list[str]:
        """Its sample."""
        return [f"{name} {self.read()}"]


class Histogram:
    """Counts of observations, one for each bound: how many are at most as large; and their sum."""

    kind = "histogram"

    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(BOUNDS) + 1), 0.0

    def observe(self, value: float) -> None:
        """Count an observation."""
        self.counts[bisect_left(BOUNDS, value)] += 1
        self.sum += value

    def lines(self, name: str) -> list[str]:
        """Its samples."""
        bounds = [*map(str, BOUNDS), "+Inf"]
        buckets = [f'{name}_bucket{{le="{bound}"}} {sum(self.counts[: n + 1])}' for n, bound in enumerate(bounds)]
        return [*buckets, f"{name}_sum {self.sum}", f"{name}_count {sum(self.counts)}"]


class Metrics:
    """What the server measures."""

    def __init__(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        self.requests, self.sequences = Counter(), Counter()
        self.prompt_tokens, self.cached_tokens, self.generated_tokens = Counter(), Counter(), Counter()
        for counter in (self.prompt_tokens, self.cached_tokens, self.generated_tokens):
            counter.add(0)
        self.first_token, self.next_token = Histogram(), Histogram()
        self.all: dict[str, tuple[Counter | Gauge | Histogram, str]] = {
            "heed_requests_total": (self.requests, "HTTP responses that have begun"),
            "heed_sequences_total": (self.sequences, "sequences that have ended: stop, length, cancelled or error"),
            "heed_prompt_tokens_total": (self.prompt_tokens, "tokens of prompts"),
            "heed_cached_prompt_tokens_total": (self.cached_tokens, "tokens of prompts that the cache already had"),
            "heed_generated_tokens_total": (self.generated_tokens, "tokens generated"),
            "heed_sequences_running": (Gauge(running), "sequences that have a row of the KV cache"),
            "heed_sequences_waiting": (Gauge(waiting), "sequences that wait for a row"),
            "heed_time_to_first_token_seconds": (self.first_token, "from a request to the first token of a sequence"),
            "heed_time_per_token_seconds": (self.next_token, "between two tokens of a sequence"),
        }

    def render(self) -> str:
        """The text of GET /metrics."""
        found = [
            f"# HELP {name} {about}\n# TYPE {name} {metric.kind}\n"
            + "".join(f"{line}\n" for line in metric.lines(name))
            for name, (metric, about) in self.all.items()
        ]
        return "".join(found)
