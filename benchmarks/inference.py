"""python -m benchmarks inference: tokens per second of heed, transformers, llama.cpp and nanoGPT, and their roofline.

All have the same random weights of heed's shape, in processes that take turns in this one run; the likeliest token is
taken. One repetition is one turn of all: ratios are medians over the repetitions of heed's rate by theirs.
"""

import contextlib
import multiprocessing
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import inference_engines
from benchmarks.inference_engines import ENGINES
from benchmarks.report import table, write_csv
from inference.huge_pages import allocate_huge_pages
from model import ModelConfig
from training.flops import count_parameters

SIZES = {
    "10M": ModelConfig(vocab_size=260, context=1024, n_layer=6, n_head=6, n_kv_head=6, n_embd=384, n_ffn=1024),
    "50M": ModelConfig(vocab_size=16384, context=1024, n_layer=9, n_head=10, n_kv_head=10, n_embd=640, n_ffn=1728),
    "124M": ModelConfig(vocab_size=50257, context=1024, n_layer=12, n_head=12, n_kv_head=12, n_embd=768, n_ffn=2048),
}
TINY = ModelConfig(vocab_size=300, context=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, head_dim=16, n_ffn=128)
BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0}  # a weight
PATIENCE = 40.0  # seconds for one engine in one row: a slower engine gets fewer repetitions, at least one
SAME = 8  # tokens that are compared


class EngineProcess:
    """An engine in a process of its own."""

    def __init__(self, name: str, folder: Path, nanogpt: Path | None, threads: int, device: str = "cpu") -> None:
        self.name, self.precision = name, ENGINES[name][0]
        self.pipe: Connection
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        args = (theirs, name, folder, nanogpt, threads, device)
        self.process = context.Process(target=inference_engines.serve, args=args, daemon=True)
        self.process.start()
        theirs.close()
        self.recv()

    def recv(self) -> Any:
        """Receive a message. Raises ValueError if it is an error, or if the process has died."""
        try:
            said = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            said = f"its process died, {_exit_status(self.process.exitcode)}"
        if isinstance(said, str) and said != "ready":
            raise ValueError(f"{self.name}: {said}")
        return said

    def generate(self, prompt: list[int], batch: int, tokens: int) -> tuple[list[float], np.ndarray, float]:
        """See inference_engines.serve."""
        with contextlib.suppress(OSError):  # of a process that has died: recv says so
            self.pipe.send((prompt, batch, tokens))
        return self.recv()

    def close(self) -> None:
        self.process.terminate()
        self.process.join()


def _exit_status(code: int | None) -> str:
    """A negative exit code is the number of a signal: -4 is SIGILL."""
    try:
        return signal.Signals(-(code or 0)).name
    except ValueError:
        return f"exit status {code}"


def bandwidth(threads: int) -> float:
    """Bytes a second at which all threads read memory in large pages: the best of some readings of half a gigabyte.

    Which of torch's kernels reads fastest depends on the processor: torch.sum alone can be slower than a decode step.
    """
    torch.set_num_threads(threads)
    much = torch.frombuffer(allocate_huge_pages(1 << 29), dtype=torch.float32).fill_(1)
    matrix, vector = much.view(-1, 4096), torch.ones(4096)
    readings: list[Callable[[], Any]] = [much.sum, much.norm, lambda: much.dot(much), lambda: matrix.mv(vector)]
    seconds = []
    for read in readings * 4:
        start = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - start)
    return much.nbytes / min(seconds)


def bytes_per_step(config: ModelConfig, precision: str, batch: int, positions: float) -> float:
    """What one step of `batch` sequences must read: the weights once, and the keys and values of each sequence.

    A cache has the weights' precision, at least 16 bits.
    """
    cache = 2 * config.n_layer * config.n_kv_head * config.head_dim * positions * max(BYTES[precision], 2)
    return count_parameters(config) * BYTES[precision] + batch * cache


def run(names: list[str], sizes: list[str], batches: list[int], prompts: list[int], tokens: int, repetitions: int,
        nanogpt: Path | None, out: Path | None, threads: int) -> int:  # fmt: skip
    """Print a table, a row for each engine in each setting; write inference.csv into `out`. Returns the exit status."""
    here = []
    for name in names:
        lacks = inference_engines.missing(name) or ("--nanogpt DIR" if name == "nanoGPT" and not nanogpt else "")
        print(f"{name} skipped: missing {lacks}" if lacks else "", end="\n" if lacks else "")
        here += [] if lacks else [name]
    speed = 0.0  # a machine's changes: the best that was seen
    rows: list[dict[str, Any]] = []
    faults = []
    for size in sizes:
        config = SIZES.get(size, TINY)
        with tempfile.TemporaryDirectory() as folder:
            inference_engines.write(Path(folder), config, here)
            there = []
            for name in here:
                try:
                    there.append(EngineProcess(name, Path(folder), nanogpt, threads))
                except ValueError as fault:
                    faults.append(f"{size}, {fault}")
            for batch in batches:
                for length in prompts:
                    speed = max(speed, bandwidth(threads))
                    found, failed = setting(there, config, batch, length, tokens, repetitions)
                    faults += [f"{size}, batch {batch}, prompt {length}, {fault}" for fault in failed]
                    for row in found:
                        read = bytes_per_step(config, row["precision"], batch, length + tokens / 2)
                        # in bytes a second, until the best reading of memory is known
                        bound = {"MBU": row["tokens/s"] and read * row["tokens/s"] / batch}
                        rows.append({"size": size, "batch": batch, "prompt": length} | row | bound)
                    told = ", ".join(f"{row['engine']} {row['fault'] or round(row['tokens/s'])}" for row in found)
                    print(f"{size}, batch {batch}, prompt {length}, tokens/s: {told}", file=sys.stderr)
            for engine in there:
                engine.close()
    for row in rows:
        row["MBU"] = row["MBU"] and row["MBU"] / speed
        row["fault"] = row.pop("fault")  # the last column
    print(f"torch {torch.__version__}, {threads} threads, memory was read at up to {speed / 1e9:.1f} GB/s")
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    print("TTFT: time to first token. MBU: share of the peak memory bandwidth.")
    print("heed/engine: rate of heed at that precision divided by its rate, median of pairs.")
    print(f"same: tokens equal to those of heed in fp32, of the first {SAME}.")
    print("MB: memory that the model and generation added to the process, at most so far.")
    for line in faults:
        print(line)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_csv(out / "inference.csv", rows)
        print(f"wrote {out / 'inference.csv'}")
    return int(any("heed" in line for line in faults))


def setting(
    there: list[EngineProcess], config: ModelConfig, batch: int, length: int, tokens: int, repetitions: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Everyone's figures with this batch and this prompt, and who failed: it has a row without figures."""
    prompt = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    first: dict[EngineProcess, list[float]] = {engine: [] for engine in there}
    rate: dict[EngineProcess, list[float]] = {engine: [] for engine in there}
    spent = dict.fromkeys(there, 0.0)
    made: dict[EngineProcess, np.ndarray] = {}
    size: dict[EngineProcess, float] = {}
    faults: dict[EngineProcess, str] = {}
    for turn in range(-1, repetitions):  # the first warms up
        for engine in list(rate):
            if turn > 0 and spent[engine] > PATIENCE:
                continue
            try:
                times, made[engine], size[engine] = engine.generate(prompt, batch, tokens)
            except ValueError as fault:
                faults[engine] = str(fault)
                del rate[engine]
                continue
            if turn >= 0:
                spent[engine] += times[-1]
                first[engine].append(times[0])
                rate[engine].append(batch * (tokens - 1) / (times[-1] - times[0]))
    ours = {engine.name: engine for engine in rate}
    for name in ours:
        if in_cpp := ours.get(f"{name} in C++"):
            python = statistics.median(a / b for a, b in zip(rate[in_cpp], rate[ours[name]], strict=False))
            print(f"batch {batch}, prompt {length}: {name} is {python:.2f} times as fast from C++ as from Python")
    rows = []
    for engine in there:
        row: dict[str, Any] = {"engine": engine.name, "precision": engine.precision}
        if engine in faults:
            figures = dict.fromkeys(("tokens/s", "TTFT ms", "MB", "heed/engine", "same"))
            rows.append(row | figures | {"fault": faults[engine].removeprefix(f"{engine.name}: ")})
            continue
        rates = rate[engine]
        heed = ours.get(f"heed {engine.precision}")
        exact = ours.get("heed fp32")
        compared = engine.name != "nanoGPT"  # which has weights of its own
        rows.append(
            row
            | {
                "tokens/s": statistics.median(rates),
                "TTFT ms": statistics.median(first[engine]) * 1000,
                "MB": size[engine],
                "heed/engine": statistics.median(a / b for a, b in zip(rate[heed], rates, strict=False))
                if heed
                else None,
                "same": f"{(made[exact][:SAME] == made[engine][:SAME]).mean():.0%}" if exact and compared else None,
                "fault": None,
            }
        )
    return rows, list(faults.values())
