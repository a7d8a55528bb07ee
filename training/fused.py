"""Fused layers for training on a CPU: model.py's layers with the C++ operations of kernels/cpu/train_ops.py.

`apply_fused_layers(model)` replaces the `forward` of every norm, attention and feed-forward layer from outside. Results
and gradients are those of model.py: tests/training/test_fused.py compares them in fp64 for every supported flag.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.engine import SUPPORTED, check_supported
from kernels import attention as compute_attention
from kernels import cpu
from kernels.cpu import train_ops
from model import GPT, Attention, Block, Decoder, FeedForward, KVCache
from training.device import Machine


class FusedLayersError(RuntimeError):
    """A model whose layers cannot be fused, or that was changed after they were."""


def apply_fused_layers(model: GPT) -> None:
    """Run the model's layers with fused C++ operations from now on. Changes `model` in place; parameters stay.

    It must be the last change to the model: every forward pass checks that no module was replaced, moved or cast since,
    and raises FusedLayersError otherwise. Call it again after a change to fuse the changed model.

    Raises:
        kernels.cpu.Unavailable: a flag of the model that the C++ operations do not support.
        FusedLayersError: a layer that is not exactly model.py's (a subclass, another module), or not fp32 on a CPU.
    """
    check_supported(model.config, SUPPORTED | {"qk_norm"})
    decoder = model.model
    _check_layers(decoder)
    block: Any
    for block in decoder.layers:
        _replace_forward(block.input_layernorm, fused_rms_norm)
        _replace_forward(block.self_attn, fused_attention)
        _replace_forward(block.post_attention_layernorm, fused_rms_norm)
        _replace_forward(block.mlp, fused_feed_forward)
    _replace_forward(decoder.norm, fused_rms_norm)
    if old := getattr(decoder, "fused_check", None):
        old.remove()
    modules = [(module, type(module), dict(module._modules)) for module in decoder.modules()]
    check = decoder.register_forward_pre_hook(functools.partial(_check_unchanged, modules))
    object.__setattr__(decoder, "fused_check", check)


def optimize_layers(model: GPT, machine: Machine) -> str:
    """Apply the machine's layer implementation to the model, in place. Returns a log line if that is not possible."""
    if machine.layer_impl == "compiled":
        for layer in model.model.layers:
            layer.compile()  # all layers share the compiled code of the first
    if machine.layer_impl == "fused":
        try:
            apply_fused_layers(model)
        except cpu.Unavailable as reason:
            return f"layers eager ({reason})"
    return ""


def fused_rms_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """nn.RMSNorm.forward: (..., C) -> (..., C)."""
    return train_ops.RMSNorm.apply(x, norm.weight, norm.eps)


def fused_attention(attention: Attention, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
    """Attention.forward: x (B, T, C); cos, sin (1, T, 1, D) -> (B, T, C)."""
    if cache is not None:
        return Attention.forward(attention, x, cos, sin, cache)
    D, q = attention.head_dim, attention.q_proj.weight  # (H * D, C), or with a gate (H * 2D, C)
    gate = None
    if attention.gate:  # a head's D query rows, then its D gate rows
        q, gate = (half.flatten(0, 1) for half in q.view(-1, 2, D, x.shape[-1]).unbind(1))  # (H * D, C) each
    qkv_weight = torch.cat((q, attention.k_proj.weight, attention.v_proj.weight))  # ((H + 2K) D, C)
    norms = [n.weight if isinstance(n, nn.RMSNorm) else None for n in (attention.q_norm, attention.k_norm)]
    eps = attention.q_norm.eps if isinstance(attention.q_norm, nn.RMSNorm) else 0.0
    qkv = F.linear(x, qkv_weight)  # (B, T, C) -> (B, T, (H + 2K) D)
    queries, keys, values = train_ops.Heads.apply(qkv, *norms, cos[0, :, 0], sin[0, :, 0], eps, D**-0.5, len(q) // D)
    # The queries are scaled already.
    out = compute_attention(queries, keys, values, attention.mask_spec, softmax_scale=1.0)  # (B, T, H, D)
    out = out.flatten(2)  # (B, T, H, D) -> (B, T, H * D)
    return attention.o_proj(out if gate is None else out * F.linear(x, gate).sigmoid())


def fused_feed_forward(mlp: FeedForward, x: Tensor) -> Tensor:
    """FeedForward.forward: (B, T, C) -> (B, T, C)."""
    gate_up = F.linear(x, torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)))  # (B, T, C) -> (B, T, 2F)
    return mlp.down_proj(train_ops.SwiGLU.apply(gate_up))


def _replace_forward(module: nn.Module, function: Any) -> None:
    module.forward = functools.partial(function, module)


def _check_layers(decoder: Decoder) -> None:
    """Raise FusedLayersError unless every module is exactly model.py's and every parameter is fp32 on a CPU."""
    expected: list[tuple[str, nn.Module, tuple[type, ...]]] = [("model.norm", decoder.norm, (nn.RMSNorm,))]
    block: Any
    for number, block in enumerate(decoder.layers):
        name = f"model.layers.{number}"
        expected.append((name, block, (Block,)))
        if type(block) is not Block:
            break  # its parts may have other names
        expected.append((f"{name}.input_layernorm", block.input_layernorm, (nn.RMSNorm,)))
        expected.append((f"{name}.self_attn", block.self_attn, (Attention,)))
        expected.append((f"{name}.post_attention_layernorm", block.post_attention_layernorm, (nn.RMSNorm,)))
        expected.append((f"{name}.mlp", block.mlp, (FeedForward,)))
        for part, module in block.self_attn.named_children():
            kinds: tuple[type, ...] = (nn.RMSNorm, nn.Identity) if part in ("q_norm", "k_norm") else (nn.Linear,)
            expected.append((f"{name}.self_attn.{part}", module, kinds))
        expected += [(f"{name}.mlp.{part}", module, (nn.Linear,)) for part, module in block.mlp.named_children()]
    for name, module, kinds in expected:
        if type(module) not in kinds:
            right = " or ".join(kind.__name__ for kind in kinds)
            raise FusedLayersError(f"{name} is {type(module).__name__}, fused layers need exactly {right}")
    _check_parameters(decoder)


def _check_parameters(decoder: nn.Module) -> None:
    for name, parameter in decoder.named_parameters():
        if not (parameter.is_cpu and parameter.dtype is torch.float32):
            where = f"{str(parameter.dtype).removeprefix('torch.')} on {parameter.device}"
            raise FusedLayersError(f"model.{name} is {where}, fused layers need float32 on a CPU")


def _check_unchanged(modules: list[tuple[nn.Module, type, dict[str, Any]]], decoder: nn.Module, inputs: Any) -> None:
    """Before every forward pass. Raise FusedLayersError if the model is not as it was when its layers were fused."""
    for module, kind, children in modules:
        if type(module) is not kind or module._modules != children:
            raise FusedLayersError(
                f"{kind.__name__} was changed, or modules in it were replaced, after apply_fused_layers(model): "
                "call it again, as the last change"
            )
        for parameter in module._parameters.values():
            if parameter is not None and not (parameter.is_cpu and parameter.dtype is torch.float32):
                _check_parameters(decoder)  # raises, with the name
