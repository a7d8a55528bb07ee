"""Chapter 9 as a user follows it: training on a folder of texts, fine-tuning to chat, and `sample.py --chat`."""

import itertools
import json
from pathlib import Path

import pytest

from sample import load
from tests.conftest import losses, train_here

SHAPE = [
    "--model.n_layer=2", "--model.n_embd=64", "--model.n_head=4", "--model.n_kv_head=2", "--model.head_dim=16",
    "--model.n_ffn=128",
]  # fmt: skip
QUICK = ["--model.context=64", "--train.compile=off", "--train.dtype=float32", "--train.micro_batch_size=16"]
WORDS = ["red", "blue", "green", "tall", "small", "happy", "old", "new", "cat", "dog", "bird", "moon", "sun", "tree"]


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A runs/ folder with `notes`, trained on a folder of text files, and `assistant`, which that became."""
    where = tmp_path_factory.mktemp("own")
    notes = where / "my-notes"
    (notes / "2024").mkdir(parents=True)
    pairs = [" ".join(pair) for pair in itertools.product(WORDS, WORDS)]
    for day in range(28):
        file = notes / ("2024" if day % 2 else "") / f"day-{day}.{'md' if day % 3 else 'txt'}"
        file.write_text("".join(f"Today I saw the {pair}, {pair}.\n" for pair in pairs[day::28]))
    train_here(
        where, "shakespeare", "--data.source", str(notes), "--name", "notes", *SHAPE, *QUICK, "--data.vocab_size=340",
        "--train.batch_tokens=1024", "--train.steps=40", "--train.num_evals=1", "--train.prompt=Today",
    )  # fmt: skip

    chats = where / "chat.jsonl"
    with chats.open("w") as file:
        for number, pair in enumerate(pairs * 4):
            system = [{"role": "system", "content": f"Number {number}."}] if number % 3 == 0 else []
            turns = [{"role": "user", "content": f"say {pair}"}, {"role": "assistant", "content": pair}]
            file.write(json.dumps({"messages": system + turns}) + "\n")
    train_here(
        where, "chat", "--init-from", str(where / "notes"), "--data.source", str(chats), "--name", "assistant",
        *QUICK, "--optim.lr=0.01", "--optim.muon_lr=0.02", "--train.batch_tokens=1024", "--train.steps=90",
        "--train.num_evals=1", "--train.prompt=say red cat",
    )  # fmt: skip
    return where


def test_a_folder_of_texts_becomes_a_model_that_generates_such_text(own, sample_py):
    done = sample_py("--run", str(own / "notes"), "--prompt", "Today", "--greedy", "--max-new-tokens", "40", where=own)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Today I saw the")
    assert losses(own / "notes")[40] < losses(own / "notes")[1] - 2


def test_the_assistant_answers_and_keeps_the_conversation(own, sample_py):
    run = own / "assistant"
    assert losses(run, "val_loss")[90] < 0.1
    model, tokenizer = load(run)
    assert model.config.vocab_size == tokenizer.vocab_size == load(own / "notes")[1].vocab_size + 2
    ask = ["--run", str(run), "--chat", "--greedy"]
    once = sample_py(*ask, "--prompt", "say blue moon", where=own)
    assert (once.returncode, once.stdout) == (0, "blue moon\n"), once.stderr
    assert "tokens in" in once.stderr
    turns = "say happy dog\nsay old sun\nsay new tree\n"
    talk = sample_py(*ask, "--system", "Number 5.", where=own, stdin=turns)
    assert talk.returncode == 0, talk.stderr
    assert talk.stdout.splitlines()[0] == "> happy dog"
    assert talk.stdout.count("> ") == 4
    assert "<|" not in talk.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--chat"],
            "has no <|im_start|> and <|im_end|>: it was not trained to chat; train it with python train.py chat",
        ),
        (["--system", "Be brief."], "--system 'Be brief.': needs --chat"),
    ],
)
def test_what_cannot_be_is_one_line(runs, words, message, sample_py):
    done = sample_py(*words, where=runs, stdin="hi\n")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("sample.py: ") and message in done.stderr and done.stderr.count("\n") == 1
