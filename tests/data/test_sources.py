"""Corpora: files, folders, patterns, tables and the hub; and one-line errors for invalid input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.chunking import Piece
from data.sources import CorpusError, open_corpus
from tests.data.test_chunking import prose, together


def texts(source: object, **options: object) -> list[str]:
    return together(list(open_corpus(str(source), **options).pieces()))  # type: ignore[arg-type]


def test_text_files(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n<|endoftext|>\r\nthree \xe2\x82\xac")
    assert texts(file) == ["one\ntwo\n", "three €"]
    file.write_text("one\n<|endoftext|> two")
    assert texts(file) == ["one\n<|endoftext|> two"]
    file.write_text("one\n<|endoftext|>")
    assert texts(file) == ["one\n"]


def test_single_file_is_split_and_files_of_a_folder_are_not(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(100))
    assert len(list(open_corpus(str(tmp_path / "a.txt")).pieces())) > 4
    (tmp_path / "b.md").write_text("b")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "c.txt").write_text("hidden")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "e.TXT").write_text("e")
    (tmp_path / "d" / "empty.txt").write_text("")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    assert list(open_corpus(str(tmp_path)).pieces()) == [Piece(t, True) for t in (prose(100), "b", "e")]
    assert texts(tmp_path / "**" / "*.TXT") == ["e"]


def test_tables(tmp_path: Path) -> None:
    rows = [
        {"text": "one\n<|endoftext|>\nstill one", "n": 1},
        {"text": "two", "n": 2},
        {"text": "  ", "n": 3},
        {"n": 4},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["three", None, "four"]}), tmp_path / "b.parquet")
    assert texts(tmp_path / "a.jsonl") == ["one\n<|endoftext|>\nstill one", "two"]
    assert texts(tmp_path / "b.parquet", text_column="body") == ["three", "four"]
    assert texts(tmp_path / "b.parquet", text_column="body", limit=1) == ["three"]
    (tmp_path / "c.txt").write_text("five")
    (tmp_path / "b.parquet").unlink()
    assert texts(tmp_path) == ["one\n<|endoftext|>\nstill one", "two", "five"]


def test_pieces_starts_over_and_fingerprint_depends_on_content(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(prose(50))
    corpus = open_corpus(str(file))
    assert list(corpus.pieces()) == list(corpus.pieces())
    other = tmp_path / "b.txt"
    other.write_text(prose(50))
    assert open_corpus(str(other)).fingerprint == corpus.fingerprint
    assert open_corpus(str(file), limit=1).fingerprint != corpus.fingerprint
    other.write_text(prose(50) + "!")
    assert open_corpus(str(other)).fingerprint != corpus.fingerprint
    (tmp_path / "r.jsonl").write_text('{"a": "x", "b": "y"}')
    prints = {open_corpus(str(tmp_path / "r.jsonl"), text_column=column).fingerprint for column in "ab"}
    assert len(prints) == 2


BAD = {
    "nosuch.txt": (None, "no such file; give a path"),
    "boook.txt": (None, "no such file; did you mean .*book.txt"),
    "empty.txt": (b" \n\r\n", "empty; training needs some text"),
    "latin.txt": (b"one\ntwo caf\xe9 three", r"latin.txt is not UTF-8 at byte 11 \(line 2\)"),
    "split.txt": (b"x" * ((1 << 20) - 1) + "é".encode()[:1] + b"\n", r"is not UTF-8 at byte 1048575 \(line 1\)"),
    "cut.txt": (b"one \xe2\x82", r"ends inside a UTF-8 character at byte 4 \(line 1\)"),
    "nul.txt": (b"one\n\ntwo\0", r"has a NUL byte at byte 8 \(line 3\)"),
    "*.xyz": (None, "no file matches"),
    "r.jsonl": (
        b'{"body": "x", "id": 1}',
        "data.text_column = 'text': must be a column of '.*r.jsonl', which has 'body', 'id'",
    ),
    "n.jsonl": (b'{"text": 1}', "data.text_column = 'text': row 0 has type int"),
    "bad.jsonl": (b'{"text": "x"}\nnot json\n', "cannot be read as a table"),
    "empty.jsonl": (b"", "cannot be read as a table|no rows"),
    "bad.parquet": (b"no parquet", "cannot be read as a table"),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_input_raises_one_line(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    (tmp_path / "book.txt").write_text("a text")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message) as error:
        list(open_corpus(str(tmp_path / name)).pieces())
    assert "\n" not in str(error.value) and str(error.value).startswith("data.")


def test_unknown_names(tmp_path: Path) -> None:
    for source, message in {
        "": "empty",
        "shakespear": "did you mean shakespeare",
        str(tmp_path): "no text in this folder",
    }.items():
        with pytest.raises(CorpusError, match=message) as error:
            open_corpus(source, field="val_source")
        assert str(error.value).startswith("data.val_source = ")


# --- the hub, without a network: a folder is a dataset too -----------------------------------------------------------


def test_hub_datasets_are_streamed(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": f"{split} {i}"}) for i in range(5)))
    corpus = open_corpus(f"hf:{tmp_path}", limit=3)
    assert [piece.text for piece in corpus.pieces()] == ["train 0", "train 1", "train 2"]
    test = open_corpus(f"hf:{tmp_path}:default:test")
    assert [piece.text for piece in test.pieces()] == [f"test {i}" for i in range(5)]
    assert open_corpus(f"hf:{tmp_path}", split="test").fingerprint == open_corpus(f"hf:{tmp_path}::test").fingerprint
    assert test.fingerprint != corpus.fingerprint
    with pytest.raises(CorpusError, match=r"data.text_column = 'body': .* has 'text'"):
        list(open_corpus(f"hf:{tmp_path}", text_column="body").pieces())
    with pytest.raises(CorpusError, match=r"data.split = 'dev'"):
        list(open_corpus(f"hf:{tmp_path}", split="dev").pieces())


def test_unavailable_hub_raises_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*_: object) -> None:
        raise ConnectionError("Couldn't reach it,\n on any line")

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    with pytest.raises(
        CorpusError, match=r"data.source = 'hf:org/name': .*Couldn't reach it, on any.*HF_HUB_OFFLINE"
    ) as error:
        open_corpus("hf:org/name")
    assert "\n" not in str(error.value)


def test_datasets_is_imported_lazily() -> None:
    code = "import sys, data.prepare, data.loader; sys.exit('datasets' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent.parent).returncode == 0
