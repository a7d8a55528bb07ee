"""Content-defined chunking: splits a stream of text of any length into documents and pieces, in constant memory.

A *piece* is the unit that belongs to either training or validation. A document declared by its source (a row, a file in
a folder, the text between two `<|endoftext|>` lines) is one piece, unless it is longer than WHOLE. A longer document or
a single file is split about every AVERAGE characters, at boundaries determined by its content: after a paragraph whose
checksum is small enough. Inserting text therefore changes only the pieces around it, and later boundaries stay. With
pieces of fixed length, all later boundaries would move, and the validation set with them.

A boundary is possible

    after a paragraph    (paragraphs end with a blank line)
    after a line         in a paragraph of more than LONG characters (verse or code without blank lines)
    after a sentence     in a line of more than LONG characters; without any, after LONG characters
"""

import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

AVERAGE = 4 << 10  # average length of a piece, in characters
LONG = 8 << 10
WHOLE = 64 << 10  # declared documents up to this length are not split
CAP = 256 << 10  # maximum length of a piece
SEPARATOR = "<|endoftext|>"  # a line with only this text ends a document
SENTENCE = re.compile(r"[.!?][\"')\]]*\s")


class Piece(NamedTuple):
    text: str
    ends: bool  # the document ends with this piece
    turns: tuple[tuple[str, str], ...] = ()  # for conversations: (role, content), see chat_format.py
    ids: bytes = b""  # for files of token ids: the ids as uint16, see token_files.py


def units(chunks: Iterable[str], separator: str = SEPARATOR) -> Iterator[str]:
    """The smallest units between which a text may be split; `""` is a separator line, the end of a document.

    The result depends on the text alone, not on the chunks: each decision needs little more than the next LONG
    characters, which are always buffered.
    """
    source = iter(chunks)
    text, at, more, by_line = "\n", 1, True, False  # text[at - 1] always exists: shows whether a line starts at `at`
    while True:
        while more and len(text) - at < 2 * LONG:
            chunk = next(source, None)
            more = chunk is not None
            text, at = text[at - 1 :] + (chunk or ""), 1
        if at == len(text):
            return
        stop = min(at + LONG, len(text))
        separator_at = find_line(text, separator, at, stop) if separator else -1
        if separator_at == at:
            yield ""
            at, by_line = min(at + len(separator) + 1, len(text)), False
            continue
        limit = stop if separator_at < 0 else separator_at
        end = text.find("\n\n", at, limit) + 2
        if end < 2 and (separator_at >= 0 or limit == len(text)):
            end = limit  # the last paragraph of a document
        if by_line or end < 2:
            end = text.find("\n", at, limit) + 1
            by_line = True
            if not end and limit - at < LONG:
                end = limit
            elif not end:
                sentence = SENTENCE.search(text, at, limit)
                end = sentence.end() if sentence else text.rfind(" ", at, limit) + 1 or limit
        line = end
        while end < limit and text[end] == "\n":
            end += 1
        by_line = by_line and end == line
        yield text[at:end]
        at = end


def find_line(text: str, line: str, start: int, stop: int) -> int:
    """Index in text[start:stop] of a line equal to `line`, or -1. Needs text[start - 1]."""
    at = text.find(line, start, stop)
    while at >= 0 and not (text[at - 1] == "\n" and text[at + len(line) : at + len(line) + 1] in ("", "\n")):
        at = text.find(line, at + 1, stop)
    return at


def chunk_text(chunks: Iterable[str], whole: int = WHOLE, separator: str = SEPARATOR) -> Iterator[Piece]:
    """Split a text into pieces. The pieces of a document, joined, are exactly the document.

    `whole`: documents up to this many characters are one piece. A document of only white space is dropped.
    """
    pieces: list[list[str]] = []  # units of the pieces of this document that are not yet yielded
    length = size = 0  # characters in the document and in the last piece
    growing, blank = False, True  # the last piece is still open; the document is white space so far
    for unit in chain(units(chunks, separator), [""]):
        if unit:
            if not growing:
                pieces.append([])
                size = 0
            pieces[-1].append(unit)
            length, size, blank = length + len(unit), size + len(unit), blank and not unit.strip()
            checksum = zlib.crc32(unit.encode("utf-8", "surrogatepass"))
            growing = checksum * AVERAGE >= len(unit) << 32 and size < CAP - LONG
            while length > whole and len(pieces) > 1 and not blank:
                yield Piece("".join(pieces.pop(0)), ends=False)
        else:
            if not blank:
                yield Piece("".join(part for piece in pieces for part in piece), ends=True)
            pieces, length, growing, blank = [], 0, False, True
