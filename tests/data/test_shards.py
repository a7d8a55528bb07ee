"""Shards: reading returns what was written, and damage is detected and reported."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data import shards
from data.shards import FORMAT_VERSION, Manifest, ShardError, Shards, Writer


def store(folder: Path, ids: list[list[int]], split: str = "train", dtype: str = "uint16") -> Shards:
    """A split with the given shards."""
    folder.mkdir(parents=True, exist_ok=True)
    about = []
    for i, part in enumerate(ids):
        file = folder / f"{split}-{i:05}.bin"
        np.array(part, dtype=dtype).tofile(file)
        about.append({"file": file.name, "tokens": len(part), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()})
    tokens = sum(map(len, ids))
    splits = {split: {"tokens": tokens, "bytes": 3 * tokens, "documents": 1, "shards": about}}
    manifest = Manifest(FORMAT_VERSION, "t", 70_000, 0, dtype, "s", "l", "f", splits)
    (folder / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest)))
    return Shards(folder, split)


@pytest.fixture
def counting(tmp_path: Path) -> Shards:
    """1,000 different tokens, 0 to 999, in three shards."""
    return store(tmp_path, [list(range(300)), list(range(300, 301)), list(range(301, 1000))])


def test_read_wraps_around_and_spans_shards(counting: Shards) -> None:
    assert (counting.tokens, counting.bytes) == (1000, 3000)
    for start, length in ((0, 1000), (299, 3), (990, 25), (1234, 2500), (999, 1)):
        tokens = counting.read(start, length)
        assert tokens.dtype == np.int64 and tokens.tolist() == [(start + i) % 1000 for i in range(length)]


def test_uint32_ids(tmp_path: Path) -> None:
    assert store(tmp_path, [[1, 65_536, 69_999]], dtype="uint32").read(0, 3).tolist() == [1, 65_536, 69_999]


def test_damage_is_reported(tmp_path: Path) -> None:
    def broken(name: str, change: Callable[[Path], object]) -> str:
        folder = tmp_path / name
        store(folder, [list(range(100)), list(range(100))])
        change(folder)
        with pytest.raises(ShardError) as error:
            Shards(folder, "train")
        assert "\n" not in str(error.value)
        return str(error.value)

    def flip(folder: Path) -> None:
        content = bytearray((folder / "train-00001.bin").read_bytes())
        content[77] ^= 4
        (folder / "train-00001.bin").write_bytes(content)

    def older(folder: Path) -> None:
        content = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(content.replace('"format_version": 1', '"format_version": 0'))

    again = "delete the folder and prepare again"
    assert "train-00001.bin: is damaged" in (message := broken("flip", flip)) and again in message
    assert "train-00000.bin: is missing" in broken("gone", lambda folder: (folder / "train-00000.bin").unlink())
    assert "another size" in broken("short", lambda folder: (folder / "train-00001.bin").write_bytes(b"ab"))
    assert "has format version 0, must be 1" in broken("older", older)
    assert "not a valid manifest" in broken("bare", lambda folder: (folder / "manifest.json").unlink())
    assert "not a valid manifest" in broken("text", lambda folder: (folder / "manifest.json").write_text("[]"))
    store(tmp_path / "whole", [[1, 2, 3]])
    with pytest.raises(ShardError, match="has no split 'val', only train"):
        Shards(tmp_path / "whole", "val")


def test_writer_and_shards_agree(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "val", "uint16", eot=7)
    writer.end()  # no open document
    writer.add([1, 2], 5)
    writer.add([3], 1)
    writer.end()
    writer.end()
    writer.add([4], 1)
    writer.end()
    about = writer.finish()
    assert {key: about[key] for key in ("tokens", "bytes", "documents")} == {"tokens": 6, "bytes": 7, "documents": 2}
    assert np.fromfile(tmp_path / "val-00000.bin", "<u2").tolist() == [1, 2, 3, 7, 4, 7]


def test_split_continues_in_further_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD", 10)
    writer = Writer(tmp_path, "train", "uint32", eot=0)
    for first in (1, 4, 30, 31, 60):  # parts of 3, 26, 1, 29 and 40 tokens
        last = {1: 4, 4: 30, 30: 31, 31: 60, 60: 100}[first]
        writer.add(list(range(first, last)), 1)
    writer.end()
    about = writer.finish()
    assert [(shard["file"], shard["tokens"]) for shard in about["shards"]] == [
        (f"train-{i:05}.bin", 10) for i in range(10)
    ]
    manifest = Manifest(FORMAT_VERSION, "t", 70_000, 0, "uint32", "s", "l", "f", {"train": about})
    (tmp_path / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest)))
    assert Shards(tmp_path, "train").read(0, 100).tolist() == [*range(1, 100), 0]
