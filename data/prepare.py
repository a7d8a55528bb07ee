"""From a corpus to shards of token ids on disk: prepared once, cached by content, read by `loader.py`.

There are four guarantees:

**No leakage.** The SHA-256 of a piece determines whether it belongs to training or validation. Adding text never moves
a piece between the splits, and two copies of a text are always in the same split: the model is not validated on text
that it was trained on. An end-of-text token follows every document and every gap where a piece belongs to the other
split, so no split joins text across a gap.

**Constant memory.** Text is tokenized in small batches and written immediately, whatever the size of the corpus.

**Atomicity.** The result is a folder `<cache>/tokens/<key>/` (for its files see `shards.py`). The key is a hash of
everything that determines the content. The folder is renamed to this name once it is complete and flushed to disk: a
process killed at any time does not leave a folder that looks complete.

**Resumption.** Every SAVE_EVERY batches the position in the text and the hashes of the shards are saved. After a kill,
the next call verifies the shards, reads the text again up to that position without tokenizing it, and continues. The
shards are the same, byte for byte, as without the kill, and as with any number of processes.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from data import chat_format
from data.chunking import Piece
from data.draft import cached, empty, load_progress, save_progress
from data.encoding import Batch, encode_ahead, token_dtype
from data.mixture import BLOCK, apportion
from data.shards import FORMAT_VERSION, Manifest, ShardError, Writer
from data.sources import CACHE, Corpus, CorpusError, open_corpus
from data.tokenizer import KINDS, Tokenizer, TokenizerError, get_tokenizer

BATCH = 1 << 18  # characters per call of the tokenizer (the library needs 100 bytes per token)
SAVE_EVERY = 256  # batches
SAMPLE = 64 << 20  # maximum number of characters for training a BPE

Log = Callable[[str], None]  # of a line; one that ends in "\r" is progress, replaced by the next one


def log_line(text: str) -> None:
    """Print a line, in place of the progress line."""
    terminal = sys.stdout.isatty()
    end = "" if terminal and text.endswith("\r") else "\n"
    print(f"\r\x1b[K{text.rstrip()}" if terminal else text.rstrip(), end=end, flush=True)


def prepare(
    source: str = "",
    *,
    sources: Sequence[dict[str, Any]] = (),
    val_source: str = "",
    val_fraction: float = 0.05,
    tokenizer: str = "bpe",
    vocab_size: int = 4096,
    format: str = "text",
    split: str = "train",
    text_column: str = "text",
    limit: int = 0,
    cache: Path = CACHE,
    processes: int | None = None,
    log: Log = log_line,
) -> Path:
    """Tokenize `source` into a training and a validation split. Returns their folder, from the cache if it exists.

    val_fraction: fraction of the pieces for validation, chosen by hash. val_source: a separate validation text; pieces
    that it shares with the source are excluded from training. tokenizer: see `get_tokenizer`; a BPE is trained on a
    sample of the training text, `char` uses the characters of both splits, and for conversations (`format` chat) the
    special tokens are added. processes: see `encode_ahead`. The other arguments are those of `open_corpus`.

    sources: instead of `source`, the sources of a mixture: for each the arguments of `open_corpus` and its weight. They
    share the tokenizer, which is trained on a sample with these weights. The result is a folder of `mixture.py`.

    Raises CorpusError and TokenizerError.
    """
    if not val_source and not 0 < val_fraction <= 0.5:
        raise CorpusError(f"data.val_fraction = {val_fraction}: must be above 0 and at most 0.5, or set val_source")
    if not (there := next(path for path in (cache, *cache.parents) if path.exists())).is_dir():
        raise CorpusError(f"HEED_CACHE = {str(cache)!r}: must be a folder, {there} is a file")
    chat = "chat" in (format, *(table.get("format") for table in sources))
    ready = None if tokenizer in KINDS else get_tokenizer(tokenizer)
    ready = chat_format.add_special_tokens(ready) if ready and chat else ready
    plan = Plan(val_fraction, tokenizer, vocab_size, chat, ready, cache, processes, log)
    how: dict[str, Any] = {"split": split, "cache": cache, "tokenizer": ready}
    try:
        if sources:
            corpora = []
            for number, table in enumerate(sources):
                own = {name: value for name, value in table.items() if name != "weight"}
                corpora.append(open_corpus(**own, field=f"sources[{number}].source", **how))
            return plan.mixture(corpora, apportion([table["weight"] for table in sources]))
        how |= {"format": format, "text_column": text_column}
        corpus = open_corpus(source, limit=limit, **how)
        return plan.shards(corpus, open_corpus(val_source, field="val_source", **how) if val_source else None)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise CorpusError(
            f"the disk of {cache} is full; free some space, or set HEED_CACHE; the same command continues"
        ) from None


@dataclasses.dataclass(frozen=True)
class Plan:
    """How corpora become folders of the cache: the arguments of `prepare`, and the tokenizer unless it is trained."""

    val_fraction: float
    kind: str
    vocab_size: int
    chat: bool
    ready: Tokenizer | None
    cache: Path
    processes: int | None
    log: Log

    def shards(self, corpus: Corpus, held: Corpus | None = None) -> Path:
        """The folder of one source."""

        def fill(draft: Path) -> None:
            splitter = Splitter(corpus, held, self.val_fraction)
            made = self._tokenizer(draft, [splitter], [1.0])
            save_manifest(draft, dataclasses.asdict(write(draft, splitter, made, self.log, self.processes)))

        return cached(self._folder(corpus.fingerprint, held.fingerprint if held else self.val_fraction), fill)

    def mixture(self, corpora: list[Corpus], shares: list[int]) -> Path:
        """The folder of a mixture, which names the folders of its sources."""
        weights = [share / BLOCK for share in shares]

        def fill(draft: Path) -> None:
            made = self._tokenizer(draft, (Splitter(corpus, None, self.val_fraction) for corpus in corpora), weights)
            folders = [dataclasses.replace(self, ready=made).shards(corpus) for corpus in corpora]
            parts = [{"folder": part.name, "weight": weight} for part, weight in zip(folders, weights, strict=True)]
            save_manifest(draft, {"format_version": FORMAT_VERSION, "sources": parts})

        prints = [corpus.fingerprint for corpus in corpora]
        return cached(self._folder((prints, shares), self.val_fraction), fill)

    def _folder(self, text: object, val: object) -> Path:
        made_with = self.ready.sha256 if self.ready else (self.kind, self.vocab_size if self.kind == "bpe" else 0)
        key = hashlib.sha256(repr((FORMAT_VERSION, text, val, made_with)).encode()).hexdigest()[:24]
        return self.cache / "tokens" / key

    def _tokenizer(self, draft: Path, splitters: Iterable["Splitter"], weights: list[float]) -> Tokenizer:
        """The tokenizer of a draft: left there by a killed process, else ready or trained now."""
        with contextlib.suppress(TokenizerError):
            left = Tokenizer.load(draft)
            if left.sha256 == load_progress(draft).get("tokenizer"):
                return left
        empty(draft)
        made = self.ready or train_tokenizer(self.kind, self.vocab_size, self.chat, list(splitters), weights, self.log)
        made.save(draft / "tokenizer.json")
        save_progress(draft, {"tokenizer": made.sha256})
        return made


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
    kind: str, vocab_size: int, chat: bool, splitters: list[Splitter], weights: list[float], log: Log
) -> Tokenizer:
    """Train a tokenizer: a BPE on a sample of the training text, `char` on all text. For a chat, add special tokens."""

    def everything() -> Iterator[str]:
        return (piece.text for splitter in splitters for _, piece in splitter)

    special_tokens = chat_format.SPECIAL_TOKENS if chat else ()
    log(f"tokenizer: training {kind} on {', '.join(splitter.corpus.name for splitter in splitters)}")
    started = time.perf_counter()
    texts = everything if kind == "char" else partial(sample, splitters, weights)
    made = get_tokenizer(kind, texts, vocab_size - len(special_tokens))
    made = chat_format.add_special_tokens(made) if chat else made
    log(f"tokenizer: {made.kind}, {made.vocab_size} entries, {time.perf_counter() - started:.1f} s")
    if kind == "bpe" and made.vocab_size < vocab_size:
        log(f"tokenizer: the text is too small for more merges, {vocab_size} entries were not reached")
    return made


def sample(splitters: list[Splitter], weights: list[float]) -> Iterator[str]:
    """Training text of the sources in proportion to their weights, SAMPLE characters at most.

    Each piece is from the source that is furthest behind its weight. A source that ends is repeated until all have
    ended. A source is sampled evenly if the size of its corpus is known, else from its start (the hub).
    """
    ended = set[int]()

    def pieces(source: int) -> Iterator[str]:
        size, due, texts = splitters[source].corpus.size, 0.0, list[str]()
        rate = min(1.0, weights[source] * SAMPLE / size) if size else 1.0
        for split, piece in splitters[source]:
            due += rate * (split == "train")
            if due >= 1:
                due -= 1
                texts.append(piece.text)
                yield piece.text
        ended.add(source)
        yield from cycle(texts)

    streams = [pieces(source) for source in range(len(splitters))]
    taken, left = [0.0] * len(splitters), SAMPLE
    while left > 0:
        source = min(range(len(splitters)), key=lambda source: taken[source] / weights[source])
        text = next(streams[source], None)
        if len(ended) == len(splitters):
            return
        if text is None:  # its share of the sample is less than a piece
            taken[source] = math.inf
            continue
        taken[source] += len(text)
        left -= len(text)
        yield text


def write(folder: Path, splitter: Splitter, tokenizer: Tokenizer, log: Log, processes: int | None = None) -> Manifest:
    """Tokenize all pieces into `folder`, or the rest of them, if a killed process saved some. Returns its manifest."""
    dtype = token_dtype(tokenizer)
    writers, pieces, done = open_writers(folder, dtype, tokenizer.eot)
    if done:
        log(f"tokens of {splitter.corpus.name}: {done / 1e6:,.0f} MB were finished before")
    corpus, size = splitter.corpus, f" of {splitter.corpus.size / 1e6:,.0f}" if splitter.corpus.size else ""
    started = logged = time.perf_counter()
    before, interval = done, 1 if sys.stdout.isatty() else 10  # seconds between progress lines
    rest = batches(islice(splitter, pieces, None))
    for number, (batch, encoded) in enumerate(encode_ahead(tokenizer, rest, processes), 1):
        for (split, piece), (ids, target_bytes, loss_mask) in zip(batch, encoded, strict=True):
            for other, writer in writers.items():
                if other != split:
                    writer.end()  # a gap: the text continues in another split
            done += len(piece.text.encode())
            if split:
                writers[split].add(ids, target_bytes, loss_mask)
                if piece.ends:
                    writers[split].end()
        pieces += len(batch)
        if number % SAVE_EVERY == 0:
            states = {split: writer.state() for split, writer in writers.items()}
            save_progress(folder, {"tokenizer": tokenizer.sha256, "pieces": pieces, "bytes": done, **states})
        now = time.perf_counter()
        if now - logged > interval:
            logged = now
            rate = (done - before) / 1e6 / (now - started)
            log(f"tokens of {corpus.name}: {done / 1e6:,.0f}{size} MB, {rate:.1f} MB/s\r")
    splits: dict[str, Any] = {split: writer.finish() for split, writer in writers.items()}
    counts = ", ".join(f"{split} {s['tokens']:,} ({s['documents']:,} documents)" for split, s in splits.items())
    log(f"tokens of {corpus.name}: {counts}, {(done - before) / 1e6:.1f} MB in {time.perf_counter() - started:.1f} s")
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


def open_writers(folder: Path, dtype: str, eot: int) -> tuple[dict[str, Writer], int, int]:
    """A writer of each split, and the pieces and bytes of text that are in their shards already."""

    def new() -> dict[str, Writer]:
        return {split: Writer(folder, split, dtype, eot) for split in ("train", "val")}

    writers, progress = new(), load_progress(folder)
    try:
        for split, writer in writers.items():
            writer.restore(progress[split])
        return writers, progress["pieces"], progress["bytes"]
    except (KeyError, ShardError, OSError):  # nothing was saved, or a shard has changed
        return new(), 0, 0


def save_manifest(folder: Path, content: dict[str, Any]) -> None:
    (folder / "manifest.json").write_text(json.dumps(content, indent=2) + "\n")


def batches(pieces: Iterable[tuple[str | None, Piece]]) -> Iterator[Batch]:
    """Group consecutive pieces into batches of about BATCH characters."""
    batch: Batch = []
    size = 0
    for split, piece in pieces:
        batch.append((split, piece))
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
