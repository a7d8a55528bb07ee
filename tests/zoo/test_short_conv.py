"""The gated short convolution compared with its definition and with the class of transformers."""

import dataclasses

import numpy as np
import torch

from model import KVCache
from tests.conftest import TINY, randomized
from zoo.short_conv import ShortConv


def definition(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The docstring of zoo/short_conv.py, token by token. x (T, C) -> (T, C), fp64."""
    T, C = x.shape
    b, c, y = (x @ weights["in_proj.weight"][i * C : (i + 1) * C].T for i in range(3))
    out = np.zeros((T, C))
    for t in range(T):
        for i in range(3):  # the last column of the filters is for the token itself
            if t - i >= 0:
                out[t] += weights["conv.weight"][:, 0, 2 - i] * b[t - i] * y[t - i]
    return (c * out) @ weights["out_proj.weight"].T


@torch.no_grad()
def check(cls) -> None:
    """AssertionError unless the outputs equal the definition's, in one call and token by token with a cache."""
    torch.manual_seed(0)
    mixer, x = cls(TINY, 0).double(), torch.randn(2, 30, TINY.n_embd, dtype=torch.float64)
    weights = {name: p.numpy() for name, p in mixer.named_parameters()}
    expected = torch.tensor(np.stack([definition(weights, row.numpy()) for row in x]))
    torch.testing.assert_close(mixer(x, None, None, None), expected, atol=1e-14, rtol=0)
    cache = KVCache(dataclasses.replace(TINY, layer_pattern="C"), 2, dtype=torch.float64)
    parts = [mixer(part, None, None, cache) for part in x.split((1, 2, 20, 1, 6), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-14, rtol=0)


def test_outputs_equal_the_definition():
    check(ShortConv)


@torch.no_grad()
def test_weights_load_strictly_into_the_class_of_transformers():
    from transformers import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    ours = randomized(dataclasses.replace(TINY, layer_pattern="C")).model.layers[0].self_attn
    config = Lfm2Config(hidden_size=32, num_hidden_layers=1, layer_types=["conv"], conv_L_cache=3, conv_bias=False)
    theirs = Lfm2ShortConv(config, 0)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 50, 32)
    torch.testing.assert_close(ours(x, None, None, None), theirs(x), atol=1e-6, rtol=0)
