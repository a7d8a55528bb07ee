"""Part `tiles`: the fastest tiles of the main kernels; candidates are checked and compiled in parallel."""

import functools
from typing import Any

import torch

from benchmarks import tiles as search
from benchmarks.gpu.part import Task
from kernels.triton import tiles
from kernels.triton.tiles import Tile

# Backward first: there the current tiles are the least certain.
ORDER = [
    ("flash_dkdv", 128), ("flash_forward", 128), ("flash_dq", 128), ("flash_dkdv", 64), ("flash_forward", 64),
    ("flash_dq", 64), ("decode", 128), ("decode", 64), ("cross_entropy", 1 << 30),
]  # fmt: skip
FLASH = [  # (M, N, warps, stages): those that compile for Hopper with at most a few hundred bytes spilled
    (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (64, 128, 8, 2), (64, 64, 4, 2),
    (64, 64, 4, 3), (64, 64, 8, 2), (32, 128, 8, 2), (32, 128, 8, 3), (32, 64, 4, 2), (32, 64, 4, 3),
]  # fmt: skip


def run(task: Task) -> None:
    """Search kernel by kernel until the time is over."""
    where = tiles.target(torch.device("cpu" if task.dry else "cuda"))
    for kernel, width in [("flash_forward", 16)] if task.dry else ORDER:
        if task.left() < 20 and not task.dry:
            task.emit(kernel=kernel, width=width, error="not searched: out of time")
            continue
        own = search.current(kernel, where, width)
        tried = search.candidates(kernel, own, task.dry)
        if kernel.startswith("flash") and not task.dry:
            tried = list(dict.fromkeys([own, *(Tile(*sizes) for sizes in FLASH)]))
        correct = []
        for tile, fault in task.map(functools.partial(_check, kernel, where, width), tried):
            if fault:
                task.emit(kernel=kernel, width=width, tile=tile, error=str(fault))
            else:
                correct.append(tile)
        for tile, seconds in sorted(search.timed(kernel, where, width, correct).items(), key=lambda pair: pair[1]):
            task.emit(kernel=kernel, width=width, tile=tile, microseconds=seconds * 1e6, current=tile == own)


def _check(kernel: str, where: str, width: int, tile: Any) -> str:
    return search.fault_of(kernel, where, width, Tile(*tile))
