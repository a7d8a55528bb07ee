"""python -m benchmarks inference: tokens per second of heed, transformers, llama.cpp and nanoGPT, and the roofline.

All engines have the same random weights and generate greedily, in separate processes that alternate within one run. In
each repetition every engine runs once. Ratios are medians over the repetitions of heed's rate divided by the engine's.
"""

import multiprocessing
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import engines
from benchmarks.engines import ENGINES
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
BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0}  # per weight
TIME_LIMIT = 40.0  # seconds per engine and row: a slower engine runs fewer repetitions, at least one
SAME = 8  # number of tokens to compare


class EngineProcess:
    """An engine in a separate process."""

    def __init__(self, name: str, folder: Path, nanogpt: Path | None, threads: int) -> None:
        self.name, self.precision = name, ENGINES[name][0]
        self.pipe: Connection
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        args = (theirs, name, folder, nanogpt, threads)
        self.process = context.Process(target=engines.serve, args=args, daemon=True)
        self.process.start()
        theirs.close()
        self.recv()

    def recv(self) -> Any:
        """Receive a message. Raises ValueError if it is an error."""
        try:
            message = self.pipe.recv()
        except EOFError:
            message = "the process exited"
        if isinstance(message, str) and message != "ready":
            raise ValueError(f"{self.name}: {message}")
        return message

    def generate(self, prompt: list[int], batch: int, tokens: int) -> tuple[list[float], np.ndarray, float]:
        """See engines.serve."""
        self.pipe.send((prompt, batch, tokens))
        return self.recv()

    def close(self) -> None:
        self.process.terminate()
        self.process.join()


def bandwidth(threads: int) -> float:
    """Read bandwidth of memory in bytes/s with all threads and huge pages: the best of 8 reads of 512 MiB."""
    torch.set_num_threads(threads)
    buffer = torch.frombuffer(allocate_huge_pages(1 << 29), dtype=torch.float32).fill_(1)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - start)
    return buffer.nbytes / min(seconds)


def bytes_per_step(config: ModelConfig, precision: str, batch: int, positions: float) -> float:
    """Bytes read by one step of `batch` sequences: the weights once, and the keys and values of each sequence.

    The KV cache has the precision of the weights, at least 16 bits.
    """
    cache = 2 * config.n_layer * config.n_kv_head * config.head_dim * positions * max(BYTES[precision], 2)
    return count_parameters(config) * BYTES[precision] + batch * cache


def run(names: list[str], sizes: list[str], batches: list[int], prompts: list[int], tokens: int, repetitions: int,
        nanogpt: Path | None, out: Path | None, threads: int) -> int:  # fmt: skip
    """Print a table with a row per engine and setting, and write inference.csv to `out`. Returns the exit status."""
    available = []
    for name in names:
        missing = engines.missing(name) or ("--nanogpt DIR" if name == "nanoGPT" and not nanogpt else "")
        print(f"{name} skipped: missing {missing}" if missing else "", end="\n" if missing else "")
        available += [] if missing else [name]
    peak = 0.0  # memory bandwidth: the maximum measured
    rows: list[dict[str, Any]] = []
    faults = []
    for size in sizes:
        config = SIZES.get(size, TINY)
        with tempfile.TemporaryDirectory() as folder:
            engines.write(Path(folder), config, available)
            running = []
            for name in available:
                try:
                    running.append(EngineProcess(name, Path(folder), nanogpt, threads))
                except ValueError as error:
                    faults.append(f"{size}, {error}")
            for batch in batches:
                for length in prompts:
                    peak = max(peak, bandwidth(threads))
                    found, failed = setting(running, batch, length, tokens, repetitions)
                    faults += [f"{size}, batch {batch}, prompt {length}, {fault}" for fault in failed]
                    for row in found:
                        read = bytes_per_step(config, row["precision"], batch, length + tokens / 2)
                        # in bytes/s; divided by the peak bandwidth below
                        bound = {"MBU": read * row["tokens/s"] / batch}
                        rows.append({"size": size, "batch": batch, "prompt": length} | row | bound)
                    rates = ", ".join(f"{row['engine']} {row['tokens/s']:,.0f}" for row in found)
                    print(f"{size}, batch {batch}, prompt {length}, tokens/s: {rates}", file=sys.stderr)
            for engine in running:
                engine.close()
    for row in rows:
        row["MBU"] /= peak
    print(f"torch {torch.__version__}, {threads} threads, peak memory bandwidth {peak / 1e9:.1f} GB/s (measured)")
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    print("TTFT: time to first token. MBU: share of the peak memory bandwidth.")
    print("heed/engine: tokens/s of heed at the same precision divided by tokens/s of the engine, median of pairs.")
    print(f"same: share of the first {SAME} tokens that equal those of heed fp32.")
    print("MB: peak memory added to the process by the model and generation.")
    for line in faults:
        print(line)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_csv(out / "inference.csv", rows)
        print(f"wrote {out / 'inference.csv'}")
    return int(any("heed" in line for line in faults))


def setting(
    running: list[EngineProcess], batch: int, length: int, tokens: int, repetitions: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """The results of all engines for a batch size and a prompt length, and the errors."""
    prompt = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    first: dict[EngineProcess, list[float]] = {engine: [] for engine in running}
    rate: dict[EngineProcess, list[float]] = {engine: [] for engine in running}
    spent = dict.fromkeys(running, 0.0)
    made: dict[EngineProcess, np.ndarray] = {}
    size: dict[EngineProcess, float] = {}
    faults = []
    for repetition in range(-1, repetitions):  # the first is a warm-up
        for engine in list(rate):
            if repetition > 0 and spent[engine] > TIME_LIMIT:
                continue
            try:
                times, made[engine], size[engine] = engine.generate(prompt, batch, tokens)
            except ValueError as error:
                faults.append(str(error))
                del rate[engine]
                continue
            if repetition >= 0:
                spent[engine] += times[-1]
                first[engine].append(times[0])
                rate[engine].append(batch * (tokens - 1) / (times[-1] - times[0]))
    ours = {engine.name: engine for engine in rate}
    rows = []
    for engine, rates in rate.items():
        heed = ours.get(f"heed {engine.precision}")
        exact = ours.get("heed fp32")
        compared = engine.name != "nanoGPT"  # it has other weights
        rows.append(
            {
                "engine": engine.name,
                "precision": engine.precision,
                "tokens/s": statistics.median(rates),
                "TTFT ms": statistics.median(first[engine]) * 1000,
                "MB": size[engine],
                "heed/engine": heed and statistics.median(a / b for a, b in zip(rate[heed], rates, strict=False)),
                "same": f"{(made[exact][:SAME] == made[engine][:SAME]).mean():.0%}" if exact and compared else None,
            }
        )
    return rows, faults
