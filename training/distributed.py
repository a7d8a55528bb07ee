"""Data-parallel training: each process trains a copy of the model on its share of the batch.

torchrun starts the processes (`torchrun --nproc-per-node 8 train.py gpt2-124m`) and sets the environment variables that
`init_distributed` reads. Without torchrun there is one process, and nothing here has an effect. Gradients are averaged
once per step, after accumulation.
"""

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class World:
    """The rank of this process, the number of processes, and the rank on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def all_reduce_sum(self, numbers: list[float], device: torch.device) -> list[float]:
        """Each number, summed over all processes."""
        if self.size == 1:
            return numbers
        shared = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(shared)
        return shared.tolist()

    def broadcast(self, number: int, device: torch.device) -> int:
        """The main process's number, on all processes."""
        return int(self.all_reduce_sum([number if self.main else 0], device)[0])

    def average_gradients(self, model: nn.Module) -> None:
        """Replace every gradient by its mean over all processes."""
        if self.size > 1:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            flat = torch.cat([g.flatten() for g in gradients])  # one all-reduce, not one per parameter
            dist.all_reduce(flat)
            flat /= self.size
            for g, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                g.copy_(mean.view_as(g))


def init_distributed() -> World:
    """Join the process group, if torchrun started one."""
    if "WORLD_SIZE" not in os.environ:
        return World()
    # The main process may tokenize a large corpus while the others wait.
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(hours=4))
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))


def cleanup() -> None:
    """Leave the process group together: a process that exits earlier breaks the others' connections."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
