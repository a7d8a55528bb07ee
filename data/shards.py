"""Shards: the file format of token ids on disk, its writer and its reader.

    manifest.json     contents of the folder and its source, with a SHA-256 of every shard
    tokenizer.json    the tokenizer
    train-00000.bin   token ids as uint16 (uint32 for larger vocabularies), little endian
    train-00000.mask  only for conversations: the loss mask, one byte per token: NO_TARGET, TARGET or FIRST
    val-00000.bin     the same for validation; a split of more than SHARD tokens continues in -00001.bin

Shards are memory-mapped, not loaded: only the pages that are read are loaded.
"""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

FORMAT_VERSION = 1
SHARD = 100_000_000  # maximum number of tokens per file
# Values of the loss mask: not a target, a target of the loss, the first token of a conversation (not a target).
NO_TARGET, TARGET, FIRST = 0, 1, 2
HASHES = ("sha256", "mask_sha256")  # in the manifest: of a shard and of its loss mask
PREPARE_AGAIN = "delete the folder and prepare again"


class ShardError(ValueError):
    """Prepared tokens that do not match their manifest, or too few tokens. The message is one line."""


@dataclass(frozen=True)
class Manifest:
    """Contents of a folder of tokens. `tokenizer` and `fingerprint` are hashes of the tokenizer and of the text."""

    format_version: int
    tokenizer: str
    vocab_size: int
    eot: int  # the id of the end-of-text token
    dtype: str  # uint16 or uint32
    source: str
    licence: str
    fingerprint: str
    # {"train" | "val": {tokens, bytes, documents, shards: [{file, tokens, sha256}]}}; for conversations also `answers`,
    # the number of targets, and for each shard `mask_sha256`
    splits: dict[str, dict[str, Any]]


class Writer:
    """Appends the token ids of one split to shards.

    `bytes` counts the UTF-8 bytes of the targets' text, without end-of-text tokens. `answers` counts the targets of
    conversations; for text it is None, and all tokens are targets.
    """

    STATE = ("tokens", "bytes", "documents", "answers", "open", "shards")

    def __init__(self, folder: Path, split: str, dtype: str, eot: int):
        self.folder, self.split, self.dtype, self.eot = folder, split, np.dtype(dtype).newbyteorder("<"), eot
        self.shards: list[dict[str, Any]] = []
        self.tokens = self.bytes = self.documents = 0
        self.answers: int | None = None
        self.open = False  # the last document has not ended yet
        self._files = list[BinaryIO]()  # of the last shard
        self._hashes = list[Any]()

    def add(self, ids: Sequence[int] | np.ndarray, text_bytes: int, loss_mask: np.ndarray | None = None) -> None:
        """Append ids to the current document; for conversations, with their loss mask."""
        if loss_mask is not None:
            self.answers = (self.answers or 0) + int(np.count_nonzero(loss_mask == TARGET))
        self._append(ids, loss_mask)
        self.bytes += text_bytes
        self.open = True

    def end(self) -> None:
        """End the current document, if any."""
        if self.open:
            self._append([self.eot], None if self.answers is None else np.array([NO_TARGET]))
            self.documents += 1
            self.open = False

    def finish(self) -> dict[str, Any]:
        """Close the last shard. Returns this split's part of the manifest."""
        self._close()
        about = {"tokens": self.tokens, "bytes": self.bytes, "documents": self.documents, "shards": self.shards}
        return about if self.answers is None else about | {"answers": self.answers}

    def state(self) -> dict[str, Any]:
        """What `restore` continues from: JSON values. All tokens so far are flushed to disk."""
        self._flush()
        return {name: getattr(self, name) for name in self.STATE}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state: what was written after it is dropped. Raises ShardError if a shard has changed since,
        OSError if one is missing."""
        for name in self.STATE:
            setattr(self, name, state[name])
        for shard in self.shards:
            for file in self._files:
                file.close()
            names = (shard["file"], mask_file(shard["file"]))[: 1 if self.answers is None else 2]
            self._files, self._hashes = [(self.folder / name).open("r+b") for name in names], []
            for file, key, width in zip(self._files, HASHES, (self.dtype.itemsize, 1), strict=False):
                file.truncate(shard["tokens"] * width)
                self._hashes.append(hashlib.file_digest(file, "sha256"))  # type: ignore[arg-type]
                if self._hashes[-1].hexdigest() != shard[key]:
                    raise ShardError(f"{self.folder / shard['file']}: has changed")

    def _append(self, ids: Sequence[int] | np.ndarray, loss_mask: np.ndarray | None) -> None:
        columns = [np.array(ids, dtype=self.dtype)]
        if loss_mask is not None:
            columns.append(np.array(loss_mask, dtype=np.uint8))
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

    def _flush(self) -> None:
        """Flush the last shard to disk, and set its hashes to those of what it has so far."""
        for file, key, digest in zip(self._files, HASHES, self._hashes, strict=False):
            file.flush()
            os.fsync(file.fileno())
            self.shards[-1][key] = digest.hexdigest()

    def _close(self) -> None:
        self._flush()
        for file in self._files:
            file.close()


def mask_file(file: str) -> str:
    """The name of the loss mask file of a shard."""
    return file.removesuffix(".bin") + ".mask"


def is_complete(folder: Path) -> bool:
    """Whether `folder` is complete, for a mixture with the folders of its sources: no file is missing or truncated.
    (Shards checks the hashes.)"""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format_version"] != FORMAT_VERSION or not (folder / "tokenizer.json").exists():
            return False
        if "sources" in manifest:
            return all(is_complete(folder.parent / source["folder"]) for source in manifest["sources"])
        width = np.dtype(manifest["dtype"]).itemsize
        return all(
            (folder / file).stat().st_size == shard["tokens"] * size
            for split in manifest["splits"].values()
            for shard in split["shards"]
            for file, size in ((shard["file"], width), (mask_file(shard["file"]), 1))[: 2 if "answers" in split else 1]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of a folder's manifest. Raises ShardError if there is none of this version."""
    try:
        content = json.loads((folder / "manifest.json").read_text())
        version = content["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(f"{folder / 'manifest.json'}: not a valid manifest ({error}); {PREPARE_AGAIN}") from None
    if version != FORMAT_VERSION:
        raise ShardError(f"{folder}: has format version {version}, must be {FORMAT_VERSION}; {PREPARE_AGAIN}")
    return content


def sync(path: Path) -> None:
    """Flush a file or a folder to disk (POSIX only)."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


class Shards:
    """One split of a prepared folder.

    `tokens`: number of tokens; `num_targets`: number of targets of the loss, all tokens or those of answers; `bytes`:
    UTF-8 bytes of the targets' text, for bits per byte; `chat`: whether it contains conversations; `manifest`:
    everything else. Raises ShardError if a file is missing or has another size or hash than in the manifest.

    verify: check the hashes. Of several processes that read one folder, one is enough.
    """

    def __init__(self, folder: Path, split: str, verify: bool = True):
        content = read_manifest(folder)
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
                sha256, mask_sha256 = shard["sha256"], shard["mask_sha256"] if self.chat else ""
                self._ids.append(_map(folder / shard["file"], dtype, shard["tokens"], sha256 if verify else ""))
                if self.chat:
                    beside = folder / mask_file(shard["file"])
                    self._masks.append(_map(beside, loss_mask, shard["tokens"], mask_sha256 if verify else ""))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, ShardError):
                raise
            raise ShardError(f"{folder / 'manifest.json'}: is damaged ({error}); {PREPARE_AGAIN}") from None
        self._starts = np.cumsum([0, *(len(part) for part in self._ids)])

    @property
    def parts(self) -> list[tuple["Shards", float]]:
        """The split as a mixture of one source, see `mixture.py`."""
        return [(self, 1.0)]

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens start .. start + length - 1 as int64 (length,), wrapping around at the end of the split."""
        return self._gather(self._ids, start, length)

    def read_mask(self, start: int, length: int) -> np.ndarray:
        """The loss mask of these tokens, NO_TARGET, TARGET or FIRST, as int64 (length,); conversations only."""
        return self._gather(self._masks, start, length)

    def conversations(self) -> np.ndarray:
        """The start of each conversation and the end of the split, int64 (conversations + 1,)."""
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
    """Memory-map a file as an array (tokens,) after checking its size and, if given, its hash."""
    if not path.exists() or path.stat().st_size != tokens * dtype.itemsize:
        raise ShardError(f"{path}: is missing or has another size than in the manifest; {PREPARE_AGAIN}")
    if sha256:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise ShardError(f"{path}: is damaged, its sha256 is not that of the manifest; {PREPARE_AGAIN}")
    return np.memmap(path, dtype=dtype, mode="r")
