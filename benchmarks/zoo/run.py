"""python -m benchmarks zoo [EXPERIMENT ...]: run experiments point by point, resume them, print their tables.

An experiment is a module of this package, see `Experiment`; its docstring says what it measures and how. Points run in
separate processes, several at a time with one thread each: for small models that is faster than one with several
threads. An experiment that measures time or memory is EXCLUSIVE: one point at a time has all threads.
"""

import functools
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Protocol, cast

import torch

from benchmarks import subprocess_runner
from benchmarks.zoo import EXPERIMENTS, members
from benchmarks.zoo.results import Point, Results, Row

SCALES = ("full", "short", "quick")


class Experiment(Protocol):
    """What a module of an experiment has."""

    EXCLUSIVE: bool
    MEASURES: tuple[str, ...]  # the keys of what `measure` returns

    def points(self, scale: str, seeds: int) -> list[Point]:
        """The settings of each measurement, all with the same keys, the most important first. A point with a "member"
        can be left out by name; "lr" and "seed" are the learning rate and the seed. `scale` is one of SCALES: short is
        for a first look, within two minutes of two threads; quick has tiny sizes, to test the code."""

    def measure(self, **point: str | int | float) -> dict[str, float]:
        """Measure a point, in about a minute. A diverged model is a result, such as NaN, not an exception."""

    def table(self, rows: list[Row]) -> str:
        """A table of all rows in Markdown: points with what was measured. There is at least one row."""

    def picture(self, rows: list[Row], path: Path) -> None:
        """Write a PNG."""


def load(name: str) -> Experiment:
    """The module of an experiment."""
    return cast(Experiment, importlib.import_module(f"benchmarks.zoo.{name}"))


def run(names: list[str], out: Path, scale: str, only: list[str], seeds: int, jobs: int, minutes: float) -> int:
    """Run the experiments (none: all) and write NAME.csv, NAME.md and NAME.png of each. Returns 1 if a point failed.

    Args:
        out: folder for the files; those of another scale than full are in a folder of its name in it.
        only: names or letters of members; none: all.
        jobs: processes at a time.
        minutes: start no further points after this time, which the experiments share.
    """
    out = out if scale == "full" else out / scale
    out.mkdir(parents=True, exist_ok=True)
    names = names or list(EXPERIMENTS)
    end, failed = time.monotonic() + 60 * minutes, 0
    for i, name in enumerate(names):
        experiment = load(name)
        points = experiment.points(scale, seeds)
        points = [p for p in points if "member" not in p or members.chosen([str(p["member"])], only)]
        if not points:
            continue
        results = Results(out / f"{name}.csv", list(points[0]), experiment.MEASURES)
        missing = [p for p in points if not results.has(p)]
        now = time.monotonic()
        progress = Progress(name, len(points) - len(missing), len(points))
        workers, threads = (1, jobs) if experiment.EXCLUSIVE else (jobs, 1)
        call = functools.partial(in_process if scale == "quick" else in_subprocess, name, threads)
        deadline = now + (end - now) / (len(names) - i)
        for point, found, error in measured(call, missing, 1 if scale == "quick" else workers, deadline):
            results.add(point, found, error)
            failed += bool(error)
            progress.advance(point, error)
        progress.end()
        if results.rows:
            report(experiment, name, results.rows, out)
    return 1 if failed else 0


def measured(
    call: Callable[[Point], dict[str, float]], points: list[Point], workers: int, deadline: float
) -> Iterator[tuple[Point, dict[str, float] | None, str]]:
    """Each point with its measurements or its error, as they become ready. None is started after the deadline."""
    waiting, running = iter(points), dict[Future[dict[str, float]], Point]()
    with ThreadPoolExecutor(workers) as pool:
        while True:
            while len(running) < workers and time.monotonic() < deadline and (point := next(waiting, None)):
                running[pool.submit(call, point)] = point
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                point = running.pop(future)
                if error := future.exception():
                    yield point, None, " ".join(f"{type(error).__name__}: {error}".split())
                else:
                    yield point, future.result(), ""


def in_process(name: str, threads: int, point: Point) -> dict[str, float]:
    """Measure a point here."""
    return load(name).measure(**point)


def in_subprocess(name: str, threads: int, point: Point) -> dict[str, float]:
    """Measure a point in another process with so many threads. Raises ValueError if it fails."""
    return subprocess_runner.measure(name, "benchmarks.zoo.run", name, str(threads), json.dumps(point))


def report(experiment: Experiment, name: str, rows: list[Row], out: Path) -> None:
    """Print the table, and write it and the picture."""
    table = experiment.table(rows)
    (out / f"{name}.md").write_text(table + "\n")
    experiment.picture(rows, out / f"{name}.png")
    print(f"{name}\n\n{table}\n\nwrote {out / name}.csv, .md and .png\n")


class Progress:
    """A line on stderr: a bar in a terminal, otherwise one line for each point."""

    def __init__(self, name: str, done: int, total: int) -> None:
        self.name, self.done, self.total = name, done, total
        self.started, self.resumed, self.bar = time.monotonic(), done, sys.stderr.isatty()
        self.show(f"{done} of {total} points are there" if done else f"{total} points")

    def advance(self, point: Point, error: str) -> None:
        """A point is ready."""
        self.done += 1
        seconds = (time.monotonic() - self.started) / (self.done - self.resumed) * (self.total - self.done)
        left = f"{self.done}/{self.total}, {seconds / 60:.0f} min left"
        settings = ", ".join(f"{key} {value}" for key, value in point.items())
        if error:
            print(f"{self.clear()}{self.name}: {settings}: {error}", file=sys.stderr)
        self.show(left if self.bar else f"{left}: {settings}")

    def show(self, text: str) -> None:
        """Replace the line, or begin the next one."""
        filled = 30 * self.done // self.total
        bar = f"[{'#' * filled}{'.' * (30 - filled)}] " if self.bar else ""
        line = f"{self.clear()}{self.name} {bar}{text}"
        print(line, end="" if self.bar else "\n", file=sys.stderr, flush=True)

    def clear(self) -> str:
        """What empties the terminal's line."""
        return "\r\033[K" if self.bar else ""

    def end(self) -> None:
        """Leave the line."""
        if self.bar:
            print(file=sys.stderr)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(load(sys.argv[1]).measure(**json.loads(sys.argv[3]))))
