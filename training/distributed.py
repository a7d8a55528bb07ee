"""Several devices, applied from outside the model: each process trains a copy on its share of the batch.

Started by torchrun (`torchrun --nproc-per-node 8 train.py gpt2-124m`), which says in the environment who is who;
without it there is one process and nothing here does anything. Gradients are averaged once a step, after accumulation.
"""

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class World:
    """This process's place among all."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def sum(self, numbers: list[float], device: torch.device) -> list[float]:
        """Each number summed over all processes."""
        if self.size == 1:
            return numbers
        shared = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(shared)
        return shared.tolist()

    def same(self, number: int, device: torch.device) -> int:
        """The main process's number, in all: what was measured must not differ between them."""
        return int(self.sum([number if self.main else 0], device)[0])

    def average_gradients(self, model: nn.Module) -> None:
        """Every gradient becomes its mean over all processes."""
        if self.size > 1:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            flat = torch.cat([g.flatten() for g in gradients])  # one message, not one a matrix
            dist.all_reduce(flat)
            flat /= self.size
            for g, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                g.copy_(mean.view_as(g))


def join() -> World:
    """Find the other processes, if torchrun started any."""
    if "WORLD_SIZE" not in os.environ:
        return World()
    # The main process may prepare a large corpus while the others wait.
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(hours=4))
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))


def leave() -> None:
    """Part from the other processes, all at once: one that went earlier would leave the others' connections hanging."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
