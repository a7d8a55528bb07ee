"""Attention weights: by hand in fp64, and against the output of the kernel that the model runs, for every flag."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from inference.attention_weights import attention_weights
from inference.quantize import quantize
from kernels import CAUSAL, MaskSpec
from kernels.reference_attention import reference_attention
from model import Attention
from tests.conftest import TINY, randomized
from training.apply_fused_layers import apply_fused_layers

FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "MQA": {"n_kv_head": 1},
    "MHA": {"n_kv_head": 4},
    "window": {"window": 5, "layer_pattern": "SL"},
    "gate": {"gate": True},
    "no QK-norm": {"qk_norm": False},
    "unscaled": {"scale_scores": False},
    "alibi": {"positions": "alibi"},
    "no positions": {"positions": "none"},
    "yarn": {"yarn_factor": 4.0, "yarn_original_context": 8},
    "dropout": {"dropout": 0.5, "attention_dropout": 0.5},
    "experts": {"n_expert": 4, "n_expert_active": 2},
    "softcap": {},
    "documents": {},
}


def made(flags: str) -> Any:
    model = randomized(dataclasses.replace(TINY, **FLAGS[flags]))
    if flags == "softcap":  # which no field of the configuration sets
        for layer in model.model.layers:
            layer.self_attn.mask_spec = MaskSpec(softcap=0.5)
    if flags == "documents":
        model.model.document_start = 1
    return model


def by_hand(attention: Attention, x: Tensor, window: int) -> Tensor:
    """softmax(q . k / sqrt(D)) of each head with RoPE at angle t theta^(-2i / D), score by score: x (T, C) after the
    layer's norm -> (H, T, T), all in fp64."""
    D, theta, T = attention.head_dim, 10000.0, len(x)

    def vector(projection: Tensor, gain: Tensor, h: int, t: int) -> Tensor:
        y = projection[h * D : (h + 1) * D] @ x[t]
        y = y / (y.square().mean() + 1e-6).sqrt() * gain
        turned = y.clone()
        for i in range(D // 2):
            angle, one, two = t * theta ** (-2 * i / D), y[i], y[i + D // 2]
            turned[i] = one * math.cos(angle) - two * math.sin(angle)
            turned[i + D // 2] = two * math.cos(angle) + one * math.sin(angle)
        return turned

    weights = torch.zeros(4, T, T, dtype=torch.float64)
    for h in range(4):
        q = [vector(attention.q_proj.weight, attention.q_norm.weight, h, t) for t in range(T)]
        k = [vector(attention.k_proj.weight, attention.k_norm.weight, h // 2, t) for t in range(T)]
        for t in range(T):
            first = max(0, t - window + 1)
            e = [math.exp(float(q[t] @ k[s]) / math.sqrt(D)) for s in range(first, t + 1)]
            weights[h, t, first : t + 1] = torch.tensor([value / sum(e) for value in e])
    return weights


@pytest.mark.parametrize("window", [3, 100])
@torch.no_grad()
def test_by_hand(window):
    model = randomized(dataclasses.replace(TINY, layer_pattern="S", window=window)).double()
    model.model.cos, model.model.sin = (t.double() for t in (model.model.cos, model.model.sin))
    tokens, layer = torch.randint(0, 97, (9,)), model.model.layers[0]
    x = layer.input_layernorm(model.model.embed_tokens(tokens))
    expected = by_hand(layer.self_attn, x, window)
    assert (attention_weights(model, tokens)[0] - expected).abs().max() < 1e-6  # cos and sin are tables in fp32


@pytest.mark.parametrize("flags", FLAGS)
@torch.no_grad()
def test_the_weighted_sum_of_the_values_is_the_kernels_output(flags):
    model, tokens = made(flags), torch.randint(2, 97, (32,))
    tokens[[10, 20]] = 1
    ends: list[Tensor] = []  # what enters o_proj: the kernel's output, and with a gate times the gate
    inputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: ends.append(args[0][0]))
        layer.self_attn.register_forward_pre_hook(lambda _, args: inputs.append(args[:3]))
    found = attention_weights(model, tokens)
    for layer, weights, args, end in zip(model.model.layers, found, inputs, ends, strict=True):
        assert weights.shape == (4, 32, 32) and weights.dtype == torch.float32
        assert not weights.triu(1).any()
        assert (weights.sum(2) - 1).abs().max() < 1e-6
        _, _, v, gate = layer.self_attn.project(*args)
        v = v[0].repeat_interleave(4 // v.shape[2], 1)  # (T, H, D)
        out = torch.einsum("hts,shd->thd", weights, v)
        out = out if gate is None else out * gate[0].sigmoid()
        assert (out.flatten(1) - end).abs().max() < 1e-5 * end.abs().max()
    if flags == "documents":
        assert not found[0][:, 20:, :20].any() and found[0][:, 10:20, 10].all()
    if flags == "window":
        assert not found[0].tril(-5).any() and found[1].tril(-5).any()


def test_sinks_take_their_share_of_the_weights():
    """No model has them yet; the kernels do, and the weights are the reference's."""
    q, k, v = torch.randn(3, 1, 8, 2, 16, dtype=torch.float64)
    sinks = torch.tensor([0.0, 2.0])
    out, lse, weights = reference_attention(q, k, v, CAUSAL, 0.25, sinks=sinks)
    assert (torch.einsum("bhts,bshd->bthd", weights, v) - out).abs().max() < 1e-12
    missing = (sinks[:, None] - lse[0].T).exp()  # (H, T)
    assert (weights[0].sum(2) + missing - 1).abs().max() < 1e-12 and missing.min() > 0.01


def test_a_layer_without_attention_has_none():
    found = attention_weights(randomized(dataclasses.replace(TINY, layer_pattern="RL")), torch.arange(5))
    assert found[0] is None and found[1].shape == (4, 5, 5)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_quantized_models_have_weights_too(kind):
    exact = attention_weights(made("plain"), tokens := torch.randint(0, 97, (32,)))
    for ours, theirs in zip(attention_weights(quantize(made("plain"), kind), tokens), exact, strict=True):
        assert ours.dtype == torch.float32 and 0 < (ours - theirs).abs().max() < 0.1


def test_fused_layers_have_the_same_weights():
    model, tokens = made("plain"), torch.randint(0, 97, (32,))
    expected = attention_weights(model, tokens)
    apply_fused_layers(model)
    for ours, theirs in zip(attention_weights(model, tokens), expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-5


def test_nothing_is_left_behind():
    model = made("plain")
    for bad in (torch.zeros(33, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(1, 4).long()):
        with pytest.raises(ValueError, match=r"33 tokens at once, but at most 32|tokens has shape \((0,|1, 4)\)"):
            attention_weights(model, bad)
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)
