"""RWKV-7 compared with its definition, and with the author's code."""

import dataclasses

import numpy as np
import pytest
import torch

from model import KVCache, ModelConfig
from tests.conftest import TINY, randomized
from zoo.rwkv7 import RWKV7


def definition(weights: dict[str, np.ndarray], x: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The docstring of zoo/rwkv7.py, token by token and head by head. x (T, C) -> (T, C), fp64."""
    H, D, T = config.n_head, config.head_dim, len(x)

    def sigmoid(y):
        return 1 / (1 + np.exp(-y))

    out, S = np.zeros((T, H * D)), np.zeros((H, D, D))
    for t in range(T):
        before = x[t - 1] if t else np.zeros_like(x[0])
        xr, xw, xk, xv, xa, xg = (x[t] + mix * (before - x[t]) for mix in weights["x_rwkvag"].reshape(6, -1))
        r, k, v = (weights[f"{n}.weight"] @ y for n, y in (("receptance", xr), ("key", xk), ("value", xv)))
        w = np.exp(-np.exp(-0.5) * sigmoid(weights["w0"] + np.tanh(xw @ weights["w1"]) @ weights["w2"]))
        a = sigmoid(weights["a0"] + xa @ weights["a1"] @ weights["a2"])
        g = sigmoid(xg @ weights["g1"]) @ weights["g2"]
        kk = k * weights["k_k"]
        k = k * (1 + (a - 1) * weights["k_a"])
        for h in range(H):
            part = slice(h * D, (h + 1) * D)
            removed = kk[part] / np.sqrt((kk[part] ** 2).sum())
            S[h] = w[part, None] * S[h] - np.outer(a[part] * removed, removed @ S[h]) + np.outer(k[part], v[part])
            o = S[h].T @ r[part]
            o = (o - o.mean()) / np.sqrt(o.var() + 64e-5) * weights["ln_x.weight"][part] + weights["ln_x.bias"][part]
            out[t, part] = (o + (r[part] * k[part] * weights["r_k"][part]).sum() * v[part]) * g[part]
    return out @ weights["output.weight"].T


@torch.no_grad()
def check(cls) -> None:
    """AssertionError unless the outputs equal the definition's, in one call and token by token with a cache."""
    torch.manual_seed(0)
    mixer, x = cls(TINY, 0).double(), torch.randn(2, 70, TINY.n_embd, dtype=torch.float64)
    for p in mixer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    weights = {name: p.numpy() for name, p in mixer.named_parameters()}
    expected = torch.tensor(np.stack([definition(weights, row.numpy(), TINY) for row in x]))
    torch.testing.assert_close(mixer(x, None, None, None), expected, atol=1e-10, rtol=0)
    cache = KVCache(dataclasses.replace(TINY, layer_pattern="W"), 2, dtype=torch.float64)
    parts = [mixer(part, None, None, cache) for part in x.split((1, 2, 30, 1, 36), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-10, rtol=0)


def test_outputs_equal_the_definition():
    check(RWKV7)


@pytest.fixture
def authors(monkeypatch):
    """The module `rwkv.model`. The environment and the flags that its import sets are restored after the test."""
    for name, value in (("RWKV_V7_ON", "1"), ("RWKV_JIT_ON", "0"), ("RWKV_CUDA_ON", "0")):
        monkeypatch.setenv(name, value)
    flags = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    import rwkv.model

    yield rwkv.model
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = flags


@torch.no_grad()
def test_equals_the_authors_code(authors):
    """Two calls of the author's function, the second from the state of the first. Its layer 0 ignores v0, v1 and v2."""
    config = dataclasses.replace(TINY, layer_pattern="W", n_head=2)
    ours = randomized(config).model.layers[0].self_attn
    weights, none = dict(ours.named_parameters()), torch.empty(0)
    theirs = [
        *weights["x_rwkvag"].flatten(1).unbind(),
        *(weights[name] for name in ("w0", "w1", "w2", "a0", "a1", "a2")), none, none, none,
        *(weights[name] for name in ("g1", "g2", "k_k", "k_a", "r_k")),
        *(weights[f"{name}.weight"].T for name in ("receptance", "key", "value", "output")),
        weights["ln_x.weight"], weights["ln_x.bias"],
    ]  # fmt: skip
    x, H, D = torch.randn(150, config.n_embd), config.n_head, config.head_dim
    last, S, parts = torch.zeros(config.n_embd), torch.zeros(H, D, D), []
    for part in x.split((100, 50)):
        out, last, S, _ = authors.RWKV_x070_TMix_seq(0, H, D, part, last, none, S, *theirs)
        parts.append(out)
    expected = torch.cat(parts)
    got = ours(x[None], None, None, None)[0]
    torch.testing.assert_close(got, expected, atol=3e-6 * expected.abs().max().item(), rtol=0)


def test_initial_values_are_the_authors():
    """In a layer of 2 heads of 64: numbers computed by hand from the author's formulas, at the ends of a head."""
    config = ModelConfig(vocab_size=9, n_layer=4, n_embd=128, n_head=2, n_kv_head=2, head_dim=64)
    mixer = RWKV7(config, 3)
    mixer.init_own_weights()
    w0, a0 = mixer.w0.tolist(), mixer.a0.tolist()
    assert (w0[0], w0[-1]) == pytest.approx((-8.0, 3.0), abs=1e-6)
    assert (a0[0], a0[-1]) == pytest.approx((-0.69, 0.31), abs=1e-6)
    assert mixer.k_k[[0, -1]].tolist() == pytest.approx([0.76, 0.66], abs=1e-6)
    assert mixer.x_rwkvag[:, 0, 0, 64].tolist() == pytest.approx(
        [1 - 0.5 ** (p / 4) for p in (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)], abs=1e-6
    )
    assert w0[63] == pytest.approx(-5.5 + 6 * (63 / 127) ** 2 + 2.5, abs=1e-5)
    torch.testing.assert_close(mixer.w2 @ mixer.w2.T, 0.01 * torch.eye(32), atol=1e-6, rtol=0)
    assert not mixer.output.weight.any() and not mixer.w1.any()
