"""The two halves of a layer for training on a CPU: x + attention(norm(x)) and x + swiglu(norm(x)).

Each is one node of autograd. feed_forward.cpp computes the feed-forward half in one call. The attention half is
linear.cpp for the projections and attention.cpp between them. The backward recomputes most activations instead of
saving them. Weights are packed once per optimizer step (`PackedWeight`), not once per micro-batch.

Shapes: B sequences, T tokens, R = B * T, C width, H query heads, K key/value heads, D head size, F feed-forward width.
"""

import math
from collections.abc import Sequence
from ctypes import Structure, c_double, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels.cpu import build
from kernels.cpu.bindings import Heads, attention, attention_backward, autocast_dtype, pack
from kernels.cpu.build import check_tensor
from kernels.reference_attention import DocumentBounds


class PackedWeight:
    """The weights (rows, C) of several linear layers of a module, stacked and packed for the tile matmul. They are
    packed again when one of them has changed."""

    def __init__(self, module: nn.Module, *names: str, unit: int = 1, gated: int = 0) -> None:
        """
        Args:
            module, names: the module and the names of its linear layers.
            unit: each weight starts at a multiple of `unit` rows.
            gated: D, if the first weight alternates D query rows and D gate rows of each head, as in Qwen3-Next. The
                gate rows of all heads are moved to the end.
        """
        self.module, self.names, self.unit, self.gated, self.key = module, names, unit, gated, None

    @property
    def weights(self) -> list[Tensor]:
        """The current weights."""
        return [getattr(self.module, name).weight for name in self.names]

    def __call__(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The packed matrix W for x W^T, and for dy W."""
        weights = self.weights
        key: Any = (dtype, *((w.data_ptr(), w._version) for w in weights))
        if key != self.key:
            parts = [w.detach() for w in weights]
            if self.gated:  # (H * 2D, C) -> (H, 2, D, C) -> (H * D, C) twice
                q, gate = parts[0].view(-1, 2, self.gated, parts[0].shape[1]).unbind(1)
                parts = [q.flatten(0, 1), *parts[1:], gate.flatten(0, 1)]
            self.key, self.packed = key, pack(parts, dtype, self.unit)
        return self.packed

    def split(self, gradient: Tensor) -> list[Tensor]:
        """The gradient of the stacked matrix as gradients of the weights."""
        rows = [len(w) for w in self.weights]
        if self.gated:
            q, *others, gate = gradient.split([rows[0] // 2, *rows[1:], rows[0] // 2])
            both = torch.stack([x.view(-1, self.gated, x.shape[1]) for x in (q, gate)], dim=1)  # (H, 2, D, C)
            return [both.view(rows[0], -1), *others]
        starts = [0, *(math.ceil(n / self.unit) * self.unit for n in rows)]
        return [gradient[sum(starts[: i + 1]) :][:n] for i, n in enumerate(rows)]


def linear(dtype: torch.dtype) -> Any:
    """linear.cpp. Raises build.Unavailable."""
    return build.library("linear", ELEMENT=dtype)


class Weights(Structure):
    """As `FeedForward` in feed_forward.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("R", "C", "F")),
        ("eps", c_double),
        *((name, c_void_p) for name in ("x", "gain", "gate_up", "down", "gate_up_t", "down_t")),
    )


class FeedForward(torch.autograd.Function):
    """x + dropout(swiglu(norm(x))): `apply(x, gain, eps, dropout, gate_up, down, *weights)`.

    x: (B, T, C) fp32. gate_up: gate_proj and up_proj, each (F, C), packed with unit=32. down: down_proj (C, F).
    weights: those of both, to which autograd hands the gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, eps: float, dropout: float, gate_up: PackedWeight, down: PackedWeight,
        *weights: Tensor
    ) -> Tensor:  # fmt: skip
        ctx.dtype, x = autocast_dtype(x), x.contiguous()
        ctx.packed, ctx.eps, ctx.dropout = (gate_up, down), eps, dropout
        C, F = weights[-1].shape
        check_layer(x, gain, weights, [(F, C), (F, C), (C, F)])
        out = torch.empty_like(x)
        shape, _kept = FeedForward.shape(ctx, x, gain)
        forward = build.library("feed_forward", ELEMENT=ctx.dtype).heed_feed_forward
        build.call(forward, shape, out, dropout == 0)
        out, mask = drop(out, x, dropout)
        ctx.save_for_backward(x, gain, mask, *weights)  # the weights, so that torch notices if they change
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, gain, mask, *_, w_down = ctx.saved_tensors
        dy, dx, dgain = dy.contiguous(), torch.empty_like(x), torch.empty_like(gain)
        dout = drop_backward(dy, mask, ctx.dropout)
        (shape, _kept), F = FeedForward.shape(ctx, x, gain), w_down.shape[1]
        dgate_up = torch.empty(2 * math.ceil(F / 32) * 32, x.shape[-1], dtype=torch.float32)
        ddown = torch.empty_like(w_down)
        backward = build.library("feed_forward", ELEMENT=ctx.dtype).heed_feed_forward_backward
        build.call(backward, shape, dout, dy, dx, dgain, dgate_up, ddown)
        return dx, dgain, *[None] * 4, *ctx.packed[0].split(dgate_up), ddown

    @staticmethod
    def shape(ctx: Any, x: Tensor, gain: Tensor) -> tuple[Weights, object]:
        """The argument of both C++ functions, and the tensors that it points to, which must outlive it."""
        (gate_up, gate_up_t), (down, down_t) = (packed(ctx.dtype) for packed in ctx.packed)
        tensors = (x, gain, gate_up, down, gate_up_t, down_t)
        F = ctx.packed[1].weights[0].shape[1]
        return Weights(x[..., 0].numel(), x.shape[-1], F, ctx.eps, *(a.data_ptr() for a in tensors)), tensors


class Attention(torch.autograd.Function):
    """x + dropout(attention(norm(x))): `apply(x, gain, eps, dropout, qkv, o, gain_q, gain_k, cos, sin, heads,
    documents, *weights)`.

    x: (B, T, C) fp32. qkv: q_proj, k_proj and v_proj ((H + 2K) D, C), with a gate ((2H + 2K) D, C). o: o_proj (C, H *
    D). gain_q, gain_k: (D,) or None. cos, sin: (T, D). documents: see `bindings.attention`. weights: those of qkv and
    o, to which autograd hands the gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, eps: float, dropout: float, qkv: PackedWeight, o: PackedWeight,
        gain_q: Tensor | None, gain_k: Tensor | None, cos: Tensor, sin: Tensor, heads: Heads,
        documents: DocumentBounds | None, *weights: Tensor
    ) -> Tensor:  # fmt: skip
        dtype, x = autocast_dtype(x), x.contiguous()
        (B, T, C), N = x.shape, sum(len(w) for w in weights[:3])
        H, K, D = heads[:3]
        check_layer(x, gain, weights, [(N - 2 * K * D, C), (K * D, C), (K * D, C), (C, H * D)])
        mixed, inverse = torch.empty(B, T, N, dtype=dtype), torch.empty(B, T, dtype=torch.float32)
        call = linear(dtype)
        build.call(call.heed_norm_linear, x, gain, eps, qkv(dtype)[0], mixed, inverse, B * T, C, N)
        attended, lse = attention(mixed, gain_q, gain_k, cos, sin, heads, documents)  # (B, T, H * D)
        read = attended * mixed[..., -attended.shape[2] :].sigmoid() if qkv.gated else attended
        out = torch.empty_like(x)
        build.call(call.heed_linear_add, read, o(dtype)[0], None if dropout else x, out, B * T, read.shape[2], C)
        out, mask = drop(out, x, dropout)
        ctx.save_for_backward(x, gain, inverse, mixed, attended, lse, mask, gain_q, gain_k, cos, sin, *weights)
        ctx.packed, ctx.dropout, ctx.heads, ctx.documents = (qkv, o), dropout, heads, documents
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, gain, inverse, mixed, attended, lse, mask, gain_q, gain_k, cos, sin, *_, w_o = ctx.saved_tensors
        (B, T, C), N, Q = x.shape, mixed.shape[2], attended.shape[2]
        qkv, o = ctx.packed
        call = linear(mixed.dtype)
        dy = dy.contiguous()
        gate = mixed[..., -Q:].sigmoid() if qkv.gated else None
        read = attended if gate is None else attended * gate
        dread, do = torch.empty_like(read), torch.empty_like(w_o)
        dout, packed = drop_backward(dy, mask, ctx.dropout), o(mixed.dtype)[1]
        build.call(call.heed_linear_add_backward, dout, read, packed, dread, do, B * T, Q, C)
        dattended = dread if gate is None else dread * gate
        dmixed, dgain_q, dgain_k = attention_backward(
            dattended, mixed, attended, lse, gain_q, gain_k, cos, sin, ctx.heads, ctx.documents
        )
        if gate is not None:
            dmixed[..., -Q:] = dread * attended * gate * (1 - gate)
        dx, dgain, dqkv = torch.empty_like(x), torch.empty_like(gain), torch.empty(N, C, dtype=torch.float32)
        backward, packed = call.heed_norm_linear_backward, qkv(mixed.dtype)[1]
        build.call(backward, dmixed, x, gain, inverse, packed, dy, dx, dgain, dqkv, B * T, C, N)
        return dx, dgain, *[None] * 4, dgain_q, dgain_k, *[None] * 4, *qkv.split(dqkv), do


def check_layer(x: Tensor, gain: Tensor, weights: Sequence[Tensor], shapes: list[tuple[int, ...]]) -> None:
    """Raise ValueError unless x (B, T, C), gain (C,) and the weights are fp32, with these shapes of the weights.

    The forward checks. The backward reads what it saved, and autograd gives it a gradient like the output.
    """
    check_tensor("x", x, torch.float32, *x.shape)
    check_tensor("gain", gain, torch.float32, x.shape[-1])
    for weight, shape in zip(weights, shapes, strict=True):
        check_tensor("weight", weight, torch.float32, *shape)


def drop(out: Tensor, x: Tensor, probability: float) -> tuple[Tensor, Tensor | None]:
    """x + dropout(out) and the mask. Without dropout, C++ has added x already, and the mask is None."""
    if not probability:
        return out, None
    out, mask = torch.native_dropout(out, probability, True)
    return out.add_(x), mask


def drop_backward(dy: Tensor, mask: Tensor | None, probability: float) -> Tensor:
    """The gradient of the argument `out` of `drop`."""
    return dy if mask is None else torch.ops.aten.native_dropout_backward(dy, mask, 1 / (1 - probability))
