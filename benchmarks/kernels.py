"""python -m benchmarks kernels: correctness and speed of heed's kernels compared with torch and others.

Every implementation is checked against the definition in fp64 at a small size, with the same head size, group size and
mask as in the timing. One with a wrong result is not timed. The others are timed alternately within one run.
"""

import sys
import warnings
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import kernel_costs, timing
from benchmarks.attention_implementations import COMPILED, HEED, exact, implementations, make_inputs, plain
from benchmarks.report import picture, table, write_csv
from benchmarks.shapes import KERNELS, Case, cases, dry_cases

SMALL, SMALL_DRY = 333, 21  # number of tokens in the check
SETS = 3  # of inputs, which a timed call uses in turn
DRY_RUN = "DRY RUN: kernels interpreted on the CPU. The times are meaningless, only the checks are valid."


class Checker:
    """Checks implementations against the definition in fp64, once per kind of case."""

    def __init__(self, device: torch.device, dtype: torch.dtype, length: int) -> None:
        self.device, self.dtype, self.length = device, dtype, length
        self.found: dict[Case, dict[str, str]] = {}

    def check_correctness(self, case: Case, names: Container[str] | None = None) -> dict[str, str]:
        """name -> error, "" if correct; for all implementations or those in `names`."""
        small = case.small(self.length)
        if small not in self.found:
            inputs = make_inputs(small, self.device, self.dtype)
            expected, baseline = exact(small, inputs), plain(small, inputs)
            found = {}
            for name, prepare in implementations(small, inputs).items():
                if names is None or name in names:
                    try:
                        found[name] = compare(prepare()(), expected, baseline)
                    except Exception as error:  # any exception of a kernel; the others are still checked
                        found[name] = one_line(error)
            self.found[small] = found
        return self.found[small]


def one_line(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


def compare(results: Iterable[torch.Tensor], expected: Iterable[torch.Tensor], baseline: Iterable[torch.Tensor]) -> str:
    """The first result whose error is more than twice that of ordinary operations in the same dtype, "" if none."""
    for i, (x, right, rounded) in enumerate(zip(results, expected, baseline, strict=True)):
        error = (x.double() - right).abs().max().item()
        allowed = 2 * (rounded.double() - right).abs().max().item() + 1e-6 * right.abs().max().item()
        if not error <= allowed:  # also true for NaN
            return f"WRONG: result {i} is off by {error:.1e}, allowed {allowed:.1e}"
    return ""


def run(only: list[str], dry: bool, out: Path | None) -> int:
    """Print the table and write kernels.csv and kernels.png to `out`. Returns 1 if one of heed's kernels is wrong."""
    device = torch.device("cpu" if dry else "cuda")
    dtype = torch.float32 if dry else torch.bfloat16
    name = "interpreter" if dry else torch.cuda.get_device_name()
    gpu = kernel_costs.GPUS["sm_90"] if dry else kernel_costs.gpu_of(name)
    print(DRY_RUN if dry else f"measured on {name}, torch {torch.__version__}, {dtype}")
    print(f"bound: roofline of {gpu.name}, perfect overlap" if gpu else f"no bound: {name} is not in the table")
    if dry:
        warnings.simplefilter("ignore")  # from numpy in the interpreter, and about uncompiled functions
    checker = Checker(device, dtype, SMALL_DRY if dry else SMALL)
    chosen = [case for case in (dry_cases() if dry else cases()) if case.kernel in (only or KERNELS)]
    rows: list[dict[str, Any]] = []
    faults: dict[str, None] = {}
    for case in chosen:
        errors = checker.check_correctness(case)
        faults |= {f"{case.kernel}, {name}: {error}": None for name, error in errors.items() if error}
        seconds, failed = time_case(case, [name for name, error in errors.items() if not error], device, dtype)
        faults |= {f"{case.series}, length {case.length}, {name}: {error}": None for name, error in failed.items()}
        about = {"kind": "dry run" if dry else "measured", "device": name, "torch": torch.__version__}
        found = rows_of(case, seconds, gpu)
        rows += [about | row for row in found]
        rates = ", ".join(f"{row['implementation']} {row['rate']:.3g}" for row in found)
        print(f"{case.series}, length {case.length}, {case.unit}: {rates}", file=sys.stderr)  # progress
    print(rates_table(rows))
    for fault in faults:
        print(fault)
    if out and rows:
        out.mkdir(parents=True, exist_ok=True)
        write_csv(out / "kernels.csv", rows)
        picture(out / "kernels.png", rows, DRY_RUN if dry else name)
        print(f"wrote {out / 'kernels.csv'} and {out / 'kernels.png'}")
    return int(any(f", {HEED}: " in fault for fault in faults))


def time_case(
    case: Case, names: Container[str], device: torch.device, dtype: torch.dtype, seconds: float = timing.SECONDS
) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds of each implementation over SETS sets of inputs, and the errors of those that fail (such as out of
    memory). seconds: see `timing.medians`."""
    sets = [make_inputs(case, device, dtype, seed) for seed in range(SETS if device.type == "cuda" else 1)]
    made = [implementations(case, inputs) for inputs in sets]
    calls, failed = {}, {}
    for name in made[0]:
        if name in names:
            try:
                each = [prepared[name]() for prepared in (made[:1] if name in COMPILED else made)]
                each[0]()
                calls[name] = timing.rotate(each)
            except Exception as error:
                failed[name] = one_line(error)
    return timing.medians(calls, device, seconds), failed


def rows_of(case: Case, seconds: dict[str, float], gpu: kernel_costs.Gpu | None) -> list[dict[str, Any]]:
    """A row of figures for each implementation of a case."""
    work = case.work()
    bound = kernel_costs.rate(work, kernel_costs.bound(work, gpu).overlap, case.unit) if gpu else None
    rows = []
    for implementation, time in seconds.items():
        rate = kernel_costs.rate(work, time, case.unit)
        row = {"series": case.series, "length": case.length, "implementation": implementation, "seconds": time}
        rows.append(row | {"rate": rate, "unit": case.unit, "bound": bound, "share": rate / bound if bound else None})
    return rows


def rates_table(rows: list[dict[str, Any]]) -> str:
    """One row per case, one column per implementation."""
    names = list(dict.fromkeys([HEED, *(row["implementation"] for row in rows)]))
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault((row["series"], row["length"]), {"unit": row["unit"], "bound": row["bound"]})
        line[row["implementation"]] = row
    body = []
    for (series, length), line in lines.items():
        rates = [line[name]["rate"] if name in line else None for name in names]
        share = line[HEED]["share"] if HEED in line else None
        body.append([series, length, line["unit"], *rates, line["bound"], f"{share:.0%}" if share else None])
    return table(["kernel", "length", "unit", *names, "bound", "heed/bound"], body)
