"""Compiles heed's C++ files for this machine when they are first needed, caches them, and calls them on tensors.

A file is compiled once for each set of types that it is used with. If that fails, `Unavailable` has the reason in one
line, and callers use torch instead.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
FOLDER = Path(os.environ.get("HEED_CACHE") or HERE.parent.parent / ".cache") / "cpu"  # compiled files
# -ffast-math is not used: it would also ignore infinities, and flush denormals in the whole process.
FLAGS = [
    "-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC",
    "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math",
]  # fmt: skip
TYPES = {torch.float32: "float", torch.bfloat16: "Bf16", torch.int8: "int8_t"}


class Unavailable(Exception):
    """A C++ file cannot be compiled or does not support a model. The message is one line."""


TRAINING = ("attention", "cross_entropy", "feed_forward", "linear", "muon")  # files compiled for a dtype


def compile_training(dtype: torch.dtype) -> None:
    """Compile the files that train on activations of this dtype, in parallel. Raises Unavailable."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: library(name, ELEMENT=dtype), TRAINING))


@functools.cache
def trains(dtype: torch.dtype) -> bool:
    """Whether the C++ files that train are available for activations of this dtype."""
    try:
        library("linear", ELEMENT=dtype)
    except Unavailable:
        return False
    return True


def require(x: Tensor) -> None:
    """Raise ValueError if the backend "cpp" does not support the dtype or device of x."""
    if x.device.type != "cpu" or not trains(x.dtype):
        raise ValueError(f"backend = 'cpp' needs fp32 or bf16 on a CPU and a C++ compiler, not {x.dtype} on {x.device}")


def check_tensor(name: str, x: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """x, if C++ can read or write it as contiguous memory of this dtype and shape on a CPU. Raises ValueError."""
    if x.dtype != dtype or x.shape != shape or not (x.is_contiguous() and x.is_cpu):
        got = f"{x.dtype} {tuple(x.shape)}{'' if x.is_contiguous() else ', strided'}, on {x.device}"
        raise ValueError(f"{name} is {got}: the C++ code needs {dtype} {shape}, contiguous, on a CPU")
    return x


@functools.cache
def library(name: str, **types: torch.dtype) -> ctypes.CDLL:
    """kernels/cpu/NAME.cpp, compiled with `types` as macros (ELEMENT=torch.float32). `name` may be an absolute path
    without the suffix. Raises Unavailable.

    The compiled file is named by a hash of all that it depends on: source, compiler, flags, processor; and of the user,
    who loads no code of another user from a shared folder.
    """
    compiler = _compiler()
    if unknown := types.values() - TYPES.keys():
        raise Unavailable(f"unsupported type {', '.join(map(str, unknown))}")
    source = HERE / f"{name}.cpp"
    command = [*compiler, *FLAGS, *(f"-D{k}={TYPES[dtype]}" for k, dtype in types.items()), str(source)]
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    texts = (path.read_text() for path in (source, *sorted(HERE.glob("*.h"))))
    user = os.getuid() if os.name == "posix" else 0
    known = "\n".join([*texts, *command, version, _processor(), str(user)])
    path = FOLDER / f"{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"
    try:
        if not path.exists():
            FOLDER.mkdir(parents=True, exist_ok=True)
            # The file is renamed when it is complete, since two processes may compile it at once.
            with tempfile.TemporaryDirectory(dir=FOLDER) as draft:
                out = Path(draft, "compiled.so")
                done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True)
                if done.returncode:
                    errors = [line for line in done.stderr.splitlines() if "error" in line]
                    raise Unavailable(f"{' '.join(compiler)} failed: {(errors or ['-'])[0]}")
                out.chmod(0o755)
                out.replace(path)
        if os.name == "posix" and not _only_ours(path.stat()):
            raise Unavailable(f"{path} belongs to, or can be written by, another user: delete it, or set HEED_CACHE")
        return ctypes.CDLL(str(path))
    except OSError as error:  # a full disk, or a folder mounted noexec
        raise Unavailable(f"{FOLDER} cannot hold compiled code: {error}") from None


def _only_ours(about: os.stat_result) -> bool:
    """Whether a file was written by this user or root, and nobody else can write it."""
    return about.st_uid in (os.getuid(), 0) and not about.st_mode & 0o022


def _compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, which may have several words ("ccache g++"), else g++ or clang++."""
    named = os.environ.get("CXX", "").strip()
    try:
        commands = [shlex.split(named)] if named else [["g++"], ["clang++"]]
    except ValueError as error:  # a quote that is not closed
        raise Unavailable(f"CXX = {named!r}: {error}") from None
    for command in commands:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    raise Unavailable(f"no C++ compiler, {f'CXX = {named!r} is none' if named else 'g++ or clang++'}")


def _processor() -> str:
    """What the compiler distinguishes processors by: machines may share the folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU"))}))


def call(function: Any, *arguments: Any) -> int:
    """Call a C++ function and return its result.

    A tensor is passed as a pointer, None as a null pointer, a structure or an array of them by reference, an int as
    int64_t, a float as double. The last argument is the number of threads. Raises ValueError if a tensor is not
    contiguous or not on a CPU.
    """
    words: list[Any] = []
    for a in (*arguments, torch.get_num_threads()):
        if isinstance(a, Tensor) and not (a.is_cpu and a.is_contiguous()):
            raise ValueError(f"a tensor of shape {tuple(a.shape)} on {a.device} is not contiguous memory of a CPU")
        if a is None or isinstance(a, Tensor):
            words.append(ctypes.c_void_p(None if a is None else a.data_ptr()))
        elif isinstance(a, ctypes.Structure | ctypes.Array):
            words.append(ctypes.byref(a))
        else:
            words.append(ctypes.c_double(a) if isinstance(a, float) else ctypes.c_int64(a))
    return function(*words)
