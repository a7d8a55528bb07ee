"""Attention by blocks of queries: with the weights of plain attention, outputs and gradients are model.Attention's."""

import dataclasses

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model import Attention, KVCache, precompute_rope
from tests.conftest import TINY
from zoo.query_blocks import QueryBlocks

CONFIG = dataclasses.replace(TINY, context=60, n_layer=1)


def tables(config, T: int) -> list[Tensor]:
    """cos and sin, (1, T, 1, D), in fp64."""
    return [table[None, :T, None].double() for table in precompute_rope(config)]


def plain(cls) -> type[QueryBlocks]:
    """A subclass with softmax(q k^T / sqrt(D)), causal."""

    class Plain(cls):
        def weights(self, q, k, distance):
            return (q @ k.mT / 4).masked_fill(distance < 0, -torch.inf).softmax(-1)

    return Plain


def check(cls) -> None:
    """AssertionError unless outputs and gradients equal attention's, and outputs in several calls with rows of a cache,
    which held other tokens before."""
    torch.manual_seed(0)
    ours, theirs = plain(cls)(CONFIG, 0).double(), Attention(CONFIG, 0).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, rope, found = torch.randn(2, 53, 32, dtype=torch.float64), tables(CONFIG, 53), []
    for mixer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        out = mixer(leaf, *rope, None)
        found.append([out, *torch.autograd.grad(out.sin().sum(), [leaf, *mixer.parameters()])])
    torch.testing.assert_close(*found, atol=1e-13, rtol=0)
    cache, at = KVCache(CONFIG, 2, dtype=torch.float64), 0
    with torch.no_grad():
        ours(x.flip(1), *rope, cache)
        rows = cache.select(torch.tensor([1, 0]), torch.tensor([0, 0]))
        for T in (1, 2, 40, 1, 9):
            out = ours(x[:, at : at + T], *(table[:, at : at + T] for table in rope), rows)
            torch.testing.assert_close(out, found[1][0][:, at : at + T].detach(), atol=1e-13, rtol=0)
            rows.advance(T)
            at += T


def test_outputs_and_gradients_equal_attentions():
    check(QueryBlocks)


def test_weights_of_all_queries_never_exist_at_once():
    """The largest tensor has 16 T weights for each head, and what is kept for the backward pass grows with T."""

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.numbers = max(self.numbers, out.numel() if isinstance(out, Tensor) else 0)
            return out

    config, totals = dataclasses.replace(CONFIG, context=1024), []
    mixer = plain(QueryBlocks)(config, 0).double()
    for T in (512, 1024):
        kept: list[Tensor] = []  # alive, so that each has an address of its own
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda y, kept=kept: kept.append(y) or y, lambda y: y)
        with Largest() as mode, hooks:
            mixer(torch.randn(1, T, 32, dtype=torch.float64), *tables(config, T), None).sum().backward()
        assert mode.numbers == 4 * 16 * T
        storages = {y.data_ptr(): y for y in (tensor.untyped_storage() for tensor in kept)}
        totals.append(sum(y.nbytes() for y in storages.values()))
    assert totals[1] < 2 * totals[0]
