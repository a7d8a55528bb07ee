"""Data-parallel training: each process trains a copy of the model on its share of the batch.

torchrun starts the processes (`torchrun --nproc-per-node 8 train.py gpt2-124m`) and sets the environment variables that
`init_distributed` reads. Without torchrun there is one process, and nothing here has an effect. Gradients are averaged
once per step, after accumulation.

A process that ends breaks the connections of the others: they raise DistributedError. One that hangs does so after
STEP_TIMEOUT; only `barrier` and `share` wait longer, while the main process prepares data, compiles or saves.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

STEP_TIMEOUT = datetime.timedelta(minutes=1)  # of a collective within a step
PATIENCE = datetime.timedelta(hours=4)  # the main process may tokenize a large corpus while the others wait
T = TypeVar("T")


class DistributedError(RuntimeError):
    """Another process of the run has ended or does not answer. The message is one line."""


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Turn the errors of a collective into a DistributedError."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        raise DistributedError(
            f"another process of this run has ended or does not answer ({reason}); the last checkpoint is good, "
            "--resume continues"
        ) from None


@dataclass(frozen=True)
class World:
    """The rank of this process, the number of processes, the rank on this machine, and the group that can wait."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    patient: Any = None

    @property
    def main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes, for PATIENCE at most. Raises DistributedError."""
        if self.size > 1:
            with _together():
                dist.all_reduce(torch.zeros(1), group=self.patient)  # dist.barrier() would choose a device

    def share(self, value: T) -> T:
        """The main process's value, on all processes. Raises DistributedError."""
        if self.size == 1:
            return value
        box = [value]
        with _together():
            dist.broadcast_object_list(box, src=0, group=self.patient, device=torch.device("cpu"))
        return box[0]

    def all_reduce_sum(self, numbers: list[float], device: torch.device) -> list[float]:
        """Each number, summed over all processes. Raises DistributedError."""
        if self.size == 1:
            return numbers
        with _together():
            shared = torch.tensor(numbers, dtype=torch.float64, device=device)
            dist.all_reduce(shared)
            return shared.tolist()

    def broadcast(self, number: int, device: torch.device) -> int:
        """The main process's number, on all processes. Raises DistributedError."""
        return int(self.all_reduce_sum([number if self.main else 0], device)[0])

    def average_gradients(self, model: nn.Module) -> None:
        """Replace every gradient by its mean over all processes. Raises DistributedError."""
        if self.size > 1:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            flat = torch.cat([g.flatten() for g in gradients])  # one all-reduce, not one per parameter
            with _together():
                dist.all_reduce(flat)
            flat /= self.size
            for g, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                g.copy_(mean.view_as(g))


def backends(cuda: bool) -> str:
    """The backend of each kind of device. A machine with a GPU may train on its CPU, too (`--train.device cpu`)."""
    return "cpu:gloo,cuda:nccl" if cuda else "gloo"


def init_distributed() -> World:
    """Join the process group, if torchrun started one. Raises DistributedError."""
    if "WORLD_SIZE" not in os.environ:
        return World()
    with _together():
        dist.init_process_group(backends(torch.cuda.is_available()), timeout=STEP_TIMEOUT)
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]), patient)


def cleanup(world: World) -> None:
    """Leave the process group together: a process that exits earlier breaks the others' connections."""
    if world.size > 1:
        world.barrier()
        dist.destroy_process_group()
