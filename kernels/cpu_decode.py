"""cpu_decode.cpp and cpu_products.h, compiled for this machine when first needed, and called through ctypes."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

SOURCES = [Path(__file__).with_name(name) for name in ("cpu_decode.cpp", "cpu_products.h")]
# What -ffast-math would also allow, to forget infinities and to flush small numbers in the whole process, is left out.
FLAGS = [
    "-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC",
    "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math",
]  # fmt: skip
TYPES = {torch.float32: "float", torch.bfloat16: "Bf16", torch.int8: "int8_t"}


class Matrix(Structure):
    """As in the C++ file, and so are the next two."""

    _fields_ = (("weight", c_void_p), ("scale", c_void_p))


class Layer(Structure):
    _fields_ = (
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, c_void_p) for name in ("norm_in", "norm_mid", "norm_q", "norm_k", "keys", "values")),
        *((name, c_int64) for name in ("slots", "window")),
    )


class Model(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("C", "H", "K", "D", "F", "V", "layers", "gated", "context")),
        ("eps", c_double),
        *((name, c_void_p) for name in ("cos", "sin", "norm")),
        ("embed", Matrix),
        ("head", Matrix),
        ("layer", POINTER(Layer)),
    )


class Unavailable(Exception):
    """The C++ file cannot be compiled here; says why in a line."""


@functools.cache
def library(weights: torch.dtype, cache: torch.dtype, folder: Path) -> ctypes.CDLL:
    """The compiled file for weights and a cache of these types, kept in `folder`. Raises Unavailable.

    Its name is a hash of all that it depends on: the source, the compiler, the flags and the processor.
    """
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")
    if compiler is None:
        raise Unavailable("there is no C++ compiler here (g++ or clang++)")
    command = [compiler, *FLAGS, f"-DWEIGHTS={TYPES[weights]}", f"-DCACHE={TYPES[cache]}", str(SOURCES[0])]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    known = "\n".join([*(source.read_text() for source in SOURCES), *command, version, _processor()])
    path = folder / f"{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as draft:  # it appears whole, also when two compile at once
            out = Path(draft, "decode.so")
            done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True)
            if done.returncode:
                raise Unavailable(f"{compiler} failed: {(done.stderr.strip() or '-').splitlines()[0]}")
            out.replace(path)
    found = ctypes.CDLL(str(path))
    found.heed_decode.argtypes = [POINTER(Model), c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int]
    found.heed_decode.restype = c_int
    return found


def _processor() -> str:
    """What distinguishes processors for a compiler: a folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU"))}))


def decode(found: ctypes.CDLL, model: Model, tokens: Tensor, lengths: Tensor) -> Tensor:
    """tokens (B, T) int64 after those that the cache holds, lengths (B,) -> the next one's logits (B, V) fp32.

    Writes keys and values into the cache that `model` points to. Raises IndexError as torch would: a token that is not
    in the vocabulary, or a position beyond the context.
    """
    B, T = tokens.shape
    tokens, logits = tokens.contiguous(), torch.empty(B, model.V)
    places = (x.data_ptr() for x in (tokens, lengths, logits))
    if found.heed_decode(model, B, T, *places, torch.get_num_threads()):
        raise IndexError(f"tokens from 0 to {model.V - 1}, 1 to {model.context} of them")
    return logits
