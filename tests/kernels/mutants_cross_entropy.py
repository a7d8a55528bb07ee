"""Seeded bugs for kernels/cross_entropy.py and its Triton kernel, and the probe that must see each of them."""

import importlib

import torch
import torch.nn.functional as F

FIRST_WALK = "total = 0.0\n    for start in range(%d, V,"
SECOND_WALK = "total\n        for start in range(%d, V,"

MUTANTS: list[tuple[str, str, str]] = [
    # chunks
    ("dW of the last chunk alone", "dweight.addmm_(logits.t(), x[part])", "dweight.copy_(logits.t() @ x[part])"),
    ("the last token left out", "min(first + rows, N))", "min(first + rows, N - 1))"),
    ("every chunk reads the first tokens", "torch.mm(x[part], w", "torch.mm(x[: len(logits)], w"),
    ("every chunk writes the first losses", "losses[part]", "losses[: len(logits)]"),
    ("targets up to V let through", "(targets >= V)", "(targets > V)"),
    # the step in torch
    ("ignored tokens have a gradient", "/ total * counts)", "/ total)"),
    ("ignored tokens have a loss", "z_loss * lse.square()) * counts)", "z_loss * lse.square()))"),
    ("the target's 1 not taken off", "scores.scatter_add_(1, at, -counts.float())", "pass"),
    ("the softcap's derivative forgotten", "scores.mul_(slope)", "pass"),
    ("the z-loss's derivative halved", "(1 + 2 * z_loss * lse) / total *", "(1 + z_loss * lse) / total *"),
    # the chain rule
    ("dx not scaled", "dx * grad if", "dx if"),
    ("dW not scaled", "(dweight * grad).to", "dweight.to"),
]  # fmt: skip

TRITON_MUTANTS: list[tuple[str, str, str]] = [
    ("no rescale of the running sum", "total * tl.exp(top - higher)", "total"),
    ("the maximum of one block only", "tl.maximum(top, tl.max(score, 0))", "tl.max(score, 0)"),
    ("padding counts", 'score = tl.where(column < V, score, float("-inf"))', "pass"),
    ("rows V apart", "row * stride  #", "row * V  #"),
    ("the first column not seen", FIRST_WALK % 0, FIRST_WALK % 1),
    ("the first column not differentiated", SECOND_WALK % 0, SECOND_WALK % 1),
    ("the column after the target", "column == target", "column == target + 1"),
    ("the target's score not capped", "at_target = softcap * accurate_tanh(at_target / softcap)", "pass"),
    ("the softcap's derivative not squared", "1 - (score / softcap) * (score / softcap)", "1 - (score / softcap)"),
    ("lse in the z-loss not squared", "z_loss * lse * lse", "z_loss * lse"),
    ("the z-loss not differentiated", "factor = (1 + 2 * z_loss * lse) / total\n", "factor = 1 / total\n"),
    ("ignored rows have a gradient", "tl.where(counts & (column < V), g", "tl.where(column < V, g"),
    ("ignored rows have a loss", "tl.where(counts, loss", "tl.where(row >= 0, loss"),
    ("a target outside looks valid", 'other=float("nan")', "other=0.0"),
]  # fmt: skip


def probe(linear_cross_entropy) -> None:
    """AssertionError unless the function and its gradients are right: two chunks, both backends, every term."""
    with_all = {"z_loss": 0.1, "softcap": 3.0}
    cases = [("torch", 300, 4096, 1.0, {}), ("torch", 30, 65, 2.0, with_all)]  # 4096: a chunk has 256 tokens
    cases += [("triton", 12, 65, 1.0, {}), ("triton", 12, 65, 2.0, with_all), ("triton", 4, 33, 300.0, {})]
    for backend, N, V, size, terms in cases:
        g = torch.Generator().manual_seed(N + V)
        x, weight = size * torch.randn(N, 8, generator=g), torch.randn(V, 8, generator=g)
        targets = torch.randint(V, (N,), generator=g)
        targets[::5], targets[1], targets[-1] = -100, V - 1, 0
        ours, exact = (
            [a.to(dtype, copy=True).requires_grad_() for a in (x, weight)] for dtype in (x.dtype, torch.float64)
        )
        loss = linear_cross_entropy(*ours, targets, **terms, backend=backend)
        expected = _definition(*exact, targets, **terms)
        (loss / 3).backward()
        (expected / 3).backward()
        close = dict(rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(loss.double(), expected, **close)
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a.grad.double(), b.grad, **close)
    try:
        linear_cross_entropy(x, weight, targets.new_full((N,), V))
    except Exception as e:
        assert isinstance(e, ValueError), e
    else:
        raise AssertionError("a target outside the vocabulary was let through")
    losses = torch.zeros(1)  # as on a GPU, where nobody has looked at the targets
    step = importlib.import_module("kernels.triton.cross_entropy").cross_entropy_step  # a mutant's, if it is one
    step(torch.zeros(1, 16), torch.tensor([16]), losses, 0.0, None, False)
    assert losses.isnan().all()


def _definition(x, weight, targets, z_loss=0.0, softcap=None):
    logits = F.linear(x, weight)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lse = torch.logsumexp(logits[targets != -100], 1)
    return F.cross_entropy(logits, targets, reduction="sum") + z_loss * lse.square().sum()
