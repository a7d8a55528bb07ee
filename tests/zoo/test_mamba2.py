"""Mamba-2 compared with its definition and with the class of transformers."""

import dataclasses

import numpy as np
import torch

from model import GPT, KVCache, ModelConfig
from tests.conftest import TINY, randomized
from zoo.mamba2 import Mamba2


def definition(weights: dict[str, np.ndarray], x: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The docstring of zoo/mamba2.py, token by token, with a state of 64. x (T, C) -> (T, C), fp64."""
    H, D, N, T = 2 * config.n_head, config.head_dim, 64, len(x)

    def silu(y):
        return y / (1 + np.exp(-y))

    projected = x @ weights["in_proj.weight"].T
    z, before, dt = np.split(projected, [H * D, 2 * H * D + 2 * N], axis=1)
    filters = weights["conv1d.weight"][:, 0]  # (channels, 4), the last one for the token itself
    mixed = np.zeros_like(before) + weights["conv1d.bias"]
    for t in range(T):
        for i in range(4):
            if t - i >= 0:
                mixed[t] += filters[:, 3 - i] * before[t - i]
    mixed = silu(mixed)
    y, S = np.zeros((T, H, D)), np.zeros((H, N, D))
    for t in range(T):
        x_t, B, C = mixed[t, : H * D].reshape(H, D), mixed[t, H * D : H * D + N], mixed[t, H * D + N :]
        step = np.log1p(np.exp(dt[t] + weights["dt_bias"]))  # (H,)
        decay = np.exp(-np.exp(weights["A_log"]) * step)
        S = decay[:, None, None] * S + B[None, :, None] * (step[:, None] * x_t)[:, None]
        y[t] = C @ S + weights["D"][:, None] * x_t
    y = y.reshape(T, H * D) * silu(z)
    y = y / np.sqrt((y**2).mean(1, keepdims=True) + config.norm_eps) * weights["norm.weight"]
    return y @ weights["out_proj.weight"].T


@torch.no_grad()
def check(cls) -> None:
    """AssertionError unless the outputs equal the definition's, in one call and token by token with a cache."""
    torch.manual_seed(0)
    mixer, x = cls(TINY, 0).double(), torch.randn(2, 70, TINY.n_embd, dtype=torch.float64)
    for name, p in mixer.named_parameters():  # and a decay from 0.3 to 0.9
        torch.nn.init.normal_(p, mean=-1.0 if name in ("A_log", "dt_bias") else 0.0, std=0.3)
    weights = {name: p.numpy() for name, p in mixer.named_parameters()}
    expected = torch.tensor(np.stack([definition(weights, row.numpy(), TINY) for row in x]))
    torch.testing.assert_close(mixer(x, None, None, None), expected, atol=1e-12, rtol=0)
    cache = KVCache(dataclasses.replace(TINY, layer_pattern="M"), 2, dtype=torch.float64)
    parts = [mixer(part, None, None, cache) for part in x.split((1, 2, 30, 1, 36), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-12, rtol=0)


def test_outputs_equal_the_definition():
    check(Mamba2)


@torch.no_grad()
def test_weights_load_strictly_into_the_class_of_transformers():
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    ours = randomized(dataclasses.replace(TINY, layer_pattern="M", norm_eps=1e-3)).model.layers[0].self_attn
    theirs = Mamba2Mixer(
        Mamba2Config(
            hidden_size=32, expand=4, num_heads=8, head_dim=16, state_size=64, n_groups=1, num_hidden_layers=1,
            layer_norm_epsilon=1e-3, chunk_size=32,
        ), 0,
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 150, 32)
    expected = theirs.eval()(x)
    torch.testing.assert_close(ours(x, None, None, None), expected, atol=3e-6 * expected.abs().max().item(), rtol=0)


def test_initial_values():
    """Steps from 0.001 to 0.1 and A from 1 to 16 (test_scan.py), D of ones and no bias, as the paper's code."""
    mixer = GPT(dataclasses.replace(TINY, layer_pattern="M")).model.layers[0].self_attn
    assert mixer.A_log.exp().min() >= 1 and mixer.A_log.exp().max() <= 16.001
    assert torch.nn.functional.softplus(mixer.dt_bias).max() < 0.1001
    assert torch.equal(mixer.D, torch.ones(8)) and not mixer.conv1d.bias.any()
