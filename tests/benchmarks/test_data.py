"""python -m benchmarks data: all of its code once, on little text."""

import itertools
import json
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as bench
from benchmarks import data, isolated
from data.tokenizer import Tokenizer, get_tokenizer
from tests.conftest import SMALL


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A text, a tokenizer of it, and how many tokens it has, an end of text after every document."""
    folder = tmp_path_factory.mktemp("text")
    documents = [
        f"Day {n}: the sea was {n % 7} feet high, the wind came from the {n % 4}th side.\n" for n in range(3000)
    ]
    text, tokenizer = folder / "text.jsonl", folder / "tokenizer.json"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    get_tokenizer("bpe", lambda: iter(documents), 300).save(tokenizer)
    ids = Tokenizer.load(tokenizer).encode_batch(documents)
    return text, tokenizer, sum(map(len, ids)) + len(documents)


@pytest.mark.parametrize("way", data.WAYS)
def test_every_way_makes_all_tokens(way, prepared, tmp_path):
    text, tokenizer, tokens = prepared
    found = data.one(way, text, tokenizer, tmp_path)
    assert found["tokens"] == tokens
    assert found["seconds"] > 0 and found["bytes"] > text.stat().st_size


def test_the_text_is_as_long_as_asked_and_says_nothing_twice(tmp_path):
    path = tmp_path / "text.jsonl"
    data.make_text(path, 7_000_000)  # more than the plays have, which are 5 MB
    lines = path.read_text().splitlines()
    assert 7_000_000 <= path.stat().st_size < 7_200_000
    assert len(set(lines)) == len(lines)
    assert len(json.loads(lines[-1])["text"].split()) > 10


def test_the_share_of_time_that_training_waits(text, tmp_path, monkeypatch):
    """By a clock that makes every batch take one second and every step four."""
    ticks = (4.0 * step + end for step in itertools.count() for end in (0, 1))
    monkeypatch.setattr(data, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    words = [word.removeprefix("--") for word in (*SMALL, f"--data.source={text}")]
    assert data.waiting(tmp_path, "shakespeare", *words) == (256 / 4, 1 / 4)


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(data, "SHAPES", [(2, 32)])
    monkeypatch.delitem(data.WAYS, "nanoGPT's way")  # the slowest, and tried above
    assert bench.main(bench.arguments(["data", "--quick"])) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{way} " in printed for way in data.WAYS)
    assert "\n2 x 32 " in printed and "of the time waiting for batches" in printed


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="--megabytes and --turns: at least 1"):
        bench.main(bench.arguments(["data", "--megabytes", "0"]))
    with pytest.raises(ValueError, match=r"heed: .*no such file"):
        none = str(tmp_path / "none.json")
        isolated.measure("heed", "benchmarks.data", "heed", none, none, str(tmp_path))
