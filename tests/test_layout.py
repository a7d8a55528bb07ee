"""The layout: import order of folders, no cycles, no import path patches, no heed modules in site-packages."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# A module may import from its own level and from lower ones. docs: architecture, "Imports run one way".
LEVELS = (
    ("kernels",),
    ("zoo",),
    ("model",),
    ("training", "inference", "data"),
    ("train", "sample", "benchmarks", "evals", "convert", "serve"),
)
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
FILES = [ROOT / f"{name}.py" if (ROOT / f"{name}.py").exists() else ROOT / name for name in LEVEL]
MODULES = [file for path in FILES for file in ([path] if path.suffix else sorted(path.rglob("*.py")))]


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(file) for file in MODULES}


def imports(file: Path, only_top: bool = False) -> set[str]:
    """heed's modules that a file imports; only_top excludes imports inside functions."""
    tree, found = ast.parse(file.read_text()), set()
    nodes = tree.body if only_top else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in NAMES else node.module for name in inner}
    return {name for name in found if name in NAMES}


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_imports_follow_the_layers(file):
    own = name_of(file).partition(".")[0]
    for name in imports(file):
        assert LEVEL[name.partition(".")[0]] <= LEVEL[own], f"{name_of(file)} imports {name}"
    if own == "data" and name_of(file) != "data.__main__":  # a command, above all layers
        assert not any(name.startswith(("training", "inference")) for name in imports(file))
    if own == "inference":
        assert not any(name.startswith("training") for name in imports(file))


def test_no_import_cycles():
    graph = {name_of(file): imports(file, only_top=True) - {name_of(file)} for file in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in graph[name]:
                # A package is loaded before the modules that it imports.
                if not (name.startswith(f"{other}.")):
                    visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_include_cycles():
    folder = ROOT / "kernels" / "cpu"
    graph = {file.name: set(re.findall(r'#include "(.+)"', file.read_text())) for file in folder.glob("*.[hc]*")}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        for other in graph[name]:
            visit(other, (*path, name))

    for name in graph:
        visit(name, ())


def test_no_sys_path_patches():
    for file in [*MODULES, *(ROOT / "tests").rglob("*.py")]:
        assert "sys." + "path" not in file.read_text(), file


def test_heed_is_not_installed_in_site_packages(tmp_path):
    for name in LEVEL:
        done = subprocess.run(
            [sys.executable, "-P", "-c", f"import {name}"], cwd=tmp_path, capture_output=True, text=True
        )
        assert f"No module named '{name}'" in done.stderr, name


def test_help_does_not_import_torch():
    code = (
        "import sys, runpy; sys.argv = ['sample.py', '--help']\ntry: runpy.run_path('sample.py', run_name='__main__')\n"
    )
    code += "except SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


def test_imports_are_light():
    """torch's compiler, its DTensor and Triton take seconds to import: only what uses them does."""
    heavy = ["torch._dynamo", "torch.distributed.tensor", "triton", "datasets", "wandb"]
    code = f"import sys, train; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
