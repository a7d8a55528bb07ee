"""Functions in several processes, which find each other as those of torchrun do, but take no time to import torch."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

HANGS = 120  # seconds, after which a test gives up; nothing is measured by it

server = multiprocessing.get_context("forkserver")  # a process without threads and devices, which forks the others
server.set_forkserver_preload(["tests.conftest", "matplotlib.pyplot", "torch.distributed.fsdp", "torch._dynamo"])


class Ranks:
    """`size` processes that call function(rank, *args), which pickle can name. In torchrun's environment variables."""

    def __init__(self, size: int, function: Callable[..., Any], *args: Any) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = server.Pipe()
            process = server.Process(target=run, args=(theirs, rank, size, self.store.port, function, args))
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def result(self, rank: int) -> Any:
        """What the function returned in a process; EOFError if it has raised an error, which it has printed."""
        assert self.pipes[rank].poll(HANGS), f"process {rank} hangs"
        return self.pipes[rank].recv()

    def ends(self) -> list[int]:
        """Wait for all; their exit status."""
        for process in self.processes:
            process.join(HANGS)
        hung = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in hung:
            self.processes[rank].kill()
        assert not hung, f"processes {hung} hang"
        return [process.exitcode for process in self.processes]


def call(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What function(rank, *args) returns in each of `size` processes."""
    ranks = Ranks(size, function, *args)
    results = [ranks.result(rank) for rank in range(size)]
    assert ranks.ends() == [0] * size
    return results


def run(pipe: Connection, rank: int, size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """A process."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    pipe.send(function(rank, *args))
