"""python -m evals RUN --needle: a model that looks the answer up finds it wherever it can look, and nowhere else."""

import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch

from data.tokenizer import Tokenizer
from evals import __main__ as evaluate
from evals import needle
from evals.loglikelihood import score
from tests.conftest import TINY, randomized

PROSE = "the quick brown foxes jumped over seven lazy sleeping dogs while many green birds watched from those branches "


class Text(SimpleNamespace):
    """What `needle` asks of Shards, of tokens in memory."""

    def __init__(self, tokenizer: Tokenizer, documents: int = 40) -> None:
        ids = [token for n in range(documents) for token in (*tokenizer.encode(f"{n} {PROSE}"), tokenizer.eot)]
        super().__init__(ids=torch.tensor(ids), tokens=len(ids))

    def read(self, start: int, length: int):
        return self.ids[(torch.arange(start, start + length)) % self.tokens].numpy()


class LooksUp:
    """A model that continues as the text did after the longest earlier match of its last tokens, of those that begin
    at most `reach` tokens ago: what a perfect induction head does (Olsson et al. 2022, arXiv 2209.11895)."""

    def __init__(self, vocab_size: int, context: int, reach: int) -> None:
        self.config, self.reach, self.V = SimpleNamespace(context=context), reach, vocab_size
        self.head = lambda logits: logits
        self.model = self.look_up
        self.look_up.__func__.cos = torch.zeros(1)

    def look_up(self, tokens: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(*tokens.shape, self.V)
        for row, ids in enumerate(tokens.tolist()):
            for t in range(len(ids) - 12, len(ids)):  # the last ones alone are asked for
                best, found = 0, None
                for s in range(max(0, t - self.reach), t):
                    match = 0
                    while match <= s and ids[s - match] == ids[t - match]:
                        match += 1
                    if match > best:
                        best, found = match, ids[s + 1]
                if found is not None:
                    out[row, t, found] = 20.0
        return out


TOKENIZERS = {
    "byte": lambda: Tokenizer.train("byte", []),
    "char": lambda: Tokenizer.train("char", [PROSE + "\nThe word of 0123456789."]),
    "bpe": lambda: Tokenizer.train("bpe", [PROSE * 9, "The word of it is so.\n" * 9], 290),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_model_that_looks_the_answer_up_finds_every_needle(kind):
    tokenizer = TOKENIZERS[kind]()
    model = LooksUp(tokenizer.vocab_size, 200, reach=200)
    cells = needle.evaluate(model, tokenizer, Text(tokenizer), [120, 200], 3)
    assert [(c.length, c.depth) for c in cells] == [(n, d) for n in (120, 200) for d in needle.DEPTHS]
    assert all(c.exact == c.choice == 1 and c.gain > 15 for c in cells)


def test_a_window_that_is_too_short_fails_exactly_beyond_it():
    tokenizer = TOKENIZERS["byte"]()
    model = LooksUp(tokenizer.vocab_size, 400, reach=95)
    cells = needle.evaluate(model, tokenizer, Text(tokenizer), [90, 400], 4)
    # Of 400 bytes the needle is within the last 95 at depth 1 alone: at 0.75, 80 of the text and the question follow.
    assert {(c.length, c.depth): c.exact for c in cells} == {
        (n, d): float(n == 90 or d == 1) for n in (90, 400) for d in needle.DEPTHS
    }
    assert all(c.choice < 1 for c in cells if not c.exact)


@pytest.mark.parametrize(("pattern", "layers"), [("L", 1), ("S", 1), ("S", 3)])
def test_a_real_model_reads_the_needle_exactly_within_its_receptive_field(pattern, layers):
    """Layers with a window of W see layers * (W - 1) tokens back: beyond, the needle changes no bit of the score."""
    tokenizer, window = TOKENIZERS["byte"](), 40
    limited = {"layer_pattern": pattern, "window": window if pattern == "S" else 0}
    model = randomized(dataclasses.replace(TINY, vocab_size=257, context=256, n_layer=layers, **limited))
    text, words = Text(tokenizer), needle.words_of(Text(tokenizer), tokenizer)
    read = []
    for depth in needle.DEPTHS:
        (context, word), *_ = needle.item(text, tokenizer, words, 250, depth, random.Random(0))
        told = [*tokenizer.encode(" is"), *word]
        answer = next(at for at in range(250) if context[at : at + len(told)] == told) + 4  # its first letter
        changed = [*context[:answer], context[answer] ^ 1, *context[answer + 1 :]]
        one, other = score(model, [(context, word)])[0].logprob, score(model, [(changed, word)])[0].logprob
        away = len(context) + len(word) - 2 - answer  # of the last position that predicts
        # Within reach of the last position that predicts; a word that begins within it may end beyond it.
        assert (one != other) == (pattern == "L" or away <= layers * (window - 1)), (depth, away)
        read.append(one != other)
    expected = {("L", 1): [True] * 5, ("S", 1): [False] * 4 + [True], ("S", 3): [False] * 3 + [True] * 2}
    assert read == expected[pattern, layers]


def test_an_item():
    tokenizer = TOKENIZERS["byte"]()
    text = Text(tokenizer)
    words = needle.words_of(text, tokenizer)
    assert "quick" in words and "the" not in words and words == sorted(set(words))
    for depth in needle.DEPTHS:
        requests = needle.item(text, tokenizer, words, 150, depth, random.Random(1))
        context = requests[0][0]
        written = [tokenizer.decode(word) for _, word in requests]
        key = tokenizer.decode(context).rpartition("\nThe word of ")[2].removesuffix(" is")
        sentence = f"\nThe word of {key} is{written[0]}.\n"
        assert context[0] == tokenizer.eot and tokenizer.eot not in context[1:]
        assert len(context) + max(len(word) for _, word in requests) == 150
        assert len(set(written)) == needle.CANDIDATES and f" {key}" not in written
        before, _, after = tokenizer.decode(context[1:]).partition(sentence)
        room = len(before) + len(after) - len(f"\nThe word of {key} is")
        assert len(before) == round(depth * room)
        assert all(context == other for other, _ in requests)


def test_a_model_that_does_not_read_has_the_chance_of_a_guess():
    tokenizer = TOKENIZERS["byte"]()

    def guesses(model, requests):
        draw = random.Random(0)
        return [needle.Score(draw.random(), False) for _ in requests]

    model = SimpleNamespace(config=SimpleNamespace(context=150))
    (*cells,) = needle.evaluate(model, tokenizer, Text(tokenizer), [150], 500, guesses)
    for cell in cells:
        assert cell.exact == 0 and abs(cell.choice - 1 / needle.CANDIDATES) < 0.08 and abs(cell.gain) < 0.06


def test_what_cannot_be_asked_is_named():
    tokenizer = TOKENIZERS["byte"]()
    model, text = SimpleNamespace(config=SimpleNamespace(context=150)), Text(tokenizer)
    with pytest.raises(ValueError, match=r"^--lengths 151: must be from 1 to model.context = 150$"):
        needle.evaluate(model, tokenizer, text, [100, 151], 1)
    with pytest.raises(ValueError, match=r"^--lengths 40: needle and question alone need \d+ tokens$"):
        needle.evaluate(model, tokenizer, text, [40], 1)
    rare, item_words = Text(tokenizer), needle.words_of(text, tokenizer)
    rare.ids[:] = tokenizer.eot  # documents without a token
    with pytest.raises(ValueError, match=r"^--needle: the text has special tokens only from token [\d,]+ on"):
        needle.item(rare, tokenizer, item_words, 100, 0.5, random.Random(0))
    few = Text(tokenizer)
    few.ids = few.ids[:30]
    few.tokens = 30
    with pytest.raises(ValueError, match=r"^--needle: the text has \d different words of 4 to 8 letters"):
        needle.evaluate(model, tokenizer, few, [100], 1)


def test_the_command(runs, tmp_path, capsys, monkeypatch):
    run, words = str(runs / "songs"), tmp_path / "words.txt"
    words.write_text(PROSE * 40)
    few = ["--items=2", "--lengths=32", f"--text={words}"]
    assert evaluate.main([run, "--needle", *few, f"--out={tmp_path}"]) in (0, 2)
    told = capsys.readouterr()
    assert "needle and question alone need" in told.err or "exact" in told.out
    file = tmp_path / "file"
    file.write_text("")
    with monkeypatch.context() as patch:  # before the evaluation
        patch.setattr(evaluate, "load", lambda *_: 1 / 0)
        for out, why in ((file, f"{file}: File exists"), (file / "more", f"{file / 'more'}: Not a directory")):
            assert evaluate.main([run, "--needle", f"--out={out}"]) == 2
            assert capsys.readouterr().err == f"evals: {why}\n"
    for wrong, why in (
        (["--needle", "--lengths=33"], "--lengths 33: must be from 1 to model.context = 32"),
        (["--needle", "--items=0"], "--items 0: must be at least 1"),
        (["--lengths=5"], "--lengths, --items and --out: go with --needle"),
        (["--needle", "--tasks=docs/example_tasks.jsonl"], "goes with one --text at most, and without --tasks"),
    ):
        assert evaluate.main([run, *wrong]) == 2
        assert why in capsys.readouterr().err
