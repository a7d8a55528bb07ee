"""Evaluation compared with a direct computation from transformers' logits for the same weights."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch

from data.tokenizer import Tokenizer
from evals import __main__ as evaluate
from evals import loglikelihood, tasks
from model import GPT, ModelConfig
from sample import load
from tests.conftest import SMALL, TINY, command, losses, randomized, train_here
from tests.test_model import qwen3


def transformers_logprobs(model: GPT, ids: list[int]) -> torch.Tensor:
    """log P(token | ids[..i]) from transformers, for each position i and each token: (len(ids) - 1, V)."""
    theirs = qwen3(model.config)
    theirs.load_state_dict(model.state_dict(), strict=False)
    theirs.tie_weights()
    with torch.no_grad():
        return theirs(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(1)  # (T, V)


def expected_score(model: GPT, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    seen = (context + continuation)[-model.config.context - 1 :]
    table = transformers_logprobs(model, seen)[-len(continuation) :]
    rows = torch.arange(len(continuation))
    return table[rows, continuation].sum().item(), table.argmax(1).tolist() == continuation


# Continuations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [8192, 60, 1])
def test_scores_for_any_batch_size(batch, monkeypatch):
    monkeypatch.setattr(loglikelihood, "BATCH", batch)
    model = randomized(TINY, seed=2)
    draw = torch.Generator().manual_seed(3)
    sizes = [(1, 1), (5, 3), (31, 1), (32, 1), (80, 1), (29, 7), (1, 32), (200, 32), (12, 2)]  # a context holds 32
    requests = [tuple(torch.randint(0, 97, (n,), generator=draw).tolist() for n in pair) for pair in sizes]
    likeliest = transformers_logprobs(model, [*requests[1][0], 0])[-1].argmax().item()
    requests += [(requests[1][0], [likeliest, 0, 0]), (requests[1][0], [likeliest])]
    for (context, continuation), (logprob, greedy) in zip(requests, loglikelihood.score(model, requests), strict=True):
        expected = expected_score(model, context, continuation)
        assert logprob == pytest.approx(expected[0], abs=1e-3)
        assert greedy == expected[1]
    assert [s.greedy for s in loglikelihood.score(model, requests)[-2:]] == [False, True]


@pytest.mark.parametrize("length", [0, 33])
def test_invalid_continuation_raises(length):
    with pytest.raises(ValueError, match=rf"^{length} tokens to score: must be 1 to model.context = 32"):
        loglikelihood.score(randomized(TINY), [([1], [2] * length)])


def test_split_of_context_and_continuation():
    tokenizer = Tokenizer.train("bpe", ["the cat and the cats sat on the mat"] * 9, 290)
    the, cat = tokenizer.encode("the"), tokenizer.encode(" cat")
    assert len(the) == len(cat) == 1
    assert loglikelihood.split(tokenizer, "the", " cat") == (the, cat)
    assert loglikelihood.split(tokenizer, "the ", "cat") == (the, cat)  # the space belongs to the word
    assert loglikelihood.split(tokenizer, "", "the") == ([tokenizer.eot], the)
    assert loglikelihood.split(tokenizer, " ", "cat") == ([tokenizer.eot], cat)
    context, continuation = loglikelihood.split(
        tokenizer, "the ca", "t"
    )  # split by token count where there is no token boundary
    assert len(context) == len(tokenizer.encode("the ca"))
    assert continuation == tokenizer.encode("the cat")[len(context) :]


# Tasks --------------------------------------------------------------------------------------------------------------

ITEMS = [
    {"task": "lambada", "text": "a dog saw the other dog"},
    {"task": "lambada", "text": "one\ntwo three ", "id": 7},
    {"task": "lambada", "text": "x y"},
    {"task": "cloze", "text": "the ____ sat.", "choices": ["cat", "elephant", "é"], "answer": 1},
    {"task": "cloze", "text": "____ is", "choices": ["this", "it"], "answer": 0},
    {"task": "choice", "prompt": "grass is", "choices": ["green", "of a bluish kind"], "answer": 1},
    {"task": "choice", "prompt": "Q: why?\n", "choices": ["so", " because"], "answer": 0},
    {"task": "choice", "prompt": "", "choices": ["b", "a", "longer"], "answer": 2},
]

# (before, options as they continue it, their bytes)
SPELLED = [
    ("the", [" cat sat.", " elephant sat.", " é sat."], [8, 13, 7]),
    ("", ["this is", "it is"], [7, 5]),
    ("grass is", [" green", " of a bluish kind"], [5, 16]),
    ("Q: why?", ["\nso", "\n because"], [2, 7]),
    ("", ["b", "a", "longer"], [1, 1, 6]),
]


@pytest.fixture
def items(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(json.dumps(item) for item in ITEMS[:4]) + "\n\n" + "\n".join(map(json.dumps, ITEMS[4:])))
    return path


def test_task_results(items):
    tokenizer = Tokenizer.train("byte", [])  # one token per byte
    model = randomized(ModelConfig(**{**vars(TINY), "vocab_size": 257, "context": 64}), seed=5)

    def logprob(before: str, after: str) -> tuple[float, bool]:
        return expected_score(model, tokenizer.encode(before) or [tokenizer.eot], tokenizer.encode(after))

    words = [logprob("a dog saw the other", " dog"), logprob("one\ntwo", " three"), logprob("x", " y")]
    right: dict[str, list[tuple[bool, bool]]] = {"cloze": [], "choice": []}
    for item, (before, options, sizes) in zip(ITEMS[3:], SPELLED, strict=True):
        p = np.array([logprob(before, option)[0] for option in options])
        right[item["task"]].append((p.argmax() == item["answer"], (p / np.array(sizes)).argmax() == item["answer"]))
    read = tasks.read(items)
    for item, (before, options, sizes) in zip(read[3:], SPELLED, strict=True):
        assert [context + continuation for context, continuation in item.options] == [before + o for o in options]
        assert [tasks.size(option) for option in item.options] == sizes
    lambada, cloze, choice = tasks.evaluate(model, tokenizer, read)

    nll = -np.array([p for p, _ in words])
    assert lambada.perplexity.value == pytest.approx(np.exp(nll.mean()), rel=1e-3)
    assert lambada.perplexity.error == pytest.approx(np.exp(nll.mean()) * nll.std(ddof=1) / 3**0.5, rel=1e-3)
    assert lambada.accuracy.value == np.mean([greedy for _, greedy in words])
    for result in (cloze, choice):
        plain, per_byte = np.array(right[result.task], dtype=float).T
        assert (result.accuracy.value, result.per_byte.value) == (plain.mean(), per_byte.mean())
        assert result.accuracy.error == pytest.approx(plain.std(ddof=1) / len(plain) ** 0.5)
        assert result.items == len(plain)
    assert any(a != b for pairs in right.values() for a, b in pairs)  # the length normalization makes a difference


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", "task = None: must be one of lambada, cloze, choice"),
        ('{"task": "quiz"}', "task = 'quiz': must be one of lambada, cloze, choice"),
        ('{"task": "lambada"}', "text = None: must be a string"),
        ('{"task": "lambada", "text": " word "}', "text = ' word ': must have a word and text before it"),
        ('{"task": "cloze", "text": "no", "choices": ["a", "b"], "answer": 0}', "text = 'no': must contain ____"),
        ('{"task": "choice", "prompt": "a", "choices": "ab", "answer": 0}', "choices = 'ab': must be a list of str"),
        (
            '{"task": "choice", "prompt": "a", "choices": ["a", " "], "answer": 0}',
            "choices = ['a', ' ']: must be two or",
        ),
        ('{"task": "choice", "prompt": "a", "choices": ["a", "b"], "answer": 2}', "answer = 2: must be from 0 to 1"),
        ('{"task": "choice", "prompt": "a", "choices": ["a", "b"], "answer": true}', "answer = True: must be a whole"),
    ],
)
def test_invalid_line_is_reported(line, message, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(ITEMS[0]) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"bad.jsonl, line 3: {re.escape(message)}"):
        tasks.read(path)


# Texts and the command ----------------------------------------------------------------------------------------------


def printed(capsys, *words) -> list[list[str]]:
    """The rows printed by the command, without the header."""
    assert evaluate.main([str(word) for word in words]) == 0
    return [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()[1:]]


def test_default_is_the_validation_split_of_training(runs, capsys):
    loss = losses(runs / "songs", "val_loss")[30]
    bits = losses(runs / "songs", "val_bpb")[30]
    (row,) = printed(capsys, runs / "songs", "--checkpoint", "latest")
    assert row[0].endswith("songs.txt (validation)")
    assert row[4:] == [f"{loss:.4f}", f"{math.exp(loss):,.2f}", f"{bits:.4f}"]


def test_a_run_keeps_the_tokenizer_that_it_was_started_with(runs, text, tmp_path, capsys):
    """The run that it began from may be gone."""
    shutil.copytree(runs / "songs", tmp_path / "songs")
    flags = [*SMALL, f"--data.source={text}", "--train.steps=1", "--train.num_evals=1"]
    tuned = train_here(tmp_path, "shakespeare", "--name=tuned", f"--init-from={tmp_path / 'songs'}", *flags)
    shutil.rmtree(tmp_path / "songs")
    capsys.readouterr()
    (row,) = printed(capsys, tuned)
    assert row[4] == f"{losses(tuned, 'val_loss')[1]:.4f}"


def test_text_results(runs, text, tmp_path, capsys):
    model, tokenizer = load(runs / "songs")
    documents = [f"{part}\n" for part in ("Song 1: the birds.\r\nAnd the bees", "No song, naïve", "x")]
    (tmp_path / "a.txt").write_bytes("<|endoftext|>\n".join(documents).encode())
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"body": part.replace("\r", "")}) for part in documents[:2]))
    ids = [i for document in documents for i in (*tokenizer.encode(document.replace("\r", "")), tokenizer.eot)]
    inputs = [tokenizer.eot, *ids]
    total = 0.0
    for start in range(0, len(ids), 32):  # the run's context
        window = inputs[start : start + 33]
        total -= transformers_logprobs(model.cpu(), window)[range(len(window) - 1), window[1:]].sum().item()
    size = len("".join(documents).replace("\r", "").encode())

    whole, table = (tmp_path / name for name in ("a.txt", "b.jsonl"))
    (row,) = printed(capsys, runs / "songs", "--text", whole)
    assert row[:4] == [str(whole), str(len(ids)), str(size), "3"]
    assert float(row[4]) == pytest.approx(total / len(ids), abs=2e-4)
    assert float(row[5]) == pytest.approx(math.exp(total / len(ids)), rel=1e-3)
    assert float(row[6]) == pytest.approx(total / size / math.log(2), abs=2e-4)

    rows = printed(capsys, runs / "songs", "--text", table, whole, "--text-column", "body", "--limit", "2")
    assert [row[3] for row in rows] == ["2", "2"]
    assert rows[0][1:] == rows[1][1:]


def test_tasks_after_a_text_run_without_dropout(runs, items, monkeypatch):
    training = []
    monkeypatch.setattr(tasks, "evaluate", lambda model, *_: training.append(model.training) or [])
    assert evaluate.main([str(runs / "songs"), "--text", str(items), "--tasks", str(items)]) == 0
    assert training == [False]


def test_command_with_tasks_skips_the_validation_split(runs, items):
    done = command("evals", str(runs / "songs"), "--tasks", str(items), where=runs)
    assert done.returncode == 0, done.stderr
    rows = [re.split(r"\s{2,}", line) for line in done.stdout.splitlines()]
    assert rows[0] == ["file", "task", "items", "accuracy", "accuracy per byte", "perplexity"]
    assert [row[:3] for row in rows[1:]] == [[str(items), task, n] for task, n in
                                             (("lambada", "3"), ("cloze", "2"), ("choice", "3"))]  # fmt: skip
    assert re.fullmatch(r"[\d,.]+ ± [\d,.]+", rows[1][5])
    assert rows[2][3] in ("0.000 ± 0.000", "0.500 ± 0.500", "1.000 ± 0.000")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], "none: no such run"),
        (["RUN", "--text", "no.txt"], "--text 'no.txt': no such file; give a path"),
        (["RUN", "--text", "ROWS"], "--text-column 'text': must be a column of '"),
        (["RUN", "--limit", "-1"], "--limit -1: must be at least 0"),
        (["RUN", "--items", "5"], "--lengths, --items and --out: go with --needle"),
        (["RUN", "--needle", "--items", "0"], "--items 0: must be at least 1"),
        (["BARE"], "bare: is not the folder of a run: there is no "),
        (["IMPORTED"], "imported was imported and has no validation text; give --text FILE"),
        (["IMPORTED", "--needle"], "imported was imported and has no validation text; give --text FILE"),
        (["RUN", "--tasks", "no.jsonl"], "no.jsonl: cannot be read"),
        (["RUN", "--tasks", "LONG"], "long.jsonl, line 1: 81 tokens to score: must be 1 to model.context = 32"),
        (["RUN", "--tasks", "EMPTY"], "empty.jsonl: has no items"),
        (["CHANGED"], "changed: data.source = 'kjv.txt' has changed since; name a --text"),
    ],
)
def test_errors_are_one_line(words, message, runs, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"task": "lambada", "text": "a " + "\U0001f642" * 20}))
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "kjv.txt").write_text("<|endoftext|>\n".join(f"Verse {n} of many.\n" for n in range(500)))
    changed = tmp_path / "changed"
    shutil.copytree(runs / "songs", changed)
    bare, imported = (shutil.copytree(changed, tmp_path / name) for name in ("bare", "imported"))
    (bare / "config.toml").unlink()
    for file in imported.glob("*/state.json"):
        state = json.loads(file.read_text())
        state["identity"]["text"] = ""  # as `convert from-hf` writes it
        file.write_text(json.dumps(state))
    config = (changed / "config.toml").read_text()
    (changed / "config.toml").write_text(re.sub(r'(?m)^source = ".*"', 'source = "kjv.txt"', config))
    places = {"RUN": runs / "songs", "ROWS": "rows.jsonl", "LONG": "long.jsonl", "EMPTY": "empty.jsonl",
              "CHANGED": changed, "BARE": bare, "IMPORTED": imported}  # fmt: skip
    assert evaluate.main([str(places.get(word, word)) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("evals: ")
    assert error.count("\n") == 1
