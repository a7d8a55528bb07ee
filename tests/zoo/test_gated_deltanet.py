"""Gated DeltaNet compared with its definition and with the class of transformers."""

import dataclasses

import numpy as np
import torch

from model import KVCache, ModelConfig
from tests.conftest import TINY, randomized
from zoo.gated_deltanet import GatedDeltaNet


def definition(weights: dict[str, np.ndarray], x: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The docstring of zoo/gated_deltanet.py, token by token and head by head. x (T, C) -> (T, C), fp64."""
    H, D, T = config.n_head, config.head_dim, len(x)

    def sigmoid(y):
        return 1 / (1 + np.exp(-y))

    qkvz = (x @ weights["in_proj_qkvz.weight"].T).reshape(T, H, 4, D)
    b_a = (x @ weights["in_proj_ba.weight"].T).reshape(T, H, 2)
    before = qkvz[:, :, :3].transpose(0, 2, 1, 3).reshape(T, 3 * H * D)  # all heads' q, then k, then v
    filters = weights["conv1d.weight"][:, 0]  # (channels, 4), the last one for the token itself
    qkv = np.zeros_like(before)
    for t in range(T):
        for i in range(4):
            if t - i >= 0:
                qkv[t] += filters[:, 3 - i] * before[t - i]
    qkv = (qkv * sigmoid(qkv)).reshape(T, 3, H, D)
    out = np.zeros((T, H, D))
    for h in range(H):
        S = np.zeros((D, D))
        for t in range(T):
            q, k, v = qkv[t, :, h]
            q, k = (y / np.sqrt((y**2).sum() + 1e-6) for y in (q, k))
            dt = np.log1p(np.exp(b_a[t, h, 1] + weights["dt_bias"][h]))
            S = np.exp(-np.exp(weights["A_log"][h]) * dt) * S
            S = S + np.outer(k, sigmoid(b_a[t, h, 0]) * (v - S.T @ k))
            o = S.T @ q / np.sqrt(D)
            z = qkvz[t, h, 3]
            out[t, h] = o / np.sqrt((o**2).mean() + config.norm_eps) * weights["norm.weight"] * z * sigmoid(z)
    return out.reshape(T, H * D) @ weights["out_proj.weight"].T


def made(cls=GatedDeltaNet) -> torch.nn.Module:
    """A layer in fp64 with random weights, and a decay from 0.3 to 0.9."""
    torch.manual_seed(0)
    mixer = cls(TINY, 0).double()
    for name, p in mixer.named_parameters():
        torch.nn.init.normal_(p, mean=-1.0 if name in ("A_log", "dt_bias") else 0.0, std=0.5)
    return mixer


@torch.no_grad()
def check(cls) -> None:
    """AssertionError unless the outputs equal the definition's, in one call and token by token with a cache."""
    mixer, x = made(cls), torch.randn(2, 70, TINY.n_embd, dtype=torch.float64)
    weights = {name: p.numpy() for name, p in mixer.named_parameters()}
    expected = torch.tensor(np.stack([definition(weights, row.numpy(), TINY) for row in x]))
    torch.testing.assert_close(mixer(x, None, None, None), expected, atol=1e-12, rtol=0)
    cache = KVCache(dataclasses.replace(TINY, layer_pattern="D"), 2, dtype=torch.float64)
    parts = [mixer(part, None, None, cache) for part in x.split((1, 2, 30, 1, 36), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-12, rtol=0)


def test_outputs_equal_the_definition():
    check(GatedDeltaNet)


def test_weights_load_strictly_into_the_class_of_transformers():
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    ours = randomized(dataclasses.replace(TINY, layer_pattern="D", norm_eps=1e-3)).model.layers[0].self_attn
    theirs = Qwen3NextGatedDeltaNet(
        Qwen3NextConfig(
            hidden_size=32, num_hidden_layers=1, layer_types=["linear_attention"], linear_num_key_heads=4,
            linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16, rms_norm_eps=1e-3,
        ), 0,
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 150, 32)
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x, None, None, None), expected, atol=3e-6 * expected.abs().max().item(), rtol=0)
