"""Part `attention`: TFLOP/s or GB/s and share of the bound, beside SDPA (cuDNN, flash) and FlexAttention.

First every kind of case is checked against fp64, in parallel, which also compiles the kernels. Then the cases are timed
one by one: medians by events with a cold cache, several sets of random inputs. FlexAttention, which is compiled for
seconds for each case, comes last, beside heed once more. At the end, the rows of kernels/gpu_choices.py.
"""

import datetime
import math
import os
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch

from benchmarks import kernel_costs
from benchmarks.attention_implementations import COMPILED, HEED, implementations, make_inputs
from benchmarks.gpu.part import Task
from benchmarks.kernels import SMALL, SMALL_DRY, Checker, one_line, rows_of, time_case
from benchmarks.shapes import TOKENS, Case, dry_cases, gpu_cases

SECONDS = 0.1  # of measuring per implementation and case
SHORT = 512  # tokens of the case that compiles a kernel for all lengths


def run(task: Task) -> None:
    """Check, then time until the time is over."""
    device = torch.device("cpu" if task.dry else "cuda")
    dtype = torch.float32 if task.dry else torch.bfloat16
    gpu = kernel_costs.GPUS["sm_90"] if task.dry else kernel_costs.gpu_of(torch.cuda.get_device_name())
    cases = list(dry_cases() if task.dry else gpu_cases())
    kinds = {_kind(case): case for case in cases}
    correct: dict[Case, list[str]] = {}
    for case, errors in task.map(check, kinds.values()):
        if isinstance(errors, Exception):
            errors = {HEED: str(errors)}
        for name, error in errors.items():
            if error:
                task.emit(check=case.series, implementation=name, error=error)
        correct[_kind(case)] = [name for name, error in errors.items() if not error]
    task.emit(checked=len(kinds))

    found: list[dict[str, Any]] = []
    for with_flex in (False, True):
        for number, case in enumerate(cases):
            if task.left() < 10:
                task.emit(not_timed=len(cases) - number, reason="out of time", flex=with_flex)
                break
            if with_flex and (case.kernel not in ("forward", "backward") or case.length not in (1024, 4096, 16384)):
                continue
            names = [HEED, "flex"] if with_flex else [name for name in correct[_kind(case)] if name != "flex"]
            try:
                seconds, failed = time_case(case, names, device, dtype, SECONDS)
            except Exception as fault:  # such as out of memory
                seconds, failed = {}, {"all": one_line(fault)}
            for row in rows_of(case, seconds, gpu):
                row |= {"kernel": case.kernel, "D": case.D, "causal": case.causal, "round": 1 + with_flex}
                found.append(row)
                task.emit(**row)
            for name, error in failed.items():
                task.emit(check=f"{case.series}, length {case.length}", implementation=name, error=error)
    task.emit(choices=choices(found, "interpreter" if task.dry else torch.cuda.get_device_name()))


def _kind(case: Case) -> Case:
    return case.small(SMALL)


def check(case: Case) -> dict[str, str]:
    """name -> error, "" if correct. Compiles heed's kernel for the timed lengths, too."""
    dry = os.environ.get("TRITON_INTERPRET") == "1"
    device, dtype = torch.device("cpu" if dry else "cuda"), torch.float32 if dry else torch.bfloat16
    names = [HEED, "sdpa", "sdpa cudnn", "sdpa flash", "torch", *(COMPILED if dry or case.V else ())]
    errors = Checker(device, dtype, SMALL_DRY if dry else SMALL).check_correctness(case, names)
    if not dry and not errors[HEED] and case.kernel in ("forward", "backward"):
        short = replace(case, B=TOKENS // SHORT, T=SHORT, S=SHORT)
        implementations(short, make_inputs(short, device, dtype))[HEED]()()
    return errors


def choices(rows: list[dict[str, Any]], name: str) -> str:
    """The row of this card for kernels/gpu_choices.py: by head size, heed's kernels or SDPA as torch chooses it.

    By the geometric mean of the causal cases: of inference over the forward pass alone, of training over both passes.
    """
    seconds = {
        (row["kernel"], row["D"], row["series"], row["length"], row["implementation"]): row["seconds"]
        for row in rows
        if row["causal"] and row["round"] == 1
    }
    ratios = defaultdict[tuple[str, int], list[float]](list)
    for (kernel, D, series, length, implementation), heed in seconds.items():
        if kernel != "forward" or implementation != HEED:
            continue
        pairs = {}
        for which in ("forward", "backward"):
            key = (which, D, series.replace("forward", which), length)
            pairs[which] = seconds.get((*key, HEED)), seconds.get((*key, "sdpa"))
        forward, backward = pairs["forward"], pairs["backward"]
        if forward[1]:
            ratios["inference", D].append(heed / forward[1])
        if forward[1] and backward[0] and backward[1]:
            ratios["train", D].append((heed + backward[0]) / (forward[1] + backward[1]))
    chosen: dict[str, dict[int, str]] = {"train": {}, "inference": {}}
    for (use, D), each in ratios.items():
        mean = math.exp(sum(map(math.log, each)) / len(each))
        chosen[use][D] = "flash" if mean < 1 else "sdpa"
    date = datetime.datetime.now(datetime.UTC).date()
    return f'"{name}": Choices("{date}", train={chosen["train"]}, inference={chosen["inference"]}),'
