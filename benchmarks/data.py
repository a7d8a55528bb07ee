"""python -m benchmarks data: throughput of tokenization and of batches, compared with other pipelines.

Three pipelines convert one JSONL file with one tokenizer to token ids on disk, each in a separate process: heed's
`prepare`; `datasets.map` with batches; and nanoGPT's data/openwebtext/prepare.py: `datasets.map` by document, then a
thousand parts into one array. The time is from the file to the ids, without imports and without caches. Memory is the
peak of the largest process. The text is Shakespeare's plays repeated, with one word in twenty moved, so that no two
documents are equal.
"""

import contextlib
import importlib
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks import subprocess_runner
from benchmarks.report import table
from data.loader import Loader
from data.prepare import prepare
from data.shards import Shards
from data.sources import open_corpus
from data.tokenizer import Tokenizer, get_tokenizer
from training.device_memory import peak_memory

VOCABULARY = 4096
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SHAPES = [(8, 256), (64, 256), (32, 1024)]  # sequences, context
BATCHES = 50  # per loader and repetition
QUICK = [
    "model.n_layer=1",
    "model.context=64",
    "train.batch_tokens=512",
    "train.micro_batch_size=8",
    "train.compile=off",
]
STEPS, SKIPPED = 25, 5  # training steps for measuring the time waiting for batches; the first ones are excluded


def make_text(path: Path, size: int) -> None:
    """Write documents, one {"text": ...} per line, up to `size` bytes."""
    documents = [piece.text.split(" ") for piece in open_corpus("shakespeare").pieces()]
    ends = np.cumsum([len(words) for words in documents])
    plays = np.array([word for words in documents for word in words], dtype=object)
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        while True:
            words = plays.copy()
            moved = rng.choice(len(words), len(words) // 20, replace=False)
            words[moved] = words[np.roll(moved, 1)]
            for start, end in zip([0, *ends], ends, strict=False):
                file.write(json.dumps({"text": " ".join(words[start:end])}) + "\n")
                if file.tell() >= size:
                    return


# Three pipelines: each converts the text to token ids in a folder and returns the number of tokens.


def heed(text: Path, tokenizer: Tokenizer, folder: Path) -> int:
    tokenizer.save(folder / "tokenizer.json")
    made = prepare(str(text), tokenizer=str(folder / "tokenizer.json"), val_fraction=0.0005, cache=folder)
    return sum(Shards(made, split).tokens for split in ("train", "val"))


def datasets_map(text: Path, tokenizer: Tokenizer, folder: Path) -> int:
    """Batches for the multithreaded tokenizer; the ids are then read back and appended to a file."""

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [[*ids, tokenizer.eot] for ids in tokenizer.encode_batch(batch["text"])]}

    count = 0
    rows = _load(text, folder).map(encode, batched=True, remove_columns=["text"])
    with (folder / "all.bin").open("wb") as file:
        for batch in rows.with_format("numpy").iter(1000):
            ids = np.concatenate(list(batch["ids"])).astype(np.uint16)
            file.write(ids.tobytes())
            count += len(ids)
    return count


def nanogpt(text: Path, tokenizer: Tokenizer, folder: Path) -> int:
    """One document at a time, in one process per core; then a thousand parts are copied to one array."""

    def encode(row: dict[str, str]) -> dict[str, Any]:
        ids = [*tokenizer.encode(row["text"]), tokenizer.eot]
        return {"ids": ids, "len": len(ids)}

    count = 0
    parts = _load(text, folder).train_test_split(test_size=0.0005, seed=1, shuffle=True)
    for name, part in parts.map(encode, remove_columns=["text"], num_proc=CORES).items():
        total, at = int(np.sum(part["len"], dtype=np.uint64)), 0
        array = np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="w+", shape=(total,))
        pieces = min(1024, len(part))
        for number in range(pieces):
            piece = part.shard(pieces, number, contiguous=True).with_format("numpy")
            ids = np.concatenate(list(piece["ids"]))
            array[at : at + len(ids)] = ids
            at += len(ids)
        array.flush()
        count += total
    return count


PIPELINES: dict[str, Callable[[Path, Tokenizer, Path], int]] = {
    "heed": heed, "datasets.map": datasets_map, "nanoGPT": nanogpt,
}  # fmt: skip


def _load(text: Path, folder: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=str(folder / "cache"))


def one(pipeline: str, text: Path, tokenizer: Path, folder: Path) -> dict[str, float]:
    """Run one pipeline in this process, a separate one: seconds, tokens and peak memory in bytes."""
    importlib.import_module("datasets")  # the import is not timed
    made = Tokenizer.load(tokenizer)
    with contextlib.redirect_stdout(sys.stderr):
        start = time.perf_counter()
        tokens = PIPELINES[pipeline](text, made, folder)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": tokens, "bytes": max(peak_memory(), subprocess_runner.peak_of_children())}


# Batches


def random_sequences(file: Path, sequences: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """nanoGPT's batches: sequences at random positions, with replacement, from a file opened for each batch."""
    ids = np.memmap(file, dtype=np.uint16, mode="r")
    starts = torch.randint(len(ids) - context, (sequences,)).tolist()
    x, y = ([torch.from_numpy(ids[s + i : s + i + context].astype(np.int64)) for s in starts] for i in (0, 1))
    return torch.stack(x), torch.stack(y)


def batches(folder: Path, sequences: int, context: int, turns: int) -> list[float]:
    """Tokens per second of heed's loader and of nanoGPT's, medians over repetitions; all batches differ."""
    loader, steps = Loader(Shards(folder, "train"), context=context, seed=0), itertools.count()
    calls = (
        lambda: loader.batch(next(steps), sequences),
        lambda: random_sequences(folder / "train-00000.bin", sequences, context),
    )
    took: list[list[float]] = [[] for _ in calls]
    for _ in range(1 + turns):  # the first one shuffles an epoch and is excluded
        for call, own in zip(calls, took, strict=True):
            start = time.perf_counter()
            for _ in range(BATCHES):
                call()
            own.append((time.perf_counter() - start) / BATCHES)
    return [sequences * context / statistics.median(own[1:]) for own in took]


def waiting(folder: Path, recipe: str, *words: str) -> tuple[float, float]:
    """Tokens per second of a run of the recipe, and the share of its time that the loop waits for batches."""
    import train
    from training.config_files import load

    calls: list[tuple[float, float]] = []
    batch = Loader.batch

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        made = batch(*arguments)
        calls.append((start, time.perf_counter()))
        return made

    overrides = {"name": "bench", "train.steps": str(STEPS), "train.minutes": "0", "train.num_evals": "1"}
    config = load(recipe, overrides | dict(word.split("=", 1) for word in words))
    with patch.object(Loader, "batch", timed), patch.object(train, "RUNS", folder):
        train.train(config, resume=False, overwrite=True)
    counted = calls[SKIPPED:]
    total = counted[-1][0] - counted[0][0]
    waited = sum(end - start for start, end in counted[:-1])
    return config.train.batch_tokens * (len(counted) - 1) / total, waited / total


def run(megabytes: int, turns: int, quick: bool) -> int:
    """Run all measurements and print the tables."""
    if min(megabytes, turns) < 1:
        raise ValueError("--megabytes and --turns: at least 1")
    megabytes = 1 if quick else megabytes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, tokenizer = folder / "text.jsonl", folder / "tokenizer.json"
        make_text(text, megabytes * 10**6)
        pieces = open_corpus("shakespeare").pieces
        get_tokenizer("bpe", lambda: (piece.text for piece in pieces()), VOCABULARY).save(tokenizer)
        found: dict[str, list[dict[str, float]]] = {pipeline: [] for pipeline in PIPELINES}
        for turn in range(turns):
            for pipeline, own in found.items():
                shutil.rmtree(folder / pipeline, ignore_errors=True)
                (folder / pipeline).mkdir()
                own.append(
                    subprocess_runner.measure(
                        pipeline, "benchmarks.data", pipeline, *map(str, (text, tokenizer, folder / pipeline))
                    )
                )
                print(f"turn {turn + 1}, {pipeline}: {own[-1]['seconds']:.1f} s", file=sys.stderr)
        size = text.stat().st_size / 1e6
        results = []
        for pipeline, own in found.items():
            ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(found["heed"], own, strict=True))
            seconds, peak = (statistics.median(r[what] for r in own) for what in ("seconds", "bytes"))
            results.append([pipeline, size / seconds, seconds, peak / 2**20, f"{own[0]['tokens']:,}", ratio])
        head = [f"{size:,.0f} MB, {CORES} cores", "MB/s", "seconds", "peak MiB", "tokens", "heed = 1"]
        print(table(head, results), end="\n\n")
        with contextlib.redirect_stdout(sys.stderr):
            speed, share = waiting(folder, "shakespeare", *(QUICK if quick else []))
        made = next((folder / "heed" / "tokens").iterdir())
        paces = [[f"{rows} x {context}", *batches(made, rows, context, max(turns, 3))] for rows, context in SHAPES]
        print(table(["batches, tokens per second", "heed", "nanoGPT"], paces), end="\n\n")
        print(
            f"a short run of shakespeare: {speed:,.0f} tokens per second, {share:.2%} of the time waiting for batches"
        )
    return 0


if __name__ == "__main__":
    print(json.dumps(one(sys.argv[1], *map(Path, sys.argv[2:]))))
