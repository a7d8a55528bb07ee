"""Do the tests have teeth? As test_mutants.py, for the C++ files."""

import shutil

import pytest

from kernels.cpu import build
from tests.kernels.mutants_cpu import MUTANTS, probe

HERE = build.HERE


@pytest.fixture
def compiled(monkeypatch, tmp_path, tmp_path_factory, compilers):
    """compiled(name, text) puts it in the place of kernels/cpu/NAME.cpp, for this test."""

    def put(name: str, text: str) -> None:
        for file in (*HERE.glob("*.h"), *HERE.glob("*.cpp")):
            shutil.copy(file, tmp_path)
        (tmp_path / file_name(name)).write_text(text)
        monkeypatch.setattr(build, "HERE", tmp_path)
        monkeypatch.setattr(
            build, "FOLDER", tmp_path_factory.getbasetemp() / "compiled"
        )  # the other file, compiled once
        compilers()

    return put


def file_name(name: str) -> str:
    """Of "prefill.h, bf16" prefill.h, of "decode_step" decode_step.cpp."""
    first = name.partition(",")[0]
    return first if first.endswith(".h") else f"{first}.cpp"


def source(name: str) -> str:
    return (HERE / file_name(name)).read_text()


def skip_if_not_compiled(name: str) -> None:
    """Lines of prefill.h that are for processors with bf16 products, or with AMX."""
    needs = {"prefill.h, bf16": "avx512_bf16", "prefill.h, int8": "amx_bf16"}.get(name, "")
    if needs not in build._processor():
        pytest.skip(f"this processor has no {needs}")


@pytest.mark.parametrize("name", MUTANTS)
def test_the_probe_passes_what_is_right(compiled, name):
    skip_if_not_compiled(name)
    compiled(name, source(name))
    probe(name)


CASES = [(name, *mutant) for name, mutants in MUTANTS.items() for mutant in mutants]


@pytest.mark.parametrize(
    ("name", "old", "new"), [(c[0], *c[2:]) for c in CASES], ids=[f"{c[0]}, {c[1]}" for c in CASES]
)
def test_a_mutant_is_caught(compiled, name, old, new):
    skip_if_not_compiled(name)
    right = source(name)
    assert right.count(old) == 1, f"occurs {right.count(old)} times: {old}"
    compiled(name, right.replace(old, new))
    with pytest.raises(AssertionError):  # a mutant that is no program raises cpu.Unavailable, and does not count
        probe(name)
