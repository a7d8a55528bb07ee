"""What lies between a block's matrix products, to train on a CPU: four operations of train_ops.cpp and their gradients,

    RMSNorm    Heads (QK-norm and RoPE)    Attend (softmax of q k^T, times v)    SwiGLU

and what lies between those of the head and the loss, `cross_entropy`.

A matrix library runs products at full rate. What lies between them is, operation by operation, several walks through
all activations; here it is one each, as a compiler would make it, but after seconds and not after half a minute.

Shapes: B sequences, T tokens, C width, H query heads, K key/value heads, G = H / K, D head size, F feed-forward width.
Activations are fp32 or bf16, sums fp32 and rounded once; gains are fp32.
"""

from ctypes import Structure, c_double, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import cpu
from kernels.cpu.blockwise_attention import spans
from kernels.reference import MaskSpec


class RMSNorm(torch.autograd.Function):
    """`apply(x, gain, eps)`: x (..., C) fp32 by its root mean square, times gain (C,); under autocast in its dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        x, C = x.contiguous(), x.shape[-1]
        y, inverse = torch.empty(x.shape, dtype=dtype), torch.empty(x.shape[:-1])
        cpu.call(cpu.training(dtype).heed_norm, x, gain, y, inverse, inverse.numel(), C, eps)
        ctx.save_for_backward(x, gain, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, inverse = ctx.saved_tensors
        dx, dgain, rows = torch.empty_like(x), torch.empty_like(gain), inverse.numel()
        backward = cpu.training(dy.dtype).heed_norm_backward
        cpu.call(backward, dy.contiguous(), x, gain, inverse, dx, dgain, rows, x.shape[-1])
        return dx, dgain, None


class Shape(Structure):
    """As `Heads` in train_ops.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("B", "T", "H", "K", "D", "normed")),
        *((name, c_double) for name in ("eps", "scale")),
        *((name, c_void_p) for name in ("gain_q", "gain_k", "cos", "sin")),
    )


class Heads(torch.autograd.Function):
    """`apply(mixed, gain_q, gain_k, cos, sin, eps, scale, H)`: mixed (B, T, (H + 2K) D) -> q (B, T, H, D), k and v (B,
    T, K, D), which lie in memory as `Attend` wants them. Queries and keys are normed, if gains (D,) are given and not
    None, and turned by cos and sin (T, D), as model.py's `apply_rotary_emb` does; queries are multiplied by scale."""

    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, gain_q: Tensor | None, gain_k: Tensor | None, cos: Tensor, sin: Tensor, eps: float,
        scale: float, H: int
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        B, T, columns = mixed.shape
        D = cos.shape[-1]
        K = (columns // D - H) // 2
        mixed = mixed.contiguous()
        ctx.normed = gain_q is not None and gain_k is not None
        gains = (gain_q, gain_k) if gain_q is not None and gain_k is not None else (torch.ones(D), torch.ones(D))
        tables = (*gains, cos.contiguous(), sin.contiguous())
        ctx.shape = (B, T, H, K, D, ctx.normed, eps, scale)
        shape = Shape(*ctx.shape, *(x.data_ptr() for x in tables))
        q, k, v = (torch.empty(B, heads, T, D, dtype=mixed.dtype) for heads in (H, K, K))
        cpu.call(cpu.training(mixed.dtype).heed_heads, shape, mixed, q, k, v)
        ctx.save_for_backward(mixed, *tables)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, D) -> (B, T, H or K, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mixed, *tables = ctx.saved_tensors
        gain_q, gain_k, *_ = tables
        shape = Shape(*ctx.shape, *(x.data_ptr() for x in tables))
        dmixed, dgains = torch.empty_like(mixed), (torch.empty_like(gain_q), torch.empty_like(gain_k))
        backward = cpu.training(mixed.dtype).heed_heads_backward
        cpu.call(backward, shape, mixed, *(d.transpose(1, 2).contiguous() for d in gradients), dmixed, *dgains)
        return dmixed, *(dgains if ctx.normed else (None, None)), *[None] * 5


class Scores(Structure):
    """As in train_ops.cpp."""

    _fields_ = tuple((name, c_int64) for name in ("N", "G", "queries", "keys", "first", "low", "window"))


class Attend(torch.autograd.Function):
    """`apply(q, k, v, pattern, scale)`: q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H, D). The pattern is causal.

    Blocks of queries multiply only the keys that they can see (blockwise_attention.py); their weights are kept.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: MaskSpec, scale: float) -> Tensor:
        B, T, H, D = q.shape
        N, G = B * k.shape[2], H // k.shape[2]
        q = (q if scale == 1 else q * scale).transpose(1, 2).reshape(N, G, T, D)  # (B, T, H, D) -> (B * K, G, T, D)
        k, v = (x.transpose(1, 2).reshape(N, T, D) for x in (k, v))  # (B, T, K, D) -> (B * K, T, D)
        out, kept = torch.empty_like(q), []
        for first, R, low, high in spans(T, T, pattern):
            block = q[:, :, first : first + R].reshape(N, G * R, D)  # (N, G, R, D) -> (N, G * R, D)
            weights = torch.bmm(block, k[:, low:high].mT)  # (N, G * R, keys)
            shape = Scores(N, G, R, high - low, first, low, pattern.window or 0)
            cpu.call(cpu.training(q.dtype).heed_softmax, shape, weights)
            out[:, :, first : first + R] = torch.bmm(weights, v[:, low:high]).view(N, G, R, D)
            kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.shape, ctx.pattern, ctx.scale = (B, H, T, D), pattern, scale
        return out.view(B, H, T, D).transpose(1, 2)  # (B * K, G, T, D) -> (B, H, T, D) -> (B, T, H, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        (B, H, T, D), (N, G) = ctx.shape, q.shape[:2]
        dout = dout.transpose(1, 2).reshape(N, G, T, D)  # (B, T, H, D) -> (B * K, G, T, D)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (first, R, low, high), weights in zip(spans(T, T, ctx.pattern), kept, strict=True):
            rows, keys = slice(first, first + R), slice(low, high)
            block, dblock = (x[:, :, rows].reshape(N, G * R, D) for x in (q, dout))  # (N, G, R, D) -> (N, G * R, D)
            dv[:, keys] += torch.bmm(weights.mT, dblock)  # (N, keys, D)
            dscores = torch.bmm(dblock, v[:, keys].mT)  # (N, G * R, keys)
            cpu.call(cpu.training(q.dtype).heed_softmax_backward, weights, dscores, N * G * R, high - low)
            dk[:, keys] += torch.bmm(dscores.mT, block)
            dq[:, :, rows] = torch.bmm(dscores, k[:, keys]).view(N, G, R, D)
        dq = dq if ctx.scale == 1 else dq * ctx.scale
        # (B * K, G, T, D) -> (B, H, T, D) -> (B, T, H, D), and the same for keys and values
        return dq.view(B, H, T, D).transpose(1, 2), *(x.view(B, -1, T, D).transpose(1, 2) for x in (dk, dv)), None, None


class SwiGLU(torch.autograd.Function):
    """`apply(both)`: both (..., 2F), gates and ups -> silu(gate) * up (..., F)."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        both = both.contiguous()
        y = torch.empty(*both.shape[:-1], both.shape[-1] // 2, dtype=both.dtype)
        cpu.call(cpu.training(both.dtype).heed_swiglu, both, y, y.numel() // y.shape[-1], y.shape[-1])
        ctx.save_for_backward(both)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        dboth, F = torch.empty_like(both), dy.shape[-1]
        cpu.call(cpu.training(both.dtype).heed_swiglu_backward, both, dy.contiguous(), dboth, dy.numel() // F, F)
        return dboth


def cross_entropy(
    logits: Tensor, targets: Tensor, losses: Tensor, z_loss: float, softcap: float | None, gradient: bool
) -> None:
    """The step of kernels/cross_entropy.py, as its `_step_in_torch`. Raises ValueError where it is not to be had."""
    cpu.require(logits)
    step, terms = cpu.training(logits.dtype).heed_cross_entropy, (float(z_loss), float(softcap or 0))
    cpu.call(step, logits, targets.contiguous(), losses, *logits.shape, logits.stride(0), *terms, gradient)
