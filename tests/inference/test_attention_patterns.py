"""Patterns of attention: maps built by hand that have them, and random ones that do not; a model built by hand."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from data.tokenizer import Tokenizer
from evals.attention_heads import induction_scores, inspect, losses, random_text
from inference import attention_patterns as patterns
from inference.attention_weights import attention_weights
from model import GPT
from tests.conftest import TINY, randomized

N = 40
EVEN = torch.ones(N, N).tril() / torch.arange(1, N + 1)[:, None]
PREVIOUS = torch.eye(N).roll(1, 0).tril(-1)
PREVIOUS[0, 0] = 1.0
FIRST = torch.zeros(N, N)
FIRST[:, 0] = 1.0
INDUCTION = FIRST.clone()
for t in range(N // 2, N):
    INDUCTION[t] = 0.0
    INDUCTION[t, t - N // 2 + 1] = 1.0
RANDOM = torch.rand(N, N, generator=torch.Generator().manual_seed(0)).tril()
MAPS = {"even": EVEN, "previous": PREVIOUS, "first": FIRST, "induction": INDUCTION, "random": patterns.shares(RANDOM)}


@pytest.mark.parametrize("name", MAPS)
def test_a_pattern_is_found_where_it_is_and_nowhere_else(name):
    share = MAPS[name]
    found = {
        "previous": patterns.previous_token(share), "first": patterns.first_token(share),
        "induction": patterns.induction(share),
    }  # fmt: skip
    for pattern, score in found.items():
        if pattern == name:
            assert score > 0.99
        elif (pattern, name) != ("first", "induction"):  # whose first half is on the first token
            assert score < 0.15


def test_entropy_evenness_and_distance_by_hand():
    share = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [2, 1, 1, 0], [0, 0, 4, 0]]) / torch.tensor([1, 2, 4, 4])[:, None]
    rows = [0.0, math.log(2), 1.5 * math.log(2), 0.0]
    assert float(patterns.entropy(share)) == pytest.approx(sum(rows) / 4)
    relative = [1.0, 1.5 * math.log(2) / math.log(3), 0.0]
    assert float(patterns.evenness(share)) == pytest.approx(sum(relative) / 3)
    relative[1] = 1.5  # of two keys at most
    assert float(patterns.evenness(share, window=2)) == pytest.approx(sum(relative) / 3)
    assert float(patterns.evenness(torch.eye(4), window=1)) == 0.0
    assert float(patterns.distance(share)) == pytest.approx((0 + 0.5 + (1 + 0.25) + 1) / 4)
    assert float(patterns.evenness(EVEN)) == pytest.approx(1.0) and float(patterns.evenness(FIRST)) == 0.0
    assert float(patterns.distance(EVEN)) == pytest.approx((N - 1) / 4)
    assert patterns.distance(torch.stack((PREVIOUS, FIRST))).tolist() == pytest.approx([(N - 1) / N, (N - 1) / 2])


def test_shares_of_a_map_with_signs():
    share = patterns.shares(torch.tensor([[-3.0, 0.0], [1.0, -3.0]]))
    assert share.tolist() == [[1.0, 0.0], [0.25, 0.75]]
    assert not patterns.shares(torch.zeros(2, 2)).any()


def test_repeated_tokens_are_different_and_repeated():
    text = patterns.repeated(torch.arange(100, 130), 25, seed=3)
    assert torch.equal(text[:25], text[25:]) and len(set(text.tolist())) == 25
    assert text.min() >= 100 and text.max() < 130
    assert not torch.equal(text, patterns.repeated(torch.arange(100, 130), 25, seed=4))


def induction_model(tokenizer: Tokenizer) -> GPT:
    """Two layers with one head of induction, built by hand (Elhage et al. 2021). Dimension i of a token is 1 if it is
    token i. A short convolution writes the token before into the dimensions from V on; head 1 of layer 2 looks for keys
    whose token before is its own token, and copies what they are. Head 2 has no queries."""
    V = tokenizer.vocab_size
    model: Any = GPT(
        dataclasses.replace(
            TINY, vocab_size=V, context=64, layer_pattern="CL", n_embd=64, n_head=2, n_kv_head=2, head_dim=32,
            qk_norm=False, positions="none",
        )
    ).eval()  # fmt: skip
    assert 2 * V + 1 <= 64 and V <= 32
    for p in model.parameters():
        if p.ndim > 1:
            p.data.zero_()
    embedding, (conv, attention) = (
        model.model.embed_tokens.weight.data,
        (layer.self_attn for layer in model.model.layers),
    )
    i, one = torch.arange(V), 2 * V
    embedding[i, i] = 1.0
    embedding[:, one] = 1.0
    conv.in_proj.weight.data[V + i, one] = 1.0  # gate b
    conv.in_proj.weight.data[64 + V + i, one] = 1.0  # gate c
    conv.in_proj.weight.data[128 + V + i, i] = 1.0
    conv.conv.weight.data[:, 0, 1] = 1.0  # the token before
    conv.out_proj.weight.data.copy_(torch.eye(64) / (64 / 2) ** 1.5)  # the norm makes each 1 a sqrt(64 / 2)
    attention.q_proj.weight.data[i, i] = 30.0
    attention.k_proj.weight.data[i, V + i] = 1.0
    attention.v_proj.weight.data[i, i] = 1.0
    attention.o_proj.weight.data[i, i] = 20.0
    return model


def test_an_induction_head_built_by_hand_is_found():
    tokenizer = Tokenizer.train("char", ["abcdefghijklmnopqrstuvwxyz"])
    model = induction_model(tokenizer)
    scores = induction_scores(model, tokenizer)
    assert list(scores) == [1]  # a convolution has no map
    assert scores[1][0] > 0.99 and scores[1][1] < 0.05
    first, second = losses(model, tokenizer)
    assert first > math.log(27) - 0.5 and second < 0.1
    text = random_text(model, tokenizer, 0)
    assert text[0] == tokenizer.eot and len(text) == 51
    heads = inspect(model, tokenizer, attention_weights(model, text))
    assert [(head.layer, head.head, head.name) for head in heads] == [(2, 1, "induction"), (2, 2, "")]
    assert heads[1].evenness == pytest.approx(1.0) and heads[1].distance == pytest.approx(12.5)


def test_random_weights_have_none():
    tokenizer = Tokenizer.train("char", ["abcdefghijklmnopqrstuvwxyz"])
    model = randomized(dataclasses.replace(TINY, vocab_size=27))
    assert all(score.max() < 0.2 for score in induction_scores(model, tokenizer).values())
    with pytest.raises(ValueError, match=r"^model.context = 4: no text can be repeated within it"):
        random_text(randomized(dataclasses.replace(TINY, vocab_size=27, context=4)), tokenizer, 0)
