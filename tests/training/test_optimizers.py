"""Optimizers and the learning rate schedule compared with their definitions."""

import itertools

import numpy as np
import pytest
import torch

from model import GPT
from tests.conftest import TINY
from training import optimizers
from training.config import OptimConfig


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 12), (2, 12, 5), (1, 1, 7)])
def test_orthogonalize_keeps_singular_vectors_and_equalizes_singular_values(shape):
    g = np.random.default_rng(0)
    matrices = g.standard_normal(shape)
    got = optimizers.orthogonalize(torch.tensor(matrices, dtype=torch.float32)).double().numpy()
    for before, after in zip(matrices, got, strict=True):
        u, s, vt = np.linalg.svd(before, full_matrices=False)
        inner = u.T @ after @ vt.T  # diagonal, if the directions are the same
        assert np.abs(inner - np.diag(np.diag(inner))).max() < 1e-4
        sizes = np.diag(inner)[s / np.linalg.norm(s) > 0.02]
        assert sizes.min() > 0.65
        assert sizes.max() < 1.25


def test_muon_step_equals_the_definition(monkeypatch):
    monkeypatch.setattr(optimizers, "orthogonalize", lambda x, _: x)
    p = torch.nn.Parameter(torch.full((2, 8), 2.0))
    muon = optimizers.Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5, dtype=torch.float32)
    muon.fused = False
    weight, memory = 2.0, 0.0
    for gradient in (1.0, -3.0):
        p.grad = torch.full((2, 8), gradient)
        muon.step()
        memory = 0.9 * memory + 0.1 * gradient
        step = 0.9 * memory + 0.1 * gradient
        weight = weight * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 8**0.5 * step
    torch.testing.assert_close(p.detach(), torch.full((2, 8), weight))


def test_muon_update_has_the_rms_of_adamw():
    torch.manual_seed(0)
    for shape in ((64, 64), (32, 128), (128, 32)):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape)
        optimizers.Muon([p], lr=1.0, momentum=0.0, weight_decay=0.0, dtype=torch.float32).step()
        assert p.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


def test_batched_step_equals_separate_steps():
    torch.manual_seed(0)
    together = [torch.nn.Parameter(torch.randn(6, 9)) for _ in range(3)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    gradients = [torch.randn(6, 9) for _ in range(3)]
    batch = optimizers.Muon(together, lr=0.1, momentum=0.9, weight_decay=0.1, dtype=torch.float32)
    singles = [optimizers.Muon([p], lr=0.1, momentum=0.9, weight_decay=0.1, dtype=torch.float32) for p in alone]
    for ours, theirs, g in zip(together, alone, gradients, strict=True):
        ours.grad, theirs.grad = g.clone(), g.clone()
    for optimizer in (batch, *singles):
        optimizer.step()
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_exactly_one_optimizer(tied):
    model = GPT(type(TINY)(**{**vars(TINY), "tie_embeddings": tied}))
    adamw, muon = optimizers.build_optimizers(model, OptimConfig(weight_decay=0.3), torch.float32)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [sorted(names[id(p)] for p in g["params"]) for o in (adamw, muon) for g in o.param_groups]
    assert sorted(itertools.chain(*groups)) == sorted(names.values())
    assert all("_proj" in name for name in groups[2])
    assert all("norm" in name for name in groups[1])
    assert groups[0] == ([] if tied else ["lm_head.weight"]) + ["model.embed_tokens.weight"]
    assert [g["weight_decay"] for o in (adamw, muon) for g in o.param_groups] == [0.3, 0.0, 0.3]
    (alone,) = optimizers.build_optimizers(model, OptimConfig(optimizer="adamw"), torch.float32)
    assert sum(len(g["params"]) for g in alone.param_groups) == len(names)


def test_schedule_warmup_constant_and_decay():
    config = OptimConfig(warmup_steps=4, lr_decay_frac=0.5)
    factors = [optimizers.lr_factor(step, 20, config) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:10] == [1.0] * 5
    assert factors[10:] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert [optimizers.lr_factor(step, 0, config) for step in (0, 4, 1000)] == pytest.approx([0.2, 1.0, 1.0])
    assert optimizers.lr_factor(19, 20, OptimConfig(lr_decay_frac=0.0)) == pytest.approx(20 / 21)
