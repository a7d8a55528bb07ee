"""Fused layers for training on a CPU: model.py's layers with the C++ operations of kernels/cpu/.

`apply_fused_layers(model)` replaces the `forward` of every layer and of the last norm from outside. Results
and gradients are those of model.py: tests/training/test_apply_fused_layers.py compares them in fp64 for every supported
flag. A layer of zoo/ keeps its mixer as it is, one with experts its feed-forward networks, and one with dropout of the
attention weights (in training) or context parallelism its attention; the rest is fused.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.engine import SUPPORTED, check_supported
from kernels import DocumentBounds, attention, cpu, preferred
from kernels.cpu import bindings, fused_layers
from kernels.cpu.fused_layers import PackedWeight
from model import GPT, Attention, Block, Decoder, FeedForward, KVCache
from training.device import Machine
from zoo import MIXERS
from zoo.mixture_of_experts import MixtureOfExperts

ADDED = {"qk_norm", "scale_scores", "positions", "n_expert", "n_expert_active"}  # to what the engine for CPUs supports


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
    check_supported(model.config, SUPPORTED | ADDED)
    if model.config.positions == "alibi":
        raise cpu.Unavailable("heed's C++ does not support model.positions = 'alibi'")
    decoder = model.model
    _check_layers(decoder)
    block: Any
    for block in decoder.layers:
        block.forward = FusedBlock(block)
    decoder.norm.forward = functools.partial(fused_rms_norm, decoder.norm)  # type: ignore[method-assign]
    if old := getattr(decoder, "fused_check", None):
        old.remove()
    modules = [(module, type(module), dict(module._modules)) for module in decoder.modules()]
    check = decoder.register_forward_pre_hook(functools.partial(_check_unchanged, modules))
    object.__setattr__(decoder, "fused_check", check)


def optimize_layers(model: GPT, machine: Machine) -> str:
    """Apply the machine's layer implementation to the model, in place. Returns log lines about what is not possible."""
    notes = []
    if machine.layer_impl == "compiled":
        for layer in model.model.layers:
            layer.compile()  # all layers share the compiled code of the first
    if machine.layer_impl == "fused":
        try:
            apply_fused_layers(model)
        except cpu.Unavailable as reason:
            notes.append(f"layers eager ({reason})")
    backend, _ = preferred(machine.device)
    if model.config.attention_dropout and backend in ("cpp", "sdpa"):
        other = "blocks" if backend == "cpp" else "reference"
        notes.append(f"attention {other} in training ({backend} does not support model.attention_dropout)")
    if model.model.document_start is not None:
        notes.append("attention within documents (data.document_mask)")
    return "\n".join(notes)


def fused_rms_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """nn.RMSNorm.forward: (..., C) -> (..., C)."""
    return bindings.RMSNorm.apply(x, norm.weight, norm.eps)


class FusedBlock:
    """Block.forward as two nodes of autograd: x + attention(norm(x)) and x + feed_forward(norm(x))."""

    def __init__(self, block: Block) -> None:
        mixer, mlp = block.self_attn, block.mlp
        self.block = block
        self.packed: list[PackedWeight] = []
        if isinstance(mixer, Attention):
            self.qkv = PackedWeight(mixer, "q_proj", "k_proj", "v_proj", gated=mixer.head_dim if mixer.gate else 0)
            self.o = PackedWeight(mixer, "o_proj")
            self.packed += [self.qkv, self.o]
        if isinstance(mlp, FeedForward):
            self.gate_up = PackedWeight(mlp, "gate_proj", "up_proj", unit=32)
            self.down = PackedWeight(mlp, "down_proj")
            self.packed += [self.gate_up, self.down]

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None,
        documents: DocumentBounds | None = None
    ) -> Tensor:  # fmt: skip
        """x (B, T, C); cos, sin (1, T, 1, D) -> (B, T, C)."""
        block = self.block
        if cache is not None:
            return Block.forward(block, x, cos, sin, cache)
        if hasattr(block, "unshard"):  # gathered weights have the address and the version of the last ones
            for weight in self.packed:
                weight.key = None
        dropout = block.dropout if block.training else 0.0
        mixer = block.self_attn
        if isinstance(mixer, Attention) and mixer.attend is attention and not (block.training and mixer.dropout):
            x = self.attend(mixer, x, cos, sin, dropout, documents)
        else:
            mixed = block.mix(fused_rms_norm(block.input_layernorm, x), cos, sin, None, documents)
            x = x + F.dropout(mixed, dropout)
        norm = block.post_attention_layernorm
        if isinstance(block.mlp, MixtureOfExperts):
            return x + F.dropout(block.mlp(fused_rms_norm(norm, x)), dropout)
        weights = (*self.gate_up.weights, *self.down.weights)
        return fused_layers.FeedForward.apply(x, norm.weight, norm.eps, dropout, self.gate_up, self.down, *weights)

    def attend(
        self, attention: Attention, x: Tensor, cos: Tensor, sin: Tensor, dropout: float,
        documents: DocumentBounds | None
    ) -> Tensor:  # fmt: skip
        """x + attention(norm(x)), (B, T, C) -> (B, T, C)."""
        D, q_norm, k_norm = attention.head_dim, attention.q_norm, attention.k_norm
        gains = [n.weight if isinstance(n, nn.RMSNorm) else None for n in (q_norm, k_norm)]
        eps = q_norm.eps or 0.0 if isinstance(q_norm, nn.RMSNorm) else 0.0
        H, K = attention.o_proj.in_features // D, attention.k_proj.out_features // D
        heads = bindings.Heads(H, K, D, attention.mask_spec.window or 0, attention.softmax_scale, eps)
        norm = self.block.input_layernorm
        return fused_layers.Attention.apply(
            x, norm.weight, norm.eps, dropout, self.qkv, self.o, *gains, cos[0, :, 0], sin[0, :, 0], heads,
            documents, *self.qkv.weights, *self.o.weights,
        )  # fmt: skip


def _check_layers(decoder: Decoder) -> None:
    """Raise FusedLayersError unless every module is exactly model.py's and every parameter is fp32 on a CPU."""
    expected: list[tuple[str, nn.Module, tuple[type, ...]]] = [("model.norm", decoder.norm, (nn.RMSNorm,))]
    block: Any
    for number, block in enumerate(decoder.layers):
        name = f"model.layers.{number}"
        expected.append((name, block, (Block,)))
        if _kind(block) is not Block:
            break  # its parts may have other names
        expected.append((f"{name}.input_layernorm", block.input_layernorm, (nn.RMSNorm,)))
        expected.append((f"{name}.self_attn", block.self_attn, (Attention, *MIXERS.values())))
        expected.append((f"{name}.post_attention_layernorm", block.post_attention_layernorm, (nn.RMSNorm,)))
        expected.append((f"{name}.mlp", block.mlp, (FeedForward, MixtureOfExperts)))
        for part, module in block.self_attn.named_children() if isinstance(block.self_attn, Attention) else ():
            kinds: tuple[type, ...] = (nn.RMSNorm, nn.Identity) if part in ("q_norm", "k_norm") else (nn.Linear,)
            expected.append((f"{name}.self_attn.{part}", module, kinds))
        parts = block.mlp.named_children() if isinstance(block.mlp, FeedForward) else ()
        expected += [(f"{name}.mlp.{part}", module, (nn.Linear,)) for part, module in parts]
    for name, module, kinds in expected:
        if _kind(module) not in kinds:
            right = " or ".join(kind.__name__ for kind in kinds)
            raise FusedLayersError(f"{name} is {_kind(module).__name__}, fused layers need exactly {right}")
    _check_parameters(decoder)


def _kind(module: nn.Module) -> type:
    """The class of a module, before fully_shard put two of its own before it."""
    return next(kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.distributed."))


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
