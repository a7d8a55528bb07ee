"""Chunking: the pieces are exactly the document, and inserted text does not move later boundaries."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.chunking import AVERAGE, CAP, LONG, WHOLE, Piece, chunk_text, units


def prose(paragraphs: int, seed: int = 0, lines: int = 6) -> str:
    """Paragraphs of different words, about 300 characters each."""
    return "\n\n".join(
        "\n".join(f"seed {seed} paragraph {i} line {j} says {(i * 7919 + j * 104729) ** 3}." for j in range(lines))
        for i in range(paragraphs)
    )


def together(pieces: list[Piece]) -> list[str]:
    documents, current = [], ""
    for piece in pieces:
        current += piece.text
        if piece.ends:
            documents.append(current)
            current = ""
    assert not current
    return documents


TEXT = st.lists(
    st.sampled_from(
        [
            "a",
            "b. ",
            "\n",
            "\n\n",
            "word " * 50,
            "x" * 3000,
            "y" * LONG,
            "Said he. " * 900,
            "<|endoftext|>",
            "é",
            "\u2028",
        ]
    ),
    max_size=30,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(TEXT, st.integers(1, 40_000), st.sampled_from([0, WHOLE]))
def test_pieces_are_the_document_for_any_chunk_size(text: str, size: int, whole: int) -> None:
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    pieces = list(chunk_text(chunks, whole))
    assert pieces == list(chunk_text([text], whole))
    expected = re.split(r"^<\|endoftext\|>(?:\n|\Z)", text, flags=re.MULTILINE)
    assert together(pieces) == [document for document in expected if document.strip()]
    assert all(0 < len(piece.text) <= max(CAP, whole) for piece in pieces)


def test_boundaries_depend_on_content() -> None:
    text = prose(2000)
    pieces = [piece.text for piece in chunk_text([text], whole=0)]
    assert AVERAGE / 2 < len(text) / len(pieces) < AVERAGE * 2
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])
    middle = len(text) // 2
    changed = [
        piece.text for piece in chunk_text([text[:middle] + "An inserted\n\nword or two.\n\n" + text[middle:]], whole=0)
    ]
    before, after = Counter(pieces), Counter(changed)
    assert sum((before - after).values()) <= 2 and sum((after - before).values()) <= 3
    grown = [piece.text for piece in chunk_text([prose(40, seed=1) + "\n\n" + text], whole=0)]
    assert sum((before - Counter(grown)).values()) <= 1


@pytest.mark.parametrize("kind", ["lines", "sentences", "nothing"])
def test_boundaries_without_blank_lines(kind: str) -> None:
    text = prose(2000).replace("\n\n", "\n")
    text = {"lines": text, "sentences": text.replace("\n", " "), "nothing": re.sub(r"[\s.]", "", text)}[kind]
    pieces = [piece.text for piece in chunk_text([text], whole=0)]
    assert "".join(pieces) == text and len(pieces) > len(text) / CAP
    if kind != "nothing":  # a text without any line or sentence end is split at fixed lengths
        changed = [piece.text for piece in chunk_text(["Put in front. \n", text], whole=0)]
        assert sum((Counter(pieces) - Counter(changed)).values()) <= 2


def test_units_end_at_blank_lines_lines_or_sentences() -> None:
    assert list(units(["one\ntwo\n\n\nthree\n\nfour"])) == ["one\ntwo\n\n\n", "three\n\n", "four"]
    long = "A sentence here. " * 1000
    assert list(units(["short\n\n", long + "\n", "\nnext"]))[:3] == [
        "short\n\n",
        "A sentence here. ",
        "A sentence here. ",
    ]
    assert list(units(["a\n<|endoftext|>\nb <|endoftext|>\n<|endoftext|> c"])) == [
        "a\n",
        "",
        "b <|endoftext|>\n<|endoftext|> c",
    ]


def test_declared_documents_are_not_split_up_to_a_limit() -> None:
    short, long = prose(20), prose(400)
    assert len(short) < WHOLE < len(long)
    pieces = list(chunk_text([f"{short}\n<|endoftext|>\n{long}\n<|endoftext|>\n \n<|endoftext|>\n"]))
    assert pieces[0] == Piece(short + "\n", ends=True) and len(pieces) > 10
    assert together(pieces) == [short + "\n", long + "\n"]
