"""The top-k memory compared with its definition, and in its limits with attention and with a sliding window."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import Attention, KVCache, apply_rotary_emb, precompute_rope
from tests.conftest import TINY
from training.flops import flops_per_token
from zoo import topk_memory
from zoo.topk_memory import TopKMemory

CONFIG = dataclasses.replace(TINY, context=100, n_layer=1, layer_pattern="Q")


def tables(T: int) -> list[Tensor]:
    """cos and sin, (1, T, 1, D), in fp64."""
    return [table[None, :T, None].double() for table in precompute_rope(CONFIG)]


def definition(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The docstring of zoo/topk_memory.py with a window of 16 and 16 keys before it, head by head and token by token.
    Of equal scores the first are read. x (T, C) -> (T, C), fp64."""
    D, T = CONFIG.head_dim, len(x)
    cos, sin = (table[0, :, 0] for table in tables(T))

    def head(name: str, h: int) -> Tensor:
        y = x @ weights[f"{name}_proj.weight"][h * D : (h + 1) * D].T  # (T, D)
        if name == "v":
            return y
        return apply_rotary_emb(F.rms_norm(y, (D,), weights[f"{name}_norm.weight"], CONFIG.norm_eps), cos, sin)

    out = torch.zeros(T, CONFIG.n_head, D, dtype=x.dtype)
    for h in range(CONFIG.n_head):
        q, k, v = head("q", h), head("k", h // 2), head("v", h // 2)
        for t in range(T):
            scores = (k[: t + 1] @ q[t] / D**0.5).tolist()
            near = list(range(max(0, t - 15), t + 1))
            far = sorted(range(max(0, t - 15)), key=lambda s: (-scores[s], s))[:16]
            read = near + far
            out[t, h] = torch.tensor([scores[s] for s in read], dtype=x.dtype).softmax(0) @ v[read]
    return out.flatten(1) @ weights["o_proj.weight"].T


def made(cls) -> tuple[torch.nn.Module, Tensor]:
    """A layer in fp64 with random weights, and its input."""
    torch.manual_seed(0)
    mixer = cls(CONFIG, 0).double()
    for p in mixer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return mixer, torch.randn(2, 90, CONFIG.n_embd, dtype=torch.float64)


@torch.no_grad()
def check(cls) -> None:
    """AssertionError unless the outputs equal the definition's, in one call and in several with a cache; also where
    all scores are equal, and where half of them are."""
    mixer, x = made(cls)
    cos, sin = tables(90)
    for keys in ("all differ", "every second is 0", "all are 0"):
        if keys == "every second is 0":
            x[:, ::2, :16] = 0
            mixer.k_proj.weight[:, 16:] = 0
        elif keys == "all are 0":
            mixer.k_proj.weight.zero_()
        expected = torch.stack([definition(mixer.state_dict(), row) for row in x])
        torch.testing.assert_close(mixer(x, cos, sin, None), expected, atol=1e-12, rtol=0)
        cache, at = KVCache(CONFIG, 2, dtype=torch.float64), 0
        for T in (1, 2, 50, 1, 36):
            part = slice(at, at + T)
            out = mixer(x[:, part], cos[:, part], sin[:, part], cache)
            torch.testing.assert_close(out, expected[:, part], atol=1e-12, rtol=0)
            cache.advance(T)
            at += T


def test_outputs_equal_the_definition():
    check(TopKMemory)


@pytest.mark.parametrize(("k", "fields"), [(74, {"layer_pattern": "L"}), (0, {"layer_pattern": "S", "window": 16})])
@torch.no_grad()
def test_limits_are_attention_and_a_sliding_window(k, fields, monkeypatch):
    """With the weights of attention: all 90 keys with 74 before the window, and the window alone."""
    monkeypatch.setattr(topk_memory, "TOP_K", k)
    mixer, x = made(TopKMemory)
    attention = Attention(dataclasses.replace(CONFIG, **fields), 0).double()
    attention.load_state_dict(mixer.state_dict(), strict=True)
    torch.testing.assert_close(mixer(x, *tables(90), None), attention(x, *tables(90), None), atol=1e-13, rtol=0)


def test_gradients_reach_the_keys_that_are_read_alone():
    mixer, x = made(TopKMemory)
    q, k = torch.randn(2, 1, 4, 90, 16, dtype=torch.float64)
    k.requires_grad_()
    distance = (torch.arange(90)[:, None] - torch.arange(90))[None, None]
    weights = mixer.weights(q, k, distance)
    (weights[0, 0, 80] @ x[0, :, 0]).backward()
    read = weights[0, 0, 80] > 0
    assert read.sum() == 32 and read[65:81].all() and not read[81:].any()
    assert torch.equal(k.grad[0, 0].abs().sum(1) > 0, read) and not k.grad[0, 1:].any()


def test_flops_are_those_of_the_pairs():
    """All scores, and 32 keys at most in the weighted sum; the rest is as of the window of attention."""
    same = dataclasses.replace(CONFIG, layer_pattern="S", window=32)
    scores = sum(t - min(t, 32) for t in range(1, 101)) * CONFIG.n_head * CONFIG.head_dim / 100  # beyond the window
    assert flops_per_token(CONFIG) == pytest.approx(flops_per_token(same) + 6 * scores)
