"""Do the tests have teeth? Bugs are put into the kernels one at a time, and each must make the module's probe fail.

A mutant is a name, a piece of a kernel module's source, and what to write in its place; tests/mutants_*.py list them.
Everything runs under the checker of tests/interpreter.py: a mutant that touches what it must not is caught there, and
does no harm.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton.runtime.interpreter import GridExecutor

from tests.interpreter import checked

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = {"flash": "flash_attention", "decode": "decode_attention", "cross_entropy": "linear_cross_entropy"}
BUGS = {
    kernel: importlib.import_module(f"tests.mutants_{kernel}")
    for kernel in PUBLIC
    if (ROOT / "tests" / f"mutants_{kernel}.py").exists()
}
MUTANTS = [(kernel, *mutant) for kernel, bugs in BUGS.items() for mutant in bugs.MUTANTS]


def source(kernel: str) -> str:
    return (ROOT / "kernels" / f"{kernel}.py").read_text()


def probe(kernel: str, source: str, name: str, where: Path) -> None:
    """Run the probe on a module of this source: in a file, since Triton reads it, and with operators of its own."""
    path = where / f"{name}.py"
    path.write_text(source.replace("heed::", f"{name}::"))
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with checked():
        BUGS[kernel].probe(getattr(module, PUBLIC[kernel]))


@pytest.mark.parametrize("kernel", BUGS)
def test_the_probe_passes_what_is_right(kernel, monkeypatch):
    monkeypatch.setattr(GridExecutor, "__call__", GridExecutor.__call__.__wrapped__)  # with coverage, see conftest.py
    with checked():
        BUGS[kernel].probe(getattr(importlib.import_module(f"kernels.{kernel}"), PUBLIC[kernel]))


@pytest.mark.parametrize("number", range(len(MUTANTS)), ids=[f"{kernel}: {name}" for kernel, name, *_ in MUTANTS])
def test_a_mutant_is_caught(number, tmp_path):
    kernel, _, old, new, *times = MUTANTS[number]  # times: how often the text occurs, where that is not once
    right = source(kernel)
    assert right.count(old) == (times[0] if times else 1), f"occurs {right.count(old)} times: {old}"
    with pytest.raises(AssertionError):  # of the probe or the checker: a mutant that is no program does not count
        probe(kernel, right.replace(old, new), f"mutant{number}", tmp_path)
