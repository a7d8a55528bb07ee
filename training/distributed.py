"""Several processes, each with a device and a share of the batch: torch.distributed's FSDP2 on a mesh of devices.

torchrun starts the processes (`torchrun --nproc-per-node 8 train.py gpt2-124m`) and sets the environment variables that
`init_distributed` reads. Without torchrun there is one process, and nothing here has an effect.

A mesh has a row for each copy of the model; the devices of a row hold the copy together (`train.shard` of them). Each
of them has some rows of every weight, gradient and moment. A layer's weights are gathered within the row before it
computes, and its gradients are averaged over the mesh while the layer before it computes (Zhao et al. 2023, arXiv
2304.11277). With `train.shard` 1 there is nothing to gather: data parallelism (Li et al. 2020, arXiv 2006.15704).

With `train.context_parallel` n, each n neighbouring devices have the same sequences, and each of them a part of their
tokens (kernels/context_parallel.py). It does not matter how these groups lie in the mesh: the loss is a sum over all
targets, each of which is on one device, so gradients are averaged as before.

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
from torch import Tensor

from kernels.context_parallel import ContextParallel
from model import GPT
from training.config import ConfigError
from training.matrix_owners import rows_of

TIMEOUT = datetime.timedelta(minutes=10)  # of a collective: torch.compile and a save take minutes
PATIENCE = datetime.timedelta(hours=4)  # a large corpus takes hours to tokenize
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # environment variables
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
    """The rank of this process, the number of processes, the rank on this machine, the store that all share, the
    timeout of a collective, and the number of processes that share a sequence (train.context_parallel)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: Any = None
    timeout: datetime.timedelta = TIMEOUT
    context: int = 1

    @property
    def data_rank(self) -> int:
        """Index of this process's group; the processes of a group have the same sequences, other groups different
        ones."""
        return self.rank // self.context

    @property
    def data_size(self) -> int:
        """The number of these groups."""
        return self.size // self.context

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


def backends(cuda: bool) -> str:
    """The backend of each kind of device. A machine with a GPU may train on its CPU, too (`--train.device cpu`)."""
    return "cpu:gloo,cuda:nccl" if cuda else "gloo"


def init_distributed(timeout: datetime.timedelta = TIMEOUT, context: int = 1) -> World:
    """Join the process group, if torchrun started one.

    timeout: of a collective. context: `train.context_parallel`; raises ConfigError if it does not divide the processes,
    or if torchrun's environment variables are incomplete.
    """
    if "WORLD_SIZE" in os.environ:
        for name in TORCHRUN:
            if not (value := os.environ.get(name, "")) or (name != "MASTER_ADDR" and not value.isdecimal()):
                why = f"is {value!r}, must be a whole number" if value else "is not set"
                raise ConfigError(f"environment variable {name} {why}: start with torchrun, or unset WORLD_SIZE")
    if (devices := int(os.environ.get("WORLD_SIZE", "1"))) % context:
        raise ConfigError(f"train.context_parallel = {context}: must divide the number of devices, {devices}")
    if "WORLD_SIZE" not in os.environ:
        return World()
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    backend = backends(torch.cuda.is_available())
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    return World(rank, size, int(os.environ["LOCAL_RANK"]), store, timeout, context)


def devices_per_copy(shard: int, world: World) -> int:
    """The number of devices that hold a copy of the model together: `train.shard`, or if it is 0 those of a machine.

    Raises ConfigError.
    """
    devices = world.share(shard or int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if world.size % devices:
        of_a_machine = "" if shard else f"the {devices} devices of a machine "
        raise ConfigError(f"train.shard = {shard}: {of_a_machine}must divide the number of devices, {world.size}")
    return devices


def parallelize(model: GPT, world: World, shard: int, device: torch.device, method: str = "auto") -> str:
    """Divide the model, in place, among the processes of a mesh (replicate, shard), and move it to their devices.

    Neighbouring ranks, which are on one machine, hold a copy together. From now on a forward pass is one of all
    processes, and parameters are DTensors: `local`, `whole` and `divided` are for them. With `world.context` above 1,
    neighbouring ranks also call `model.loss` with the same sequences, and each gets the loss of its own part of the
    targets; `model(tokens)` may be called with a cache only: each process then computes whole sequences alone. method:
    `train.context_method`. Returns the lines to log.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # two seconds to import

    ranks = torch.arange(world.size).view(-1, shard)  # (replicate, shard)
    row, column = divmod(world.rank, shard)
    groups = [
        dist.new_group(line.tolist(), timeout=world.timeout, use_local_synchronization=True)
        for line in (ranks[:, column], ranks[row])
    ]
    mesh = DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=("replicate", "shard"))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)  # what is in no layer
    for name in ("loss", "next_logits"):
        register_fsdp_forward_method(model, name)
    line = f"mesh {world.size} devices = {world.size // shard} copies of the model x {shard} devices (train.shard)"
    return line if world.context == 1 else f"{line}\n{share_sequences(model, world, method)}"


def share_sequences(model: GPT, world: World, method: str) -> str:
    """From now on `model.loss` is context-parallel: see `parallelize`. Returns the line to log."""
    n, ranks = world.context, range(world.data_rank * world.context, (world.data_rank + 1) * world.context)
    why = "train.context_method"
    if method == "auto":
        together = world.share(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) % n == 0
        method, why = ("gather", "within a machine") if together else ("ring", "across machines")
    group = dist.new_group(list(ranks), timeout=world.timeout, use_local_synchronization=True)
    parallel, loss = ContextParallel(group, method), model.loss
    attend = torch.compiler.disable(parallel.attention)  # a compiled layer calls it between two graphs
    layer: Any
    for layer in model.model.layers:
        layer.self_attn.attend = attend

    def own_loss(tokens: Tensor, targets: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        of_tokens = {"positions": parallel.split(positions), "documents": model.model.documents(tokens)}
        return loss(parallel.split(tokens), parallel.split(targets), **of_tokens)

    model.loss = own_loss  # type: ignore[method-assign, assignment]
    gathers = not_a_ring(model) if method == "ring" else ""
    return f"context {world.data_size} groups of {n} devices share sequences: {method} ({why}){gathers}"


def not_a_ring(model: GPT) -> str:
    """For the log: the layers that gather if the method is ring, which computes the plain causal mask only; or ""."""
    if model.model.document_start is not None:
        return "; gather for all layers (data.document_mask)"
    if model.config.positions == "alibi":
        return "; gather for all layers (model.positions = alibi)"
    return "; gather for window layers" if "S" in model.config.layer_pattern[: model.config.n_layer] else ""


def reduce_gradients(model: Any, last: bool) -> None:
    """Before a micro-batch: its gradients are summed up within a copy of the model, and only those of the last one of
    a step are reduced across the copies."""
    if hasattr(model, "set_requires_all_reduce"):
        model.set_requires_all_reduce(last)


# torch.distributed.tensor takes two seconds to import, and a run of one process has no DTensor: so they are recognized
# by an attribute.


def local(tensor: Any) -> Tensor:
    """The rows of a tensor that this process has: all, if it is not divided."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Any) -> Tensor:
    """All rows of a tensor. Collective, if it is divided."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def divided(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor that every process has, divided as another one of its shape is, if that is."""
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import DTensor

    mesh = like.device_mesh
    rows = tensor[rows_of(len(tensor), mesh["shard"].size(), mesh.get_local_rank("shard"))].to(like.device)
    return DTensor.from_local(rows, mesh, like.placements, shape=tensor.shape, stride=tensor.stride())


def cleanup(world: World) -> None:
    """Leave the process group together: a process that exits earlier breaks the others' connections."""
    if world.size > 1:
        world.barrier()
        dist.destroy_process_group()
