"""python -m benchmarks data, with a short text."""

import itertools
import json
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as bench
from benchmarks import data, subprocess_runner
from data.tokenizer import Tokenizer, get_tokenizer
from tests.conftest import SMALL


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A text, a tokenizer trained on it, and its number of tokens including end-of-text tokens."""
    folder = tmp_path_factory.mktemp("text")
    documents = [
        f"Day {n}: the sea was {n % 7} feet high, the wind came from the {n % 4}th side.\n" for n in range(3000)
    ]
    text, tokenizer = folder / "text.jsonl", folder / "tokenizer.json"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    get_tokenizer("bpe", lambda: iter(documents), 300).save(tokenizer)
    ids = Tokenizer.load(tokenizer).encode_batch(documents)
    return text, tokenizer, sum(map(len, ids)) + len(documents)


@pytest.mark.parametrize("pipeline", data.PIPELINES)
def test_every_pipeline_returns_all_tokens(pipeline, prepared, tmp_path):
    text, tokenizer, tokens = prepared
    found = data.one(pipeline, text, tokenizer, tmp_path)
    assert found["tokens"] == tokens
    assert found["seconds"] > 0 and found["bytes"] > text.stat().st_size


def test_text_has_the_requested_size_and_no_duplicates(tmp_path):
    path = tmp_path / "text.jsonl"
    data.make_text(path, 7_000_000)  # more than the plays, which have 5 MB
    lines = path.read_text().splitlines()
    assert 7_000_000 <= path.stat().st_size < 7_200_000
    assert len(set(lines)) == len(lines)
    assert len(json.loads(lines[-1])["text"].split()) > 10


def test_share_of_time_waiting_for_batches(text, tmp_path, monkeypatch):
    """With a simulated clock: each batch takes one second, each step four."""
    ticks = (4.0 * step + end for step in itertools.count() for end in (0, 1))
    monkeypatch.setattr(data, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    words = [word.removeprefix("--") for word in (*SMALL, f"--data.source={text}")]
    assert data.waiting(tmp_path, "shakespeare", *words) == (256 / 4, 1 / 4)


def test_command(capsys, monkeypatch):
    monkeypatch.setattr(data, "SHAPES", [(2, 32)])
    monkeypatch.delitem(data.PIPELINES, "nanoGPT")  # the slowest, tested above
    assert bench.main(bench.arguments(["data", "--quick"])) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{pipeline} " in printed for pipeline in data.PIPELINES)
    assert "\n2 x 32 " in printed and "of the time waiting for batches" in printed


def test_errors_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="--megabytes and --turns: at least 1"):
        bench.main(bench.arguments(["data", "--megabytes", "0"]))
    with pytest.raises(ValueError, match=r"heed: .*no such file"):
        none = str(tmp_path / "none.json")
        subprocess_runner.measure("heed", "benchmarks.data", "heed", none, none, str(tmp_path))
