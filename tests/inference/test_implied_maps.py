"""The maps that mixers imply: against each mixer's own sum for any values, and against formulas in fp64."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo.gated_deltanet
import zoo.mamba2
from inference.attention_weights import attention_weights
from inference.implied_maps import MODULES, NONE, SCANNED, implied_map, mixing
from model import Attention
from tests.conftest import TINY, randomized
from zoo import MIXERS

T = 20  # tokens, more than a head has channels
WEIGHTS = "ABKPQ"


def layer(letter: str, **fields: Any) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A mixer in fp64, and its inputs x, cos, sin."""
    model = randomized(dataclasses.replace(TINY, layer_pattern=letter, **fields)).double()
    cos, sin = (table[None, :T, None] for table in (model.model.cos, model.model.sin))
    return model.model.layers[0].self_attn, torch.randn(1, T, 32, dtype=torch.float64), cos, sin


def test_every_mixer_is_accounted_for():
    assert {*MODULES, *SCANNED, *NONE} == {Attention, *MIXERS.values()}


@pytest.mark.parametrize("letter", sorted({"L", *MIXERS} - {"C", "R"}))
@torch.no_grad()
def test_the_map_times_any_values_is_what_the_mixer_computes(letter):
    mixer, *inputs = layer(letter)
    found = implied_map(mixer, *inputs)
    assert not found.triu(1).any()
    for values in (None, torch.randn(T, 16, dtype=torch.float64)):
        with mixing(mixer, 16, values) as (own, outs):
            mixer(*inputs, None)
        v = own[0].repeat_interleave(len(found) // own[0].shape[1], 1)  # (T, K, D) -> (T, H, D)
        assert values is None or torch.equal(v, values[:, None].expand_as(v))
        error = (torch.einsum("hts,shd->thd", found, v) - outs[0]).abs().max()
        assert error < 1e-5 * outs[0].abs().max()  # the identity matrix is in fp32, and some sums are
    if letter in WEIGHTS:
        assert found.min() >= 0 and (found.sum(2) - 1).abs().max() < 1e-5
    with mixing(mixer, 16) as (_, outs):
        pass
    assert outs == []  # nothing is left behind


@torch.no_grad()
def test_linear_attention_by_hand():
    mixer, x, cos, sin = layer("K")
    found = implied_map(mixer, x, cos, sin)
    q, k, _ = mixer.project(x, cos, sin)
    for h in range(4):
        phi_q, phi_k = (F.elu(y) + 1 for y in (q[0, :, h], k[0, :, h // 2]))
        products = (phi_q @ phi_k.T).tril()
        assert (found[h] - products / products.sum(1, keepdim=True)).abs().max() < 1e-6


@torch.no_grad()
def test_retention_by_hand():
    mixer, x, cos, sin = layer("T")
    found = implied_map(mixer, x, cos, sin)
    q, k, _ = mixer.project(x, cos, sin)
    for h in range(4):
        for t in range(T):
            for s in range(t + 1):
                gamma = 1 - 2.0 ** -(5 + h // 2)
                expected = gamma ** (t - s) * float(q[0, t, h] @ k[0, s, h // 2]) / 4
                assert float(found[h, t, s]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("letter", "module"), [("D", zoo.gated_deltanet), ("M", zoo.mamba2)])
@torch.no_grad()
def test_recurrences_by_hand(letter, module, monkeypatch):
    """M[t, s] = q_t^T (product of the transitions from s + 1 to t) k_s, with beta_s for the delta rule."""
    mixer, *inputs = layer(letter)
    found, scan, calls = implied_map(mixer, *inputs), module.scan, []
    monkeypatch.setattr(module, "scan", lambda *words: (calls.append(words), scan(*words))[1])
    mixer(*inputs, None)
    q, k, _, decay, beta, _ = calls[0]
    N = q.shape[-1]
    for h in range(len(found)):
        own = h if q.shape[2] > 1 else 0
        for s in range(T):
            rate = beta[0, s, h] if beta is not None else 1.0
            state = rate * k[0, s, own]  # (N,): what the value of token s is multiplied by
            for t in range(s, T):
                if t > s:
                    state = decay[0, t, h].exp() * state
                    if beta is not None:
                        state = state - beta[0, t, h] * k[0, t, own] * (k[0, t, own] @ state)
                assert abs(float(q[0, t, own] @ state - found[h, t, s])) < 1e-5 * N


@torch.no_grad()
def test_the_weights_of_a_hybrid():
    model = randomized(dataclasses.replace(TINY, layer_pattern="DLRM", n_layer=4))
    delta, attention, lstm, mamba = attention_weights(model, torch.arange(9))
    assert lstm is None
    assert [len(found) for found in (delta, attention, mamba)] == [4, 4, 8]
    assert delta.min() < 0 and attention.min() == 0
    assert mamba.dtype == torch.float32
