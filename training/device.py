"""Device, precision and layer implementation: chosen once for this machine, each with a reason that the run logs."""

import ctypes
import dataclasses
import platform
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from kernels import cpu, preferred
from training.config import ConfigError, TrainConfig
from training.distributed import World


@dataclass(frozen=True)
class Machine:
    """Where and how a run computes. `reasons` has one log line for each choice.

    `layer_impl`: "eager" (model.py as written), "compiled" (torch.compile) or "fused" (C++,
    training/apply_fused_layers.py).
    """

    device: torch.device
    dtype: torch.dtype
    layer_impl: str
    reasons: tuple[str, ...]

    def autocast(self) -> torch.autocast:
        """Matmuls in `dtype`; weights, sums and norms in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def uncompiled(self) -> AbstractContextManager[Any]:
        """Run everything eagerly: compiling a second graph for evaluation takes longer than it saves."""
        # Only where it is needed: setting the stance imports torch's compiler, which takes seconds.
        return torch.compiler.set_stance("force_eager") if self.layer_impl == "compiled" else nullcontext()


def choose(config: TrainConfig, local_rank: int = 0) -> Machine:
    """Choose, and set up this process. Raises ConfigError if the configuration asks for what this machine lacks."""
    # Under autocast norms read bf16 and have fp32 gains, as they should; torch warns that its fused norm cannot run.
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
    device, device_reason = _device(config.device, local_rank)
    if device.type == "cpu":
        keep_freed_memory()
    dtype, dtype_reason = _dtype(config.dtype, device)
    layer_impl, layer_reason = _layer_impl(config.compile, device, dtype)
    reasons = [device_reason, dtype_reason, f"layers {layer_reason}"]
    if layer_impl != "fused":  # which have an attention of their own
        backend, why = preferred(device)
        reasons.append(f"attention {backend} ({why})")
    return Machine(device, dtype, layer_impl, tuple(reasons))


def choose_together(config: TrainConfig, world: World) -> Machine:
    """`choose`, with the dtype and the layer implementation of the main process on all processes.

    They depend on measurements, which may differ from process to process. Raises ConfigError if one cannot follow.
    """
    if world.main:
        machine = choose(config, world.local_rank)
        world.share((machine.dtype, machine.layer_impl))
        return machine
    dtype, layer_impl = world.share((torch.float32, ""))
    compile = {"eager": "off", "compiled": "on", "fused": "auto"}[layer_impl]
    followed = dataclasses.replace(config, dtype=str(dtype).removeprefix("torch."), compile=compile)
    machine = choose(followed, world.local_rank)
    if machine.layer_impl != layer_impl:
        raise ConfigError(
            f"train.compile = {config.compile!r}: process 0 has {layer_impl} layers, process {world.rank} cannot: "
            f"{machine.reasons[2]}; off trains on both"
        )
    return machine


def _device(asked: str, local_rank: int) -> tuple[torch.device, str]:
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = asked if asked != "auto" else next(k for k in ("cuda", "mps", "cpu") if there[k])
    if not there[kind]:
        raise ConfigError(
            f"train.device = {kind!r}: not available on this machine or in this build of torch; auto chooses"
        )
    if kind == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device, f"device {device}: {torch.cuda.get_device_name(device)}"
    name = f"{platform.machine()}, {torch.get_num_threads()} threads" if kind == "cpu" else "Apple GPU"
    return torch.device(kind), f"device {kind}: {name}"


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory. Returns False where it is not glibc and has no such setting.

    Every step frees its activations and allocates them again. By default glibc returns large blocks to the system,
    which then hands out zeroed pages one by one: thousands of page faults per step.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGE = -1, -3, 1 << 30  # bytes; mallopt(3)
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE) and mallopt(M_TRIM_THRESHOLD, LARGE))


def _dtype(asked: str, device: torch.device) -> tuple[torch.dtype, str]:
    if asked != "auto":
        return getattr(torch, asked), f"dtype {asked} (train.dtype)"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        fast, reason = has_bf16(device), f"compute capability {major}.{minor}"
    elif device.type == "cpu":
        ratio = _bf16_gain()
        fast, reason = ratio > 1.3, f"{'' if ratio > 1.3 else 'bfloat16 '}matmul {ratio:.2g}x fp32, measured"
    else:
        fast, reason = False, "bfloat16 is not used on this device"
    dtype = torch.bfloat16 if fast else torch.float32
    return dtype, f"dtype {str(dtype).removeprefix('torch.')} ({reason})"


def has_bf16(device: torch.device) -> bool:
    """Whether this is a GPU whose matrix units compute in bf16."""
    if device.type != "cuda":
        return False
    # is_bf16_supported() is also true where bf16 is emulated, as on a T4; tensor cores have it from 8.0 on
    return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8


def _bf16_gain() -> float:
    """How many times faster this CPU multiplies matrices in bf16 than in fp32, measured.

    Small matmuls take turns, since a machine's speed may change in between: about 5 ms, or half a second where bf16 is
    emulated.
    """
    matrices = {dtype: torch.ones(384, 384, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds = {dtype: list[float]() for dtype in matrices}
    for _ in range(5):
        for dtype, a in matrices.items():
            start = time.perf_counter()
            a @ a
            seconds[dtype].append(time.perf_counter() - start)
    return min(seconds[torch.float32][1:]) / min(seconds[torch.bfloat16][1:])  # the first call includes set-up


def _layer_impl(asked: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    if asked != "auto":
        name = "compiled" if asked == "on" else "eager"
        return name, f"{name} (train.compile = {asked})"
    if device.type == "cpu":
        try:
            cpu.compile_training(dtype)
        except cpu.Unavailable as reason:
            return "eager", f"eager ({reason})"
        return "fused", "fused C++ (no compile time)"
    if device.type != "cuda":
        return "eager", f"eager (compiling is not tried on a device of type {device.type})"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "eager", "eager (torch.compile needs triton, which is not installed)"
    return "compiled", "compiled (torch.compile, one block for all layers)"
