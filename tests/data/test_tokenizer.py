"""Tokenizers: exact round trips for any text, special tokens never come from text, and errors are one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizer import EOT, Tokenizer, TokenizerError, get_tokenizer
from inference.detokenizer import StreamingDetokenizer

TEXTS = ["the cat sat on the mat, the other cat sat on the hat. " * 20, "It's 1,234 days — café, 日本語, 👩‍👩‍👧!\n\n"]
ODD = f"Hi {EOT}\0\r\n\t é e\u0301 \u200d\ufeff 日本語 👩‍👩‍👧 Ã  double   {EOT}{EOT[:-1]}\n\n\n \x7f\x85\u2028 "


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train("bpe", TEXTS, 300)


@pytest.fixture(scope="module")
def byte() -> Tokenizer:
    return Tokenizer.train("byte", TEXTS)


@pytest.fixture(scope="module")
def char() -> Tokenizer:
    return Tokenizer.train("char", [*TEXTS, ODD])


@settings(max_examples=300, deadline=None)
@given(st.text() | st.sampled_from([ODD, EOT]) | st.text(alphabet="<|endoftext|> \n'st1"))
def test_round_trip_of_any_text(bpe: Tokenizer, byte: Tokenizer, text: str) -> None:
    for tokenizer in (bpe, byte):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eot not in ids and all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.encode_batch([text, "x", text]) == [ids, tokenizer.encode("x"), ids]
        stream = StreamingDetokenizer(tokenizer)
        assert "".join(stream.add_token(i) for i in ids) + stream.finalize() == text
    assert len(byte.encode(text)) == len(text.encode())


@given(st.text(alphabet="".join(sorted(set(ODD)))))
def test_round_trip_of_characters(char: Tokenizer, text: str) -> None:
    ids = char.encode(text)
    assert char.decode(ids) == text and len(ids) == len(text) and char.eot not in ids
    assert ids == char.inner.encode(text).ids  # the shortcut equals the library, and so every other tool


def test_kinds_and_sizes(bpe: Tokenizer, byte: Tokenizer, char: Tokenizer) -> None:
    assert (bpe.kind, byte.kind, char.kind) == ("bpe", "byte", "char")
    assert (bpe.vocab_size, byte.vocab_size) == (300, 257)
    assert char.vocab_size == 1 + len(set("".join([*TEXTS, ODD])))
    assert [t.eot for t in (bpe, byte, char)] == [0, 0, 0]
    assert len(bpe.encode(" the cat")) < len(byte.encode(" the cat")) == 8


def test_bpe_stops_early_on_a_small_text() -> None:
    assert 257 < Tokenizer.train("bpe", ["abab abab"], 5000).vocab_size < 270
    with pytest.raises(TokenizerError, match=r"data.vocab_size = 256: bpe needs at least 257"):
        Tokenizer.train("bpe", TEXTS, 256)
    with pytest.raises(TokenizerError, match=r"data.tokenizer = 'word'"):
        Tokenizer.train("word", TEXTS)


def test_training_is_deterministic_and_ignores_special_tokens() -> None:
    assert Tokenizer.train("bpe", TEXTS, 400).sha256 == Tokenizer.train("bpe", TEXTS, 400).sha256
    assert Tokenizer.train("bpe", [EOT * 100], 280).encode(EOT) != [0]


def test_end_of_text_is_skipped_in_decoding(bpe: Tokenizer, char: Tokenizer) -> None:
    for tokenizer in (bpe, char):
        ids = [tokenizer.eot, *tokenizer.encode("the cat"), tokenizer.eot, tokenizer.eot, *tokenizer.encode(" sat")]
        assert tokenizer.decode(ids) == "the cat sat"
        stream = StreamingDetokenizer(tokenizer)
        assert "".join(map(stream.add_token, ids)) + stream.finalize() == "the cat sat"


def test_detokenizer_returns_complete_characters_only(byte: Tokenizer) -> None:
    stream = StreamingDetokenizer(byte)
    assert [stream.add_token(i) for i in byte.encode("aé👩b")] == ["a", "", "é", "", "", "", "👩", "b"]
    assert [stream.add_token(i) for i in byte.encode("👩")[:3]] == ["", "", ""]
    assert stream.finalize() == "\ufffd" and stream.finalize() == ""
    assert stream.add_token(byte.encode("c")[0]) == "c"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=60))
def test_detokenizer_accepts_any_token_ids(bpe: Tokenizer, ids: list[int]) -> None:
    stream = StreamingDetokenizer(bpe)
    assert "".join(stream.add_token(i) for i in ids) + stream.finalize() == bpe.decode(ids)


def test_lone_surrogates_raise_with_position(bpe: Tokenizer, char: Tokenizer) -> None:
    for tokenizer in (bpe, char):
        with pytest.raises(TokenizerError, match=r"character 4 is '\\ud83d', half of a surrogate pair"):
            tokenizer.encode_batch(["the", "the \ud83d cat"])


def test_unseen_characters_raise(char: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"character 4 is 'Z', not one of .* \(all such here: 'QZ'\)"):
        char.encode("the Z Q Z")


def test_save_and_load(bpe: Tokenizer, byte: Tokenizer, char: Tokenizer, tmp_path: Path) -> None:
    for tokenizer in (bpe, byte, char):
        tokenizer.save(tmp_path / "tokenizer.json")
        for again in (Tokenizer.load(tmp_path / "tokenizer.json"), get_tokenizer(str(tmp_path))):
            assert (again.sha256, again.kind, again.eot) == (tokenizer.sha256, tokenizer.kind, tokenizer.eot)
            assert again.encode(ODD) == tokenizer.encode(ODD)  # encode_special_tokens is not stored in the file
            assert again.decode(again.encode(ODD)) == ODD
    assert len({t.sha256 for t in (bpe, byte, char)}) == 3


def test_transformers_loads_the_file_and_agrees(bpe: Tokenizer, char: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    text = "the cat sat, it's 1,234 日本語 👩‍👩‍👧!\n\n"
    for tokenizer in (bpe, char):
        tokenizer.save(tmp_path / "tokenizer.json")
        fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
        assert fast(text)["input_ids"] == tokenizer.encode(text)
        assert fast.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


def edited(tokenizer: Tokenizer, path: Path, rename: str) -> Path:
    """The file with another name for the end-of-text token."""
    content = json.loads(tokenizer.inner.to_str())
    content["model"]["vocab"][rename] = content["model"]["vocab"].pop(EOT)
    content["added_tokens"][0]["content"] = rename
    path.write_text(json.dumps(content))
    return path


def test_existing_tokenizers_and_their_end_of_text(bpe: Tokenizer, tmp_path: Path) -> None:
    for name in ("</s>", "<|im_end|>", "<|end_of_text|>"):
        tokenizer = Tokenizer.load(edited(bpe, tmp_path / "tokenizer.json", name))
        assert tokenizer.eot == 0 and tokenizer.decode([0, *tokenizer.encode(name)]) == name
    with pytest.raises(TokenizerError, match=r"tokenizer.json': has no <\|endoftext\|>, nor any of"):
        Tokenizer.load(edited(bpe, tmp_path / "tokenizer.json", "<stop>"))
    both = json.loads(edited(bpe, tmp_path / "tokenizer.json", "</s>").read_text())
    both["model"]["vocab"]["<eos>"] = 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(both))
    with pytest.raises(TokenizerError, match=r"several candidates: \['</s>', '<eos>'\]"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_imported_settings_are_ignored(bpe: Tokenizer, tmp_path: Path) -> None:
    """Truncation, padding and added special tokens of a tokenizer.json do not apply."""
    from tokenizers import Tokenizer as Inner
    from tokenizers.processors import TemplateProcessing

    inner = Inner.from_str(bpe.inner.to_str())
    inner.enable_truncation(3)
    inner.enable_padding(length=50)
    inner.post_processor = TemplateProcessing(single=f"{EOT} $A", special_tokens=[(EOT, 0)])
    inner.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode("the cat sat on the mat") == bpe.encode("the cat sat on the mat")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.json", "no such file; name a tokenizer.json or one of"),
        ("./missing", "no such file"),
        ("bad.json", "not a tokenizer.json"),
    ],
)
def test_missing_and_invalid_files(spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("{}")
    with pytest.raises(TokenizerError, match=message) as error:
        get_tokenizer(spec)
    assert "\n" not in str(error.value)


def test_unavailable_hub_raises_one_line() -> None:
    code = (
        "from data.tokenizer import *\n"
        "try: get_tokenizer('nobody/nothing')\n"
        "except TokenizerError as error: assert '\\n' not in str(error); print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("data.tokenizer = 'nobody/nothing': neither one of"), done.stdout + done.stderr
