"""python -m benchmarks kernels --bound: the roofline of each GPU, next to published measurements. No kernel runs.

Every table states the kind of its figures: `bound` (calculated, see benchmarks/kernel_costs.py), `compiled` (from the
binary, see tests/kernels/compile_kernels.py) or `measured`, with the source.
"""

import json
import re
from pathlib import Path

from benchmarks import kernel_costs
from benchmarks.kernel_costs import GPUS, Bound, Work, bound, rate
from benchmarks.report import table
from kernels.triton.flash_decoding import choose_splits
from kernels.triton.tiles import TABLE

TOKENS, WIDTH = 16384, 2048  # the longest shape of the FlashAttention papers
HEADS = 32, 8, 128  # H, K, D of the decoding tables
WASTE_LENGTHS = 512, 2048, 16384
COMPILED = "registers", "spilled", "shared", "programs", "matrix unit", "loads"
BUDGET = Path(__file__).resolve().parent.parent / "tests" / "kernels" / "compiled_limits.json"


# Measured on an H100 80GB SXM5 in fp16, 16k tokens (arXiv 2407.08608, figure 5: forward, figure 6: backward).
# "Triton" is FlashAttention-2 in Triton as measured in that paper, forward only.
PUBLISHED = {  # (kernel, D, causal) -> TFLOP/s
    ("forward", 64, False): {"FlashAttention-2": 324, "Triton": 403, "cuDNN": 413, "FlashAttention-3": 497},
    ("forward", 64, True): {"FlashAttention-2": 299, "Triton": 363, "cuDNN": 388, "FlashAttention-3": 473},
    ("forward", 128, False): {"FlashAttention-2": 370, "Triton": 395, "cuDNN": 595, "FlashAttention-3": 648},
    ("forward", 128, True): {"FlashAttention-2": 335, "Triton": 378, "cuDNN": 539, "FlashAttention-3": 616},
    ("backward", 64, False): {"FlashAttention-2": 291, "cuDNN": 433, "FlashAttention-3": 474},
    ("backward", 128, False): {"FlashAttention-2": 322, "cuDNN": 516, "FlashAttention-3": 561},
}
NOTES = """\
backward counts 5 matmuls (2.5 forward passes), as in papers, of the 7 computed by two kernels without atomics; a single
kernel computes 5. dq and dk/dv count the 3 and 4 that they compute. Causal counts half of the scores.
Published, H100: arXiv 2407.08608, figures 5 and 6, fp16, 16k tokens; Triton is FlashAttention-2 in Triton.
Published, A100: FlashAttention-2 reaches up to 230 TFLOP/s (arXiv 2307.08691, section 4).
Triton's tutorial (06-fused-attention) prints for D 64, 16k, fp16: forward 164 causal, 167 full, on an unnamed GPU."""


def report() -> str:
    """All tables."""
    parts = [
        ("Specifications, and the rates derived from them", _gpus()),
        ("TFLOP/s [bound]: perfect overlap / matmuls and exp2 in series / all in series", _attention()),
        ("Decoding one token, the cross-entropy step [bound]", _memory()),
        (
            "Published for H100 SXM, TFLOP/s [measured, by the authors of the paper below], next to the bound [bound]",
            _published(),
        ),
        (
            "Causal waste [bound]: share of the computed scores that are masked, with the tile of each kernel, at "
            + " / ".join(f"T {T:,}" for T in WASTE_LENGTHS),
            _waste(),
        ),
        ("Split decoding [bound]: bytes transferred for the splits, relative to the cache", _splits()),
        ("Registers per thread, bytes spilled, bytes of shared memory [compiled]", _compiled()),
    ]
    return "\n\n".join([*(f"{title}\n{text}" for title, text in parts), NOTES])


def _gpus() -> str:
    rows = [
        [f"{g.name} ({target})", g.matmuls / 1e12, g.memory / 1e12, g.processors, g.exp2 / 1e12, g.fp32 / 1e12]
        for target, g in GPUS.items()
    ]
    return table(["GPU", "bf16 TFLOP/s", "TB/s", "processors", "T exp2/s", "T fp32/s"], rows)


def attention(kernel: str, D: int, causal: bool, target: str) -> tuple[list[Work], Bound]:
    """The work of an attention kernel at the papers' longest shape, and its bound."""
    H = WIDTH // D
    work = getattr(kernel_costs, kernel)(1, TOKENS, TOKENS, H, H, D, causal)
    return work, bound(work, GPUS[target])


def _attention() -> str:
    rows = []
    for kernel in ("forward", "dq", "dkdv", "backward"):
        for D in (64, 128):
            cells = []
            for target in GPUS:
                work, seconds = attention(kernel, D, False, target)
                cells.append(" / ".join(f"{rate(work, s, 'TFLOP/s'):.0f}" for s in seconds))
            rows.append([f"{kernel} D {D}", *cells])
    return table(["kernel", *(gpu.name for gpu in GPUS.values())], rows)


def _memory() -> str:
    """Microseconds and GB/s."""
    H, K, D = HEADS
    kernels = {
        f"decode B {B}, S {S:,}, H {H}, K {K}, D {D}": kernel_costs.decode(B, 1, S, H, K, D)
        for B, S in ((1, 8192), (64, 8192))
    }
    kernels |= {f"cross-entropy step, 1,024 x {V:,}": kernel_costs.cross_entropy_step(1024, V) for V in (32768, 151936)}
    rows = []
    for name, work in kernels.items():
        seconds = [bound(work, gpu).overlap for gpu in GPUS.values()]
        rows.append([name, *(f"{s * 1e6:,.1f} us, {rate(work, s, 'GB/s'):,.0f} GB/s" for s in seconds)])
    return table(["kernel", *(gpu.name for gpu in GPUS.values())], rows)


def _published() -> str:
    names = list(PUBLISHED["forward", 64, False])
    rows = []
    for (kernel, D, causal), figures in PUBLISHED.items():
        work, seconds = attention(kernel, D, causal, "sm_90")
        bounds = " / ".join(f"{rate(work, s, 'TFLOP/s'):.0f}" for s in seconds)
        rows.append([f"{kernel} D {D} {'causal' if causal else 'full'}", *map(figures.get, names), bounds])
    return table(["kernel", *names, "bound"], rows)


def _compiled() -> str:
    """The recorded figures of each compiled kernel without extras; `programs` fit on one processor at a time."""
    if not BUDGET.exists():
        return "not recorded: python -m tests.kernels.compile_kernels --record"
    rows = []
    for name, figures in json.loads(BUDGET.read_text())["kernels"].items():
        if re.search(r" (D (64|128)( T 1)?|V \d+) on ", name):
            *tile, warps, stages = figures["tile"].values()
            size = f"{' x '.join(map(str, tile))}, {warps} warps, {stages} stages"
            rows.append([name, size, *(figures[column] for column in COMPILED)])
    return table(["kernel", "tile", *COMPILED], rows)


def _waste() -> str:
    rows = []
    for kernel in [name for name in TABLE if name.startswith("flash")]:
        for D in (64, 128):
            tiles = [next(tile for size, tile in TABLE[kernel][target].items() if size >= D) for target in GPUS]
            cells = []
            for tile in tiles:
                shares = " / ".join(f"{kernel_costs.causal_waste(T, tile.M, tile.N):.1%}" for T in WASTE_LENGTHS)
                cells.append(f"{tile.M} x {tile.N}: {shares}")
            rows.append([f"{kernel} D {D}", *cells])
    return table(["kernel", *(gpu.name for gpu in GPUS.values())], rows)


def splits(B: int, S: int, target: str) -> int:
    """The number of splits in kernels/triton/flash_decoding.py for one query per sequence, on a GPU."""
    _, K, D = HEADS
    tile = TABLE["decode"][target][D]  # H / K rows fit into one block
    return choose_splits(B * K, -(-S // tile.N), GPUS[target].processors)


def _splits() -> str:
    H, K, D = HEADS
    rows = []
    for B, S in ((1, 1024), (1, 8192), (1, 65536), (16, 8192), (64, 8192)):
        cache = 4 * B * S * K * D
        cells = []
        for target, gpu in GPUS.items():
            n = splits(B, S, target)
            cells.append(
                f"{n} splits, +{kernel_costs.split_bytes(n, B, 1, H, D) / cache:.1%}; unsplit {B * K}/{gpu.processors}"
            )
        rows.append([f"B {B}, S {S:,}: {cache / 1e6:,.1f} MB", *cells])
    return table(["cache (bf16)", *(gpu.name for gpu in GPUS.values())], rows)
