"""Continuous batching: each sequence gets the tokens of `sample.generate`, whatever shares the batch or a prefix."""

import dataclasses
import random

import pytest
import torch

from data.tokenizer import Tokenizer
from inference import continuous_batching
from inference.continuous_batching import ContinuousBatch, Sequence, stream_batch
from inference.engine import CppEngine, EagerEngine
from inference.quantize import quantize
from inference.sampling import SamplingParams
from model import GPT, KVCache
from sample import generate, stream_generate
from tests.conftest import TINY, randomized
from zoo import MIXERS

GREEDY = SamplingParams(greedy=True)
FULL = dataclasses.replace(TINY, context=64)
WINDOWED = dataclasses.replace(TINY, context=64, window=6, layer_pattern="SL", gate=True)
STATES = dataclasses.replace(TINY, context=64, layer_pattern="DL")


def alone(model: GPT, sequence: Sequence, tokens: int) -> list[int]:
    """What sample.generate yields for the prompt of a sequence that has not begun."""
    steps = generate(
        model, list(sequence.tokens), max_new_tokens=tokens, sampling=sequence.sampling, seed=sequence.seed
    )
    return [int(token) for token in steps]


def finish(batch: ContinuousBatch, tokens: dict[Sequence, int]) -> dict[Sequence, list[int]]:
    """Step until every sequence has so many tokens. Returns them."""
    while not batch.idle:
        for sequence in batch.step():
            if sequence.num_generated == tokens[sequence]:
                batch.remove(sequence)
    return {sequence: sequence.tokens[sequence.prompt_size :] for sequence in tokens}


def mixed_sequences(seed: int, count: int) -> list[Sequence]:
    """Prompts from one token to twice the context of 64, greedy or sampled in several ways."""
    numbers = random.Random(seed)
    ways = (
        GREEDY,
        SamplingParams(temperature=1.2),
        SamplingParams(top_k=20, repetition_penalty=1.5),
        SamplingParams(top_p=0.8, min_p=0.01),
    )
    lengths = (1, 2, 20, 33, 63, 64, 65, 130)
    return [
        Sequence([numbers.randrange(97) for _ in range(numbers.choice(lengths))], numbers.choice(ways), seed=number)
        for number in range(count)
    ]


@pytest.mark.parametrize(
    ("engine", "config", "kind"),
    [
        *((CppEngine, config, kind) for config in (FULL, WINDOWED) for kind in ("fp32", "bf16", "int8")),
        # in bf16, torch rounds differently for each size of a batch
        *((EagerEngine, config, "fp32") for config in (FULL, WINDOWED, STATES)),
    ],
)
def test_tokens_equal_those_of_each_sequence_alone(engine, config, kind, monkeypatch):
    model = randomized(config, seed=3)
    if kind != "fp32":
        quantize(model, kind)
    monkeypatch.setattr(continuous_batching, "make_engine", engine)
    monkeypatch.setattr("sample.make_engine", engine)
    count = 30 if engine is CppEngine else 12
    sequences = mixed_sequences(1, count)
    tokens = {sequence: random.Random(n).randrange(1, 80) for n, sequence in enumerate(sequences)}
    expected = {sequence: alone(model, sequence, number) for sequence, number in tokens.items()}
    batch = ContinuousBatch(model, max_sequences=7)
    for sequence in sequences:
        batch.add(sequence)
    assert finish(batch, tokens) == expected


def test_sequences_join_and_leave_at_any_time():
    model = randomized(dataclasses.replace(TINY, context=64), seed=3)
    numbers, batch = random.Random(5), ContinuousBatch(model, max_sequences=3)
    coming, wanted, expected, left = mixed_sequences(2, 60), {}, {}, 0
    while coming or not batch.idle:
        for _ in range(min(len(coming), numbers.choice((0, 0, 0, 1, 4)))):
            sequence = coming.pop()
            wanted[sequence] = numbers.randrange(1, 30)
            expected[sequence] = alone(model, sequence, wanted[sequence])
            batch.add(sequence)
        for sequence in batch.step():
            if sequence.num_generated == wanted[sequence]:
                batch.remove(sequence)
        present = [*batch.waiting, *batch.running]
        if present and numbers.random() < 0.1:  # one that waits, reads or generates leaves early
            batch.remove(numbers.choice(present))
            left += 1
        assert sorted([*batch.free, *(sequence.row for sequence in batch.running)]) == [0, 1, 2]
    got = {sequence: sequence.tokens[sequence.prompt_size :] for sequence in wanted}
    assert left > 5
    assert all(tokens == expected[sequence][: len(tokens)] for sequence, tokens in got.items())
    assert sum(len(tokens) == wanted[sequence] for sequence, tokens in got.items()) >= 60 - left
    batch.remove(sequence)  # has left: nothing happens


def test_a_long_prompt_does_not_stop_the_others(monkeypatch):
    monkeypatch.setattr(KVCache, "CHUNK", 16)
    model = randomized(dataclasses.replace(TINY, context=200))
    batch, first = ContinuousBatch(model, max_sequences=2), Sequence([1, 2, 3], GREEDY)
    batch.add(first)
    assert batch.step() == [first]
    long = Sequence(torch.randint(0, 97, (150,)).tolist(), GREEDY)
    batch.add(long)
    expected = {first: alone(model, Sequence([1, 2, 3], GREEDY), 21), long: alone(model, long, 10)}
    steps = [batch.step() for _ in range(9)]
    assert steps == [[first]] * 9  # nine chunks of 16 and one of 6 tokens
    assert batch.step() == [first, long]
    assert finish(batch, {first: 21, long: 10}) == expected


# Prefixes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def appended(monkeypatch):
    """The (sequences, tokens) of every call of an engine."""
    calls = []

    def record(engine):
        call = engine.__call__
        monkeypatch.setattr(
            engine, "__call__", lambda self, x, cache: (calls.append(tuple(x.shape)), call(self, x, cache))[1]
        )

    record(CppEngine)
    record(EagerEngine)
    return calls


@pytest.mark.parametrize("config", [FULL, WINDOWED, STATES], ids=["full", "windowed", "states"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_next_turn_of_a_chat_finds_the_last_one_in_the_cache(config, rows, appended):
    model = randomized(config, seed=4)
    batch, text = ContinuousBatch(model, rows), torch.randint(0, 97, (9,)).tolist()
    for turn in range(4):
        appended.clear()
        sequence = Sequence(text, GREEDY)
        expected = alone(model, sequence, 5)
        appended.clear()
        batch.add(sequence)
        (got,) = finish(batch, {sequence: 5}).values()
        assert got == expected
        # The last token of the last answer was not passed through the model, and 6 follow it.
        assert appended == [(1, 9 if turn == 0 else 7), *[(1, 1)] * 4]
        assert sequence.num_reused == (0 if turn == 0 else len(text) - 5 - 7)
        text = [*text, *range(turn, turn + 6)]


def test_samples_of_a_prompt_are_prefilled_once(appended):
    model = randomized(dataclasses.replace(TINY, context=64))
    batch, prompt = ContinuousBatch(model, 4), torch.randint(0, 97, (40,)).tolist()
    sequences = [Sequence(list(prompt), SamplingParams(temperature=1.5), seed=n) for n in range(4)]
    expected = {sequence: alone(model, sequence, 8) for sequence in sequences}
    appended.clear()
    for sequence in sequences:
        batch.add(sequence)
    assert finish(batch, dict.fromkeys(sequences, 8)) == expected
    assert appended[:4] == [(1, 40), (1, 1), (1, 1), (1, 1)]
    assert [sequence.num_reused for sequence in sequences] == [0, 39, 39, 39]
    assert len({tuple(tokens) for tokens in expected.values()}) > 1


def test_a_common_prefix_is_copied_from_a_row_in_use_and_both_go_on():
    model = randomized(dataclasses.replace(TINY, context=64), seed=6)
    batch, system = ContinuousBatch(model, 2), torch.randint(0, 97, (20,)).tolist()
    first, second = Sequence([*system, 1], GREEDY), Sequence([*system, 2, 3], GREEDY)
    expected = {sequence: alone(model, sequence, 60) for sequence in (first, second)}
    batch.add(first)
    for _ in range(10):
        batch.step()
    batch.add(second)
    assert finish(batch, {first: 60, second: 60}) == expected
    assert second.num_reused == 20


@torch.inference_mode()
def test_keeps_says_when_a_ring_buffer_still_has_a_window(monkeypatch):
    monkeypatch.setattr(KVCache, "CHUNK", 16)
    config = dataclasses.replace(TINY, context=100, window=6, layer_pattern="SL")  # rings of 21 slots
    model, tokens = randomized(config), torch.randint(0, 97, (1, 90))
    other, kept, zero = torch.randint(0, 97, (1, 9)), [], torch.tensor([0])
    for number, written in enumerate((10, 21, 22, 40, 90)):
        for length in range(written + 1):
            cache = KVCache(config, 2)
            if not cache.keeps(length, written):
                assert length < written - 16
                continue
            kept.append(written - length)
            for start in range(0, written, 16):
                CppEngine(model)(tokens[:, start : min(start + 16, written)], cache.select(zero, zero + start))
            cache.copy_row(0, 1, length)
            # Both rows, in place and copied, go back to `length` and on with other tokens.
            engine = (EagerEngine, CppEngine)[(number + length) % 2](model)
            view = cache.select(torch.tensor([0, 1]), torch.tensor([length, length]))
            expected = model(torch.cat([tokens[:, :length], other], 1))[:, length:]
            for piece in (slice(0, 1), slice(1, 9)):
                logits = engine(other[:, piece].expand(2, -1), view)
                torch.testing.assert_close(logits, expected[:, piece.stop - 1].expand(2, -1), atol=2e-5, rtol=2e-5)
    assert kept.count(16) == 4 and kept.count(21) == 1


def test_a_prefix_that_a_ring_buffer_has_lost_is_prefilled_again(monkeypatch):
    monkeypatch.setattr(KVCache, "CHUNK", 16)
    model = randomized(dataclasses.replace(TINY, context=100, window=6, layer_pattern="SL"), seed=4)
    batch, prompt = ContinuousBatch(model, 1), torch.randint(0, 97, (12,)).tolist()
    for size, end, reused in ((14, [], 0), (50, [1, 2], 12), (9, [3], 0)):
        sequence = Sequence([*prompt, *end], GREEDY)
        expected = alone(model, sequence, size)
        batch.add(sequence)
        assert finish(batch, {sequence: size}) == {sequence: expected}
        assert sequence.num_reused == reused


# Log-probabilities and text -----------------------------------------------------------------------------------------


def test_logprobs_are_the_models():
    model = randomized(TINY, seed=2)
    batch = ContinuousBatch(model, 3)
    asked = [Sequence([5, 6], SamplingParams(top_k=3), seed=n, num_logprobs=top) for n, top in enumerate((None, 0, 4))]
    for sequence in asked:
        batch.add(sequence)
    finish(batch, dict.fromkeys(asked, 12))
    assert asked[0].logprobs == []
    for sequence, top in zip(asked[1:], (0, 4), strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([sequence.tokens[:-1]]))[0, 1:].log_softmax(1)  # (12, V)
        assert len(sequence.logprobs) == 12
        for token, row, found in zip(sequence.tokens[2:], expected, sequence.logprobs, strict=True):
            torch.testing.assert_close(found.logprob, float(row[token]), atol=1e-5, rtol=1e-5)
            values, ids = row.topk(top)
            assert [number for number, _ in found.top] == ids.tolist()
            torch.testing.assert_close(torch.tensor([p for _, p in found.top]), values, atol=1e-5, rtol=1e-5)


def test_texts_of_a_batch_equal_the_text_of_each_prompt():
    tokenizer = Tokenizer.train("byte", [])
    model = randomized(dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size))
    prompts: list[str | list[int]] = ["", "one", "the second", tokenizer.encode("tokens")]
    for stop, whole_lines in (((), False), (("\x03", "e"), False), ((), True)):
        options = {"max_new_tokens": 30, "stop": stop, "whole_lines": whole_lines}
        texts = [""] * 4
        for number, text in stream_batch(ContinuousBatch(model, 3), tokenizer, prompts, seed=7, **options):
            texts[number] += text
        for number, prompt in enumerate(prompts):
            parts = stream_generate(model, tokenizer, prompt, seed=7 + number, **options)
            assert texts[number] == "".join(text for _, text in parts)


def test_a_stream_that_is_closed_frees_its_rows():
    tokenizer = Tokenizer.train("byte", [])
    model = randomized(dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size))
    batch = ContinuousBatch(model, 2)
    stream = stream_batch(batch, tokenizer, ["a", "b", "c"])
    next(stream)
    stream.close()
    assert batch.idle and sorted(batch.free) == [0, 1]


@pytest.mark.parametrize("letter", MIXERS)
def test_states_of_other_mixers_have_rows_too(letter):
    """A row is used again by the third sequence, and the second passes the context of 64."""
    config = dataclasses.replace(TINY, context=64, layer_pattern=letter + "L", gate=letter == "D")
    model = randomized(config, seed=2)
    batch = ContinuousBatch(model, 2)
    sequences = {
        Sequence(torch.randint(0, 97, (n,)).tolist(), GREEDY): length for n, length in ((20, 4), (5, 80), (9, 8))
    }
    expected = {sequence: alone(model, sequence, length) for sequence, length in sequences.items()}
    for sequence in sequences:
        batch.add(sequence)
    assert finish(batch, sequences) == expected
