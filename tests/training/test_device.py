"""The choice of device, precision and layer implementation, with simulated machines."""

import ctypes
import platform
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import ROOT
from training import device
from training.config import ConfigError, TrainConfig


@pytest.mark.parametrize(("gain", "dtype"), [(6.4, torch.bfloat16), (0.01, torch.float32), (1.2, torch.float32)])
def test_cpu_dtype_is_the_one_with_faster_matmuls(monkeypatch, gain, dtype):
    monkeypatch.setattr(device, "_bf16_gain", lambda: gain)
    machine = device.choose(TrainConfig(steps=1, device="cpu"))
    assert machine.dtype == dtype
    assert f"matmul {gain:.2g}x fp32, measured" in machine.reasons[1]
    asked = device.choose(TrainConfig(steps=1, device="cpu", dtype="float32"))
    assert (asked.dtype, asked.reasons[1]) == (torch.float32, "dtype float32 (train.dtype)")


class Matmuls(TorchDispatchMode):
    """A clock that only matmuls move on: by 6 s in fp32, 2 s in bf16; ten times that while the machine is slow."""

    def __init__(self):
        super().__init__()
        self.now, self.made = 0.0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            self.made += 1
            slow = 10 if self.made in (1, 2, 3, 8) else 1
            self.now += slow * {torch.float32: 6.0, torch.bfloat16: 2.0}[args[0].dtype]
        return function(*args, **(kwargs or {}))


def test_bf16_speedup_is_the_ratio_of_the_fastest_matmuls(monkeypatch):
    with Matmuls() as clock:
        monkeypatch.setattr(device, "time", SimpleNamespace(perf_counter=lambda: clock.now))
        assert device._bf16_gain() == 3.0


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_gpu_dtype_depends_on_compute_capability_not_on_emulation(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # also true on a T4, by emulation
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    machine = device.choose(TrainConfig(steps=1), local_rank=3)
    assert (machine.device, machine.dtype) == (torch.device("cuda", 3), dtype)


HELD = """
import ctypes
import torch
from training.device import keep_freed_memory

class Memory(ctypes.Structure):  # mallinfo(3)
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Memory

def held_after_a_step():  # bytes that the C library has from the system
    activations = [torch.ones(25 << 20) for _ in range(4)]  # 100 MB each
    del activations
    memory = mallinfo2()
    return memory.arena + memory.hblkhd

print(held_after_a_step(), keep_freed_memory(), held_after_a_step())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or newer")
def test_freed_memory_is_kept_for_the_next_step():
    done = subprocess.run([sys.executable, "-c", HELD], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    before, kept, after = done.stdout.split()
    assert kept == "True"
    assert int(after) - int(before) >= 300 << 20  # part of the heap was there before


@pytest.mark.skipif(platform.libc_ver()[0] == "glibc", reason="glibc has the setting")
def test_another_c_library_has_no_such_setting():
    assert not device.keep_freed_memory()


def test_unavailable_device_raises(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"train.device = 'cuda': not available on this machine"):
        device.choose(TrainConfig(steps=1, device="cuda"))


def test_layer_implementation_depends_on_what_is_available(monkeypatch, clear_compiled):
    def choose(**fields) -> tuple[str, str]:
        machine = device.choose(TrainConfig(steps=1, device="cpu", dtype="float32", **fields))
        return machine.layer_impl, machine.reasons[2]

    assert choose() == ("fused", "layers fused C++ (no compile time)")
    assert choose(compile="on") == ("compiled", "layers compiled (train.compile = on)")
    assert choose(compile="off") == ("eager", "layers eager (train.compile = off)")
    clear_compiled()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert choose() == ("eager", "layers eager (no C++ compiler, g++ or clang++)")
