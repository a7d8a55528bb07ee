"""Optimizers against their definitions, and the choice of machine against machines that are not here."""

import itertools
import platform
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from model import GPT
from runtime import device, optim
from runtime.config import ConfigError, OptimConfig, TrainConfig
from tests.conftest import ROOT, TINY


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 12), (2, 12, 5), (1, 1, 7)])
def test_orthogonalize_keeps_directions_and_evens_out_sizes(shape):
    g = np.random.default_rng(0)
    matrices = g.standard_normal(shape)
    got = optim.orthogonalize(torch.tensor(matrices, dtype=torch.float32)).double().numpy()
    for before, after in zip(matrices, got, strict=True):
        u, s, vt = np.linalg.svd(before, full_matrices=False)
        inner = u.T @ after @ vt.T  # diagonal, if the directions are the same
        assert np.abs(inner - np.diag(np.diag(inner))).max() < 1e-4
        sizes = np.diag(inner)[s / np.linalg.norm(s) > 0.02]
        assert sizes.min() > 0.65
        assert sizes.max() < 1.25


def test_muon_steps_as_written(monkeypatch):
    monkeypatch.setattr(optim, "orthogonalize", lambda x, _: x)
    p = torch.nn.Parameter(torch.full((2, 8), 2.0))
    muon = optim.Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5, dtype=torch.float32)
    weight, memory = 2.0, 0.0
    for gradient in (1.0, -3.0):
        p.grad = torch.full((2, 8), gradient)
        muon.step()
        memory = 0.9 * memory + 0.1 * gradient
        step = 0.9 * memory + 0.1 * gradient
        weight = weight * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 8**0.5 * step
    torch.testing.assert_close(p.detach(), torch.full((2, 8), weight))


def test_muons_step_has_the_size_of_adamws():
    torch.manual_seed(0)
    for shape in ((64, 64), (32, 128), (128, 32)):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape)
        optim.Muon([p], lr=1.0, momentum=0.0, weight_decay=0.0, dtype=torch.float32).step()
        assert p.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


def test_a_batch_of_matrices_is_stepped_like_each_alone():
    torch.manual_seed(0)
    together = [torch.nn.Parameter(torch.randn(6, 9)) for _ in range(3)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    gradients = [torch.randn(6, 9) for _ in range(3)]
    batch = optim.Muon(together, lr=0.1, momentum=0.9, weight_decay=0.1, dtype=torch.float32)
    singles = [optim.Muon([p], lr=0.1, momentum=0.9, weight_decay=0.1, dtype=torch.float32) for p in alone]
    for ours, theirs, g in zip(together, alone, gradients, strict=True):
        ours.grad, theirs.grad = g.clone(), g.clone()
    for optimizer in (batch, *singles):
        optimizer.step()
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_one_optimizer_and_the_right_one(tied):
    model = GPT(type(TINY)(**{**vars(TINY), "tie_embeddings": tied}))
    adamw, muon = optim.build(model, OptimConfig(weight_decay=0.3), torch.float32)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [sorted(names[id(p)] for p in g["params"]) for o in (adamw, muon) for g in o.param_groups]
    assert sorted(itertools.chain(*groups)) == sorted(names.values())
    assert all("_proj" in name for name in groups[2])
    assert all("norm" in name for name in groups[1])
    assert groups[0] == ([] if tied else ["lm_head.weight"]) + ["model.embed_tokens.weight"]
    assert [g["weight_decay"] for o in (adamw, muon) for g in o.param_groups] == [0.3, 0.0, 0.3]
    (alone,) = optim.build(model, OptimConfig(optimizer="adamw"), torch.float32)
    assert sum(len(g["params"]) for g in alone.param_groups) == len(names)


def test_the_schedule_rises_stays_and_falls_to_almost_nothing():
    config = OptimConfig(warmup_steps=4, decay=0.5)
    factors = [optim.schedule(step, 20, config) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:10] == [1.0] * 5
    assert factors[10:] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert [optim.schedule(step, 0, config) for step in (0, 4, 1000)] == pytest.approx([0.2, 1.0, 1.0])
    assert optim.schedule(19, 20, OptimConfig(decay=0.0)) == pytest.approx(20 / 21)


# The machine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gain", "dtype"), [(6.4, torch.bfloat16), (0.01, torch.float32), (1.2, torch.float32)])
def test_a_cpus_precision_is_the_one_that_it_multiplies_faster(monkeypatch, gain, dtype):
    monkeypatch.setattr(device, "_bf16_gain", lambda: gain)
    machine = device.choose(TrainConfig(steps=1, device="cpu"))
    assert machine.dtype == dtype
    assert f"{gain:.2g} times as fast" in machine.why[1]
    asked = device.choose(TrainConfig(steps=1, device="cpu", dtype="float32"))
    assert (asked.dtype, asked.why[1]) == (torch.float32, "precision float32: asked for")


def test_the_gain_is_measured():
    assert 0 < device._bf16_gain() < 100


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_a_gpus_precision_is_told_by_its_capability_and_not_by_emulation(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # a T4 says so, too
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    machine = device.choose(TrainConfig(steps=1), local_rank=3)
    assert (machine.device, machine.dtype) == (torch.device("cuda", 3), dtype)


FAULTS = """
import resource
import torch
from runtime.device import keep_freed_memory

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(1 << 20) for _ in range(20)]  # 4 MB each: 20,480 pages of 4 KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = [step() for _ in range(3)][-1]
kept = keep_freed_memory()
print(kept, before, [step() for _ in range(3)][-1])
"""


def test_memory_that_a_step_frees_is_there_for_the_next():
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    words = done.stdout.split()
    kept, before, after = words[0] == "True", int(words[1]), int(words[2])
    assert kept == (platform.libc_ver()[0] == "glibc")
    if kept:
        assert before > 500  # 20,480 where nothing happens to lie above what is freed
        assert after < 100


def test_what_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"train.device = 'cuda': not on this machine"):
        device.choose(TrainConfig(steps=1, device="cuda"))


def test_layers_learn_in_the_way_that_is_to_be_had(monkeypatch, compilers):
    def choose(**fields) -> tuple[str, str]:
        machine = device.choose(TrainConfig(steps=1, device="cpu", dtype="float32", **fields))
        return machine.layers, machine.why[2]

    assert choose()[0] == "C++"
    assert choose(compile="on") == ("compiled", "layers compiled: train.compile = on")
    assert choose(compile="off") == ("written", "layers written: train.compile = off")
    compilers()
    monkeypatch.setenv("CXX", "/no/compiler")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert choose() == ("written", "layers written: there is no C++ compiler here (g++ or clang++)")
