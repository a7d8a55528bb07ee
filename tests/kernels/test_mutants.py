"""Do the tests have teeth? Bugs are put into the kernels one at a time, and each must make the module's probe fail.

A mutant is a name, a piece of a kernel module's source, and what to write in its place; mutants_*.py list them.
Everything runs under the checker of interpreter.py: a mutant that touches what it must not is caught there, and does no
harm.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


from kernels.cross_entropy import linear_cross_entropy
from kernels.triton import flash_attention, flash_decoding
from tests.conftest import ROOT
from tests.kernels import mutants_cross_entropy, mutants_flash_attention, mutants_flash_decoding
from tests.kernels.interpreter import checked

# file under kernels/ -> (public function, the module of its bugs and its probe, the bugs)
FILES = {
    "triton/flash_attention": (
        flash_attention.flash_attention,
        mutants_flash_attention.MUTANTS,
        mutants_flash_attention,
    ),
    "triton/flash_decoding": (flash_decoding.decode_attention, mutants_flash_decoding.MUTANTS, mutants_flash_decoding),
    "cross_entropy": (linear_cross_entropy, mutants_cross_entropy.MUTANTS, mutants_cross_entropy),
    "triton/cross_entropy": (linear_cross_entropy, mutants_cross_entropy.TRITON_MUTANTS, mutants_cross_entropy),
}
MUTANTS = [(file, *mutant) for file, (_, mutants, _) in FILES.items() for mutant in mutants]


def source(file: str) -> str:
    return (ROOT / "kernels" / f"{file}.py").read_text()


def probe(file: str, source: str, name: str, where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the probe on a module of this source: in a file, since Triton reads it, and with operators of its own."""
    path = where / f"{name}.py"
    path.write_text(source.replace("heed::", f"{name}::"))
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function, _, bugs = FILES[file]
    if file == "triton/cross_entropy":  # which kernels/cross_entropy.py imports when it is called
        monkeypatch.setitem(sys.modules, "kernels.triton.cross_entropy", module)
    else:
        function = getattr(module, function.__name__)
    with checked():
        bugs.probe(function)


@pytest.mark.parametrize("file", FILES)
def test_the_probe_passes_what_is_right(file):
    function, _, bugs = FILES[file]
    with checked():
        bugs.probe(function)


@pytest.mark.parametrize("number", range(len(MUTANTS)), ids=[f"{file}: {name}" for file, name, *_ in MUTANTS])
def test_a_mutant_is_caught(number, tmp_path, monkeypatch):
    file, _, old, new, *times = MUTANTS[number]  # times: how often the text occurs, where that is not once
    right = source(file)
    assert right.count(old) == (times[0] if times else 1), f"occurs {right.count(old)} times: {old}"
    with pytest.raises(AssertionError):  # of the probe or the checker: a mutant that is no program does not count
        probe(file, right.replace(old, new), f"mutant{number}", tmp_path, monkeypatch)
