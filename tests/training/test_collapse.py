"""Signs of collapse: models built to have them, by hand; in every kind of run, and without an effect on it."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model import GPT
from tests.conftest import SMALL, TINY, losses, randomized, train_here, weights
from tests.training.ranks import call
from training import collapse, distributed
from training.collapse import advice, measure, similarity
from training.device import Machine

SEES_A_FEATURE = dataclasses.replace(TINY, qk_norm=False, positions="none", n_kv_head=4)
CPU = Machine(torch.device("cpu"), torch.float32, "eager", ())


class Text:
    """A text of some tokens, or of these."""

    def __init__(self, tokens: int, *ids: int) -> None:
        self.tokens, self.ids = tokens, torch.tensor(ids or range(tokens)).remainder(97)

    @property
    def parts(self) -> Any:
        return [(self, 1.0)]

    def read(self, start: int, count: int) -> Any:
        assert start + count <= self.tokens
        return self.ids[start : start + count].numpy()


def test_similarity_by_hand():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])  # cosines 0, 1 / sqrt(2) and 1 / sqrt(2)
    assert similarity(x) == pytest.approx((0 + 2 / math.sqrt(2)) / 3)
    assert similarity(torch.ones(5, 3)) == pytest.approx(1.0)


def test_a_model_that_attends_to_all_alike_and_whose_tokens_are_alike():
    """No query: all scores are 0. A large vector that is added to all tokens: they have one direction."""
    model = randomized(dataclasses.replace(TINY, qk_norm=False))
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    found = measure(model, Text(1000), CPU)
    assert (found["uniform_heads"], found["first_token_heads"]) == (1.0, 0.0)
    assert found["similarity_2"] < 0.5
    assert model.training
    model.model.embed_tokens.weight.data += 100
    alike = measure(model, Text(1000), CPU)
    assert alike["similarity_1"] > 0.99 and alike["similarity_2"] > 0.99
    assert advice(found, model.config) == (
        "\nsigns of collapse: 100% of the heads attend to all tokens alike or to the first one only "
        "(what may help: model.gate = true and model.qk_norm = true)"
    )
    assert "); tokens are alike after the last layer (cosine similarity 1.00; " in advice(alike, model.config)


def test_no_advice_that_was_followed():
    config = dataclasses.replace(TINY, gate=True)
    told = advice({"uniform_heads": 0.3, "first_token_heads": 0.2, "similarity_2": 0.1}, config)
    assert told == (
        "\nsigns of collapse: 50% of the heads attend to all tokens alike or to the first one only "
        "(what may help: lower learning rates)"
    )
    assert advice({"uniform_heads": 0.3, "first_token_heads": 0.19, "similarity_1": 0.99}, config) == ""


@pytest.mark.parametrize(("pattern", "remedy"), [("LD", "model.gate = true"), ("LK", "lower learning rates")])
def test_no_advice_that_the_model_cannot_follow(pattern, remedy):
    """K refuses a gate."""
    config = dataclasses.replace(TINY, layer_pattern=pattern)
    assert advice({"uniform_heads": 0.6}, config).endswith(f"(what may help: {remedy})")


def test_no_remedy_for_tokens_that_are_alike():
    assert advice({"uniform_heads": 0.1, "similarity_2": 0.99}, TINY) == (
        "\nsigns of collapse: tokens are alike after the last layer (cosine similarity 0.99; usual early in training)"
    )


def test_what_is_missing_is_left_out():
    found = measure(randomized(dataclasses.replace(TINY, layer_pattern="RD")), Text(30), CPU)
    assert list(found) == ["similarity_1", "similarity_2"]
    assert measure(randomized(TINY), Text(1), CPU) == {}


def documents(*lengths: int) -> list[int]:
    """Tokens as in a text: each document ends with the end-of-text token, 0, and begins with that of the one before."""
    return [token for length in lengths for token in [*range(1, length), 0]]


def sinks(model: GPT) -> GPT:
    """Of the heads of layer 1, two of four attend to the end-of-text token."""
    with torch.no_grad():
        embedding, attention = model.model.embed_tokens.weight, model.model.layers[0].self_attn
        embedding[:, 0] = 0.0
        embedding[0, 0] = 5.0
        embedding[:, 1] = 1.0  # a constant, for the queries
        for matrix, column in ((attention.q_proj.weight, 1), (attention.k_proj.weight, 0)):
            matrix[:32] = 0.0
            matrix[:32, column] = 10.0
    return model


def test_a_quarter_of_the_heads_on_the_first_token():
    """Head 0 and 1 of layer 1 see a feature that only the first token, 0, has; the others are random."""
    found = measure(sinks(randomized(SEES_A_FEATURE)), Text(20), CPU)
    assert found["first_token_heads"] == 2 / 8


def test_with_a_document_mask_each_document_has_a_first_token():
    """Two documents: the longer one is measured, from the end-of-text token on that begins it, wherever it is."""
    model: Any = sinks(randomized(SEES_A_FEATURE))
    across = measure(model, Text(27, *documents(7, 20)), CPU)
    assert across["first_token_heads"] == 0  # two tokens are alike, and the first one is neither
    alone = measure(model, Text(20, 0, *documents(20)[:-1]), CPU)
    model.model.document_start = 0
    for lengths in ((20,), (7, 20), (20, 7), (3, 4, 20, 5)):
        found = measure(model, Text(sum(lengths), *documents(*lengths)), CPU)
        assert found == alone and found["first_token_heads"] == 2 / 8
    assert measure(model, Text(1, 0), CPU) == {}  # an empty document


def test_similarity_is_that_of_the_hidden_states():
    model = randomized(TINY)
    tokens = torch.from_numpy(Text(32).read(0, 32))[None]
    states = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, inputs, out: states.append(out[0]))
    with torch.no_grad():
        model(tokens)
    for layer, x in enumerate(states.copy(), 1):
        cosines = [float(F.cosine_similarity(x[t], x[s], 0)) for t in range(32) for s in range(32) if t != s]
        expected = sum(cosines) / len(cosines)
        assert measure(model, Text(32), CPU)[f"similarity_{layer}"] == pytest.approx(expected, abs=1e-5)


def test_it_is_recorded_and_changes_no_bit_of_the_run(run_training, monkeypatch):
    words = ("--train.steps=4", "--train.num_evals=2", "--model.dropout=0.3")
    run = run_training("watched", *words)
    for name in ("uniform_heads", "first_token_heads", "similarity_1", "similarity_2"):
        assert list(losses(run, name)) == [2, 4]
    monkeypatch.setattr(collapse, "measure", lambda *_: {})
    other = run_training("unwatched", *words)
    assert not losses(other, "similarity_1")
    assert losses(run) == losses(other) and weights(run) == weights(other)


def test_advice_is_printed_with_the_evaluation(run_training, monkeypatch, capsys):
    monkeypatch.setattr(collapse, "EVEN", 0.0)
    run_training("flat", "--train.steps=1", "--train.num_evals=1")
    assert "signs of collapse: 100% of the heads attend" in capsys.readouterr().out


def together(rank: int, shard: int, context: int, start: int | None) -> dict[str, float]:
    world = distributed.init_distributed(context=context)
    torch.manual_seed(0)
    model = GPT(TINY)
    model.model.document_start = start
    distributed.parallelize(model, world, shard, torch.device("cpu"))
    return measure(model, Text(100), CPU)


@pytest.mark.parametrize(("shard", "context", "start"), [(1, 1, None), (2, 1, None), (1, 2, None), (1, 2, 12)])
def test_in_several_processes_as_in_one(shard, context, start):
    torch.manual_seed(0)
    model = GPT(TINY)
    model.model.document_start = start
    expected = measure(model, Text(100), CPU)
    for found in call(2, together, shard, context, start):
        assert found == pytest.approx(expected, abs=1e-6)


def test_fused_layers_as_eager_ones(text, tmp_path):
    """On a machine with a C++ compiler; elsewhere both are eager."""
    words = [word for word in SMALL if "compile" not in word] + [f"--data.source={text}", "--train.steps=3"]
    for name, how in (("eager", "off"), ("fused", "auto")):
        train_here(tmp_path, "shakespeare", f"--name={name}", f"--train.compile={how}", "--train.num_evals=1", *words)
    for name in ("similarity_1", "similarity_2", "uniform_heads"):
        eager, fused = (losses(tmp_path / run, name) for run in ("eager", "fused"))
        assert fused == pytest.approx(eager, abs=1e-4)
