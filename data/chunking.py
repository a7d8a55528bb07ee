"""Chunking: from a stream of text of any length to documents and pieces, in constant memory.

A *piece* is what the rest of heed handles: it goes to training or to validation as a whole. A document that its source
declares (a row, a file of a folder, what stands between two `<|endoftext|>` lines) is one piece, unless it is longer
than WHOLE. A longer text, or a lone file, is cut about every AVERAGE characters, at places that *its own words* choose:
after a paragraph whose checksum is small enough. So text inserted on page one changes the pieces that it touches, and
every later cut stays where it was. Were cuts made by counting, all would move, and with them the validation set.

    paragraphs      end with a blank line
    their lines     instead, in a paragraph of more than LONG characters (verse or code without blank lines)
    their sentences instead, in a line of more than LONG characters; at the worst, LONG characters with no end in sight
"""

import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

AVERAGE = 4 << 10  # characters between two cuts, on average
LONG = 8 << 10
WHOLE = 64 << 10  # a declared document up to this long is never cut
CAP = 256 << 10  # a piece is never longer
SEPARATOR = "<|endoftext|>"  # alone on a line, it ends a document
SENTENCE = re.compile(r"[.!?][\"')\]]*\s")


class Piece(NamedTuple):
    text: str
    ends: bool  # the document ends with this piece
    turns: tuple[tuple[str, str], ...] = ()  # of a conversation: (role, content), see chat_format.py


def units(chunks: Iterable[str], separator: str = SEPARATOR) -> Iterator[str]:
    """The smallest parts that a text may be cut between; `""` stands for a separator line, the end of a document.

    The result depends on the text alone, never on how it came in chunks: a decision looks at the next LONG characters
    and a few more, and those are always in view.
    """
    source = iter(chunks)
    text, at, more, by_line = "\n", 1, True, False  # text[at - 1] is always there: it tells where a line starts
    while True:
        while more and len(text) - at < 2 * LONG:
            chunk = next(source, None)
            more = chunk is not None
            text, at = text[at - 1 :] + (chunk or ""), 1
        if at == len(text):
            return
        stop = min(at + LONG, len(text))
        mark = find_line(text, separator, at, stop) if separator else -1
        if mark == at:
            yield ""
            at, by_line = min(at + len(separator) + 1, len(text)), False
            continue
        limit = stop if mark < 0 else mark
        end = text.find("\n\n", at, limit) + 2
        if end < 2 and (mark >= 0 or limit == len(text)):
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
    """Where `line` begins in text[start:stop], alone on a line; -1 if nowhere. Needs text[start - 1]."""
    at = text.find(line, start, stop)
    while at >= 0 and not (text[at - 1] == "\n" and text[at + len(line) : at + len(line) + 1] in ("", "\n")):
        at = text.find(line, at + 1, stop)
    return at


def chunk_text(chunks: Iterable[str], whole: int = WHOLE, separator: str = SEPARATOR) -> Iterator[Piece]:
    """The pieces of a text; those of one document, put together, are that document exactly.

    `whole`: documents up to so many characters are one piece. A document of nothing but white space is left out.
    """
    pieces: list[list[str]] = []  # of this document, not yet given out, as units
    length = size = 0  # characters of the document, of the last piece
    growing, blank = False, True  # the last piece is not closed yet; the document is white space so far
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
