"""Additive attention compared with its definition; and Luong's scores, which are flags of attention."""

import dataclasses

import numpy as np
import pytest
import torch

from model import Attention, KVCache, ModelConfig
from tests.conftest import TINY
from zoo.additive_attention import AdditiveAttention

CONFIG = dataclasses.replace(TINY, context=80, norm_eps=1e-3)


def definition(weights: dict[str, np.ndarray], x: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The docstring of zoo/additive_attention.py, head by head and token by token. x (T, C) -> (T, C), fp64."""
    H, D, G, out = config.n_head, config.head_dim, config.n_head // config.n_kv_head, []

    def head(name: str, h: int) -> np.ndarray:
        y = x @ weights[f"{name}_proj.weight"][h * D : (h + 1) * D].T  # (T, D)
        if config.qk_norm and name != "v":
            y = y / np.sqrt((y**2).mean(1, keepdims=True) + config.norm_eps) * weights[f"{name}_norm.weight"]
        return y

    for h in range(H):
        q, k, v, v_a = head("q", h), head("k", h // G), head("v", h // G), weights["v_a"][h * D : (h + 1) * D]
        rows = []
        for t in range(len(x)):
            p = np.exp([v_a @ np.tanh(q[t] + k[s]) for s in range(t + 1)])
            rows.append(p @ v[: t + 1] / p.sum())
        out.append(np.stack(rows))
    return np.concatenate(out, 1) @ weights["o_proj.weight"].T


@torch.no_grad()
def check(cls) -> None:
    """AssertionError unless the outputs equal the definition's, in one call and in several with a cache, with and
    without QK-norm, whatever cos and sin say."""
    torch.manual_seed(0)
    for qk_norm in (True, False):
        config = dataclasses.replace(CONFIG, qk_norm=qk_norm, n_layer=1, layer_pattern="A")
        mixer, x = cls(config, 0).double(), torch.randn(2, 50, TINY.n_embd, dtype=torch.float64)
        for p in mixer.parameters():
            torch.nn.init.normal_(p, std=0.5)
        weights = {name: p.numpy() for name, p in mixer.named_parameters()}
        expected = torch.tensor(np.stack([definition(weights, row.numpy(), config) for row in x]))
        cos, sin = torch.rand(2, 1, 50, 1, TINY.head_dim, dtype=torch.float64)
        torch.testing.assert_close(mixer(x, cos, sin, None), expected, atol=1e-12, rtol=0)
        cache = KVCache(config, 2, dtype=torch.float64)
        parts = []
        for part in x.split((1, 2, 30, 1, 16), 1):
            parts.append(mixer(part, cos[:, : part.shape[1]], sin[:, : part.shape[1]], cache))
            cache.advance(part.shape[1])
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-12, rtol=0)


def test_outputs_equal_the_definition():
    check(AdditiveAttention)


def test_first_scores_have_the_size_of_products():
    config = ModelConfig(vocab_size=9, n_embd=64, n_head=8, n_kv_head=8, head_dim=64)
    torch.manual_seed(0)
    mixer = AdditiveAttention(config, 0)
    mixer.init_own_weights()
    q, k = torch.randn(2, 8, 1, 300, 64)
    scores = (q + k).tanh() @ mixer.v_a.detach().view(8, 64, 1)
    assert 0.5 < scores.std() < 1


@pytest.mark.parametrize("score", ["dot", "general"])
@torch.no_grad()
def test_luongs_scores_are_flags_of_attention(score):
    """Luong et al. 2015, equation 8: h_t . h_s, and h_t . W h_s, of one head whose values are the states."""
    config = dataclasses.replace(
        TINY, n_head=1, n_kv_head=1, head_dim=32, positions="none", scale_scores=False, qk_norm=False
    )
    torch.manual_seed(0)
    layer, h = Attention(config, 0).double(), 0.5 * torch.randn(20, 32, dtype=torch.float64)
    for linear in (layer.v_proj, layer.o_proj, *((layer.q_proj, layer.k_proj) if score == "dot" else ())):
        linear.weight.copy_(torch.eye(32))
    W = torch.eye(32).double() if score == "dot" else layer.q_proj.weight.T @ layer.k_proj.weight
    expected = torch.zeros(20, 32, dtype=torch.float64)
    for t in range(20):
        p = torch.stack([h[t] @ (W @ h[s]) for s in range(t + 1)]).softmax(0)
        for s in range(t + 1):
            expected[t] += p[s] * h[s]
    out = layer(h[None], torch.ones(1, 20, 1, 32), torch.zeros(1, 20, 1, 32), None)
    torch.testing.assert_close(out[0], expected, atol=1e-13, rtol=0)
