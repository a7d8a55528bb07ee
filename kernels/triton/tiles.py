"""Tile sizes of every kernel, per GPU and head size: one static table, no autotuning at startup.

A tile is what one program processes: BLOCK_M query rows (or tokens) and BLOCK_N keys (or vocabulary entries), with
`warps` warps and `stages` blocks of loads in flight. `python -m benchmarks tiles` searches for the fastest tiles on a
GPU and prints new rows.
"""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """BLOCK_M, BLOCK_N, the number of warps, and the number of software pipeline stages."""

    M: int
    N: int
    warps: int
    stages: int


# kernel -> target -> largest head size (or other width) for which the tile is used -> tile
TABLE: dict[str, dict[str, dict[int, Tile]]] = {
    # One row at a time: N columns of it. Few, full CTAs, which read each row twice: the second time the rows in flight
    # are still in the L2 with 50,257 columns in bf16, not with 151,936 (calculated for sm_90: 27 and 80 MB of 50 MB).
    "cross_entropy": {
        "sm_80": {1024: Tile(1, 1024, 4, 1), 4096: Tile(1, 4096, 16, 1), 1 << 30: Tile(1, 8192, 32, 1)},
        "sm_90": {1024: Tile(1, 1024, 4, 1), 4096: Tile(1, 4096, 16, 1), 1 << 30: Tile(1, 8192, 32, 1)},
        "sm_100": {1024: Tile(1, 1024, 4, 1), 4096: Tile(1, 4096, 16, 1), 1 << 30: Tile(1, 8192, 32, 1)},
        "gfx942": {1024: Tile(1, 1024, 4, 1), 4096: Tile(1, 4096, 16, 1), 1 << 30: Tile(1, 8192, 16, 1)},
    },
    # M is the maximum number of rows; for fewer rows it is the next power of two, at least 16. Keys are read once.
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
    # M queries, N keys: as large as registers allow.
    "flash_forward": {
        "sm_80": {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 2)},
        "sm_90": {64: Tile(128, 128, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
        "sm_100": {64: Tile(128, 128, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2)},
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
        "sm_90": {64: Tile(64, 128, 8, 2), 128: Tile(32, 128, 8, 2), 256: Tile(32, 64, 8, 2)},
        "sm_100": {64: Tile(64, 128, 8, 2), 128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
        "gfx942": {64: Tile(32, 128, 8, 1), 128: Tile(32, 64, 8, 1), 256: Tile(16, 64, 8, 1)},
    },
}

# Flash attention in fp32, on every GPU: exact matmuls do not use tensor cores, and larger tiles would spill registers.
FLASH_FP32 = {128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)}

# Without a GPU: small, so that small inputs span several blocks in Triton's interpreter.
INTERPRETED = Tile(16, 16, 4, 1)


def target(device: torch.device) -> str:
    """The row of the table for a device: sm_80, sm_90, sm_100, gfx942, or "interpreter" without a GPU.

    Other GPUs use sm_80's tiles, which need the least shared memory: Ada and consumer Blackwell GPUs have no more.
    """
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def tile(kernel: str, width: int, device: torch.device) -> Tile:
    """The tile of a kernel at a head size. Raises ValueError if the kernel does not support such a large width."""
    where = target(device)
    if where == "interpreter":
        return INTERPRETED
    rows = TABLE[kernel][where]
    fits = [size for size in rows if size >= width]
    if not fits:
        raise ValueError(f"{kernel} supports widths up to {max(rows)} on {where}, not {width}")
    return rows[min(fits)]
