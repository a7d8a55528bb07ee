"""train.eval_tokens: evaluation on the first documents, the whole validation text at the end."""

import math

import pytest

import train
from data.prepare import prepare
from data.shards import TARGET, Shards
from data.tokenizer import Tokenizer
from tests.conftest import losses
from training import checkpoint, metrics


@pytest.fixture(scope="module")
def val(runs):
    folder = prepare(**train.load(str(runs / "songs" / "config.toml")).data.preparation)
    return Shards(folder, "val"), Tokenizer.load(folder / "tokenizer.json")


def test_the_prefix_is_of_whole_documents_with_their_bytes(val):
    shards, tokenizer = val
    ids = shards.read(0, shards.tokens).tolist()
    ends = [at + 1 for at, token in enumerate(ids) if token == tokenizer.eot]
    for asked in (1, 5, ends[0] - 1, ends[0], ends[0] + 1, ends[3], shards.tokens - 1):
        part = shards.prefix(asked, tokenizer.decode)
        assert part.tokens == part.num_targets == min(end for end in ends if end >= asked)
        assert part.bytes == len(tokenizer.decode(ids[: part.tokens]).encode())
        assert part.read(0, part.tokens).tolist() == ids[: part.tokens]
    assert shards.prefix(ends[0], tokenizer.decode).tokens < shards.tokens
    for all_of_it in (0, shards.tokens, shards.tokens + 1, 10**15):
        assert shards.prefix(all_of_it, tokenizer.decode) is shards


def test_all_documents_together_have_the_bytes_of_the_split(val):
    shards, tokenizer = val
    ids = shards.read(0, shards.tokens).tolist()
    last = max(at for at, token in enumerate(ids[:-1]) if token == tokenizer.eot) + 1
    head = shards.prefix(last, tokenizer.decode)
    assert head.bytes + len(tokenizer.decode(ids[last:]).encode()) == shards.bytes


def test_of_conversations_the_answers_count(tmp_path):
    import json

    turns = [
        {"messages": [{"role": "user", "content": f"Song {n}?"}, {"role": "assistant", "content": f"{n} bées!"}]}
        for n in range(60)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    folder = prepare(
        str(tmp_path / "chat.jsonl"), format="chat", val_fraction=0.3, tokenizer="byte", cache=tmp_path / "cache"
    )
    shards, tokenizer = Shards(folder, "val"), Tokenizer.load(folder / "tokenizer.json")
    starts = shards.conversations().tolist()
    part = shards.prefix(starts[2] - 3, tokenizer.decode)
    assert part.tokens == starts[2] and part.conversations().tolist() == starts[:3]
    assert part.num_targets == int((shards.read_mask(0, starts[2]) == TARGET).sum())
    targets = shards.read(0, starts[2])[shards.read_mask(0, starts[2]) == TARGET]
    assert part.bytes == len(tokenizer.decode(targets.tolist()).encode()) == part.num_targets - 2  # two end marks


def test_a_run_evaluates_on_the_prefix_and_on_everything_at_the_end(run_training, val, capsys):
    words = ("--train.steps=4", "--train.num_evals=2")
    whole = run_training("whole", *words)
    run = run_training("part", *words, "--train.eval_tokens=200")
    said = capsys.readouterr().out
    assert losses(run) == losses(whole)
    assert list(losses(run, "val_loss")) == [2, 4]
    assert losses(run, "val_loss") != losses(whole, "val_loss")
    assert losses(run, "full_val_loss") == {4: losses(whole, "val_loss")[4]}
    assert losses(run, "full_val_bpb") == {4: losses(whole, "val_bpb")[4]}
    assert f"\nval_loss: {losses(run, 'full_val_loss')[4]:.4f}\n" in said
    part = val[0].prefix(200, val[1].decode)
    for step, loss in losses(run, "val_loss").items():
        assert losses(run, "val_bpb")[step] == pytest.approx(loss * part.num_targets / part.bytes / math.log(2))
    run_training("part", *words, "--train.eval_tokens=200", "--resume")
    assert len([r for r in metrics.read(run / "metrics.jsonl") if "full_val_loss" in r]) == 1
    assert checkpoint.read_state(checkpoint.find(run, "latest"))["step"] == 4
