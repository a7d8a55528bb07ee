"""The LSTM compared with its definition and with nn.LSTM."""

import dataclasses

import numpy as np
import torch

from model import KVCache
from tests.conftest import TINY
from zoo.lstm import LSTM


def definition(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The docstring of zoo/lstm.py, token by token. x (T, C) -> (T, C), fp64."""

    def sigmoid(y):
        return 1 / (1 + np.exp(-y))

    W, U, b, b2 = (weights[f"lstm.{name}_l0"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h, c, out = np.zeros(x.shape[1]), np.zeros(x.shape[1]), []
    for token in x:
        i, f, g, o = (W @ token + b + U @ h + b2).reshape(4, -1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.stack(out)


@torch.no_grad()
def check(cls) -> None:
    """AssertionError unless the outputs equal the definition's, in one call and token by token with a cache, the
    arithmetic is fp32's whatever autocast says, and the initial values are the docstring's."""
    torch.manual_seed(0)
    mixer, x = cls(TINY, 0), torch.randn(2, 50, TINY.n_embd, dtype=torch.float64)
    for p in mixer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    expected = mixer(x.float(), None, None, None)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mixer(x.float(), None, None, None), expected, atol=0, rtol=0)
    mixer = mixer.double()
    weights = {name: p.numpy() for name, p in mixer.named_parameters()}
    expected = torch.tensor(np.stack([definition(weights, row.numpy()) for row in x]))
    torch.testing.assert_close(mixer(x, None, None, None), expected, atol=1e-14, rtol=0)
    cache = KVCache(dataclasses.replace(TINY, layer_pattern="R"), 2, dtype=torch.float64)
    parts = [mixer(part, None, None, cache) for part in x.split((1, 2, 30, 1, 16), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-14, rtol=0)
    mixer.init_own_weights()
    forget = torch.zeros(4, 32, dtype=torch.float64)
    forget[1] = 1
    assert torch.equal(mixer.lstm.bias_ih_l0 + mixer.lstm.bias_hh_l0, forget.flatten())
    for p in (mixer.lstm.weight_ih_l0, mixer.lstm.weight_hh_l0):
        assert 0.95 * 32**-0.5 < p.max() < 32**-0.5 and -(32**-0.5) < p.min() < -0.95 * 32**-0.5


def test_outputs_equal_the_definition():
    check(LSTM)


def test_outputs_and_gradients_equal_nn_lstms():
    ours, theirs = LSTM(TINY, 0).double(), torch.nn.LSTM(32, 32, batch_first=True).double()
    theirs.load_state_dict(ours.lstm.state_dict(), strict=True)
    found = []
    for function, module in ((lambda x: ours(x, None, None, None), ours), (lambda x: theirs(x)[0], theirs)):
        x = torch.randn(2, 50, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = function(x)
        found.append([out, *torch.autograd.grad(out.sin().sum(), [x, *module.parameters()])])
    torch.testing.assert_close(*found, atol=1e-14, rtol=0)


@torch.no_grad()
def test_the_cell_has_fp32_with_bf16_weights():
    """A forget gate near 1 and an input gate near 0: a sum in bf16 would not grow beyond 256 of its addends."""
    mixer = LSTM(TINY, 0)
    for p in mixer.parameters():
        torch.nn.init.zeros_(p)
    mixer.lstm.bias_ih_l0.copy_(torch.tensor([-6.0, 20.0, 10.0, 20.0]).repeat_interleave(32))
    mixer = mixer.bfloat16()
    cache = KVCache(dataclasses.replace(TINY, layer_pattern="R"), 1, dtype=torch.bfloat16)
    for part in torch.zeros(1, 800, 32, dtype=torch.bfloat16).split((400, *[1] * 400), 1):
        out = mixer(part, None, None, cache)
    assert out.dtype == torch.bfloat16
    added = torch.sigmoid(torch.tensor(-6.0)) * torch.tanh(torch.tensor(10.0))
    torch.testing.assert_close(cache.layers[0][1], (800 * added).expand(1, 32), atol=1e-4, rtol=0)
