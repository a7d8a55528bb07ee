"""How a model's layers learn: as model.py is written, compiled by torch, or on a CPU with heed's own C++.

`hasten` puts faster code in the place of some modules' `forward`. It computes the same: tests/training/test_fused.py compares
it with model.py in fp64, for every flag.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.engine import KNOWN, refuse_unknown
from kernels import attention as attend
from kernels import cpu
from kernels.cpu import train_ops
from model import GPT, Attention, FeedForward, KVCache
from training.device import Machine


def hasten(model: GPT, machine: Machine) -> str:
    """Make the layers learn in the way that the machine chose, and return what is to be said of that, mostly nothing.
    Changes `model`; its parameters stay as they are."""
    if machine.layers == "compiled":
        for layer in model.model.layers:
            layer.compile()  # all layers run the code of the first
    if machine.layers == "C++":
        try:
            refuse_unknown(model.config, KNOWN | {"qk_norm"})
        except cpu.Unavailable as reason:
            return f"layers written, not C++: {reason}"
        faster: dict[type, Any] = {nn.RMSNorm: _norm, Attention: _attention, FeedForward: _feed_forward}
        for name, module in model.named_modules():
            # Norms of queries and keys are in `_attention`; by themselves they serve a cache, as they are written.
            if type(module) in faster and not name.endswith(("q_norm", "k_norm")):
                module.forward = functools.partial(faster[type(module)], module)
    return ""


def _norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return train_ops.RMSNorm.apply(x, norm.weight, norm.eps)


def _attention(attention: Attention, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
    """As Attention.forward: x (B, T, C), cos and sin (1, T, 1, D) -> (B, T, C)."""
    if cache is not None:
        return Attention.forward(attention, x, cos, sin, cache)
    D, q = attention.head_dim, attention.q_proj.weight  # (H * D, C), or with a gate (H * 2D, C)
    gate = None
    if attention.gate:  # a head's D query rows, then its D gate rows
        q, gate = (half.flatten(0, 1) for half in q.view(-1, 2, D, x.shape[-1]).unbind(1))  # (H * D, C) each
    together = torch.cat((q, attention.k_proj.weight, attention.v_proj.weight))  # ((H + 2K) D, C)
    norms = [n.weight if isinstance(n, nn.RMSNorm) else None for n in (attention.q_norm, attention.k_norm)]
    eps = attention.q_norm.eps if isinstance(attention.q_norm, nn.RMSNorm) else 0.0
    mixed = F.linear(x, together)  # (B, T, C) -> (B, T, (H + 2K) D)
    queries, keys, values = train_ops.Heads.apply(mixed, *norms, cos[0, :, 0], sin[0, :, 0], eps, D**-0.5, len(q) // D)
    out = attend(queries, keys, values, attention.mask_spec, softmax_scale=1.0).flatten(
        2
    )  # (B, T, H, D) -> (B, T, H * D)
    return attention.o_proj(out if gate is None else out * F.linear(x, gate).sigmoid())


def _feed_forward(mlp: FeedForward, x: Tensor) -> Tensor:
    """As FeedForward.forward: (B, T, C) -> (B, T, C)."""
    both = F.linear(x, torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)))  # (B, T, C) -> (B, T, 2F)
    return mlp.down_proj(train_ops.SwiGLU.apply(both))
