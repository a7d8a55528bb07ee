"""python -m benchmarks kernels: heed's kernels against torch's and others', for correctness and speed.

Every implementation is checked against the definition in fp64 at a small size, with the head size, group and mask that
it is timed with. One that is wrong is not timed. The others are timed in turns in this one run.
"""

import sys
import warnings
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import kernel_costs, timing
from benchmarks.implementations import HEED, draw, exact, implementations, plain
from benchmarks.report import picture, table, write_csv
from benchmarks.shapes import KERNELS, Case, cases, dry_cases

SMALL, SMALL_DRY = 333, 21  # tokens of the check
MEANINGLESS = "DRY RUN: kernels interpreted on the CPU. The times mean nothing; only the checks do."


class Judge:
    """Checks implementations against the definition in fp64, each kind of case once."""

    def __init__(self, device: torch.device, dtype: torch.dtype, length: int) -> None:
        self.device, self.dtype, self.length = device, dtype, length
        self.found: dict[Case, dict[str, str]] = {}

    def check_correctness(self, case: Case, whom: Container[str] | None = None) -> dict[str, str]:
        """name -> what is wrong, "" if nothing; of all implementations or of those in `whom`."""
        small = case.small(self.length)
        if small not in self.found:
            drawn = draw(small, self.device, self.dtype)
            truth, ordinary = exact(small, drawn), plain(small, drawn)
            found = {}
            for name, prepare in implementations(small, drawn).items():
                if whom is None or name in whom:
                    try:
                        found[name] = wrong(prepare()(), truth, ordinary)
                    except Exception as error:  # whatever a kernel raises, the others are still compared
                        found[name] = said(error)
            self.found[small] = found
        return self.found[small]


def said(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


def wrong(results: Iterable[torch.Tensor], truth: Iterable[torch.Tensor], ordinary: Iterable[torch.Tensor]) -> str:
    """The first result whose error is more than twice that of ordinary operations in the same dtype."""
    for i, (x, right, rough) in enumerate(zip(results, truth, ordinary, strict=True)):
        error = (x.double() - right).abs().max().item()
        allowed = 2 * (rough.double() - right).abs().max().item() + 1e-6 * right.abs().max().item()
        if not error <= allowed:  # NaN is not either
            return f"WRONG: result {i} is off by {error:.1e}, allowed {allowed:.1e}"
    return ""


def run(only: list[str], dry: bool, out: Path | None) -> int:
    """Print the table; write kernels.csv and kernels.png into `out`. Returns 1 if one of heed's kernels is wrong."""
    device = torch.device("cpu" if dry else "cuda")
    dtype = torch.float32 if dry else torch.bfloat16
    name = "interpreter" if dry else torch.cuda.get_device_name()
    gpu = kernel_costs.GPUS["sm_90"] if dry else kernel_costs.gpu_of(name)
    print(MEANINGLESS if dry else f"measured on {name}, torch {torch.__version__}, {dtype}")
    print(f"the bound is that of {gpu.name} when all overlaps" if gpu else f"no bound: {name} is not in the table")
    if dry:
        warnings.simplefilter("ignore")  # of numpy, which interprets, and of what is not compiled
    judge = Judge(device, dtype, SMALL_DRY if dry else SMALL)
    chosen = [case for case in (dry_cases() if dry else cases()) if case.kernel in (only or KERNELS)]
    rows: list[dict[str, Any]] = []
    faults: dict[str, None] = {}
    for case in chosen:
        verdicts = judge.check_correctness(case)
        faults |= {f"{case.kernel}, {who}: {what}": None for who, what in verdicts.items() if what}
        seconds, failed = _time(case, [who for who, what in verdicts.items() if not what], device, dtype)
        faults |= {f"{case.series}, length {case.length}, {who}: {what}": None for who, what in failed.items()}
        work = case.work()
        bound = kernel_costs.rate(work, kernel_costs.bound(work, gpu).overlap, case.unit) if gpu else None
        for who, time in seconds.items():
            rate = kernel_costs.rate(work, time, case.unit)
            rows.append(
                {"kind": "dry run" if dry else "measured", "device": name, "torch": torch.__version__}
                | {"series": case.series, "length": case.length, "who": who, "seconds": time}
                | {"rate": rate, "unit": case.unit, "bound": bound, "share": rate / bound if bound else None}
            )  # fmt: skip
        told = ", ".join(f"{who} {kernel_costs.rate(work, time, case.unit):.3g}" for who, time in seconds.items())
        print(f"{case.series}, length {case.length}, {case.unit}: {told}", file=sys.stderr)  # a run takes a while
    print(_table(rows))
    for fault in faults:
        print(fault)
    if out and rows:
        out.mkdir(parents=True, exist_ok=True)
        write_csv(out / "kernels.csv", rows)
        picture(out / "kernels.png", rows, MEANINGLESS if dry else name)
        print(f"wrote {out / 'kernels.csv'} and {out / 'kernels.png'}")
    return int(any(f", {HEED}: " in fault for fault in faults))


def _time(
    case: Case, whom: list[str], device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds of those who can, and why the others cannot (as when memory does not suffice for all logits)."""
    drawn = draw(case, device, dtype)
    calls, failed = {}, {}
    for who, prepare in implementations(case, drawn).items():
        if who in whom:
            try:
                call = prepare()
                call()
                calls[who] = call
            except Exception as error:
                failed[who] = said(error)
    return timing.medians(calls, device), failed


def _table(rows: list[dict[str, Any]]) -> str:
    """One row per case, one column per implementation."""
    names = list(dict.fromkeys([HEED, *(row["who"] for row in rows)]))
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        lines.setdefault((row["series"], row["length"]), {"unit": row["unit"], "bound": row["bound"]})[row["who"]] = row
    body = []
    for (series, length), line in lines.items():
        rates = [line[name]["rate"] if name in line else None for name in names]
        share = line[HEED]["share"] if HEED in line else None
        body.append([series, length, line["unit"], *rates, line["bound"], f"{share:.0%}" if share else None])
    return table(["kernel", "length", "unit", *names, "bound", "heed/bound"], body)
