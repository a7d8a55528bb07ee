"""Linear attention compared with its definition: a T x T matrix of weights."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import Attention, KVCache, ModelConfig, apply_rotary_emb, precompute_rope
from tests.conftest import TINY, randomized
from zoo.linear_attention import LinearAttention, phi, weighted_mean

CONFIG = dataclasses.replace(TINY, context=80, n_kv_head=2, layer_pattern="K")


def heads(weights: dict[str, Tensor], x: Tensor, config: ModelConfig, h: int) -> list[Tensor]:
    """Query, key and value of query head h, (T, D) each, as model.Attention's: normed, and rotated."""
    D, T, G = config.head_dim, len(x), config.n_head // config.n_kv_head
    cos, sin = (table[:T].to(x.dtype) for table in precompute_rope(config))
    found = []
    for name, i in (("q", h), ("k", h // G), ("v", h // G)):
        y = x @ weights[f"{name}_proj.weight"][i * D : (i + 1) * D].T
        if name != "v":
            if config.qk_norm:
                y = F.rms_norm(y, (D,), weights[f"{name}_norm.weight"], config.norm_eps)
            y = apply_rotary_emb(y, cos, sin)
        found.append(y)
    return found


def definition(weights: dict[str, Tensor], x: Tensor, config: ModelConfig) -> Tensor:
    """The weights phi(q) . phi(k) of all pairs, masked, each row divided by its sum. x (T, C) -> (T, C)."""
    out = []
    for h in range(config.n_head):
        q, k, v = heads(weights, x, config, h)
        scores = ((F.elu(q) + 1) @ (F.elu(k) + 1).T).tril()
        out.append(scores / scores.sum(1, keepdim=True) @ v)
    return torch.cat(out, 1) @ weights["o_proj.weight"].T


@torch.no_grad()
def compare(cls, config: ModelConfig, definition, layer: int = 0, factors: dict[str, float] | None = None) -> None:
    """AssertionError unless a class's outputs equal a definition's, in one call and token by token with a cache.

    factors: on the random weights, by name. With large ones, logarithms in the thousands are rounded."""
    torch.manual_seed(0)
    mixer, x = cls(config, layer).double(), torch.randn(2, 70, config.n_embd, dtype=torch.float64)
    for name, p in mixer.named_parameters():
        torch.nn.init.normal_(p, std=0.5 * (factors or {}).get(name, 1.0))
    atol = 1e-9 if factors else 1e-12
    expected = torch.stack([definition(mixer.state_dict(), row, config) for row in x])
    cos, sin = (table[None, :70, None].double() for table in precompute_rope(config))  # (1, T, 1, D)
    torch.testing.assert_close(mixer(x, cos, sin, None), expected, atol=atol, rtol=0)
    cache, at = KVCache(config, 2, dtype=torch.float64), 0
    for T in (1, 2, 30, 1, 36):
        part = slice(at, at + T)
        out = mixer(x[:, part], cos[:, part], sin[:, part], cache)
        torch.testing.assert_close(out, expected[:, part], atol=atol, rtol=0)
        cache.advance(T)
        at += T


def check(cls) -> None:
    """AssertionError unless it equals the definition, with and without QK-norm."""
    for qk_norm in (True, False):
        compare(cls, dataclasses.replace(CONFIG, qk_norm=qk_norm), definition)


def test_outputs_equal_the_definition():
    check(LinearAttention)


def test_phi_is_elu_plus_one():
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64).requires_grad_()
    found = []
    for y in (phi(x), F.elu(x) + 1):
        found.append((y, *torch.autograd.grad(y.sum(), x)))
    torch.testing.assert_close(*found, atol=1e-15, rtol=0)
    small = phi(torch.tensor([-30.0, -80.0]))  # elu rounds them to -1
    torch.testing.assert_close(small, torch.tensor([-30.0, -80.0]).exp())


def test_weights_are_those_of_attention():
    attention = randomized(dataclasses.replace(CONFIG, layer_pattern="L")).model.layers[0].self_attn
    assert type(attention) is Attention
    LinearAttention(CONFIG, 0).load_state_dict(attention.state_dict(), strict=True)


def test_the_first_token_is_its_own_value_and_weights_add_up_to_one():
    torch.manual_seed(0)
    q, k, v = torch.rand(2, 9, 4, 8), torch.rand(2, 9, 2, 8), torch.randn(2, 9, 2, 5)
    none = torch.zeros(1, 9, 1)
    out, _ = weighted_mean(q, k, v, none, None)
    torch.testing.assert_close(out[:, 0], v[:, 0].repeat_interleave(2, 1))
    torch.testing.assert_close(weighted_mean(q, k, v + 3, none, None)[0], out + 3)


def test_weights_that_underflow_give_zeros_and_no_nan():
    q, k, v = torch.full((1, 3, 1, 4), 1e-30), torch.full((1, 3, 1, 4), 1e-30), torch.randn(1, 3, 1, 4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = weighted_mean(*leaves, torch.zeros(1, 3, 1), None)
    out.sum().backward()
    assert not out.any() and all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("letter", "KPT")
@pytest.mark.parametrize("field", [{"positions": "alibi"}, {"scale_scores": False}, {"gate": True}])
def test_what_would_be_ignored_is_refused(letter, field):
    name = next(iter(field))
    with pytest.raises(ValueError, match=rf"model.{name} = .*: \w+, {letter} in layer_pattern, does not support it"):
        dataclasses.replace(CONFIG, layer_pattern=letter, **field)
