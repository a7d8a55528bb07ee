"""Shards: the file format of token ids on disk, its writer and its reader.

    manifest.json     what the folder holds and its source, with a SHA-256 of every shard
    tokenizer.json    the tokenizer that made it
    train-00000.bin   token ids, one after the other: uint16 (uint32 if the vocabulary is larger), little endian
    train-00000.mask  only of conversations: the loss mask, one byte a token: NO_TARGET, TARGET or FIRST
    val-00000.bin     the same for validation; a split of more than SHARD tokens goes on in -00001.bin

Shards are memory-mapped, not loaded: reading touches only the pages that it needs.
"""

import copy
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_VERSION = 1
SHARD = 100_000_000  # tokens in a file, at most
NO_TARGET, TARGET, FIRST = (
    0,
    1,
    2,
)  # of a conversation: not a target; a target of the loss; its first token, not a target
AGAIN = "delete the folder and prepare again"


class ShardError(ValueError):
    """Prepared tokens that differ from their manifest, or are too few. The message is one line."""


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
    # {"train" | "val": {tokens, bytes, documents, shards: [{file, tokens, sha256}]}}; of conversations with the number
    # of tokens in `answers`, and in each shard the `mask_sha256` of its second file
    splits: dict[str, dict[str, Any]]


class Writer:
    """One split's token ids, appended to shards as they come. `bytes` counts the UTF-8 text of the targets, without
    end-of-text tokens; `answers` its tokens in conversations, else it is None: all count."""

    def __init__(self, folder: Path, split: str, dtype: str, eot: int):
        self.folder, self.split, self.dtype, self.eot = folder, split, np.dtype(dtype).newbyteorder("<"), eot
        self.shards: list[dict[str, Any]] = []
        self.tokens = self.bytes = self.documents = 0
        self.answers: int | None = None
        self.open = False  # the last document has not been ended yet

    def add(self, ids: list[int], text_bytes: int, loss_mask: list[int] | None = None) -> None:
        """A further part of the document; in conversations with what each id is."""
        if loss_mask is not None:
            self.answers = (self.answers or 0) + loss_mask.count(TARGET)
        self._append(ids, loss_mask)
        self.bytes += text_bytes
        self.open = True

    def end(self) -> None:
        """The document ends here, if one was begun."""
        if self.open:
            self._append([self.eot], None if self.answers is None else [NO_TARGET])
            self.documents += 1
            self.open = False

    def finish(self) -> dict[str, Any]:
        """Close the last shard; this split's part of the manifest."""
        self._close()
        about = {"tokens": self.tokens, "bytes": self.bytes, "documents": self.documents, "shards": self.shards}
        return about if self.answers is None else about | {"answers": self.answers}

    def _append(self, ids: list[int], loss_mask: list[int] | None) -> None:
        columns = [np.array(ids, dtype=self.dtype)] + (
            [] if loss_mask is None else [np.array(loss_mask, dtype=np.uint8)]
        )
        while len(columns[0]):
            if not self.shards or self.shards[-1]["tokens"] == SHARD:
                self._close()
                name = f"{self.split}-{len(self.shards):05}.bin"
                self.shards.append({"file": name, "tokens": 0, "sha256": ""})
                self._files = [(self.folder / file).open("wb") for file in (name, mask_file(name))[: len(columns)]]
                self._hashes = [hashlib.sha256() for _ in columns]
            room = SHARD - self.shards[-1]["tokens"]
            for column, file, digest in zip(columns, self._files, self._hashes, strict=True):
                file.write(part := column[:room].tobytes())
                digest.update(part)
            self.shards[-1]["tokens"] += len(columns[0][:room])
            self.tokens += len(columns[0][:room])
            columns = [column[room:] for column in columns]

    def _close(self) -> None:
        if self.shards:
            for key, file, digest in zip(("sha256", "mask_sha256"), self._files, self._hashes, strict=False):
                file.close()
                self.shards[-1][key] = digest.hexdigest()


def mask_file(file: str) -> str:
    """The name of the file beside a shard's that says what each token is."""
    return file.removesuffix(".bin") + ".mask"


def whole(folder: Path) -> bool:
    """Whether `folder` was finished, and nothing in it is missing or cut short. (Shards checks every byte.)"""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        width = np.dtype(manifest["dtype"]).itemsize
        sizes = [
            (folder / file).stat().st_size == shard["tokens"] * size
            for split in manifest["splits"].values()
            for shard in split["shards"]
            for file, size in ((shard["file"], width), (mask_file(shard["file"]), 1))[: 2 if "answers" in split else 1]
        ]
        return manifest["format_version"] == FORMAT_VERSION and all(sizes) and (folder / "tokenizer.json").exists()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk. (Only POSIX can be asked to.)"""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


class Shards:
    """One split of a prepared folder.

    `tokens`: how many; `num_targets`: how many are targets of the loss, all or those of answers; `bytes`: UTF-8 bytes
    of the targets' text, for bits per byte; `chat`: whether it holds conversations; `manifest`: everything else.
    Raises ShardError if a file is missing, has another size, or differs in a single bit from what was written.
    """

    def __init__(self, folder: Path, split: str):
        try:
            content = json.loads((folder / "manifest.json").read_text())
            version = content["format_version"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ShardError(f"{folder / 'manifest.json'}: is no manifest ({error}); {AGAIN}") from None
        if version != FORMAT_VERSION:
            raise ShardError(f"{folder}: has format version {version}, this heed reads {FORMAT_VERSION}; {AGAIN}")
        try:
            self.manifest = Manifest(**content)
            if split not in self.manifest.splits:
                raise ShardError(f"{folder}: has no split {split!r}, only {', '.join(self.manifest.splits)}")
            about = self.manifest.splits[split]
            self.tokens, self.bytes = int(about["tokens"]), int(about["bytes"])
            self.chat, self.num_targets = "answers" in about, int(about.get("answers", self.tokens))
            dtype, loss_mask = np.dtype(self.manifest.dtype).newbyteorder("<"), np.dtype(np.uint8)
            self._ids, self._masks = list[np.ndarray](), list[np.ndarray]()
            for shard in about["shards"]:
                self._ids.append(_map(folder / shard["file"], dtype, shard["tokens"], shard["sha256"]))
                if self.chat:
                    beside = folder / mask_file(shard["file"])
                    self._masks.append(_map(beside, loss_mask, shard["tokens"], shard["mask_sha256"]))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, ShardError):
                raise
            raise ShardError(f"{folder / 'manifest.json'}: is damaged ({error}); {AGAIN}") from None
        self._starts = np.cumsum([0, *(len(part) for part in self._ids)])

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens start .. start + length - 1 as int64 (length,), counted round the circle of the whole split."""
        return self._gather(self._ids, start, length)

    def read_mask(self, start: int, length: int) -> np.ndarray:
        """What these tokens are, NO_TARGET, TARGET or FIRST each, as int64 (length,); of conversations only."""
        return self._gather(self._masks, start, length)

    def conversations(self) -> np.ndarray:
        """Where each conversation begins, and as the last number the end of the split, int64 (conversations + 1,)."""
        found = (np.flatnonzero(part == FIRST) + at for part, at in zip(self._masks, self._starts, strict=False))
        starts = np.concatenate(list(found))
        return np.append(starts[starts < self.tokens], self.tokens)

    def prefix(self, tokens: int, decode: Callable[[list[int]], str]) -> "Shards":
        """The first documents of this split, together at least `tokens` tokens; the split itself if it has no more, or
        for 0. decode: ids to text without special tokens, to count the bytes of the targets."""
        end = self._document_end(tokens) if 0 < tokens < self.tokens else self.tokens
        if end == self.tokens:
            return self
        ids, part = self.read(0, end), copy.copy(self)
        targets = ids[self.read_mask(0, end) == TARGET] if self.chat else ids
        part.tokens, part.num_targets, part.bytes = end, len(targets), len(decode(targets.tolist()).encode())
        return part if part.num_targets and part.bytes else self

    def _document_end(self, start: int) -> int:
        """Where the document ends that the token before `start` belongs to."""
        if self.chat:
            return int(next(end for end in self.conversations() if end >= start))
        for at in range(start - 1, self.tokens, 1 << 16):
            found = np.flatnonzero(self.read(at, min(1 << 16, self.tokens - at)) == self.manifest.eot)
            if len(found):
                return at + int(found[0]) + 1
        return self.tokens

    def _gather(self, maps: list[np.ndarray], start: int, length: int) -> np.ndarray:
        out = np.empty(length, dtype=np.int64)
        filled = 0
        while filled < length:
            at = (start + filled) % self.tokens
            shard = int(np.searchsorted(self._starts, at, side="right")) - 1
            part = maps[shard][at - self._starts[shard] :][: length - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
        return out


def _map(path: Path, dtype: np.dtype, tokens: int, sha256: str) -> np.ndarray:
    """A file as an array (tokens,) that is read when it is looked at."""
    if not path.exists() or path.stat().st_size != tokens * dtype.itemsize:
        raise ShardError(f"{path}: is missing or has another size than its manifest says; {AGAIN}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise ShardError(f"{path}: is damaged, its sha256 is not its manifest's; {AGAIN}")
    return np.memmap(path, dtype=dtype, mode="r")
