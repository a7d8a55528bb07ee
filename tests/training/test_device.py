"""The choice of device, precision and layer implementation, with simulated machines."""

import platform
import shutil
import subprocess
import sys

import pytest
import torch

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


def test_bf16_speedup_is_measured():
    assert 0 < device._bf16_gain() < 100


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


FAULTS = """
import resource
import torch
from training.device import keep_freed_memory

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(1 << 20) for _ in range(20)]  # 4 MB each: 20,480 pages of 4 KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = [step() for _ in range(3)][-1]
kept = keep_freed_memory()
print(kept, before, [step() for _ in range(3)][-1])
"""


def test_freed_memory_is_kept_for_the_next_step():
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    words = done.stdout.split()
    kept, before, after = words[0] == "True", int(words[1]), int(words[2])
    assert kept == (platform.libc_ver()[0] == "glibc")
    if kept:
        assert before > 500  # 20,480 if no other memory is above the freed memory
        assert after < 100


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
