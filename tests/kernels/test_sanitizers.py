"""heed's C++ under AddressSanitizer and UndefinedBehaviorSanitizer, on random shapes (sanitized.py)."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.cpu import build
from tests.conftest import ROOT, USER_ENV
from tests.kernels.sanitized import FLAGS


def run(examples: int, folder: Path, tmp_path: Path) -> subprocess.CompletedProcess:
    """Run sanitized.py, or skip where the compiler has no sanitizers."""
    compiler, empty = shutil.which("g++"), tmp_path / "empty.cpp"
    if compiler is None:
        pytest.skip("no g++")
    empty.write_text("")
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    tried = subprocess.run([compiler, *FLAGS, str(empty), "-o", str(tmp_path / "empty.so")], capture_output=True)
    if tried.returncode or not Path(runtime).is_file():
        pytest.skip("this g++ has no sanitizers")
    options = "detect_leaks=0:alloc_dealloc_mismatch=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255"
    env = USER_ENV | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": options, "CXX": compiler, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "tests.kernels.sanitized", str(examples), str(folder)]
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("examples", [8, pytest.param(400, marks=pytest.mark.full)])
def test_no_access_out_of_bounds_and_no_undefined_behaviour(examples, tmp_path):
    done = run(examples, build.HERE, tmp_path)
    assert done.returncode == 0, done.stdout[-600:] + done.stderr[:6000]
    assert done.stdout.count("B=") >= examples


def test_an_off_by_one_is_found(tmp_path):
    for file in (*build.HERE.glob("*.h"), *build.HERE.glob("*.cpp")):
        shutil.copy(file, tmp_path)
    source, right = tmp_path / "attention.cpp", "t < m.T; t++, to += m.width()"
    assert source.read_text().count(right) == 1
    source.write_text(source.read_text().replace(right, right.replace("<", "<=")))
    done = run(3, tmp_path, tmp_path)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stdout + done.stderr
