"""Counts what a process sends, on torch's fake process group, too."""

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Sent(TorchDispatchMode):
    """Counts the bytes that a process sends, by operation; of an all-reduce, which sends 2 (R - 1) / R of it, the
    tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = dict.fromkeys(("_allgather_base_", "_reduce_scatter_base_", "allreduce_", "alltoall_base_",
                                    "allgather_", "send"), 0)  # fmt: skip

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, _, name = str(function).removesuffix(".default").partition(".")
        if space == "c10d" and name != "recv_":
            first, second = (sum(x.nbytes for x in tree_leaves(a) if isinstance(x, torch.Tensor)) for a in args[:2])
            sent = abs(first - second)  # gathered or scattered, without its own part
            if name == "alltoall_base_":
                n = dist.get_world_size()  # none are given if all get as many
                counts = args[4] or [args[1].numel() // n] * n  # of numbers to each process; this one is the first
                sent = sum(counts[1:]) * args[1].element_size()
            self.bytes[name] += sent
        return function(*args, **(kwargs or {}))
