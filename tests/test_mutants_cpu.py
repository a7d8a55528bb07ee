"""Do the tests have teeth? As test_mutants.py, for the C++ that trains on a CPU."""

import shutil

import pytest
import torch

from kernels import cpu
from tests.mutants_cpu import MUTANTS, probe

CPP = cpu.HERE / "cpu_train.cpp"


@pytest.fixture
def compiled(monkeypatch, tmp_path, compilers):
    """compiled(text) puts it in the place of cpu_train.cpp, for this test."""

    def put(text: str) -> None:
        for header in cpu.HERE.glob("*.h"):
            shutil.copy(header, tmp_path)
        (tmp_path / CPP.name).write_text(text)
        monkeypatch.setattr(cpu, "HERE", tmp_path)
        monkeypatch.setattr(cpu, "FOLDER", tmp_path / "compiled")
        compilers()

    return put


def test_the_probe_passes_what_is_right(compiled):
    compiled(CPP.read_text())
    probe()


@pytest.mark.parametrize(("old", "new"), [mutant[1:] for mutant in MUTANTS], ids=[mutant[0] for mutant in MUTANTS])
def test_a_mutant_is_caught(compiled, old, new):
    right = CPP.read_text()
    assert right.count(old) == 1, f"occurs {right.count(old)} times: {old}"
    compiled(right.replace(old, new))
    cpu.training(torch.float32)  # raises: a mutant that is no program does not count
    with pytest.raises(AssertionError):
        probe()
