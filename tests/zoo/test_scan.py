"""The chunked recurrence compared with its definition, token by token in fp64, and with transformers."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import scan as module
from zoo.scan import scan


def recurrence(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, S: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in the docstring of zoo/scan.py, one token after another."""
    out = []
    for t in range(q.shape[1]):
        S = S * decay[:, t, :, None, None].exp()
        u = v[:, t]
        if beta is not None:
            u = beta[:, t, :, None] * (u - torch.einsum("bhn,bhnp->bhp", k[:, t], S))
        S = S + torch.einsum("bhn,bhp->bhnp", k[:, t], u)
        out.append(torch.einsum("bhn,bhnp->bhp", q[:, t], S))
    return torch.stack(out, 1), S


def inputs(T: int = 53, N: int = 8, P: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, decay, beta, state."""
    g, B, H = torch.Generator().manual_seed(T), 2, 3
    q, k = torch.randn(2, B, T, H, N, generator=g, dtype=dtype)
    v, state = torch.randn(B, T, H, P, generator=g, dtype=dtype), torch.randn(B, H, N, P, generator=g, dtype=dtype)
    decay, beta = -torch.rand(B, T, H, generator=g, dtype=dtype), torch.rand(B, T, H, generator=g, dtype=dtype)
    return [q, F.normalize(k, dim=-1), v, decay, beta, state]


def check(scan) -> None:
    """AssertionError unless outputs, states and all gradients equal the definition's, from a state, in 4 chunks."""
    for delta in (True, False):
        found = []
        for function in (lambda *x: scan(*x, size=16), recurrence):
            q, k, v, decay, beta, state = leaves = [x.requires_grad_() for x in inputs()]
            out, S = function(q, k, v, decay, beta if delta else None, state)
            gradients = torch.autograd.grad(out.sin().sum() + S.cos().sum(), leaves, allow_unused=True)
            found.append([out, S, *(g for g in gradients if g is not None)])
        assert len(found[0]) == len(found[1])
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-13, rtol=0)


def test_outputs_states_and_gradients_equal_the_definition():
    check(scan)


@pytest.mark.parametrize("delta", [True, False])
def test_any_split_into_calls_and_chunks_gives_the_same(delta):
    *tokens, beta, state = inputs()
    tokens.append(beta if delta else None)
    expected = recurrence(*tokens, state)
    for size, parts in itertools.product((1, 7, 64), ((53,), (20, 33), (1,) * 53, (50, 1, 2))):
        S, outs = state, []
        for part in zip(*(x.split(parts, 1) if x is not None else [None] * len(parts) for x in tokens), strict=True):
            out, S = scan(*part, S, size)
            outs.append(out)
        torch.testing.assert_close((torch.cat(outs, 1), S), expected, atol=1e-13, rtol=0)
    zeros = torch.zeros_like(state)
    torch.testing.assert_close(scan(*tokens), recurrence(*tokens, zeros), atol=1e-13, rtol=0)


def test_heads_broadcast():
    """Queries and keys that all heads share; queries in groups, each with one key, value and decay."""
    q, k, v, decay, _, state = inputs()
    one_q, one_k = q[:, :, :1], k[:, :, :1]
    for S, first in ((state, state), (None, torch.zeros_like(state))):
        expected = recurrence(one_q.expand_as(q), one_k.expand_as(k), v, decay, None, first)
        torch.testing.assert_close(scan(one_q, one_k, v, decay, None, S, 16), expected, atol=1e-13, rtol=0)
    groups = torch.stack((q, q + 1), 3)  # (B, T, K, G, N)
    out, S = scan(groups, k[:, :, :, None], v[:, :, :, None], decay[:1, :, :, None], size=16)
    for g in range(2):
        expected = recurrence(groups[:, :, :, g], k, v, decay[:1], None, torch.zeros_like(state))
        torch.testing.assert_close((out[:, :, :, g], S[:, :, 0]), expected, atol=1e-13, rtol=0)


def test_strong_decay_in_fp32():
    """Up to e^-160 per token: the decay over a chunk, and its inverse, are outside the range of fp32. The tolerance is
    the rounding of a sum of 64 such logarithms."""
    for factor in (20, 160):
        q, k, v, decay, beta, state = (x.float().requires_grad_() for x in inputs(150))
        out, S = scan(q, k, v, decay * factor, beta, state)
        exact = [x.double() for x in (q, k, v, decay * factor, beta, state)]
        expected, _ = recurrence(*exact)
        torch.testing.assert_close(out.double(), expected, atol=2e-4 * expected.abs().max().item(), rtol=0)
        gradients = torch.autograd.grad(out.sum() + S.sum(), (q, k, v, decay, beta, state))
        assert all(g.isfinite().all() for g in gradients)


def test_fp32_within_bf16_autocast():
    half = [x.bfloat16() for x in inputs()]
    expected = scan(*(x.float() for x in half))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(scan(*half), expected, atol=0, rtol=0)


def test_delta_rule_equals_transformers():
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    q, k, v, decay, beta, state = inputs(150, 16, 12, torch.float32)
    got = scan(q * 16**-0.5, k, v, decay, beta, state)
    for function in (theirs.torch_chunk_gated_delta_rule, theirs.torch_recurrent_gated_delta_rule):
        expected = function(q, k, v, decay, beta, initial_state=state, output_final_state=True)
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)


def test_initial_decay_remembers_from_one_to_a_thousand_tokens():
    torch.manual_seed(0)
    A_log, dt_bias = torch.empty(2, 5000)
    module.init_decay(A_log, dt_bias)
    assert 1 <= A_log.exp().min() < 1.01 and 15.9 < A_log.exp().max() <= 16.001
    dt = F.softplus(dt_bias)
    assert 0.00099 < dt.min() < 0.0011 and 0.099 < dt.max() < 0.1001
    assert dt.log().mean().item() == pytest.approx(torch.tensor([0.001, 0.1]).log().mean().item(), abs=0.05)
