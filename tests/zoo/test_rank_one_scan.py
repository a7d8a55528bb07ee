"""The chunked recurrence of RWKV-7 compared with its definition, token by token in fp64."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.rank_one_scan import rank_one_scan
from zoo.scan import scan


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, a: Tensor, b: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition in the docstring of zoo/rank_one_scan.py, one token after another."""
    out = []
    for t in range(q.shape[1]):
        u = torch.einsum("bhn,bhnp->bhp", a[:, t], S)
        S = decay[:, t, :, :, None].exp() * S
        S = S + torch.einsum("bhn,bhp->bhnp", b[:, t], u) + torch.einsum("bhn,bhp->bhnp", k[:, t], v[:, t])
        out.append(torch.einsum("bhn,bhnp->bhp", q[:, t], S))
    return torch.stack(out, 1), S


def inputs(T: int = 53, N: int = 8, P: int = 6, strongest: float = 2.0) -> list[Tensor]:
    """q, k, v, decay, a, b, state, in fp64."""
    g, B, H = torch.Generator().manual_seed(T), 2, 3
    q, k, a, rate = torch.randn(4, B, T, H, N, generator=g, dtype=torch.float64)
    v = torch.randn(B, T, H, P, generator=g, dtype=torch.float64)
    state = torch.randn(B, H, N, P, generator=g, dtype=torch.float64)
    decay = -strongest * torch.rand(B, T, H, N, generator=g, dtype=torch.float64)
    a = F.normalize(a, dim=-1)
    return [q, k, v, decay, -a, rate.sigmoid() * a, state]


def check(rank_one_scan) -> None:
    """AssertionError unless outputs, states and all gradients equal the definition's, from a state, in 4 chunks."""
    found = []
    for function in (lambda *x: rank_one_scan(*x, size=16), recurrence):
        leaves = [x.requires_grad_() for x in inputs()]
        out, S = function(*leaves)
        found.append([out, S, *torch.autograd.grad(out.sin().sum() + S.cos().sum(), leaves)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_outputs_states_and_gradients_equal_the_definition():
    check(rank_one_scan)


def test_any_split_into_calls_and_chunks_gives_the_same():
    *tokens, state = inputs()
    expected = recurrence(*tokens, state)
    for size, parts in itertools.product((1, 7, 32), ((53,), (20, 33), (1,) * 53, (50, 1, 2))):
        S, outs = state, []
        for part in zip(*(x.split(parts, 1) for x in tokens), strict=True):
            out, S = rank_one_scan(*part, S, size)
            outs.append(out)
        torch.testing.assert_close((torch.cat(outs, 1), S), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(rank_one_scan(*tokens), recurrence(*tokens, 0 * state), atol=1e-12, rtol=0)


def test_strongest_decay_of_rwkv7_in_fp32():
    """All channels decay by e^(-e^-0.5) per token, or by half of it and more: outputs and gradients are as of fp32."""
    exact = inputs(150, strongest=0.5 * math.exp(-0.5))
    exact[3] -= 0.5 * math.exp(-0.5)
    results = []
    for function, dtype in ((rank_one_scan, torch.float32), (recurrence, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in exact]
        out, S = function(*leaves)
        results.append([out, S, *torch.autograd.grad(out.sin().sum() + S.cos().sum(), leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_fp32_within_bf16_autocast():
    half = [x.bfloat16() for x in inputs(strongest=0.5)]
    expected = rank_one_scan(*(x.float() for x in half))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(rank_one_scan(*half), expected, atol=0, rtol=0)


def test_equals_the_delta_rule_of_scan():
    """u = beta (v - S^T k) after the decay, if a is the decayed key and b = beta k."""
    q, k, v, _, _, rate, state = inputs()
    k, beta, decay = (
        F.normalize(k, dim=-1),
        rate.sum(-1).sigmoid(),
        -rate.square().sum(-1),
    )  # (B, T, H) for the last two
    b = beta[..., None] * k
    a = -decay[..., None].exp() * k
    got = rank_one_scan(q, b, v, decay[..., None].expand_as(k), a, b, state)
    torch.testing.assert_close(got, scan(q, k, v, decay, beta, state), atol=1e-12, rtol=0)
