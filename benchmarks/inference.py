"""python -m benchmarks inference: how fast heed speaks, beside transformers, llama.cpp and nanoGPT, and beside what memory allows.

All have the same random weights of heed's shape, in processes that take turns in this one run; the likeliest token is
taken. One repetition is one turn of all: ratios are medians over the repetitions of heed's rate by theirs.
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
from benchmarks.engines import SPEAKERS
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
PATIENCE = 40.0  # seconds for one speaker in one row: who needs more is heard fewer times, but once at least
SAME = 8  # tokens that are compared


class Speaker:
    """A process that speaks when asked."""

    def __init__(self, name: str, folder: Path, nanogpt: Path | None, threads: int) -> None:
        self.name, self.precision = name, SPEAKERS[name][0]
        self.pipe: Connection
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        args = (theirs, name, folder, nanogpt, threads)
        self.process = context.Process(target=engines.serve, args=args, daemon=True)
        self.process.start()
        theirs.close()
        self.hear()

    def hear(self) -> Any:
        """What the process says. Raises ValueError when that is what went wrong."""
        try:
            said = self.pipe.recv()
        except EOFError:
            said = "its process died"
        if isinstance(said, str) and said != "ready":
            raise ValueError(f"{self.name}: {said}")
        return said

    def stream_generate(self, prompt: list[int], batch: int, tokens: int) -> tuple[list[float], np.ndarray, float]:
        """See engines.serve."""
        self.pipe.send((prompt, batch, tokens))
        return self.hear()

    def close(self) -> None:
        self.process.terminate()
        self.process.join()


def bandwidth(threads: int) -> float:
    """Bytes a second at which all threads read memory in large pages: the best of some readings of half a gigabyte."""
    torch.set_num_threads(threads)
    much = torch.frombuffer(allocate_huge_pages(1 << 29), dtype=torch.float32).fill_(1)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        much.sum()
        seconds.append(time.perf_counter() - start)
    return much.nbytes / min(seconds)


def bytes_a_step(config: ModelConfig, precision: str, batch: int, positions: float) -> float:
    """What one step of `batch` sequences must read: the weights once, and the keys and values of each sequence.

    A cache has the weights' precision, at least 16 bits.
    """
    cache = 2 * config.n_layer * config.n_kv_head * config.head_dim * positions * max(BYTES[precision], 2)
    return count_parameters(config) * BYTES[precision] + batch * cache


def run(names: list[str], sizes: list[str], batches: list[int], prompts: list[int], tokens: int, repetitions: int,
        nanogpt: Path | None, out: Path | None, threads: int) -> int:  # fmt: skip
    """Print a table, a row for each speaker in each setting; write sample.csv into `out`. Returns the exit status."""
    here = []
    for name in names:
        lacks = engines.missing(name) or ("--nanogpt DIR" if name == "nanoGPT" and not nanogpt else "")
        print(f"{name} is left out: there is no {lacks}" if lacks else "", end="\n" if lacks else "")
        here += [] if lacks else [name]
    speed = 0.0  # a machine's changes: the best that was seen
    rows: list[dict[str, Any]] = []
    faults = []
    for size in sizes:
        config = SIZES.get(size, TINY)
        with tempfile.TemporaryDirectory() as folder:
            engines.write(Path(folder), config, here)
            there = []
            for name in here:
                try:
                    there.append(Speaker(name, Path(folder), nanogpt, threads))
                except ValueError as fault:
                    faults.append(f"{size}, {fault}")
            for batch in batches:
                for length in prompts:
                    speed = max(speed, bandwidth(threads))
                    found, failed = setting(there, config, batch, length, tokens, repetitions)
                    faults += [f"{size}, batch {batch}, prompt {length}, {fault}" for fault in failed]
                    for row in found:
                        read = bytes_a_step(config, row["precision"], batch, length + tokens / 2)
                        # in bytes a second, until the best reading of memory is known
                        bound = {"of the bound": read * row["tokens/s"] / batch}
                        rows.append({"size": size, "batch": batch, "prompt": length} | row | bound)
                    told = ", ".join(f"{row['who']} {row['tokens/s']:,.0f}" for row in found)
                    print(f"{size}, batch {batch}, prompt {length}, tokens/s: {told}", file=sys.stderr)
            for speaker in there:
                speaker.close()
    for row in rows:
        row["of the bound"] /= speed
    print(f"torch {torch.__version__}, {threads} threads, memory was read at up to {speed / 1e9:.1f} GB/s")
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    print("first ms: until the first token. heed/it: rate of heed at that precision by its rate, the median of pairs.")
    print(f"same: tokens equal to those of heed in fp32, of the first {SAME}.")
    print("MB: added to a process by the model and its speaking, at most so far.")
    for line in faults:
        print(line)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_csv(out / "sample.csv", rows)
        print(f"wrote {out / 'sample.csv'}")
    return int(any("heed" in line for line in faults))


def setting(
    there: list[Speaker], config: ModelConfig, batch: int, length: int, tokens: int, repetitions: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Everyone's figures with this batch and this prompt, and who failed."""
    prompt = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    first: dict[Speaker, list[float]] = {speaker: [] for speaker in there}
    rate: dict[Speaker, list[float]] = {speaker: [] for speaker in there}
    spent = dict.fromkeys(there, 0.0)
    made: dict[Speaker, np.ndarray] = {}
    size: dict[Speaker, float] = {}
    faults = []
    for turn in range(-1, repetitions):  # the first warms up
        for speaker in list(rate):
            if turn > 0 and spent[speaker] > PATIENCE:
                continue
            try:
                times, made[speaker], size[speaker] = speaker.stream_generate(prompt, batch, tokens)
            except ValueError as fault:
                faults.append(str(fault))
                del rate[speaker]
                continue
            if turn >= 0:
                spent[speaker] += times[-1]
                first[speaker].append(times[0])
                rate[speaker].append(batch * (tokens - 1) / (times[-1] - times[0]))
    ours = {speaker.name: speaker for speaker in rate}
    rows = []
    for speaker, rates in rate.items():
        heed = ours.get(f"heed {speaker.precision}")
        exact = ours.get("heed fp32")
        compared = speaker.name != "nanoGPT"  # which has weights of its own
        rows.append(
            {
                "who": speaker.name,
                "precision": speaker.precision,
                "tokens/s": statistics.median(rates),
                "first ms": statistics.median(first[speaker]) * 1000,
                "MB": size[speaker],
                "heed/it": statistics.median(a / b for a, b in zip(rate[heed], rates, strict=False)) if heed else None,
                "same": f"{(made[exact][:SAME] == made[speaker][:SAME]).mean():.0%}" if exact and compared else None,
            }
        )
    return rows, faults
