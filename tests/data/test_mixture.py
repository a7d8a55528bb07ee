"""Mixtures: the shares of the sources are their weights, and a step is a function of its number."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import data.prepare as module
import evals.__main__ as evals
import train
from data import chat_format
from data.loader import Conversations, Loader, open_loader
from data.mixture import BLOCK, MixedShards, apportion, open_shards, schedule
from data.prepare import Splitter, prepare
from data.shards import ShardError, Shards
from data.sources import CorpusError, open_corpus
from data.tokenizer import Tokenizer
from tests.conftest import SMALL, losses, train_here, weights
from tests.data.test_chat_format import line
from tests.data.test_prepare import documents, story, write
from tests.data.test_shards import store
from training.checkpoint import CheckpointError


@pytest.mark.parametrize("given", [[1], [70, 30], [0.5, 0.25, 0.25], [1, 1, 1], [9990, 6, 4], [3, 0.01, 7, 2, 2, 5]])
def test_shares_are_the_weights(given):
    """Exact in a block, up to rounding; and the places of a source are evenly spaced."""
    sources, before = schedule(given)
    for source, weight in enumerate(given):
        places = np.flatnonzero(sources == source)
        assert abs(len(places) - weight / sum(given) * BLOCK) < 1
        assert before[places].tolist() == list(range(len(places)))
        gaps = np.diff(places, append=BLOCK + places[0])
        assert gaps.max() - gaps.min() <= 2 * len(given)
        surplus = np.cumsum(sources == source) - np.arange(1, BLOCK + 1) * len(places) / BLOCK
        assert np.ptp(surplus) <= max(1, len(given) - 1)  # of any number of consecutive sequences
    assert sum(apportion(given)) == BLOCK


@pytest.fixture
def parts(tmp_path: Path) -> list[tuple[Shards, float]]:
    """Three sources with tokens 0 to 999, 1000 to 1299 and 2000 to 2049."""
    bounds = ((0, 1000, 0.5), (1000, 1300, 0.375), (2000, 2050, 0.125))
    return [(store(tmp_path / f"{start}", [list(range(start, end))]), weight) for start, end, weight in bounds]


def test_batches_have_the_shares_and_each_source_its_own_epochs(parts):
    mixture = open_loader(MixedShards(parts), context=10, seed=3)
    rows = torch.cat([mixture.batch(step, 16)[0] for step in range(100)])[:, 0] // 1000
    assert rows.bincount().tolist() == [800, 600, 200]  # of 1,600
    assert all(abs(int((batch == 0).sum()) - 8) <= 1 for batch in rows.split(16))
    shares = [weight for _, weight in parts]
    for source, (shards, _) in enumerate(parts):
        mine, alone = (number for number in range(1600) if rows[number] == source), Loader(shards, context=10, seed=3)
        for number, sequence in enumerate(mine):  # 8, 20 and 40 epochs
            assert (mixture.sample(sequence)[0] == alone.sample(number)[0]).all()
            later = mixture.sample(3 * BLOCK + sequence)[0]
            assert (later == alone.sample(3 * round(shares[source] * BLOCK) + number)[0]).all()


def test_a_batch_is_a_function_of_seed_step_and_rank(parts):
    whole = open_loader(MixedShards(parts), context=10, seed=3)
    for step in (900, 3, BLOCK // 12):  # the last one spans two blocks
        x, y = whole.batch(step, 12)
        shares = [open_loader(MixedShards(parts), context=10, seed=3).batch(step, 12, rank, 3) for rank in range(3)]
        assert torch.equal(torch.cat([a for a, _ in shares]), x) and torch.equal(torch.cat([b for _, b in shares]), y)
        assert torch.equal(x[:, 1:], y[:, :-1])
    assert not torch.equal(open_loader(MixedShards(parts), context=10, seed=4).batch(0, 12)[0], whole.batch(0, 12)[0])
    with pytest.raises(ShardError, match=r"the training text of 's' has only 50 tokens, and 101 are needed"):
        open_loader(MixedShards(parts), context=100, seed=0)


# From sources to a folder --------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path: Path) -> list[dict[str, Any]]:
    """Stories of the sun and the moon, few letters, and some conversations."""
    write(tmp_path / "stories.txt", [story(i) for i in range(300)])
    rows = (json.dumps({"body": f"Dear {i}, how are you? I am {i % 7} years old.\n"}) for i in range(120))
    (tmp_path / "letters.jsonl").write_text("\n".join(rows))
    turns = ([("user", f"What is {i} plus one?"), ("assistant", f"It is {i + 1}.")] for i in range(80))
    (tmp_path / "chat.jsonl").write_text("\n".join(line(*turn) for turn in turns))
    return [
        {"source": str(tmp_path / "stories.txt"), "weight": 6.0},
        {"source": str(tmp_path / "letters.jsonl"), "weight": 3.0, "text_column": "body", "limit": 100},
        {"source": str(tmp_path / "chat.jsonl"), "weight": 1.0, "format": "chat"},
    ]


def make(sources: list[dict[str, Any]], **options: Any) -> Path:
    cache = Path(sources[0]["source"]).parent / "cache"
    how: dict[str, Any] = {"tokenizer": "byte", "val_fraction": 0.2, "log": lambda _: None, **options}
    return prepare(sources=sources, cache=cache, **how)


def test_every_source_is_prepared_with_one_tokenizer(sources):
    folder = make(sources, tokenizer="bpe", vocab_size=340)
    made = Tokenizer.load(folder)
    assert made.vocab_size == 340 and chat_format.special_tokens(made)
    train_text, val_text = (open_shards(folder, split) for split in ("train", "val"))
    assert [weight for _, weight in train_text.parts] == [0.6, 0.3, 0.1]
    assert [shards.manifest.tokenizer for shards, _ in (*train_text.parts, *val_text.parts)] == [made.sha256] * 6
    assert [shards.chat for shards, _ in train_text.parts] == [False, False, True] and not train_text.chat
    assert isinstance(open_loader(train_text, context=16, seed=0).loaders[2], Conversations)
    names = [part["folder"] for part in json.loads((folder / "manifest.json").read_text())["sources"]]
    stories, letters, _ = ([*documents(folder.parent / name, "train"), *documents(folder.parent / name, "val")]
                           for name in names)  # fmt: skip
    assert sorted(stories) == sorted(story(i) for i in range(300)) and len(letters) == 100
    alone = prepare(
        sources[0]["source"], tokenizer=str(folder / "tokenizer.json"), val_fraction=0.2, cache=folder.parent.parent
    )
    assert alone.name == names[0]  # the same folder as of the source alone


def test_the_cache_knows_mixtures(sources, monkeypatch):
    folder, calls, write = make(sources), list[str](), module.write
    monkeypatch.setattr(module, "write", lambda *a: calls.append(a[1].corpus.name) or write(*a))
    for scale in (1, 0.1):
        assert make([table | {"weight": table["weight"] * scale} for table in sources]) == folder
    other = make([table | {"weight": 1.0} for table in sources])
    assert other != folder and not calls  # byte is the same tokenizer: other weights need no new tokens
    assert len({folder, other, make(sources[:2]), make(sources, val_fraction=0.1)}) == 4
    calls.clear()
    names = [part["folder"] for part in json.loads((folder / "manifest.json").read_text())["sources"]]
    (folder.parent / names[1] / "train-00000.bin").unlink()
    assert make(sources) == folder and calls == [sources[1]["source"]]
    assert not list(folder.parent.glob(".tmp-*"))


def test_a_stopped_mixture_continues(sources, monkeypatch):
    expected = make(sources, tokenizer="bpe", vocab_size=340)
    kept = {path.name: path.read_bytes() for path in expected.parent.rglob("*") if path.is_file()}
    expected.parent.rename(expected.parent.with_name("kept"))
    trained, stops, train, write = list[str](), itertools.count(), module.train_tokenizer, module.write

    def stop(*arguments: Any) -> Any:
        if next(stops) % 2:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(module, "train_tokenizer", lambda *a: trained.append("") or train(*a))
    monkeypatch.setattr(module, "write", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            make(sources, tokenizer="bpe", vocab_size=340)
    assert make(sources, tokenizer="bpe", vocab_size=340) == expected and len(trained) == 1
    assert {path.name: path.read_bytes() for path in expected.parent.rglob("*") if path.is_file()} == kept


def test_the_tokenizer_is_trained_on_a_weighted_sample(sources, monkeypatch):
    splitters = [Splitter(open_corpus(table["source"], text_column="body"), None, 0.2) for table in sources[:2]]
    train = [{piece.text for split, piece in splitter if split == "train"} for splitter in splitters]
    assert sum(map(len, train[0])) > 10 * sum(map(len, train[1]))
    for share in (0.9, 0.5, 0.02):
        sizes, pieces = [0, 0], list(module.sample(splitters, [1 - share, share]))
        for piece in pieces:
            sizes[piece in train[1]] += len(piece)
        assert sizes[1] / sum(sizes) == pytest.approx(share, abs=0.01)
        assert set(pieces) == train[0] | train[1]  # all of both, and repeated what is less than its share
    monkeypatch.setattr(module, "SAMPLE", 5000)
    sizes = [0, 0]
    for piece in module.sample(splitters, [0.5, 0.5]):
        sizes[piece in train[1]] += len(piece)
    assert 3000 < sum(sizes) < 5500 and abs(sizes[0] - sizes[1]) < 500
    monkeypatch.setattr(module, "SAMPLE", 2000)  # the share of the second one is less than a piece
    assert 3 <= len(list(module.sample(splitters, [0.9999, 0.0001]))) < 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "nowhere.txt"}, r"data.sources\[1\].source = 'nowhere.txt': no such file"),
        (
            {"text_column": "text"},
            r"data.text_column = 'text': must be a column of '.*letters.jsonl', which has 'body'",
        ),
        ({"limit": 1}, r"letters.jsonl': too short to hold out a part for validation"),
        ({"format": "chat"}, r"letters.jsonl:1: has no \"messages\""),
    ],
)
def test_mistakes_are_one_line(sources, change, message):
    sources[1] |= change
    with pytest.raises(CorpusError, match=message) as error:
        make(sources)
    assert "\n" not in str(error.value)


def test_a_damaged_manifest_is_one_line(sources):
    folder = make(sources)
    manifest = json.loads((folder / "manifest.json").read_text())
    for damaged in (
        {"sources": 3},
        {"sources": [{}]},
        {"sources": [{"folder": 3, "weight": 1}]},
        {"format_version": 9},
    ):
        (folder / "manifest.json").write_text(json.dumps(manifest | damaged))
        with pytest.raises(ShardError, match=r"manifest.json: is damaged|has format version 9, must be 1") as error:
            open_shards(folder, "train")
        assert "\n" not in str(error.value)
        assert make(sources) == folder  # prepared again
    part = folder.parent / manifest["sources"][2]["folder"] / "train-00000.mask"
    part.write_bytes(bytes(part.stat().st_size))
    with pytest.raises(ShardError, match=r"train-00000.mask: is damaged"):
        open_shards(folder, "train")


# Training ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(sources, tmp_path) -> str:
    """A recipe with the mixture."""
    tables = ("\n".join(f"{k} = {json.dumps(v)}" for k, v in table.items()) for table in sources)
    (tmp_path / "mixed.toml").write_text("".join(f"[[data.sources]]\n{table}\n\n" for table in tables))
    return str(tmp_path / "mixed.toml")


SHORT = [*SMALL, "--data.tokenizer=byte", "--train.steps=6", "--train.num_evals=2", "--model.context=64"]


def test_a_resumed_run_is_bitwise_equal(recipe, tmp_path, monkeypatch):
    whole = train_here(tmp_path, recipe, "--name=whole", *SHORT)
    real = train.validate
    monkeypatch.setattr(train, "validate", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        train_here(tmp_path, recipe, "--name=killed", *SHORT)
    monkeypatch.setattr(train, "validate", real)
    killed = train_here(tmp_path, recipe, "--name=killed", *SHORT, "--resume")
    assert losses(killed) == losses(whole) and len(losses(killed)) == 6 and weights(killed) == weights(whole)
    changed = (killed / "config.toml").read_text().replace("weight = 6.0", "weight = 5.0")
    (killed / "config.toml").write_text(changed)
    with pytest.raises(CheckpointError, match=r"killed cannot be resumed: the text's hash was"):
        train_here(tmp_path, recipe, "--name=killed", *SHORT, "--resume")


def test_validation_is_the_weighted_mean_and_evals_prints_the_parts(recipe, tmp_path, capsys):
    run = train_here(tmp_path, recipe, "--name=mixed", *SHORT, "--train.prompt=Hello")
    capsys.readouterr()
    assert evals.main([str(run), "--checkpoint", "latest"]) == 0
    rows = [line.split()[-6:] for line in capsys.readouterr().out.splitlines()][-4:]
    tokens, size, documents, nats, _, bits = (
        [float(n.replace(",", "")) for n in column] for column in zip(*rows, strict=True)
    )
    shares = (0.6, 0.3, 0.1)
    assert nats[3] == pytest.approx(sum(w * loss for w, loss in zip(shares, nats, strict=False)), abs=2e-4)
    assert nats[3] == pytest.approx(losses(run, "val_loss")[6], abs=2e-4)
    per_token = sum(w * b / n for w, b, n in zip(shares, size, tokens, strict=False))
    assert bits[3] == pytest.approx(nats[3] / math.log(2) / per_token, abs=2e-3)
    assert bits[3] == pytest.approx(losses(run, "val_bpb")[6], abs=2e-4)
    assert tokens[3] == sum(tokens[:3]) and documents[3] == sum(documents[:3])


def test_evaluation_on_the_first_documents_of_each_source(sources):
    folder = make(sources)
    text, decode = open_shards(folder, "val"), Tokenizer.load(folder).decode
    first = text.prefix(1000, decode)
    counts = [shards.tokens for shards, _ in first.parts]
    assert all(n <= count < n + 700 for n, count in zip((600, 300, 100), counts, strict=True))
    assert first.tokens == sum(counts) and first.num_targets < text.num_targets
    assert text.prefix(0, decode) is text is text.prefix(10**9, decode)
