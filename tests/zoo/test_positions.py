"""Positions and unscaled scores compared with their definitions and with Bloom, MPT and GPT-2 of transformers."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import transformers
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

from inference import engine
from kernels import cpu
from model import GPT, Attention, KVCache
from tests.conftest import TINY, randomized
from training.apply_fused_layers import apply_fused_layers
from zoo.positions import POSITIONS, SCALE, Sinusoids, alibi_slopes


def change(**fields):
    return dataclasses.replace(TINY, **fields)


def check_slopes(alibi_slopes) -> None:
    """AssertionError unless the slopes are Bloom's for every number of heads, and the paper's for 8."""
    for heads in range(1, 65):
        torch.testing.assert_close(
            alibi_slopes(heads), _get_alibi_slopes(heads, torch.device("cpu")), rtol=1e-6, atol=0
        )
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]


def check_sinusoids(cls) -> None:
    """AssertionError unless the vectors are those of Vaswani et al. 2017, section 3.5, times SCALE."""
    for C in (32, 31):  # an odd width has one sine more
        module = cls(change(n_embd=C, context=50))
        for t in (0, 1, 49):
            angles = [t / 10000 ** (2 * (c // 2) / C) for c in range(C)]
            expected = torch.tensor([math.cos(a) if c % 2 else math.sin(a) for c, a in enumerate(angles)])
            torch.testing.assert_close(module(torch.tensor([[t]]))[0, 0], SCALE * expected, atol=1e-8, rtol=0)


def check(module) -> None:
    """Both of the above, of a module."""
    check_slopes(module.alibi_slopes)
    check_sinusoids(module.Sinusoids)


def test_alibi_slopes_equal_blooms():
    check_slopes(alibi_slopes)


def test_sinusoids_equal_the_definition():
    check_sinusoids(Sinusoids)


@pytest.mark.parametrize("flags", [{"positions": "alibi"}, {"positions": "none"}, {"scale_scores": False}], ids=str)
@torch.no_grad()
def test_attention_equals_the_definition(flags):
    """softmax(scale q k - m_h (t - s)) v, head by head in fp64, with and without a window and a cache."""
    for window in (0, 5):
        config = change(layer_pattern="S" if window else "L", window=window, qk_norm=False, **flags)
        torch.manual_seed(0)
        layer, x = Attention(config, 0).double(), torch.randn(1, 20, 32, dtype=torch.float64)
        cos, sin = (table[None, :20, None].double() for table in (GPT(config).model.cos, GPT(config).model.sin))
        weights = {name: p.numpy() for name, p in layer.named_parameters()}
        out = np.zeros((20, 4, 16))
        for h in range(4):
            q, k, v = (
                x[0].numpy() @ weights[f"{name}_proj.weight"].reshape(-1, 16, 32)[head].T
                for name, head in (("q", h), ("k", h // 2), ("v", h // 2))
            )
            if "scale_scores" in flags:  # here with RoPE
                angles = np.outer(np.arange(20), 10000.0 ** (-np.arange(8) / 8))
                turn = np.exp(1j * angles)
                q, k = ((y[:, :8] + 1j * y[:, 8:]) * turn for y in (q, k))
                q, k = (np.concatenate((y.real, y.imag), 1) for y in (q, k))
            slope = 4.0 ** -(h + 1) if flags.get("positions") == "alibi" else 0.0
            for t in range(20):
                seen = range(max(0, t - window + 1) if window else 0, t + 1)
                scale = 1.0 if "scale_scores" in flags else 0.25
                p = np.exp([scale * q[t] @ k[s] - slope * (t - s) for s in seen])
                out[t, h] = sum(w * v[s] for w, s in zip(p / p.sum(), seen, strict=True))
        expected = torch.tensor(out.reshape(20, 64) @ weights["o_proj.weight"].T)
        bound = 1e-6 if "scale_scores" in flags else 1e-12  # RoPE's tables are fp32
        torch.testing.assert_close(layer(x, cos, sin, None)[0], expected, atol=bound, rtol=0)
        cache, parts = KVCache(config, 1, dtype=torch.float64), []
        for t in range(20):
            parts.append(layer(x[:, t : t + 1], cos[:, t : t + 1], sin[:, t : t + 1], cache))
            cache.advance(1)
        torch.testing.assert_close(torch.cat(parts, 1)[0], expected, atol=bound, rtol=0)


@torch.no_grad()
def test_alibi_equals_the_attention_of_mpt():
    config = change(positions="alibi", qk_norm=False, n_kv_head=4, head_dim=8)
    ours = randomized(config).model.layers[0].self_attn
    theirs = MptAttention(transformers.MptConfig(d_model=32, n_heads=4)).eval()
    theirs.Wqkv.weight.copy_(torch.cat([getattr(ours, f"{name}_proj").weight for name in "qkv"]))
    theirs.out_proj.weight.copy_(ours.o_proj.weight)
    x, hidden = torch.randn(2, 30, 32), torch.ones(30, 30, dtype=torch.bool).triu(1)
    expected = theirs(x, build_mpt_alibi_tensor(4, 30), None, hidden)[0]
    model = GPT(config).model
    torch.testing.assert_close(
        ours(x, model.cos[None, :30, None], model.sin[None, :30, None], None), expected, atol=2e-6, rtol=1e-5
    )


@torch.no_grad()
def test_learned_positions_equal_gpt2s():
    config = change(positions="learned")
    ours = randomized(config)
    theirs = transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=1, n_head=4)
    )
    theirs.wte.weight.copy_(ours.model.embed_tokens.weight)
    theirs.wpe.weight.copy_(ours.model.embed_positions.weight)
    tokens, seen = torch.randint(0, 97, (2, 30)), []
    expected = theirs.eval()(tokens, output_hidden_states=True).hidden_states[0]
    ours.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ours(tokens)
    assert torch.equal(seen[0], expected)
    cache = KVCache(config, 2)
    for part in tokens.split((9, 1, 20), 1):
        ours(part, cache)
        cache.advance(part.shape[1])
    assert torch.equal(torch.cat(seen[1:], 1), expected)


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_causality_and_whether_order_matters(positions):
    """Without positions, one layer reads the tokens before the last one as a set; with any other kind, in order."""
    model = randomized(change(positions=positions, n_layer=1)).double()
    model.model.embed_tokens.weight *= 0.1  # positions are a visible part of the sum
    tokens = torch.randint(0, 97, (1, 32))
    before, reversed_ = model(tokens), torch.cat((tokens[:, :31].flip(1), tokens[:, 31:]), 1)
    assert torch.allclose(model(reversed_)[:, -1], before[:, -1], atol=1e-10) == (positions == "none")
    changed = tokens.clone()
    changed[0, 20] = (tokens[0, 20] + 1) % 97
    assert torch.equal(model(changed)[:, :20], before[:, :20])


def test_cpp_refuses_by_name():
    model = randomized(change(positions="alibi"))
    with pytest.raises(cpu.Unavailable, match=r"does not support model.positions = 'alibi'"):
        apply_fused_layers(model)
    for flags in ({"positions": "alibi"}, {"positions": "learned"}, {"scale_scores": False}):
        with pytest.raises(cpu.Unavailable, match=f"does not support model.{next(iter(flags))}"):
            engine.CppEngine(randomized(change(**flags)))
