"""Files of token ids, such as nanoGPT's train.bin: uint16, little endian, no header.

An end-of-text token ends a document (50256 in GPT-2's vocabulary), and so does the end of the file; without any, the
file is one document. A document of more than WHOLE tokens is split every PART tokens, so that a part of it can be held
out. The ids are used as they are. The tokenizer that made them tells the text, from which come the bytes and the hash
that decides between training and validation: as if the text itself were the source.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.chunking import Piece
from data.tokenizer import KINDS, Tokenizer

WHOLE = 16 << 10
PART = 1 << 10
BLOCK = 1 << 22
CHECKED = 256  # tokens of the first document whose text is encoded again


def inspect(file: Path, tokenizer: Tokenizer | None) -> str:
    """The SHA-256 of a file. Raises ValueError with the reason if its ids are not those of the tokenizer."""
    if tokenizer is None:
        raise ValueError(
            f"{file.name} has token ids, and they need the tokenizer that made them: data.tokenizer must be its "
            f"tokenizer.json (for GPT-2's ids, gpt2), not {' or '.join(KINDS)}; nanoGPT's characters are numbered in "
            "meta.pkl, which is not read: use its input.txt as data.source"
        )
    if not file.stat().st_size or file.stat().st_size % 2:
        raise ValueError(f"{file.name} has {file.stat().st_size} bytes: not token ids of 2 bytes each")
    ids = np.memmap(file, "<u2", "r")
    for start in range(0, len(ids), BLOCK):
        high = np.flatnonzero(ids[start : start + BLOCK] >= tokenizer.vocab_size)
        if len(high):
            raise ValueError(
                f"{file.name} has token {ids[start + high[0]]} at position {start + high[0]}, and the tokenizer has "
                f"{tokenizer.vocab_size}: it is not the one that made this file, or this is no file of 16-bit token ids"
            )
    first = next(parts(ids, tokenizer), None)
    if first is None:
        raise ValueError(f"{file.name} has only end-of-text tokens; training needs some text")
    head = first[0][:CHECKED].tolist()
    kept = len(head) * 7 // 8  # where a text is cut, its last tokens may be others
    if tokenizer.encode(tokenizer.decode(head))[:kept] != head[:kept]:
        raise ValueError(
            f"{file.name}: the text of its tokens has other tokens in this tokenizer, which did not make it"
        )
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read(file: Path, tokenizer: Tokenizer) -> Iterator[Piece]:
    """The pieces of a file, with their ids. A document of only white space is dropped."""
    for part, whole, ends in parts(np.memmap(file, "<u2", "r"), tokenizer):
        text = tokenizer.decode(part.tolist())
        if text.strip() or not whole:
            yield Piece(text, ends, ids=part.tobytes())


def parts(ids: np.ndarray, tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, bool, bool]]:
    """The parts of each document without its end-of-text token, whether it is the whole document, and whether the
    document ends with it."""
    start, whole = 0, True
    while start < len(ids):
        most = WHOLE if whole else PART
        window = ids[start : start + most + 1]
        found = np.flatnonzero(window == tokenizer.eot)
        if len(found) or len(window) <= most:  # the end of the file
            end, ends = start + int(found[0]) if len(found) else len(ids), True
        else:
            end, whole = start + PART, False
            while end < len(ids) and _is_inside(ids[end], tokenizer):
                end += 1
            ends = end == len(ids) or bool(ids[end] == tokenizer.eot)
        if end > start:
            yield ids[start:end], whole, ends
        start, whole = end + ends, ends


def _is_inside(token: np.uint16, tokenizer: Tokenizer) -> bool:
    """Whether a token may begin within a character: its bytes alone are not UTF-8."""
    return tokenizer.decode([int(token)]).startswith("\ufffd")
