"""Do the tests have teeth? As test_mutants.py, for the C++ files."""

import shutil

import pytest

from kernels.cpu import build
from tests.kernels.mutants_cpu import MUTANTS, probe

HERE = build.HERE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all mutants: its path is part of a compiled file's name, so each other file is compiled once."""
    return tmp_path_factory.mktemp("mutants")


@pytest.fixture
def compiled(monkeypatch, folder, clear_compiled):
    """compiled(name, text) replaces kernels/cpu/NAME, for this test."""

    def put(name: str, text: str) -> None:
        for file in (*HERE.glob("*.h"), *HERE.glob("*.cpp")):
            shutil.copy(file, folder)
        (folder / file_name(name)).write_text(text)
        monkeypatch.setattr(build, "HERE", folder)
        monkeypatch.setattr(build, "FOLDER", folder / "compiled")
        monkeypatch.setattr(build, "FLAGS", ["-O1", *build.FLAGS[1:]])  # compiles in two thirds of the time
        clear_compiled()

    return put


def file_name(name: str) -> str:
    """The file of a key of MUTANTS: "prefill.h, bf16" is in prefill.h."""
    return name.partition(",")[0]


def source(name: str) -> str:
    return (HERE / file_name(name)).read_text()


# Some lines of prefill.h are compiled only for processors with bf16 matmuls, or with AMX.
NEEDS = {"prefill.h, bf16": "avx512_bf16", "prefill.h, int8": "amx_bf16"}
FILES = [name for name in MUTANTS if NEEDS.get(name, "") in build._processor()]


@pytest.mark.parametrize("name", FILES)
def test_the_probe_passes_what_is_right(compiled, name):
    compiled(name, source(name))
    probe(name)


CASES = [(name, *mutant) for name in FILES for mutant in MUTANTS[name]]


@pytest.mark.parametrize(
    ("name", "old", "new"), [(c[0], *c[2:]) for c in CASES], ids=[f"{c[0]}, {c[1]}" for c in CASES]
)
def test_a_mutant_is_caught(compiled, name, old, new):
    right = source(name)
    assert right.count(old) == 1, f"occurs {right.count(old)} times: {old}"
    compiled(name, right.replace(old, new))
    with pytest.raises(AssertionError):  # a mutant that is no program raises cpu.Unavailable, and does not count
        probe(name)
