"""Compile every kernel ahead of time for GPUs that need not be there, and read off what the compiler made of it.

    python -m tests.kernels.compile_kernels             print the figures as JSON
    python -m tests.kernels.compile_kernels --record    write them to compiled_limits.json, for test_compiled.py

The kernels are launched as always, by their public functions, on tensors of this machine with the tiles of the target.
But the launch is caught: Triton derives from its arguments what it would compile for that GPU (types, which pointers
and numbers are multiples of 16, constants), compiles it, and nothing runs. So no signature is written down twice.

The figures of one kernel: registers a thread; spills, in bytes; shared memory of a program, in bytes; how many
programs fit on one processor by these; as disassembled, the weakest matrix unit and the best loads that it uses, and
how many of these fetch 16 bytes, the most there is; and whether ptxas gave up overlapping matmuls ("serialized").
"""

import contextlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

assert os.environ.pop("TRITON_INTERPRET", "0") in ("", "0"), "the interpreter compiles nothing"
ROOT = Path(__file__).resolve().parent.parent.parent

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from kernels import cross_entropy
from kernels.reference_attention import CAUSAL, MaskSpec
from kernels.triton import flash_attention, flash_decoding, tiles

BUDGET = ROOT / "tests" / "kernels" / "compiled_limits.json"
TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}  # A100, H100, B200, MI300X
SHARED = {"sm_80": 164, "sm_90": 228, "sm_100": 228}  # KiB a processor; CUDA programming guide, "Compute Capabilities"
# Matrix units from the weakest, so that one product that falls back shows. Loads from the best: the first load of what
# stays is never asynchronous.
MATRIX_UNITS = ("HMMA", "HGMMA", "UTCHMMA")
LOADS = ("UTMALDG", "LDGSTS", "LDG")
EXTRAS = ("plain", "window+documents", "everything")
BF16 = torch.bfloat16


# 1. The launches ----------------------------------------------------------------------------------------------------


def flash_case(D: int, extras: str) -> None:
    """Forward and backward, 8 query heads on 2 key/value heads."""
    q, k, v = (torch.empty(2, 1024, heads, D, dtype=BF16, requires_grad=True) for heads in (8, 2, 2))
    plain = extras in ("plain", "dropout")
    documents = None if plain else torch.zeros(2, 1024, dtype=torch.int64)
    pattern = CAUSAL if plain else MaskSpec(True, 256, 30.0 if extras == "everything" else None)
    slopes, sinks = (torch.zeros(8, requires_grad=True) if extras == "everything" else None for _ in range(2))
    dropout = (0.1, torch.zeros(2, dtype=torch.int32)) if extras == "dropout" else (0.0, None)
    out, _ = flash_attention.flash_attention(q, k, v, pattern, 0.1, documents, slopes, sinks, *dropout)
    out.backward(torch.empty_like(out))


def decode_case(D: int, T: int, extras: str) -> None:
    """T queries over a cache of 8192, 32 query heads on 8 key/value heads; in pages of 256 unless plain."""
    q, shape = torch.empty(1, T, 32, D, dtype=BF16), (1, 8192, 8, D)
    pages = None
    if extras != "plain":
        shape, pages = (32, 256, 8, D), torch.zeros(1, 32, dtype=torch.int32)
    pattern = MaskSpec(True, 4096, 30.0) if extras == "everything" else CAUSAL
    slopes, sinks = (torch.zeros(32) if extras == "everything" else None for _ in range(2))
    k, v = (torch.empty(shape, dtype=BF16) for _ in range(2))
    flash_decoding.decode_attention(q, k, v, pattern, 0.1, torch.tensor([8192]), pages, slopes, sinks)


def cross_entropy_case(V: int, extras: str) -> None:
    x, weight = torch.zeros(2, 16, dtype=BF16, requires_grad=True), torch.zeros(V, 16, dtype=BF16, requires_grad=True)
    terms = {"z_loss": 1e-4, "softcap": 30.0} if extras == "everything" else {}
    cross_entropy.linear_cross_entropy(x, weight, torch.zeros(2, dtype=torch.int64), backend="triton", **terms)


def jobs() -> Iterator[tuple[Any, ...]]:
    """(target, case, its arguments), those that take longest first."""
    for target, D in itertools.product(TARGETS, (256, 128, 64)):
        for extras in EXTRAS if target == "sm_90" and D != 256 else EXTRAS[:1]:
            yield target, flash_case, D, extras
    for target in TARGETS:
        yield target, flash_case, 128, "dropout"
    for target, D in itertools.product(TARGETS, (256, 128, 64)):
        yield target, decode_case, D, 1, "plain"
        if D == 128:
            yield target, decode_case, D, 16, "plain"
    for D in (128, 64):
        yield "sm_90", decode_case, D, 1, "pages"
        yield "sm_90", decode_case, D, 1, "everything"
    for target in TARGETS:
        yield target, cross_entropy_case, 151_936, "plain"
    yield "sm_90", cross_entropy_case, 151_936, "everything"


def launches(target: str, launch: Callable[..., None], *arguments: Any) -> list[tuple[JITFunction, tuple, dict]]:
    """What a call launches on a target: kernels with their arguments."""
    caught: list[tuple[JITFunction, tuple, dict]] = []

    def catch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        caught.append((self, args, kwargs))

    with (
        patch.object(JITFunction, "run", catch),
        patch.object(tiles, "target", lambda device: target),
        patch.object(flash_decoding, "INTERPRETED", PROCESSORS[target]),
    ):
        launch(*arguments)
    return caught


# 2. Compiling and reading -------------------------------------------------------------------------------------------


def compiled(target: str, kernel: JITFunction, args: tuple, kwargs: dict) -> tuple[Any, dict, str]:
    """What Triton would compile for this launch on this target; the constants; what ptxas said."""
    backend = make_backend(TARGETS[target])
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(said):
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = cache, True
        binary = triton.compile(source, target=TARGETS[target], options=options.__dict__)
    return binary, bound, said.getvalue()


def figures(target: str, kernel: JITFunction, args: tuple, kwargs: dict) -> dict[str, Any]:
    """One row of the budget."""
    binary, bound, said = compiled(target, kernel, args, kwargs)
    found = {"tile": {name: bound[name] for name in ("M", "N", "BLOCK_M", "BLOCK_N") if name in bound}}
    found["tile"] |= {"warps": kwargs["num_warps"], "stages": kwargs["num_stages"]}
    found |= (_amd if target == "gfx942" else _nvidia)(target, binary, said)
    return found


def _nvidia(target: str, binary: Any, said: str) -> dict[str, Any]:
    """By ptxas's log and the disassembly."""
    registers, shared = _number(r"Used (\d+) registers", said), binary.metadata.shared
    threads = 32 * binary.metadata.num_warps
    fit = [
        65536 // (-(-registers // 8) * 8 * threads),  # registers are given out by 8
        2048 // threads,
        SHARED[target] * 1024 // (shared + 1024),  # 1 KiB of each program's is the system's
    ]
    if binary.metadata.tmem_size:
        fit.append(512 // binary.metadata.tmem_size)  # columns of Blackwell's tensor memory
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        sass = subprocess.run([knobs.nvidia.nvdisasm.path, "-c", file.name], capture_output=True, text=True, check=True)
    return {
        "registers": registers,
        "spilled": _number(r"(\d+) bytes spill stores", said) + _number(r"(\d+) bytes spill loads", said),
        "shared": shared,
        "programs": min(fit),
        "matrix unit": _first(MATRIX_UNITS, sass.stdout),
        **_loads(LOADS, sass.stdout),
        "serialized": "serialized" in said,
    }


def _amd(target: str, binary: Any, said: str) -> dict[str, Any]:
    """By the assembly's metadata. A processor has 4 units of 512 registers, at most 8 wavefronts each, and 64 KiB."""
    text = binary.asm["amdgcn"]
    registers, shared = _number(r"\.vgpr_count:\s+(\d+)", text), binary.metadata.shared
    warps = binary.metadata.num_warps
    fit = [4 * min(512 // (-(-registers // 8) * 8), 8) // warps, 65536 // max(shared, 1)]
    return {
        "registers": registers,
        "spilled": 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text),
        "shared": shared,
        "programs": min(fit),
        "matrix unit": _first(("v_mfma",), text),
        **_loads(("global_load_lds", "buffer_load", "global_load"), text),
        "serialized": False,
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"{pattern} not in {text[:2000]}"
    return int(found[1])


def _first(instructions: tuple[str, ...], text: str) -> str | None:
    """The first of the instructions that occurs at all."""
    return next((name for name in instructions if re.search(rf"\b{name}", text)), None)


def _loads(instructions: tuple[str, ...], text: str) -> dict[str, Any]:
    """The best load, and how many of its kind fetch 16 bytes a thread, or by TMA a whole block."""
    best = _first(instructions, text)
    return {"loads": best, "wide loads": len(re.findall(rf"\b{best}[\w.]*(?:\.128|x4)\b|\bUTMALDG", text))}


def rows(job: tuple[Any, ...]) -> dict[str, dict[str, Any]]:
    """A job's rows, named by kernel, size, extras, target."""
    target, launch, *arguments, extras = job
    found = {}
    for kernel, args, kwargs in launches(target, launch, *arguments, extras):
        size = " ".join(f"{name} {n}" for name, n in zip(launch.__annotations__, arguments, strict=False))
        name = kernel.__module__.rpartition(".")[2].removesuffix("_attention").replace("flash_decoding", "decode")
        words = name + kernel.__name__, size, extras, "on", target
        found[" ".join(word for word in words if word != "plain")] = figures(target, kernel, args, kwargs)
    return found


def budget() -> dict[str, Any]:
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        parts = list(pool.map(rows, jobs()))
    return {"triton": triton.__version__, "kernels": dict(sorted(itertools.chain(*(part.items() for part in parts))))}


if __name__ == "__main__":
    text = json.dumps(budget())
    text = re.sub(r' ?("(?:triton|kernels)": |"[^"]+ on \w+": )', r"\n\1", text)  # one kernel a line
    if "--record" in sys.argv:
        BUDGET.write_text(text + "\n")
    else:
        print(text)
