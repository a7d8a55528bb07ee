"""The compiled gate: what the compilers make of every kernel is held to the figures in compiled_limits.json.

compile_kernels.py compiles them, in a process of its own, since this one has Triton's interpreter. A figure that got
worse fails; one that got better fails too, until it is recorded, so that the record is always what is there. With
another Triton only what must hold anyway is tested: no kernel spills with 3.6.0 either (compiled 2026-11-26).
"""

import itertools
import json
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

pytest.importorskip("triton")

from tests.conftest import ROOT, USER_ENV

BUDGET = json.loads((ROOT / "tests" / "kernels" / "compiled_limits.json").read_text())
recorded = pytest.mark.skipif(
    version("triton") != BUDGET["triton"], reason=f"the figures are of triton {BUDGET['triton']}, see requirements.txt"
)
RECORD = "record it on purpose with `python -m tests.kernels.compile_kernels --record`"

# What is better comes first; of numbers less is better, except of these two.
MORE = {"programs", "wide loads"}
ORDER = {
    "matrix unit": ["UTCHMMA", "HGMMA", "HMMA", "v_mfma", None],
    "loads": ["UTMALDG", "LDGSTS", "LDG", "global_load_lds", "buffer_load", "global_load", None],
}


def rank(figure: str, value) -> int:
    """The less the better."""
    return ORDER[figure].index(value) if figure in ORDER else -value if figure in MORE else value


def compare(recorded: dict, found: dict) -> tuple[list[str], list[str]]:
    """Lines about figures that are worse, and about those that are better, for kernels that both have."""
    worse, better = [], []
    for name in recorded.keys() & found.keys():
        for figure in recorded[name].keys() - {"tile"}:
            old, new = recorded[name][figure], found[name][figure]
            if old != new:
                side = worse if rank(figure, new) > rank(figure, old) else better
                side.append(f"{name}: {figure} {new}, recorded {old}")
    return sorted(worse), sorted(better)


def compile_kernels(code: str = "") -> dict:
    """The figures; with code, of what it prints after it has imported the script."""
    words = (
        ["-c", f"from tests.kernels.compile_kernels import *\n{code}"]
        if code
        else ["-m", "tests.kernels.compile_kernels"]
    )
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=USER_ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def compiled() -> dict:
    """name -> figures of every kernel, compiled now."""
    return compile_kernels()["kernels"]


def lines(found: list[str]) -> str:
    return "\n".join(found)


@recorded
def test_every_kernel_is_recorded(compiled):
    assert compiled.keys() == BUDGET["kernels"].keys(), RECORD
    tiles = {name: row["tile"] for name, row in compiled.items()}
    assert tiles == {name: row["tile"] for name, row in BUDGET["kernels"].items()}, f"another tile: {RECORD}"


@recorded
def test_nothing_is_worse(compiled):
    worse, _ = compare(BUDGET["kernels"], compiled)
    assert not worse, f"worse:\n{lines(worse)}"


@recorded
def test_nothing_is_better_than_recorded(compiled):
    _, better = compare(BUDGET["kernels"], compiled)
    assert not better, f"better: {RECORD}\n{lines(better)}"


# What must hold whatever is recorded --------------------------------------------------------------------------------


def kernels(compiled, target: str, *modules: str) -> dict:
    return {name: row for name, row in compiled.items() if name.endswith(target) and name.startswith(modules)}


def product_rows(name: str, tile: dict) -> int:
    """Rows of the matrices that a kernel multiplies: its queries, or its keys where all are transposed."""
    return tile["N"] if name.startswith("flash_dkdv") else tile.get("BLOCK_M") or tile["M"]


def test_nothing_spills_and_no_product_waits(compiled):
    for name, row in compiled.items():
        assert row["spilled"] == 0, name
        assert not row["serialized"], name
    for target, D in itertools.product(("sm_80", "sm_90", "sm_100", "gfx942"), (64, 128)):
        for kernel in (f"flash_forward D {D}", f"flash_dq D {D}", f"flash_dkdv D {D}", f"decode_split D {D} T 1"):
            assert f"{kernel} on {target}" in compiled


@pytest.mark.parametrize(
    ("target", "large", "small"),
    [
        ("sm_80", "HMMA", "HMMA"),
        ("sm_90", "HGMMA", "HMMA"),
        ("sm_100", "UTCHMMA", "HMMA"),
        ("gfx942", "v_mfma", "v_mfma"),
    ],
)
def test_the_matrix_unit_is_the_targets(compiled, target, large, small):
    multiply = kernels(compiled, target, "flash", "decode_split")
    assert len(multiply) >= 12
    for name, row in multiply.items():
        assert row["matrix unit"] == (large if product_rows(name, row["tile"]) >= 64 else small), name


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_loads_are_asynchronous_and_wide(compiled, target):
    """At head size 256 the backward's blocks fit only once: there is no pipeline."""
    for name, row in kernels(compiled, target, "flash", "decode_split").items():
        if not re.match("flash_(dq|dkdv) D 256", name):
            assert row["loads"] in ("UTMALDG", "LDGSTS"), name
        assert row["wide loads"] > 0, name


# The gate has teeth -------------------------------------------------------------------------------------------------

LARGE = """
tiles.TABLE["flash_forward"]["sm_90"][64] = tiles.Tile(128, 256, 4, 1)
caught = launches("sm_90", flash_case, 64, "plain")
print(json.dumps({"flash_forward D 64 on sm_90": figures("sm_90", *caught[0])}))
"""


def test_a_kernel_made_worse_is_reported():
    found = compile_kernels(LARGE)
    worse, _ = compare(BUDGET["kernels"], found)
    assert {line.split(": ")[1].split()[0] for line in worse} >= {"registers", "spilled", "loads", "serialized"}, worse


@pytest.mark.parametrize(
    ("figure", "value", "is_worse"),
    [
        ("registers", 1, False), ("registers", 1000, True), ("spilled", 4, True), ("shared", 1 << 20, True),
        ("programs", 0, True), ("programs", 9, False), ("matrix unit", "HMMA", True), ("matrix unit", None, True),
        ("loads", "LDG", True), ("loads", "UTMALDG", False), ("wide loads", 0, True), ("serialized", True, True),
    ],
)  # fmt: skip
def test_each_figure_counts(figure, value, is_worse):
    name = "flash_forward D 64 on sm_90"
    worse, better = compare(BUDGET["kernels"], {name: BUDGET["kernels"][name] | {figure: value}})
    assert (len(worse), len(better)) == (is_worse, not is_worse)
