"""Device, precision and compiler: chosen once by asking the machine, each with the reason that a run prints."""

import ctypes
import platform
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from kernels import cpu, preferred
from training.config import ConfigError, TrainConfig


@dataclass(frozen=True)
class Machine:
    """Where and how a run computes; `why` is one line for each choice."""

    device: torch.device
    dtype: torch.dtype
    layers: str  # how they learn (training/fused.py): as "written", "compiled" by torch, or in "C++"
    why: tuple[str, ...]

    def autocast(self) -> torch.autocast:
        """Products in `dtype`; weights, sums and norms stay fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def uncompiled(self) -> AbstractContextManager[Any]:
        """In it all code runs as written: to compile a second graph, for evaluation, takes longer than it saves."""
        # Only where it is needed: to name the stance imports torch's compiler, some seconds.
        return torch.compiler.set_stance("force_eager") if self.layers == "compiled" else nullcontext()


def choose(config: TrainConfig, local_rank: int = 0) -> Machine:
    """Choose, and set this process up for it. Raises ConfigError when the configuration demands what this machine does
    not have."""
    # Under autocast norms read bf16 and have fp32 gains, as they should; torch tells that its fused one then cannot.
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
    device, why_device = _device(config.device, local_rank)
    if device.type == "cpu":
        keep_freed_memory()
    dtype, why_dtype = _dtype(config.dtype, device)
    layers, why_layers = _layers(config.compile, device, dtype)
    backend, why = preferred(device)
    why_attention = () if layers == "C++" else (f"attention {backend}: {why}",)
    return Machine(device, dtype, layers, (why_device, why_dtype, f"layers {layers}: {why_layers}", *why_attention))


def _device(asked: str, local_rank: int) -> tuple[torch.device, str]:
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = asked if asked != "auto" else next(k for k in ("cuda", "mps", "cpu") if there[k])
    if not there[kind]:
        raise ConfigError(
            f"train.device = {kind!r}: not on this machine, or not in this build of torch; auto finds what is"
        )
    if kind == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device, f"device {device}: {torch.cuda.get_device_name(device)}"
    name = f"{platform.machine()}, {torch.get_num_threads()} threads" if kind == "cpu" else "Apple GPU"
    return torch.device(kind), f"device {kind}: {name}"


def keep_freed_memory() -> bool:
    """Ask the C library to keep what this process frees; False where it is not glibc and cannot be asked.

    Every step frees its activations and wants them again. By default glibc returns large blocks to the system, which
    hands out zeroed pages again one by one: thousands of page faults a step.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGE = -1, -3, 1 << 30  # bytes; mallopt(3)
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE) and mallopt(M_TRIM_THRESHOLD, LARGE))


def _dtype(asked: str, device: torch.device) -> tuple[torch.dtype, str]:
    if asked != "auto":
        return getattr(torch, asked), f"precision {asked}: asked for"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        # is_bf16_supported() also says yes to emulation, on a T4 for one; the tensor cores know bf16 from 8.0 on
        fast, fact = major >= 8 or torch.version.hip is not None, f"compute capability {major}.{minor}"
    elif device.type == "cpu":
        ratio = _bf16_gain()
        fast, fact = ratio > 1.3, f"its products run {ratio:.2g} times as fast as fp32's here, measured"
    else:
        fast, fact = False, "bfloat16 is not tried on this device"
    dtype = torch.bfloat16 if fast else torch.float32
    return dtype, f"precision {str(dtype).removeprefix('torch.')}: bfloat16: {fact}"


def _bf16_gain() -> float:
    """How many times faster this CPU multiplies in bf16 than in fp32, from a few small products in turns, since a
    machine's speed may change in between (some 5 ms; half a second where bf16 is only emulated)."""
    matrices = {dtype: torch.ones(384, 384, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds = {dtype: list[float]() for dtype in matrices}
    for _ in range(5):
        for dtype, a in matrices.items():
            start = time.perf_counter()
            a @ a
            seconds[dtype].append(time.perf_counter() - start)
    return min(seconds[torch.float32][1:]) / min(seconds[torch.bfloat16][1:])  # the first ones pay for set-up


def _layers(asked: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    if asked != "auto":
        return "compiled" if asked == "on" else "written", f"train.compile = {asked}"
    if device.type == "cpu":
        try:
            cpu.training(dtype)
        except cpu.Unavailable as reason:
            return "written", f"{reason}"
        return "C++", "as fast as what torch would compile, and there at once"
    if device.type != "cuda":
        return "written", f"compiling is not tried on a device of type {device.type}"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "written", "torch's compiler needs triton, which is not installed"
    return "compiled", "by torch, one block for all layers"
