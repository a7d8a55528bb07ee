"""python -m benchmarks gpu: check and measure everything on one GPU, within a fixed time.

Each part runs in a process of its own and has a share of the time that is left. A part that fails, hangs or runs out of
time is stopped; the others go on. DIR/gpu.json has all results and is written anew after each; at the end gpu.md has
them as tables, and gpu-attention.png and gpu-training.png as pictures. gpu.log is what the parts printed.
"""

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import ROW, report
from benchmarks.subprocess_runner import ROOT


class Part(NamedTuple):
    """`share` of the time relative to the parts after it; `least` seconds, below which it is skipped."""

    title: str
    share: float
    least: float
    needs_nanogpt: bool = False


PARTS = {
    "correctness": Part("Kernels against fp64", 16, 40),
    "attention": Part("Attention, decoding, cross-entropy", 22, 40),
    "pretraining": Part("Training step of the 124M shape", 22, 40),
    "generation": Part("Generation at 124M", 12, 30),
    "shakespeare": Part("nanoGPT's GPU setting", 36, 60, needs_nanogpt=True),
    "tiles": Part("Tile search", 10, 20),
}
COMMAND = [sys.executable, "-m", "benchmarks.gpu.part"]
END = 15.0  # seconds for the report


def run(out: Path, only: list[str], minutes: float, nanogpt: Path | None, text: Path | None, dry: bool) -> int:
    """Run the parts, or those in `only`. Returns 1 if one of them failed, did not end in time, or found a fault."""
    out.mkdir(parents=True, exist_ok=True)
    names = [name for name in PARTS if name in (only or PARTS)]
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "commit": _commit(), "dry": dry,
        "machine": {}, "parts": {},
    }  # fmt: skip
    deadline = time.monotonic() + 60 * minutes - END
    with (out / "gpu.log").open("w") as log:
        for number, name in enumerate(names):
            part, left = PARTS[name], deadline - time.monotonic()
            seconds = left * part.share / sum(PARTS[later].share for later in names[number:])
            found: dict[str, Any] = {"title": part.title, "status": "", "seconds": 0.0, "rows": []}
            results["parts"][name] = found
            if part.needs_nanogpt and not (nanogpt and text):
                found["status"] = "skipped: needs --nanogpt DIR and --text FILE"
            elif seconds < part.least:
                found["status"] = f"skipped: needs {part.least:.0f} s, has {max(seconds, 0):.0f}"
            else:
                task = {"seconds": seconds - 5, "dry": dry, "nanogpt": str(nanogpt or ""), "text": str(text or "")}
                _run_part(name, task, seconds, results, lambda: _save(out, results), log)
            _save(out, results)
            print(f"{name}: {found['status']}, {found['seconds']:.0f} s, {len(found['rows'])} results", flush=True)
    try:
        report.write(out, results)
    except Exception as error:  # the results are in gpu.json
        print(f"no tables or pictures: {type(error).__name__}: {error}")
    print(report.summary(results))
    print(f"wrote {out}")
    parts = results["parts"].values()
    skipped = [part for part in parts if part["status"].startswith("skipped")]
    return int(any(part["status"] != "ok" for part in parts if part not in skipped) or bool(report.faults(results)))


def _run_part(
    name: str, task: dict[str, Any], seconds: float, results: dict[str, Any], save: Callable[[], None], log: Any
) -> None:
    """Run one part and collect its rows until it ends or its time is over."""
    found, start = results["parts"][name], time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | ({"TRITON_INTERPRET": "1"} if task["dry"] else {})
    process = subprocess.Popen(
        [*COMMAND, name, json.dumps(task)], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    late = threading.Event()

    def stop() -> None:
        late.set()
        _kill(process)

    timer = threading.Timer(seconds, stop)
    timer.start()
    last = ""
    assert process.stdout
    try:
        for line in process.stdout:
            log.write(line)
            log.flush()
            if not line.startswith(ROW):
                last = line.strip() or last
                continue
            row = json.loads(line.removeprefix(ROW))
            if "machine" in row:
                results["machine"] |= row["machine"]
            else:
                found["rows"].append(row)
                save()
        code = process.wait()
    finally:  # also when the user interrupts
        timer.cancel()
        _kill(process)
    found["seconds"] = time.monotonic() - start
    found["status"] = f"stopped after {seconds:.0f} s" if late.is_set() else "ok" if code == 0 else f"failed: {last}"


def _kill(process: subprocess.Popen[str]) -> None:
    """End a part and the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own


def _save(out: Path, results: dict[str, Any]) -> None:
    draft = out / ".gpu.json"
    draft.write_text(json.dumps(results, indent=1) + "\n")
    draft.replace(out / "gpu.json")


def _commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
