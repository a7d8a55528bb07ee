"""Memory: what this process used at its peak, and whether a model fits."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from training.config import Config


def peak_memory(device: "torch.device | None" = None) -> int:
    """Peak memory in bytes: on a CUDA device what torch allocated, else the resident memory of this process.

    0 where the system does not report it. On Linux from /proc: getrusage() starts from the parent process's peak.
    """
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def state_bytes(config: "Config") -> int:
    """Bytes of weights, gradients and optimizer states in fp32: per parameter 16, or 12 where Muon has one moment."""
    import torch

    from model import GPT
    from training.optimizers import by_muon

    with torch.device("meta"):
        named = GPT(config.model).named_parameters()
        return sum(p.numel() * (12 if by_muon(name, p, config.optim) else 16) for name, p in named)


def check_fits(config: "Config", num_params: int, device: "torch.device", devices: int = 1) -> None:
    """Raise ConfigError if the memory of the device is too small for the model alone, before it is allocated.

    Activations come on top. devices: that hold the model together.
    """
    from training.config import ConfigError

    if device.type == "cuda":
        import torch

        there = torch.cuda.mem_get_info(device)[1]
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if (needed := state_bytes(config) / devices) > there:
        raise ConfigError(
            f"model: {num_params:,} parameters need at least {needed / 2**30:,.1f} GiB of memory, "
            f"{device} has {there / 2**30:,.1f}; choose a smaller model, or with several devices a larger train.shard"
        )
