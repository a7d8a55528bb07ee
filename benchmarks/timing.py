"""Timing of several calls, alternating within one run, so that drift affects all of them equally."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

SECONDS = 0.3  # measuring time per call
FEWEST, MOST = 10, 200  # repetitions
CACHE = 512 << 20  # bytes, larger than the last-level cache of any GPU: writing them flushes the cache
FILLS = 8  # cache flushes; meanwhile the host queues the call, so that launch overhead is not measured

Call = Callable[[], object]


def medians(calls: Mapping[Any, Call], device: torch.device, seconds: float = SECONDS) -> dict[Any, float]:
    """The median seconds of each call after a warm-up; on a GPU measured by events, with a cold cache.

    seconds: about how long each call is measured, on a GPU.
    """
    if device.type == "cuda" and calls:
        return _on_gpu(calls, seconds)
    return _on_cpu(calls)


def rotate(calls: Sequence[Call]) -> Call:
    """One call that makes each of the calls in turn: of one implementation with several sets of inputs."""
    rotation = itertools.cycle(calls)
    return lambda: next(rotation)()


def _on_gpu(calls: Mapping[Any, Call], seconds: float) -> dict[Any, float]:
    cold = torch.empty(CACHE, dtype=torch.int8, device="cuda")

    def once(call: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(FILLS):
            cold.zero_()
        start.record()
        call()
        end.record()
        return start, end

    longest = 0.0
    for call in calls.values():
        for _ in range(3):  # the first compiles
            start, end = once(call)
        torch.cuda.synchronize()
        longest = max(longest, start.elapsed_time(end) / 1000)
    turns = min(max(int(seconds / longest), FEWEST), MOST)
    events = [{name: once(call) for name, call in calls.items()} for _ in range(turns)]
    torch.cuda.synchronize()
    return {
        name: statistics.median(turn[name][0].elapsed_time(turn[name][1]) for turn in events) / 1000 for name in calls
    }


def _on_cpu(calls: Mapping[Any, Call]) -> dict[Any, float]:
    """For a dry run: one call each, not representative of a GPU."""
    took = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        took[name] = time.perf_counter() - start
    return took
