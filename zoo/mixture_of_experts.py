"""Mixture of experts: each token is processed by `n_expert_active` of `n_expert` feed-forward networks.

    out = sum over the chosen e of p_e expert_e(x);   p = the largest of softmax(W x), divided by their sum

A router W chooses (Shazeer et al. 2017, arXiv 1701.06538, section 2.1). So a layer has n_expert times the parameters,
for the arithmetic of n_expert_active feed-forward networks. A loss keeps the router from always choosing the same
experts (Fedus et al. 2021, "Switch Transformers", arXiv 2101.03961, equations 4 to 6):

    loss = E sum_e f_e P_e;   f_e = share of the tokens that choose e,   P_e = mean probability of e

f and P are means over one sequence here (as in DeepSeek-V3, arXiv 2412.19437, equations 17 to 20), not over a batch.
So the loss does not depend on how a batch is divided into micro-batches and devices.
Cost: per token n_expert_active feed-forward networks and E C for the router; nothing is kept.
Weights and computation are those of transformers' Qwen3MoeSparseMoeBlock with norm_topk_prob.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.reference_attention import IGNORE_INDEX
from zoo.scan import upcast


class MixtureOfExperts(nn.Module):
    """The router and its experts, each an `expert(config)`."""

    def __init__(self, config: Any, expert: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        self.active = config.n_expert_active
        self.gate = nn.Linear(config.n_embd, config.n_expert, bias=False)  # the router, under Hugging Face's name
        self.experts = nn.ModuleList(expert(config) for _ in range(config.n_expert))
        self.balance: Tensor | None = None  # (B,), of the last forward pass in training

    def forward(self, x: Tensor) -> Tensor:
        (B, T, C), E, k = x.shape, len(self.experts), self.active
        with torch.autocast(x.device.type, enabled=False):  # in fp32, as Switch Transformers, section 2.4
            probabilities = F.linear(upcast(x), upcast(self.gate.weight)).softmax(-1)  # (B, T, E)
        p, chosen = probabilities.topk(k)  # (B, T, k) each
        if self.training:
            self.balance = balance(probabilities, chosen)
        order = chosen.flatten().argsort(stable=True)  # (B * T * k,) the pairs of token and expert, sorted by expert
        back = order.argsort()
        rows = Rows.apply(x.flatten(0, 1), order // k, back.view(-1, k))  # (B * T, C) -> (B * T * k, C)
        parts = rows.split(chosen.flatten().bincount(minlength=E).tolist())
        # In training, an expert without tokens runs, too: every process has the same gradients to average.
        pairs = zip(self.experts, parts, strict=True)
        out = torch.cat([expert(part) for expert, part in pairs if len(part) or self.training])
        out = Rows.apply(out, back, order[:, None]).view(B, T, k, C)
        p = (p / p.sum(-1, keepdim=True)).to(out.dtype)
        return (p[..., None] * out).sum(2)  # (B, T, k, C) -> (B, T, C)


class Rows(torch.autograd.Function):
    """x[index], for x (M, C). `copies` (M, k) are the rows of the result that each row of x becomes: the gradient is
    their sum. That of plain indexing is added with atomics on several cores, in any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, copies: Tensor) -> Tensor:
        ctx.save_for_backward(copies)
        return x[index]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (copies,) = ctx.saved_tensors
        return dy[copies].sum(1), None, None  # (M, k, C) -> (M, C)


def balance(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """E sum_e f_e P_e of each sequence, (B,): k if all experts are chosen equally often, E if always the same ones are,
    with certainty.

    probabilities: (B, T, E) of the router. chosen: (B, T, k) experts.
    """
    E = probabilities.shape[-1]
    f = F.one_hot(chosen, E).sum(2).to(probabilities.dtype).mean(1)  # (B, T, k, E) -> (B, E)
    return E * (f * probabilities.mean(1)).sum(-1)


def load_balancing_loss(blocks: Iterable[Any], targets: Tensor) -> Tensor:
    """The sum over layers and sequences of `balance` in the last forward pass, times the number of a sequence's targets
    (B, T) that are not IGNORE_INDEX: as a part of a sum over targets, it becomes a mean with it."""
    number, total = (targets != IGNORE_INDEX).sum(1), torch.zeros((), device=targets.device)
    for block in blocks:
        total = total + (block.mlp.balance * number).sum()
        block.mlp.balance = None  # it holds the graph of the forward pass
    return total
