"""python -m benchmarks tiles: the fastest tile of a kernel on this GPU, as rows to paste into kernels/triton/tiles.py.

For every head size (or width) in the table, each candidate tile is checked against the definition and timed with one
long case. Candidates that are wrong or do not fit the GPU are dropped. The finalists, the fastest ones and the current
tile, are timed again alternately, so that a candidate is not selected by chance.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks import timing
from benchmarks.attention_implementations import HEED, implementations, make_inputs
from benchmarks.kernels import DRY_RUN, SMALL, SMALL_DRY, Checker
from benchmarks.shapes import Case
from benchmarks.timing import Call
from kernels.triton import tiles
from kernels.triton.tiles import Tile

FINALISTS = 4


def case_of(kernel: str, width: int, dry: bool) -> Case:
    """The case for timing the tiles of a kernel."""
    if kernel == "cross_entropy":
        return Case(
            "cross-entropy", 1, *((32, 32, 1, 1, 32) if dry else (8192, 8192, 1, 1, 1024)), V=min(width, 151936)
        )
    if kernel.startswith("decode"):
        return Case("decode", *((2, 1, 64, 4, 2) if dry else (16, 1, 16384, 32, 8)), width)
    direction = "forward" if "forward" in kernel else "backward"
    return Case(direction, *((1, 48, 48, 2, 1) if dry else (4, 4096, 4096, 16, 4)), width)


def candidates(kernel: str, own: Tile, dry: bool) -> list[Tile]:
    """The candidate tiles, starting with the current one."""
    if dry:
        tried = [(16, 32, 4, 1)]
    elif kernel == "cross_entropy":
        tried = [(1, N, warps, 1) for N in (1024, 2048, 4096, 8192, 16384) for warps in (4, 8, 16, 32)]
    elif kernel == "decode_combine":
        tried = [(1, N, warps, 1) for N in (4, 8, 16, 32, 64) for warps in (1, 2, 4)]
    elif kernel == "decode":  # M is a maximum, not reached with one query per sequence
        tried = list(itertools.product([own.M], (16, 32, 64, 128), (2, 4, 8), (1, 2, 3, 4, 5)))
    else:
        tried = list(itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4)))
    return list(dict.fromkeys([own, *(Tile(*t) for t in tried)]))


@contextmanager
def using(kernel: str, where: str, width: int, tile: Tile) -> Iterator[None]:
    """Replace one tile of the table; in a dry run, that of the interpreter."""
    if where == "interpreter":
        before, tiles.INTERPRETED = tiles.INTERPRETED, tile
    else:
        before = tiles.TABLE[kernel][where][width]
        tiles.TABLE[kernel][where][width] = tile
    try:
        yield
    finally:
        if where == "interpreter":
            tiles.INTERPRETED = before
        else:
            tiles.TABLE[kernel][where][width] = before


def run(kernel: str | None, dry: bool) -> int:
    """Print a row for every width of one kernel or all. Raises ValueError for an unknown kernel."""
    if kernel is not None and kernel not in tiles.TABLE:
        raise ValueError(f"tiles {kernel}: must be one of {', '.join(tiles.TABLE)}")
    device = torch.device("cpu" if dry else "cuda")
    where = tiles.target(device)
    print(DRY_RUN if dry else f"measured on {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name in [kernel] if kernel else tiles.TABLE:
        widths = [16] if dry else list(tiles.TABLE[name][where])
        rows = {width: search(name, where, width) for width in widths}
        print(f'"{name}": {{\n    "{where}": {rows},\n}},')
    return 0


def current(kernel: str, where: str, width: int) -> Tile:
    """The tile of the table."""
    return tiles.INTERPRETED if where == "interpreter" else tiles.TABLE[kernel][where][width]


def fault_of(kernel: str, where: str, width: int, tile: Tile) -> str:
    """The error of a kernel with a candidate tile, "" if it is correct. Compiles it for the timed case, too."""
    dry = where == "interpreter"
    device, dtype = torch.device("cpu" if dry else "cuda"), torch.float32 if dry else torch.bfloat16
    case = case_of(kernel, width, dry)
    with using(kernel, where, width, tile):
        fault = Checker(device, dtype, SMALL_DRY if dry else SMALL).check_correctness(case, [HEED])[HEED]
        if not fault and not dry:
            implementations(case, make_inputs(case, device, dtype))[HEED]()()
    return fault


def timed(kernel: str, where: str, width: int, correct: list[Tile]) -> dict[Tile, float]:
    """Median seconds of the current tile and of the fastest candidates."""
    dry, own = where == "interpreter", current(kernel, where, width)
    device, dtype = torch.device("cpu" if dry else "cuda"), torch.float32 if dry else torch.bfloat16
    case = case_of(kernel, width, dry)
    inputs = make_inputs(case, device, dtype)
    calls: dict[Tile, Call] = {}
    for tile in correct:
        with using(kernel, where, width, tile):
            prepared = implementations(case, inputs)[HEED]()

        def call(tile: Tile = tile, prepared: Call = prepared) -> None:
            with using(kernel, where, width, tile):
                prepared()

        calls[tile] = call

    first = timing.medians(calls, device)
    finalists = [tile for tile in calls if tile == own or tile in sorted(first, key=first.__getitem__)[:FINALISTS]]
    return timing.medians({tile: calls[tile] for tile in finalists}, device)


def search(kernel: str, where: str, width: int) -> Tile:
    """The fastest correct tile; the current one if no other is faster."""
    own, correct = current(kernel, where, width), []
    for tile in candidates(kernel, own, where == "interpreter"):
        if fault := fault_of(kernel, where, width, tile):
            print(f"# {kernel}, {width}, {tile}: {fault}")
        else:
            correct.append(tile)
    last = timed(kernel, where, width, correct)
    for tile in last if where != "interpreter" else ():
        print(f"# {kernel}, {width}, {tile}: {last[tile] * 1e6:.1f} us{', current' if tile == own else ''}")
    return min(last, key=last.__getitem__, default=own)
