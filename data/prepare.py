"""From a corpus to shards of token ids on disk: prepared once, cached by content, read by `loader.py`.

There are three guarantees:

**No leakage.** The SHA-256 of a piece determines whether it belongs to training or validation. Adding text never moves
a piece between the splits, and two copies of a text are always in the same split: the model is not validated on text
that it was trained on. An end-of-text token follows every document and every gap where a piece belongs to the other
split, so no split joins text across a gap.

**Constant memory.** Text is tokenized a few MB at a time and written immediately, whatever the size of the corpus.

**Atomicity.** The result is a folder `<cache>/tokens/<key>/` (for its files see `shards.py`). The key is a hash of
everything that determines the content. The folder is renamed to this name once it is complete and flushed to disk: a
process killed at any time does not leave a folder that looks complete.
"""

import dataclasses
import errno
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data import chat_format
from data.chunking import Piece
from data.shards import FORMAT_VERSION, Manifest, Writer, is_complete, sync
from data.sources import CACHE, Corpus, CorpusError, open_corpus
from data.tokenizer import KINDS, Tokenizer, get_tokenizer

BATCH = 1 << 20  # characters per call of the tokenizer (the library needs 100 bytes per token)
SAMPLE = 64 << 20  # maximum number of characters for training a BPE
DAY = 86_400

Log = Callable[[str], None]


def prepare(
    source: str,
    *,
    val_source: str = "",
    val_fraction: float = 0.05,
    tokenizer: str = "bpe",
    vocab_size: int = 4096,
    format: str = "text",
    split: str = "train",
    text_column: str = "text",
    limit: int = 0,
    cache: Path = CACHE,
    log: Log = print,
) -> Path:
    """Tokenize `source` into a training and a validation split. Returns their folder, from the cache if it exists.

    val_fraction: fraction of the pieces for validation, chosen by hash. val_source: a separate validation text; pieces
    that it shares with the source are excluded from training. tokenizer: see `get_tokenizer`; a BPE is trained on a
    sample of the training text, `char` uses the characters of both splits, and for conversations (`format` chat) the
    special tokens are added. The other arguments are those of `open_corpus`. Raises CorpusError and TokenizerError.
    """
    if not val_source and not 0 < val_fraction <= 0.5:
        raise CorpusError(f"data.val_fraction = {val_fraction}: must be above 0 and at most 0.5, or set val_source")
    how: dict[str, Any] = {"format": format, "split": split, "text_column": text_column, "cache": cache}
    corpus = open_corpus(source, limit=limit, **how)
    held = open_corpus(val_source, field="val_source", **how) if val_source else None
    special_tokens = chat_format.SPECIAL_TOKENS if format == "chat" else ()
    ready = None if tokenizer in KINDS else get_tokenizer(tokenizer)
    ready = chat_format.add_special_tokens(ready) if ready and special_tokens else ready
    made_with = ready.sha256 if ready else (tokenizer, vocab_size if tokenizer == "bpe" else 0)
    val = held.fingerprint if held else val_fraction
    key = hashlib.sha256(repr((FORMAT_VERSION, corpus.fingerprint, val, made_with)).encode()).hexdigest()[:24]
    folder = cache / "tokens" / key
    if is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    for old in folder.parent.glob(".tmp-*"):
        if time.time() - old.stat().st_mtime > DAY:  # left by a killed process
            shutil.rmtree(old, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".tmp-{key}-"))
    try:
        splitter = Splitter(corpus, held, val_fraction)
        made = ready or train_tokenizer(tokenizer, vocab_size, splitter, log, special_tokens)
        made.save(temporary / "tokenizer.json")
        manifest = write(temporary, splitter, made, log)
        (temporary / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")
        publish(temporary, folder)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise CorpusError(
            f"data.source = {source!r}: the disk of {cache} is full; free some space, or set HEED_CACHE"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


class Splitter:
    """All pieces, each with its split: "train", "val", or None (in the source, but excluded as validation text)."""

    def __init__(self, corpus: Corpus, held: Corpus | None, fraction: float):
        self.corpus, self.held, self.below = corpus, held, int(fraction * 2**64)
        self.known = {text_hash(piece.text) for piece in held.pieces()} if held else set[int]()
        self._settle()

    def __iter__(self) -> Iterator[tuple[str | None, Piece]]:
        if self.held:
            yield from (("val", piece) for piece in self.held.pieces())
        for piece in self.corpus.pieces():
            if self.held:
                yield (None if text_hash(piece.text) in self.known else "train"), piece
            else:
                yield ("val" if text_hash(piece.text) < self.below else "train"), piece

    def _settle(self) -> None:
        """Ensure that neither split is empty. A split of a short text may be empty by chance: then validation is the
        piece with the smallest hash."""
        seen = set[str | None]()
        for split, _ in self:
            seen.add(split)
            if {"train", "val"} <= seen:
                return
        if self.held:
            raise CorpusError(
                "data.val_source: contains all of data.source, no training text is left; use another text"
            )
        hashes = sorted({text_hash(piece.text) for piece in self.corpus.pieces()})
        if len(hashes) < 2:
            raise CorpusError(
                f"data.source = {self.corpus.name!r}: too short to hold out a part for validation; "
                "use more text (at least 20 KB), or set data.val_source"
            )
        self.below = hashes[0] + 1


def text_hash(text: str) -> int:
    """The first 64 bits of the sha256 of a text."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def train_tokenizer(
    kind: str, vocab_size: int, splitter: Splitter, log: Log, special_tokens: tuple[str, ...]
) -> Tokenizer:
    """Train a tokenizer and add the special tokens.

    A BPE is trained on SAMPLE characters of training text, spread evenly if the size of the corpus is known, else from
    its start (the hub).
    """
    rate = min(1.0, SAMPLE / splitter.corpus.size) if splitter.corpus.size else 1.0

    def sample() -> Iterator[str]:
        left, due = SAMPLE, 0.0
        for split, piece in splitter:
            due += rate * (split == "train")
            if due >= 1:
                due, left = due - 1, left - len(piece.text)
                yield piece.text
            if left <= 0:
                return

    def everything() -> Iterator[str]:
        return (piece.text for _, piece in splitter)

    log(f"tokenizer: training {kind} on {splitter.corpus.name}")
    started = time.perf_counter()
    made = get_tokenizer(kind, everything if kind == "char" else sample, vocab_size - len(special_tokens))
    made = chat_format.add_special_tokens(made) if special_tokens else made
    log(f"tokenizer: {made.kind}, {made.vocab_size} entries, {time.perf_counter() - started:.1f} s")
    if kind == "bpe" and made.vocab_size < vocab_size:
        log(f"tokenizer: the text is too small for more merges, {vocab_size} entries were not reached")
    return made


def write(folder: Path, splitter: Splitter, tokenizer: Tokenizer, log: Log) -> Manifest:
    """Tokenize all pieces into `folder`. Returns its manifest."""
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    writers = {split: Writer(folder, split, dtype, tokenizer.eot) for split in ("train", "val")}
    started = logged = time.perf_counter()
    done, total = 0, f" of {splitter.corpus.size / 1e6:.0f}" if splitter.corpus.size else ""
    for batch, encoded in encoded_ahead(splitter, tokenizer):
        for (split, piece), (ids, target_bytes, loss_mask) in zip(batch, encoded, strict=True):
            for other, writer in writers.items():
                if other != split:
                    writer.end()  # a gap: the text continues in another split
            done += len(piece.text.encode())
            if split:
                writers[split].add(ids, target_bytes, loss_mask)
                if piece.ends:
                    writers[split].end()
        now = time.perf_counter()
        if now - logged > 2:
            logged = now
            log(f"tokens: {done / 1e6:.0f}{total} MB, {done / 1e6 / (now - started):.1f} MB/s")
    splits: dict[str, Any] = {split: writer.finish() for split, writer in writers.items()}
    counts = ", ".join(f"{split} {s['tokens']:,} ({s['documents']:,} documents)" for split, s in splits.items())
    log(f"tokens: {counts}, {done / 1e6:.1f} MB in {time.perf_counter() - started:.1f} s")
    corpus = splitter.corpus
    about = (
        tokenizer.sha256,
        tokenizer.vocab_size,
        tokenizer.eot,
        dtype,
        corpus.name,
        corpus.licence,
        corpus.fingerprint,
    )
    return Manifest(FORMAT_VERSION, *about, splits)


Batch = list[tuple[str | None, Piece]]
Encoded = list[tuple[list[int], int, list[int] | None]]


def encoded_ahead(splitter: Splitter, tokenizer: Tokenizer) -> Iterator[tuple[Batch, Encoded]]:
    """Batches and their encodings. The tokenizer's threads encode the next batch while Python writes this one."""
    with ThreadPoolExecutor(1) as thread:
        ready: tuple[Batch, Future[Encoded]] | None = None
        for batch in batches(splitter):
            future = thread.submit(encode, tokenizer, [piece for _, piece in batch])
            if ready:
                yield ready[0], ready[1].result()
            ready = batch, future
        if ready:
            yield ready[0], ready[1].result()


def encode(tokenizer: Tokenizer, pieces: list[Piece]) -> Encoded:
    """For each piece: the ids, the UTF-8 bytes of the targets' text, and for conversations the loss mask."""
    if not pieces[0].turns:
        ids = tokenizer.encode_batch([piece.text for piece in pieces])
        return [(part, len(piece.text.encode()), None) for part, piece in zip(ids, pieces, strict=True)]
    answers = [sum(len(text.encode()) for role, text in piece.turns if role == "assistant") for piece in pieces]
    encoded = chat_format.encode(tokenizer, [list(piece.turns) for piece in pieces])
    return [(part, size, loss_mask) for (part, loss_mask), size in zip(encoded, answers, strict=True)]


def batches(splitter: Splitter) -> Iterator[Batch]:
    """Group consecutive pieces into batches of about BATCH characters."""
    batch: Batch = []
    size = 0
    for split, piece in splitter:
        batch.append((split, piece))
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def publish(temporary: Path, folder: Path) -> None:
    """Rename the complete folder atomically. If another process was faster, its folder stays."""
    temporary.chmod(0o755)
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    if folder.exists() and not is_complete(folder):
        broken = temporary.with_suffix(".broken")
        folder.rename(broken)
        shutil.rmtree(broken, ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError:
        if not is_complete(folder):
            raise
    sync(folder.parent)
