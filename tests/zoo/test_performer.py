"""Performer compared with its definition and with softmax attention, which it estimates."""

import dataclasses
import types

import pytest
import torch
from torch import Tensor

from model import Attention, ModelConfig, precompute_rope
from tests.conftest import TINY, randomized
from tests.zoo.test_linear_attention import compare, heads
from zoo import performer
from zoo.performer import Performer, random_vectors

CONFIG = dataclasses.replace(TINY, context=80, n_kv_head=2, layer_pattern="P")


def definition(w: Tensor):
    """The layer with random vectors w (m, D): x (T, C) -> (T, C). All weights, from their logarithms."""

    def forward(weights: dict[str, Tensor], x: Tensor, config: ModelConfig) -> Tensor:
        out = []
        for h in range(config.n_head):
            q, k, v = heads(weights, x, config, h)
            q, k = (y / config.head_dim**0.25 for y in (q, k))
            q, k = (y @ w.T - (y**2).sum(1, keepdim=True) / 2 for y in (q, k))  # (T, m)
            scores = (q[:, None] + k[None]).logsumexp(2)  # (T, T)
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            out.append(scores.softmax(1) @ v)
        return torch.cat(out, 1) @ weights["o_proj.weight"].T

    return forward


def check(module: types.ModuleType) -> None:
    """AssertionError unless a module's class equals the definition, and its vectors are normal and orthogonal."""
    assert module.FEATURES == 2
    vectors = torch.stack([module.random_vectors(layer, 3, 16) for layer in range(100)]).double()  # (100, 3 * 16, 16)
    blocks = vectors.unflatten(1, (3, 16))
    gram = blocks @ blocks.mT
    lengths = gram.diagonal(dim1=2, dim2=3)
    torch.testing.assert_close(gram, torch.diag_embed(lengths), atol=1e-5, rtol=0)
    assert abs(lengths.mean() - 16) < 0.5 and abs(lengths.var() - 32) < 4  # squares: chi-squared of 16 dimensions
    numbers = blocks.diagonal(dim1=2, dim2=3)  # whose signs an algorithm may choose
    assert abs((numbers - 0.5).exp().mean() - 1) < 0.1  # e^(w . x - |x|^2 / 2) has mean 1 for any x
    w = module.Performer(CONFIG, 1).w.double()
    assert torch.equal(w, module.random_vectors(1, 2, 16).double())

    compare(module.Performer, CONFIG, definition(w), 1)
    plain = dataclasses.replace(CONFIG, qk_norm=False)
    for name, factor in (("q", 60.0), ("k", 8.0)):  # features up to e^800, and from e^-1000: not numbers of fp64
        compare(module.Performer, plain, definition(w), 1, {f"{name}_proj.weight": factor})


def test_outputs_equal_the_definition():
    check(performer)


def test_gradients_equal_the_definitions():
    """The largest features are constants for autograd: the output does not depend on them."""
    mixer, x = Performer(CONFIG, 0).double(), torch.randn(70, 32, dtype=torch.float64).requires_grad_()
    cos, sin = (table[None, :70, None].double() for table in precompute_rope(CONFIG))
    outs = mixer(x[None], cos, sin, None)[0], definition(mixer.w)(dict(mixer.named_parameters()), x, CONFIG)
    got, expected = (torch.autograd.grad(out.sin().sum(), [x, *mixer.parameters()]) for out in outs)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_error_falls_with_the_root_of_the_number_of_vectors(monkeypatch):
    """The root mean square over layers and tokens of the difference to softmax attention of the same weights."""
    attention = randomized(dataclasses.replace(CONFIG, layer_pattern="L")).model.layers[0].self_attn.double()
    assert type(attention) is Attention
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.data.fill_(0.5)
    x = torch.randn(2, 70, CONFIG.n_embd, dtype=torch.float64)
    cos, sin = (table[None, :70, None].double() for table in precompute_rope(CONFIG))
    errors = []
    with torch.no_grad():
        expected = attention(x, cos, sin, None)
        for features in (4, 16, 64):
            monkeypatch.setattr(performer, "FEATURES", features)
            squares = []
            for layer in range(8):
                mixer = Performer(CONFIG, layer).double()
                mixer.load_state_dict(attention.state_dict(), strict=True)
                squares.append((mixer(x, cos, sin, None) - expected).square().mean())
            errors.append(torch.stack(squares).mean().sqrt().item() / expected.std().item())
    assert errors[2] < 0.1
    assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([2, 2], rel=0.2)


def test_vectors_never_change():
    """They belong to weights that were trained with them."""
    numbers = random_vectors(0, 2, 64)[[0, 63, 64], [0, 1, 2]].tolist()
    assert numbers == pytest.approx([1.0127988, -0.8640872, -0.3450014], abs=1e-6)
    assert (random_vectors(5, 2, 8) - random_vectors(6, 2, 8)).abs().max() > 1


@torch.no_grad()
def test_features_have_fp32_within_bf16_autocast():
    """Queries, keys and values are exact in bf16 here: what remains is the rounding of the output."""
    config = dataclasses.replace(CONFIG, qk_norm=False, n_embd=64, n_kv_head=4)
    mixer, x = Performer(config, 0), torch.eye(64)[None]
    for name in "qkv":
        weight = getattr(mixer, f"{name}_proj").weight
        weight.copy_(3 * torch.randn(64, 64).bfloat16())
    mixer.o_proj.weight.copy_(torch.eye(64))
    cos, sin = torch.ones(1, 64, 1, 16), torch.zeros(1, 64, 1, 16)
    expected = mixer(x, cos, sin, None)
    with torch.autocast("cpu", torch.bfloat16):
        got = mixer(x, cos, sin, None)
    torch.testing.assert_close(got.float(), expected, atol=1e-6, rtol=2**-8)
