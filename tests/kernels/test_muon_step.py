"""Muon's step in C++ against its definition in training/optimizers.py, computed in fp64."""

import pytest
import torch

from training.optimizers import Muon, orthogonalize

SHAPES = [(1, 1), (1, 40), (32, 32), (48, 37), (33, 70), (130, 64)]


def compare_steps(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Three steps of one matrix, with the state that they leave."""
    lr, momentum, decay = 0.1, 0.8, 0.3
    random = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape, generator=random))
    muon = Muon([weight], lr, momentum, decay, dtype)
    assert muon.fused
    exact, buffer = weight.detach().double(), torch.zeros(shape, dtype=torch.double)
    for _ in range(3):
        weight.grad = torch.randn(shape, generator=random)
        version = weight._version
        muon.step()
        assert weight._version > version
        buffer = momentum * buffer + (1 - momentum) * weight.grad.double()
        ahead = momentum * buffer + (1 - momentum) * weight.grad.double()
        update = orthogonalize(ahead[None], torch.double)[0]
        exact = exact * (1 - lr * decay) - lr * 0.2 * max(shape) ** 0.5 * update
    rtol = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(weight.detach().double(), exact, rtol=rtol, atol=rtol * float(exact.abs().max()))
    torch.testing.assert_close(muon.state[weight]["momentum"].double(), buffer, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_equal_the_definition(shape, dtype):
    compare_steps(shape, dtype)


def test_many_matrices_in_one_call_and_gradients_that_are_not_contiguous():
    random = torch.Generator().manual_seed(1)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=random)) for shape in SHAPES]
    alone = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    for w, other in zip(weights, alone, strict=True):
        w.grad = torch.randn(w.shape[::-1], generator=random).T
        other.grad = w.grad.clone()
        Muon([other], 0.1, 0.8, 0.3, torch.float32).step()
    Muon(weights, 0.1, 0.8, 0.3, torch.float32).step()
    assert all(torch.equal(w, other) for w, other in zip(weights, alone, strict=True))


def test_a_zero_gradient_only_decays():
    weight = torch.nn.Parameter(torch.ones(5, 7))
    weight.grad = torch.zeros(5, 7)
    Muon([weight], 0.1, 0.8, 0.3, torch.float32).step()
    assert torch.equal(weight.detach(), torch.full((5, 7), 1 - 0.1 * 0.3))
