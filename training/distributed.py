"""Data-parallel training: each process trains a copy of the model on its share of the batch.

torchrun starts the processes (`torchrun --nproc-per-node 8 train.py gpt2-124m`) and sets the environment variables that
`init_distributed` reads. Without torchrun there is one process, and nothing here has an effect. Gradients are averaged
once per step, after accumulation.

A process that ends breaks the connections of the others, and one that hangs lets their next collective time out: both
end the run, and the last checkpoint is good. What may take longer than a collective, preparing a text, is waited for on
the store through which the processes found each other.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

TIMEOUT = datetime.timedelta(minutes=10)  # of a collective: torch.compile and a save take minutes
PATIENCE = datetime.timedelta(hours=4)  # a large corpus takes hours to tokenize
T = TypeVar("T")


class DistributedError(RuntimeError):
    """Another process of the run has ended or does not answer. The message is one line."""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Turn the error of a collective, wherever it is within, into a DistributedError."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):  # gloo's errors have no type
            raise
        reason = " ".join(str(error).split())[:120]
        raise DistributedError(
            f"another process of this run has ended or does not answer ({reason}); the last checkpoint is good, "
            "--resume continues"
        ) from None


@dataclass(frozen=True)
class World:
    """The rank of this process, the number of processes, the rank on this machine, and the store that all share."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: Any = None

    @property
    def main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    @contextlib.contextmanager
    def in_turn(self, what: str, log: Callable[[str], None]) -> Iterator[None]:
        """The block first in the main process, then in the first process of every other machine, then in the rest.

        What one of them leaves on a disk, those after it find there. They wait for PATIENCE at most.
        """
        if self.size > 1 and self.main:
            log(f"{what}: {self.size - 1} other processes wait for it")
        before = [] if self.main else [0] if self.local_rank == 0 else [0, self.rank - self.local_rank]
        for rank in before:
            self.store.wait([f"{what} {rank}"], PATIENCE)
        yield
        if self.size > 1:
            self.store.set(f"{what} {self.rank}", "done")

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1))  # dist.barrier() would choose a device

    def share(self, value: T) -> T:
        """The main process's value, on all processes."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def all_reduce_sum(self, numbers: list[float], device: torch.device) -> list[float]:
        """Each number, summed over all processes."""
        if self.size == 1:
            return numbers
        shared = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(shared)
        return shared.tolist()

    def average_gradients(self, model: nn.Module) -> None:
        """Replace every gradient by its mean over all processes."""
        if self.size > 1:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            flat = torch.cat([g.flatten() for g in gradients])  # one all-reduce, not one per parameter
            dist.all_reduce(flat)
            flat /= self.size
            for g, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                g.copy_(mean.view_as(g))


def backends(cuda: bool) -> str:
    """The backend of each kind of device. A machine with a GPU may train on its CPU, too (`--train.device cpu`)."""
    return "cpu:gloo,cuda:nccl" if cuda else "gloo"


def init_distributed(timeout: datetime.timedelta = TIMEOUT) -> World:
    """Join the process group, if torchrun started one. timeout: of a collective."""
    if "WORLD_SIZE" not in os.environ:
        return World()
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    backend = backends(torch.cuda.is_available())
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    return World(rank, size, int(os.environ["LOCAL_RANK"]), store)


def cleanup(world: World) -> None:
    """Leave the process group together: a process that exits earlier breaks the others' connections."""
    if world.size > 1:
        world.barrier()
        dist.destroy_process_group()
