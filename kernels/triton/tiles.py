"""The tile of every kernel, per GPU and head size: one static table, nothing is searched when a run starts.

A tile is what one program holds: BLOCK_M query rows (or tokens), BLOCK_N keys (or vocabulary), worked on by `warps`
warps, with `stages` blocks of loads in flight. `python -m benchmarks tiles` searches them on a GPU and prints new
rows.
"""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """BLOCK_M x BLOCK_N, the number of warps, the stages of the software pipeline."""

    M: int
    N: int
    warps: int
    stages: int


# kernel -> target -> the largest head size (or other width) that the tile is for -> tile
TABLE: dict[str, dict[str, dict[int, Tile]]] = {
    # One row at a time: N columns of it. Few, full CTAs, which read each row twice: the second time the rows in flight
    # are still in the L2 with 50,257 columns in bf16, not with 151,936 (calculated for sm_90: 27 and 80 MB of 50 MB).
    "cross_entropy": {
        "sm_80": {1024: Tile(1, 1024, 4, 1), 4096: Tile(1, 4096, 16, 1), 1 << 30: Tile(1, 8192, 32, 1)},
        "sm_90": {1024: Tile(1, 1024, 4, 1), 4096: Tile(1, 4096, 16, 1), 1 << 30: Tile(1, 8192, 32, 1)},
        "sm_100": {1024: Tile(1, 1024, 4, 1), 4096: Tile(1, 4096, 16, 1), 1 << 30: Tile(1, 8192, 32, 1)},
        "gfx942": {1024: Tile(1, 1024, 4, 1), 4096: Tile(1, 4096, 16, 1), 1 << 30: Tile(1, 8192, 16, 1)},
    },
    # M is the most rows of a block; when fewer are needed it is the next power of two from 16. The keys are read once.
    "decode": {
        "sm_80": {64: Tile(64, 64, 4, 3), 128: Tile(64, 32, 4, 3), 256: Tile(64, 32, 8, 2)},
        "sm_90": {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3), 256: Tile(64, 32, 8, 3)},
        "sm_100": {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3), 256: Tile(64, 32, 8, 3)},
        "gfx942": {64: Tile(64, 64, 4, 1), 128: Tile(64, 64, 4, 1), 256: Tile(64, 32, 4, 1)},
    },
    "decode_combine": {
        "sm_80": {256: Tile(1, 16, 4, 1)},
        "sm_90": {256: Tile(1, 16, 4, 1)},
        "sm_100": {256: Tile(1, 16, 4, 1)},
        "gfx942": {256: Tile(1, 16, 4, 1)},
    },
    # M queries, N keys: as large as the registers allow.
    "flash_forward": {
        "sm_80": {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 2)},
        "sm_90": {64: Tile(128, 128, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
        "sm_100": {64: Tile(128, 128, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
        "gfx942": {64: Tile(128, 64, 8, 1), 128: Tile(128, 64, 8, 1), 256: Tile(64, 32, 8, 1)},
    },
    "flash_dq": {
        "sm_80": {64: Tile(128, 64, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
        "sm_90": {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
        "sm_100": {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 1)},
        "gfx942": {64: Tile(128, 64, 8, 1), 128: Tile(128, 32, 8, 1), 256: Tile(64, 16, 8, 1)},
    },
    "flash_dkdv": {
        "sm_80": {64: Tile(32, 128, 8, 2), 128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
        "sm_90": {64: Tile(64, 128, 8, 2), 128: Tile(32, 128, 8, 2), 256: Tile(32, 32, 8, 1)},
        "sm_100": {64: Tile(64, 128, 8, 2), 128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
        "gfx942": {64: Tile(32, 128, 8, 1), 128: Tile(32, 64, 8, 1), 256: Tile(16, 64, 8, 1)},
    },
}

# Flash in fp32, on every GPU: exact matmuls use registers, not tensor cores, and larger tiles would spill.
FLASH_FP32 = {128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)}

# Where no GPU is: small, so that Triton's interpreter crosses block borders on small inputs.
INTERPRETED = Tile(16, 16, 4, 1)


def target(device: torch.device) -> str:
    """The row of the table for a device: sm_80, sm_90, sm_100, gfx942, or "interpreter" where no GPU is.

    Others take sm_80's, whose tiles ask for the least shared memory: Ada and the smaller Blackwells have no more.
    """
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def tile(kernel: str, width: int, device: torch.device) -> Tile:
    """The tile of a kernel at a head size. Raises ValueError: the kernel does not take a width so large."""
    where = target(device)
    if where == "interpreter":
        return INTERPRETED
    rows = TABLE[kernel][where]
    fits = [size for size in rows if size >= width]
    if not fits:
        raise ValueError(f"{kernel} takes widths up to {max(rows)} on {where}, not {width}")
    return rows[min(fits)]
