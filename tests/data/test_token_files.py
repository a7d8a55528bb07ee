"""Files of token ids: the same shards as from the text itself, and one line for each mistake."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from data import token_files
from data.prepare import prepare
from data.shards import Shards
from data.sources import CorpusError, open_corpus
from data.tokenizer import EOT, Tokenizer
from tests.data.test_prepare import documents, story

TEXTS = [story(i) + "語 🙂" * (i % 3) for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE whose last id is the end-of-text token, as GPT-2's 50256."""
    made = Tokenizer.train("bpe", TEXTS[:50], 400).inner
    content = json.loads(made.to_str())
    content["added_tokens"] = []
    content["model"]["vocab"] = {token: i - 1 for token, i in content["model"]["vocab"].items() if token != EOT}
    last = tokenizers.Tokenizer.from_str(json.dumps(content))
    last.add_special_tokens([EOT])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    last.save(str(path))
    assert Tokenizer.load(path).eot == Tokenizer.load(path).vocab_size - 1
    return path


def save(path: Path, tokenizer: Path, texts: list[str]) -> Path:
    """What nanoGPT's data/openwebtext/prepare.py writes: an end-of-text token after each document."""
    made = Tokenizer.load(tokenizer)
    np.array([i for text in texts for i in [*made.encode(text), made.eot]], np.uint16).tofile(path)
    return path


def make(source: Path, tokenizer: Path, **options: Any) -> Path:
    how = {"tokenizer": str(tokenizer), "val_fraction": 0.2, "log": lambda _: None, **options}
    return prepare(str(source), cache=source.parent / "cache", **how)


def shards(folder: Path) -> tuple[dict[str, bytes], Any]:
    """The files of ids and what the manifest says about them."""
    files = {path.name: path.read_bytes() for path in folder.glob("*.bin")}
    return files, json.loads((folder / "manifest.json").read_text())["splits"]


def test_equal_to_the_text_itself(tmp_path, tokenizer):
    tokens = save(tmp_path / "train.bin", tokenizer, [*TEXTS, TEXTS[7], " \n"])
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in [*TEXTS, TEXTS[7]]))
    assert shards(make(tokens, tokenizer)) == shards(make(tmp_path / "text.jsonl", tokenizer))
    some, other = make(tokens, tokenizer, limit=50), make(tmp_path / "text.jsonl", tokenizer, limit=50)
    assert shards(some) == shards(other) != shards(make(tokens, tokenizer))


def test_nanogpts_split(tmp_path, tokenizer):
    train = save(tmp_path / "train.bin", tokenizer, TEXTS[:150])
    val = save(tmp_path / "val.bin", tokenizer, TEXTS[140:])
    folder = make(train, tokenizer, val_source=str(val))
    assert (folder / "val-00000.bin").read_bytes() == val.read_bytes()
    assert documents(folder, "train") == TEXTS[:140]  # without what is in both
    (tmp_path / "val.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[:140]))
    folder = make(train, tokenizer, val_source=str(tmp_path / "val.jsonl"))
    assert documents(folder, "train") == TEXTS[140:150]


@pytest.mark.parametrize("alphabet", ["the cat sat ", "語日本の", "🙂🎉é "])
def test_a_long_document_is_split_and_keeps_its_ids(tmp_path, tokenizer, alphabet):
    """Without an end-of-text token, as nanoGPT's data/shakespeare."""
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list(alphabet), 40_000))
    ids = np.array(Tokenizer.load(tokenizer).encode(text), np.uint16)
    ids.tofile(tmp_path / "train.bin")
    made = Tokenizer.load(tokenizer)
    pieces = list(open_corpus(str(tmp_path / "train.bin"), tokenizer=made).pieces())
    assert len(pieces) > 5 and [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert b"".join(piece.ids for piece in pieces) == ids.tobytes()
    assert "".join(piece.text for piece in pieces) == text  # no piece begins within a character
    folder = make(tmp_path / "train.bin", tokenizer)
    splits = {split: Shards(folder, split) for split in ("train", "val")}
    assert sum(part.bytes for part in splits.values()) == len(text.encode())
    kept = [part.read(0, part.tokens) for part in splits.values()]
    assert sorted(np.concatenate(kept)[np.concatenate(kept) != made.eot]) == sorted(ids)


def test_documents_around_the_limit_of_length(tmp_path, tokenizer, monkeypatch):
    """Whatever the lengths, documents are whole or split, their ids are kept, and empty ones are dropped."""
    monkeypatch.setattr(token_files, "WHOLE", 20)
    monkeypatch.setattr(token_files, "PART", 7)
    made, rng = Tokenizer.load(tokenizer), np.random.default_rng(0)
    letters = [made.inner.token_to_id(letter) for letter in "abcd"]
    inside = made.encode("\u0939")  # a character of several tokens
    assert len(inside) == 3
    for end in (True, False):
        parts = [rng.choice(letters, length) for length in (*range(50), 0, 0, 20, 21, 34, 35, 7, 8)]
        parts += [np.array([*parts[length], *inside]) for length in range(14, 42)]
        ids = np.concatenate([[*part, made.eot] for part in parts])[: None if end else -1].astype(np.uint16)
        ids.tofile(tmp_path / "train.bin")
        found, document, sizes = [], b"", list[int]()
        for piece in token_files.read(tmp_path / "train.bin", made):
            document += piece.ids
            sizes.append(len(piece.ids) // 2)
            if piece.ends:
                found.append(document)
                assert len(document) // 2 > 20 or len(sizes) == 1
                assert max(sizes) <= (7 + 3 if len(sizes) > 1 else 20)
                document, sizes = b"", []
        assert found == [part.astype(np.uint16).tobytes() for part in parts if len(part)]


def test_what_is_no_file_of_these_tokens_is_one_line(tmp_path, tokenizer):
    good = save(tmp_path / "train.bin", tokenizer, TEXTS).read_bytes()
    high = np.frombuffer(good, np.uint16).copy()
    high[12] = 50_256
    other = tmp_path / "other.json"
    Tokenizer.train("bpe", [Path(__file__).read_text()], 420).save(other)
    cases: list[tuple[bytes, str, str]] = [
        (good, "bpe", r"need the tokenizer that made them: data.tokenizer must be its tokenizer.json .* its input.txt"),
        (good, "char", r"meta.pkl, which is not read"),
        (good[:-1], str(tokenizer), r"has \d+ bytes: not token ids of 2 bytes each"),
        (b"", str(tokenizer), r"has 0 bytes: not token ids"),
        (high.tobytes(), str(tokenizer), r"has token 50256 at position 12, and the tokenizer has \d+: it is not"),
        (hashlib.sha256(b"").digest() * 99, str(tokenizer), r"has token \d+ at position"),
        (good, str(other), r"the text of its tokens has other tokens in this tokenizer"),
        (np.full(99, Tokenizer.load(tokenizer).eot, np.uint16).tobytes(), str(tokenizer), r"has only end-of-text"),
    ]
    for number, (content, spec, message) in enumerate(cases):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=message) as error:
            make(path, Path(spec))
        assert str(error.value).startswith(f"data.source = '{path}': ") and "\n" not in str(error.value)
