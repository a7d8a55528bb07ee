"""Batches of conversations: every answer is a target once per epoch and nothing else, and the loss is their mean."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from data import chat_format, shards
from data.loader import Conversations, validation
from data.prepare import prepare
from data.shards import ShardError, Shards
from data.tokenizer import Tokenizer
from kernels.reference_attention import IGNORE_INDEX
from model import GPT
from tests.conftest import ROOT, SMALL, TINY, USER_ENV, losses, randomized
from tests.data.test_chat_format import line


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """160 conversations of one to four questions, some of them long, in two files."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for n in range(160):
        turns = []
        for q in range(n % 4 + 1):
            turns.append(("user", f"{n}: what is {q} times {n % 9}?" + " Tell me." * (n % 13)))
            turns.append(("assistant", f"It is {q * (n % 9)}."))
        rows.append(line(*turns, id=n))
    (folder / "a.jsonl").write_text("\n".join(rows[:90]) + "\n")
    (folder / "b.jsonl").write_text("\r\n".join(rows[90:]))
    return folder


@pytest.fixture
def prepared(questions, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(shards, "SHARD", 3000)  # several files
    return prepare(
        str(questions), format="chat", tokenizer="byte", val_fraction=0.2, cache=tmp_path, log=lambda _: None
    )


def answers(questions: Path) -> list[str]:
    rows = [json.loads(row) for file in sorted(questions.iterdir()) for row in file.read_text().split("\n") if row]
    return [turn["content"] for row in rows for turn in row["messages"] if turn["role"] == "assistant"]


def targets_of(tokenizer: Tokenizer, y: torch.Tensor) -> list[str]:
    """The answers decoded from the targets, in order. Each must end with its end token."""
    end = chat_format.special_tokens(tokenizer)[1]
    parts = [[]]
    for i in y[y != IGNORE_INDEX].tolist():
        parts.append([]) if i == end else parts[-1].append(i)
    assert parts.pop() == []
    return [tokenizer.decode(part) for part in parts]


@pytest.mark.parametrize("context", [16, 64, 1200, 5000])
def test_every_answer_is_a_target_once_per_epoch_and_once_in_validation(prepared, questions, context):
    tokenizer, texts = Tokenizer.load(prepared), []
    for split in ("train", "val"):
        part = Shards(prepared, split)
        assert len(part.manifest.splits["train"]["shards"]) > 2
        batches = list(validation(part, context, 3, part.manifest.eot))
        assert all(x.shape == y.shape and x.shape[1] == context and len(x) <= 3 for x, y in batches)
        x, y = (torch.cat(rows) for rows in zip(*batches, strict=True))
        found = targets_of(tokenizer, y.flatten())
        assert part.num_targets == int((y != IGNORE_INDEX).sum()) == sum(len(text.encode()) + 1 for text in found)
        assert part.bytes == sum(len(text.encode()) for text in found)
        texts += found
        loader = Conversations(part, context=context, seed=3)
        if loader.num_sequences > 1:
            for epoch in range(2):  # one sequence per step
                steps = [loader.batch(epoch * loader.num_sequences + n, 1) for n in range(loader.num_sequences)]
                rows = sorted((*a[0].tolist(), *b[0].tolist()) for a, b in steps)
                assert rows == sorted((*a.tolist(), *b.tolist()) for a, b in zip(x, y, strict=True))
        if context >= 1200:  # longer than any conversation
            assert bool((x[:, 0] == chat_format.special_tokens(tokenizer)[0]).all())
    assert sorted(texts) == sorted(answers(questions))


def test_batch_is_a_function_of_seed_step_and_rank(prepared):
    part = Shards(prepared, "train")
    whole = Conversations(part, context=64, seed=5)
    for step in (7, 0, 40):
        x, y = whole.batch(step, 12)
        shares = [Conversations(part, context=64, seed=5).batch(step, 12, rank, 3) for rank in range(3)]
        assert torch.equal(torch.cat([a for a, _ in shares]), x) and torch.equal(torch.cat([b for _, b in shares]), y)
    assert not torch.equal(Conversations(part, context=64, seed=6).batch(0, 12)[0], whole.batch(0, 12)[0])


def test_damaged_mask_file_is_reported(prepared):
    file = prepared / "train-00001.mask"
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)
    with pytest.raises(ShardError, match=r"train-00001.mask: is damaged"):
        Shards(prepared, "train")
    assert shards.is_complete(prepared)
    file.write_bytes(content[:-1])
    assert not shards.is_complete(prepared)


# Training -----------------------------------------------------------------------------------------------------------


def test_only_answers_have_gradients(prepared):
    part = Shards(prepared, "train")
    x, y = Conversations(part, context=32, seed=1).batch(0, 16)
    model = randomized(type(TINY)(**{**vars(TINY), "vocab_size": part.manifest.vocab_size}))
    seen = []  # inputs of the head, (B, T, C)

    def keep(_module, _inputs, out):
        out.retain_grad()
        seen.append(out)

    model.model.norm.register_forward_hook(keep)
    model.loss(x, y).backward()
    moved = seen[0].grad.abs().sum(-1) > 0  # (B, T): positions with a gradient
    assert torch.equal(moved, y != IGNORE_INDEX) and moved.any() and not moved.all()


def test_loss_is_the_mean_over_answers_for_any_micro_batch_size(run_training, questions, monkeypatch):
    """Compared with one cross-entropy over the whole batch; micro-batches have different numbers of answers."""
    words = [f"--data.source={questions}", "--data.format=chat", "--data.tokenizer=byte", "--train.steps=3"]
    batches, batch = [], Conversations.batch
    monkeypatch.setattr(Conversations, "batch", lambda self, *a: (batches.append(batch(self, *a)), batches[-1])[1])
    at_once = run_training("chat-at-once", *words, "--train.num_evals=1", "--train.micro_batch_size=8")
    one_by_one = run_training("chat-one-by-one", *words, "--train.num_evals=1", "--train.micro_batch_size=1")
    counts = (batches[0][1] != IGNORE_INDEX).sum(1)
    assert counts.min() != counts.max()
    assert losses(one_by_one) == pytest.approx(losses(at_once), rel=1e-4)
    config = train.load(str(at_once / "config.toml")).model
    torch.manual_seed(0)
    logits = GPT(config)(batches[0][0])
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batches[0][1].flatten(), ignore_index=IGNORE_INDEX
    )
    assert losses(at_once)[1] == pytest.approx(float(expected), rel=1e-4)


def test_two_processes_with_unequal_numbers_of_answers_equal_one_process(run_training, questions, tmp_path):
    words = [f"--data.source={questions}", "--data.format=chat", "--train.steps=4", "--train.num_evals=1"]
    alone = run_training("chat-alone", *words)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "train.py"),
         "shakespeare", "--name=chat-both", *SMALL, *words],
        cwd=ROOT, env=USER_ENV | {"HEED_RUNS": str(tmp_path), "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for key in ("loss", "val_loss"):
        assert losses(tmp_path / "chat-both", key) == pytest.approx(losses(alone, key), rel=1e-4)


def test_resume_on_conversations_is_bitwise_equal(run_training, questions, monkeypatch):
    words = [f"--data.source={questions}", "--data.format=chat", "--train.steps=6", "--train.num_evals=2"]
    whole = run_training("chat-whole", *words)
    real = train.validate
    monkeypatch.setattr(train, "validate", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        run_training("chat-killed", *words)
    monkeypatch.setattr(train, "validate", real)
    killed = run_training("chat-killed", *words, "--resume")
    assert losses(killed) == losses(whole) and len(losses(killed)) == 6
    assert re.search(r"im_end", (killed / "tokenizer.json").read_text())
