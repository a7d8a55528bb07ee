"""One part of `python -m benchmarks gpu`, in a process of its own: python -m benchmarks.gpu.part NAME TASK

TASK is a Task as JSON. The part prints a line for each result as soon as it is there, so that a part that fails or runs
out of time loses no more than the result it was working on.
"""

import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu import ROW

WORKERS = 12  # processes that compile at the same time


@dataclass(frozen=True)
class Task:
    """What a part is asked to do. `seconds` until it is stopped; `dry`: tiny shapes on the CPU, interpreted, to test
    the code; `nanogpt`: the folder of nanoGPT, "" if there is none; `text`: the file of tiny Shakespeare."""

    seconds: float
    dry: bool = False
    nanogpt: str = ""
    text: str = ""
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds that are left."""
        return self.started + self.seconds - time.monotonic()

    def emit(self, **row: Any) -> None:
        """Report a result."""
        print(ROW + json.dumps(row), flush=True)

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """(item, function(item)) or (item, the exception), in the order in which they are done.

        Compiling takes longer than running, and a GPU does not accept another call from a process after a fault: so
        each item has a process of its own, several at a time. A dry run is in this process.
        """
        if self.dry:
            yield from ((item, _attempt(function, item)) for item in items)
            return
        waiting = list(items)
        context = multiprocessing.get_context("spawn")
        workers = min(WORKERS, len(waiting), os.cpu_count() or 1)
        with ProcessPoolExecutor(max(workers, 1), mp_context=context, max_tasks_per_child=1) as pool:
            futures = {pool.submit(_attempt, function, item): item for item in waiting}
            for future in as_completed(futures):
                try:
                    yield futures[future], future.result()
                except Exception as error:  # the process died
                    yield futures[future], error


def _attempt(function: Callable[[Any], Any], item: Any) -> Any:
    try:
        return function(item)
    except Exception as error:
        return RuntimeError(f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}")


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch
    import triton

    found = {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
    if not torch.cuda.is_available():
        return found | {"gpu": "none"}
    driver = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found | driver | {"gpu": torch.cuda.get_device_name(), "memory": torch.cuda.mem_get_info()[1]}


if __name__ == "__main__":
    name, given = sys.argv[1:]
    task = Task(**json.loads(given))
    task.emit(machine=machine())
    importlib.import_module(f"benchmarks.gpu.{name}").run(task)
