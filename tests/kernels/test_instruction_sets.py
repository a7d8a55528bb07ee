"""The C++ files compiled for older processors: on a machine with AMX, this tests all paths of tile_matmul.h."""

import dataclasses
import os
import platform
from pathlib import Path

import pytest
import torch

from kernels.cpu import build
from tests.conftest import TINY, randomized
from tests.kernels.test_cross_entropy import compare, draw
from tests.kernels.test_muon_step import compare_steps
from tests.training.test_apply_fused_layers import fused, relative_errors, results

# g++'s name for each, and what /proc/cpuinfo must list: fp32 vectors of 8, of 16, pairs of bf16
SETS = {"x86-64-v3": {"avx2", "fma"}, "x86-64-v4": {"avx512vl", "avx512dq"}, "cooperlake": {"avx512_bf16"}}


def available() -> list[str]:
    """ "native", and the sets that this processor includes."""
    if platform.machine() != "x86_64" or not os.path.exists("/proc/cpuinfo"):
        return ["native"]
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return ["native", *(name for name, needed in SETS.items() if needed <= flags)]


@pytest.fixture(params=available())
def instruction_set(request, monkeypatch, clear_compiled):
    """The C++ files are compiled for this instruction set."""
    monkeypatch.setattr(build, "FLAGS", [f.replace("native", request.param) for f in build.FLAGS])
    clear_compiled()


@pytest.mark.usefixtures("instruction_set")
def test_layers_loss_and_optimizer_on_every_instruction_set():
    model = randomized(dataclasses.replace(TINY, context=150, window=40, layer_pattern="SL", gate=True))
    tokens = torch.randint(0, 97, (2, 150), generator=torch.Generator().manual_seed(0))
    exact = results(randomized(model.config).double(), tokens)
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        for name, error in relative_errors(results(fused(randomized(model.config)), tokens, dtype), exact).items():
            assert error < bound, (dtype, name)
    compare(*draw(70, 40, 65), backend="cpp", z_loss=0.1, softcap=3.0)
    compare_steps((48, 37), torch.float32)
    compare_steps((48, 37), torch.bfloat16)
