"""How a model's layers learn: as model.py is written, compiled by torch, or on a CPU with heed's own C++.

`hasten` puts faster code in the place of some modules' `forward`. It computes the same: tests/test_learner.py compares
it with model.py in fp64, for every flag.
"""

import functools

import torch
from torch import Tensor, nn

from kernels import cpu, cpu_layers, cpu_train
from model import GPT, Block, KVCache
from runtime.device import Machine
from runtime.reader import KNOWN, refuse_unknown


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
        for layer in model.model.layers:
            layer.forward = functools.partial(Layer(layer), layer)  # type: ignore[arg-type]
        model.model.norm.forward = functools.partial(_norm, model.model.norm)  # type: ignore[method-assign]
    return ""


def _norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return cpu_train.RMSNorm.apply(x, norm.weight, norm.eps)


class Layer:
    """A block's forward: two nodes of autograd."""

    def __init__(self, layer: Block) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = cpu_layers.Packed(attention, "q_proj", "k_proj", "v_proj", gated=attention.gate * attention.head_dim)
        self.o = cpu_layers.Packed(attention, "o_proj")
        self.gate_up, self.down = cpu_layers.Packed(mlp, "gate_proj", "up_proj", unit=32), cpu_layers.Packed(mlp, "down_proj")

    def __call__(self, layer: Block, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        """As Block.forward: x (B, T, C), cos and sin (1, T, 1, D) -> (B, T, C)."""
        if cache is not None:
            return Block.forward(layer, x, cos, sin, cache)
        attention, dropout = layer.self_attn, layer.dropout if layer.training else 0.0
        D, q_norm, k_norm = attention.head_dim, attention.q_norm, attention.k_norm
        gains = [n.weight if isinstance(n, nn.RMSNorm) else None for n in (q_norm, k_norm)]
        eps = q_norm.eps if isinstance(q_norm, nn.RMSNorm) else 0.0
        H = attention.o_proj.weight.shape[1] // D
        K = attention.k_proj.weight.shape[0] // D
        heads = cpu_train.Heads(H, K, D, attention.pattern.window or 0, D**-0.5, eps)
        norm = layer.input_layernorm
        x = cpu_layers.Attention.apply(
            x, norm.weight, norm.eps, dropout, self.qkv, self.o, *gains, cos[0, :, 0], sin[0, :, 0], heads,
            *self.qkv.weights, *self.o.weights,
        )  # fmt: skip
        norm = layer.post_attention_layernorm
        weights = (*self.gate_up.weights, *self.down.weights)
        return cpu_layers.FeedForward.apply(x, norm.weight, norm.eps, dropout, self.gate_up, self.down, *weights)
