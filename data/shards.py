"""Token ids on disk: the one file format of the data pipeline, how it is written and how it is read.

    manifest.json     what is here and where it came from, with a sha256 for every shard
    tokenizer.json    the tokenizer that made it
    train-00000.bin   token ids, one after the other: uint16 (uint32 if the vocabulary is larger), little endian
    val-00000.bin     the same for validation; a split of more than SHARD tokens goes on in -00001.bin

Shards are never loaded but memory-mapped: reading touches only the pages that it needs.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_VERSION = 1
SHARD = 100_000_000  # tokens in a file, at most
AGAIN = "delete the folder and prepare again"


class ShardError(ValueError):
    """Prepared tokens that are not what their manifest says, or too few. One line, for the user."""


@dataclass(frozen=True)
class Manifest:
    """What a folder of tokens holds. `tokenizer` and `fingerprint` are hashes, of the tokenizer and of the text."""

    format_version: int
    tokenizer: str
    vocab_size: int
    eot: int  # the id of the end-of-text token
    dtype: str  # uint16 or uint32
    source: str
    licence: str
    fingerprint: str
    splits: dict[str, dict[str, Any]]  # {"train" | "val": {tokens, bytes, documents, shards: [{file, tokens, sha256}]}}


class Writer:
    """One split's token ids, appended to shards as they come. `bytes` counts UTF-8 text, not end-of-text marks."""

    def __init__(self, folder: Path, split: str, dtype: str, eot: int):
        self.folder, self.split, self.dtype, self.eot = folder, split, np.dtype(dtype).newbyteorder("<"), eot
        self.shards: list[dict[str, Any]] = []
        self.tokens = self.bytes = self.documents = 0
        self.open = False  # the last document has not been ended yet

    def add(self, ids: list[int], text_bytes: int) -> None:
        """A further part of the document."""
        self._append(np.array(ids, dtype=self.dtype))
        self.bytes += text_bytes
        self.open = True

    def end(self) -> None:
        """The document ends here, if one was begun."""
        if self.open:
            self._append(np.array([self.eot], dtype=self.dtype))
            self.documents += 1
            self.open = False

    def finish(self) -> dict[str, Any]:
        """Close the last shard; this split's part of the manifest."""
        self._close()
        return {"tokens": self.tokens, "bytes": self.bytes, "documents": self.documents, "shards": self.shards}

    def _append(self, ids: np.ndarray) -> None:
        while len(ids):
            if not self.shards or self.shards[-1]["tokens"] == SHARD:
                self._close()
                self.shards.append({"file": f"{self.split}-{len(self.shards):05}.bin", "tokens": 0, "sha256": ""})
                self._file = (self.folder / self.shards[-1]["file"]).open("wb")
                self._hash = hashlib.sha256()
            part, ids = np.split(ids, [SHARD - self.shards[-1]["tokens"]])
            self._file.write(part.tobytes())
            self._hash.update(part.tobytes())
            self.shards[-1]["tokens"] += len(part)
            self.tokens += len(part)

    def _close(self) -> None:
        if self.shards:
            self._file.close()
            self.shards[-1]["sha256"] = self._hash.hexdigest()


def whole(folder: Path) -> bool:
    """Whether `folder` was finished, and nothing in it is missing or cut short. (Shards checks every byte.)"""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        width = np.dtype(manifest["dtype"]).itemsize
        sizes = [
            (folder / shard["file"]).stat().st_size == shard["tokens"] * width
            for split in manifest["splits"].values()
            for shard in split["shards"]
        ]
        return manifest["format_version"] == FORMAT_VERSION and all(sizes) and (folder / "tokenizer.json").exists()
    except (OSError, ValueError, KeyError):
        return False


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk. (Only POSIX can be asked to.)"""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


class Shards:
    """One split of a prepared folder.

    `tokens`: how many; `bytes`: of the text they stand for, in UTF-8 (bits per byte need it); `manifest`: all the rest.
    Raises ShardError if a file is missing, has another size, or differs in a single bit from what was written.
    """

    def __init__(self, folder: Path, split: str):
        try:
            content = json.loads((folder / "manifest.json").read_text())
            version = content["format_version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ShardError(f"{folder / 'manifest.json'}: is no manifest ({error}); {AGAIN}") from None
        if version != FORMAT_VERSION:
            raise ShardError(f"{folder}: has format version {version}, this heed reads {FORMAT_VERSION}; {AGAIN}")
        self.manifest = Manifest(**content)
        if split not in self.manifest.splits:
            raise ShardError(f"{folder}: has no split {split!r}, only {', '.join(self.manifest.splits)}")
        about = self.manifest.splits[split]
        self.tokens, self.bytes = int(about["tokens"]), int(about["bytes"])
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._maps: list[np.ndarray] = []
        for shard in about["shards"]:
            path = folder / shard["file"]
            if not path.exists() or path.stat().st_size != shard["tokens"] * dtype.itemsize:
                raise ShardError(f"{path}: is missing or has another size than its manifest says; {AGAIN}")
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                    raise ShardError(f"{path}: is damaged, its sha256 is not its manifest's; {AGAIN}")
            self._maps.append(np.memmap(path, dtype=dtype, mode="r"))
        self._starts = np.cumsum([0, *(len(part) for part in self._maps)])

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens start .. start + length - 1 as int64 (length,), counted round the circle of the whole split."""
        out = np.empty(length, dtype=np.int64)
        filled = 0
        while filled < length:
            at = (start + filled) % self.tokens
            shard = int(np.searchsorted(self._starts, at, side="right")) - 1
            part = self._maps[shard][at - self._starts[shard] :][: length - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
        return out
