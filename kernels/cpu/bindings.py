"""The C++ operations that train a model on a CPU, called on tensors: RMSNorm, attention, the loss, Muon's step.

Operation by operation, torch reads and writes all activations in memory. Each C++ file keeps them in the cache of a
core from its first to its last operation. kernels/cpu/fused_layers.py builds layers from them.

Shapes: B sequences, T tokens, C width, H query heads, K key/value heads, D head size, V vocabulary.
Activations are fp32 or bf16, sums fp32; gains are fp32.
"""

import math
from ctypes import Structure, c_double, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cpu import build
from kernels.cpu.build import check_tensor
from kernels.reference_attention import DocumentBounds


def norm(x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """RMSNorm of x (..., C) fp32 with gain (C,) fp32, in `dtype`, and 1 / rms(x) (...), which the backward needs.

    Raises ValueError for other dtypes and shapes, as all functions of this file do.
    """
    check_tensor("x", x, torch.float32, *x.shape)
    check_tensor("gain", gain, torch.float32, x.shape[-1])
    y, inverse = torch.empty(x.shape, dtype=dtype), torch.empty(x.shape[:-1], dtype=torch.float32)
    build.call(build.library("linear", ELEMENT=dtype).heed_norm, x, gain, y, inverse, inverse.numel(), x.shape[-1], eps)
    return y, inverse


def norm_backward(dy: Tensor, x: Tensor, gain: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """dx (..., C) and dgain (C,), both fp32, from dy (..., C)."""
    check_tensor("dy", dy, dy.dtype, *x.shape)
    check_tensor("x", x, torch.float32, *x.shape)
    check_tensor("gain", gain, torch.float32, x.shape[-1])
    check_tensor("inverse", inverse, torch.float32, *x.shape[:-1])
    dx, dgain = torch.empty_like(x), torch.empty_like(gain)
    backward, rows = build.library("linear", ELEMENT=dy.dtype).heed_norm_backward, inverse.numel()
    build.call(backward, dy, x, gain, inverse, dx, dgain, rows, x.shape[-1])
    return dx, dgain


class Segment(Structure):
    """As in linear.cpp."""

    _fields_ = (("data", c_void_p), ("rows", c_int64))


def pack(segments: list[Tensor], dtype: torch.dtype, unit: int = 1) -> tuple[Tensor, Tensor]:
    """The segments (rows, K), stacked to W (N, K), in the layout of the tile matmul: for x W^T, and for dy W.

    Args:
        segments: all fp32 or all of `dtype`; each starts at a multiple of `unit` rows.
        dtype: of the activations.
    """
    library = build.library("linear", ELEMENT=dtype)
    multiplied = torch.bfloat16 if library.heed_multiplied_size() == 2 else torch.float32
    segments = [w.contiguous() for w in segments]
    N, K = sum(math.ceil(len(w) / unit) * unit for w in segments), segments[0].shape[1]
    both = torch.empty(2, math.ceil(N / 32) * 32 * math.ceil(K / 32) * 32, dtype=multiplied)
    product, gradient = both.unbind()
    array = (Segment * len(segments))(*(Segment(w.data_ptr(), len(w)) for w in segments))
    fp32 = segments[0].dtype == torch.float32
    build.call(library.heed_pack, array, len(segments), unit, fp32, K, product, gradient)
    return product, gradient


class RMSNorm(torch.autograd.Function):
    """`apply(x, gain, eps)`: see `norm`. The result has autocast's dtype if autocast is on, else x's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, inverse = norm(x, gain, eps, autocast_dtype(x))
        ctx.save_for_backward(x, gain, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *norm_backward(dy.contiguous(), *ctx.saved_tensors), None


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matmuls: autocast's if autocast is on, else that of x."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class Heads(NamedTuple):
    """The shape of an attention layer with a causal mask."""

    queries: int  # H, query heads
    keys: int  # K, key/value heads
    head_dim: int  # D
    window: int  # keys that a query sees, its own included; 0 for all
    scale: float  # multiplies the scores
    eps: float  # of QK-norm


def attention(
    qkv: Tensor, gain_q: Tensor | None, gain_k: Tensor | None, cos: Tensor, sin: Tensor, heads: Heads,
    documents: DocumentBounds | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """QK-norm, RoPE and causal attention of qkv (B, T, (H + 2K) D or more) -> out (B, T, H * D) and the log-sum-exp of
    the scores (B, H, T rounded up), in base 2, for the backward.

    Queries and keys are normed if gains (D,) are given. cos, sin (T, D): as model.py's `apply_rotary_emb` reads them.
    documents: the bounds (B, T) of packed documents, between which nothing is attended to.
    """
    B, T, _ = qkv.shape
    shape, _kept = _shape(qkv, gain_q, gain_k, cos, sin, heads, documents)
    out = torch.empty(B, T, heads.queries * heads.head_dim, dtype=qkv.dtype)
    lse = torch.empty(B, heads.queries, shape.tokens, dtype=torch.float32)
    build.call(build.library("attention", ELEMENT=qkv.dtype).heed_attention, shape, qkv, out, lse)
    return out, lse


def attention_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, gain_q: Tensor | None, gain_k: Tensor | None, cos: Tensor,
    sin: Tensor, heads: Heads, documents: DocumentBounds | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """dqkv and the gradients of both gains, from the arguments and results of `attention`. What follows queries, keys
    and values in a row of dqkv is not written."""
    shape, _kept = _shape(qkv, gain_q, gain_k, cos, sin, heads, documents)
    dout, (B, T, _) = dout.contiguous(), qkv.shape
    for name, x in (("out", out), ("dout", dout)):
        check_tensor(name, x, qkv.dtype, B, T, heads.queries * heads.head_dim)
    check_tensor("lse", lse, torch.float32, B, heads.queries, shape.tokens)
    dqkv, dgains = torch.empty_like(qkv), torch.empty(2, heads.head_dim, dtype=torch.float32)
    backward = build.library("attention", ELEMENT=qkv.dtype).heed_attention_backward
    build.call(backward, shape, qkv, out, lse, dout, dqkv, dgains[0], dgains[1])
    return dqkv, *(dgains.unbind() if gain_q is not None else (None, None))


class Shape(Structure):
    """As `Attention` in attention.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("B", "T", "H", "K", "D", "normed", "window", "tokens", "pitch")),
        *((name, c_double) for name in ("eps", "scale")),
        *((name, c_void_p) for name in ("gain_q", "gain_k", "cos", "sin", "starts", "ends")),
    )


def _shape(
    qkv: Tensor, gain_q: Tensor | None, gain_k: Tensor | None, cos: Tensor, sin: Tensor, heads: Heads,
    documents: DocumentBounds | None
) -> tuple[Shape, list[Tensor]]:  # fmt: skip
    """The structure, and the tensors that it points to, which must outlive it."""
    (B, T, pitch), (H, K, D) = qkv.shape, heads[:3]
    if D % 2 or H % K or pitch < (H + 2 * K) * D:
        raise ValueError(f"qkv {tuple(qkv.shape)} does not hold {H} query heads and 2 x {K} of the even size {D}")
    ones = torch.ones(D, dtype=torch.float32)
    tables = [ones if g is None else g for g in (gain_q, gain_k)] + [cos, sin]
    tables = [x.float().contiguous() for x in tables]
    for name, x, shape in zip(("gain_q", "gain_k", "cos", "sin"), tables, ((D,), (D,), (T, D), (T, D)), strict=True):
        check_tensor(name, x, torch.float32, *shape)
    tokens = math.ceil(T / 64) * 64  # BLOCK in attention.cpp
    bounds = [] if documents is None else [x.contiguous() for x in documents]
    for name, x in zip(DocumentBounds._fields, bounds, strict=False):
        check_tensor(name, x, torch.int32, B, T)
    pointers = [x.data_ptr() for x in tables] + ([x.data_ptr() for x in bounds] or [0, 0])
    counts = (B, T, H, K, D, gain_q is not None, heads.window, tokens, pitch)
    return Shape(*counts, heads.eps, heads.scale, *pointers), tables + bounds


class Attend(torch.autograd.Function):
    """Causal attention without norm and RoPE: `apply(q, k, v, scale, window, documents)`, q (B, T, H, D), k and v
    (B, T, K, D) -> (B, T, H, D). documents: see `attention`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, documents: DocumentBounds | None
    ) -> Tensor:
        B, T, H, D = q.shape
        qkv = torch.cat((q, k, v), dim=2).view(B, T, -1)  # (B, T, H + 2K, D) -> (B, T, (H + 2K) D)
        cos, sin = torch.ones(T, D, dtype=torch.float32), torch.zeros(T, D, dtype=torch.float32)
        ctx.heads = Heads(H, k.shape[2], D, window, scale, 0.0)
        out, lse = attention(qkv, None, None, cos, sin, ctx.heads, documents)
        ctx.save_for_backward(qkv, out, lse, cos, sin)
        ctx.documents = documents
        return out.view(B, T, H, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse, cos, sin = ctx.saved_tensors
        (B, T, H, D), K = dout.shape, ctx.heads.keys
        dqkv, _, _ = attention_backward(dout.flatten(2), qkv, out, lse, None, None, cos, sin, ctx.heads, ctx.documents)
        return *dqkv.view(B, T, -1, D).split((H, K, K), dim=2), None, None, None


class Loss(Structure):
    """As in cross_entropy.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("N", "C", "V")),
        *((name, c_double) for name in ("z_loss", "softcap")),
        *((name, c_void_p) for name in ("x", "weight", "head", "head_t", "targets", "losses", "dx", "dw")),
    )


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, losses: Tensor, dx: Tensor | None, dw: Tensor | None, z_loss: float,
    softcap: float | None
) -> None:  # fmt: skip
    """The backend "cpp" of kernels/cross_entropy.py: writes losses (N,) and, if they are not None, dx (N, C) in x's
    dtype and dw (V, C) fp32, for x (N, C), weight (V, C) and targets (N,) int64. Raises ValueError for other devices
    and dtypes."""
    build.require(x)
    (N, C), V = x.shape, len(weight)
    x, weight, targets = x.contiguous(), weight.to(x.dtype).contiguous(), targets.contiguous()
    check_tensor("weight", weight, x.dtype, V, C)
    check_tensor("targets", targets, torch.int64, N)
    check_tensor("losses", losses, torch.float32, N)
    if dx is not None:
        check_tensor("dx", dx, x.dtype, N, C)
    if dw is not None:
        check_tensor("dw", dw, torch.float32, V, C)
    head, head_t = pack([weight], x.dtype)
    pointers = (None if a is None else a.data_ptr() for a in (x, weight, head, head_t, targets, losses, dx, dw))
    loss = Loss(N, C, V, z_loss, softcap or 0.0, *pointers)
    build.call(build.library("cross_entropy", ELEMENT=x.dtype).heed_linear_cross_entropy, loss)


class MuonMatrix(Structure):
    """As in muon.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "momentum", "gradient")),
        *((name, c_int64) for name in ("rows", "columns")),
    )


def muon_step(
    weights: list[Tensor], momenta: list[Tensor], dtype: torch.dtype, lr: float, momentum: float,
    weight_decay: float
) -> None:  # fmt: skip
    """One step of Muon (training/optimizers.py), in place. weights, with gradients, and momenta: (rows, columns) fp32.
    dtype: of the matmuls."""
    # Each thread takes the next matrix. The largest come first, so that none is left for a single thread at the end.
    order = sorted(zip(weights, momenta, strict=True), key=lambda pair: -pair[0].numel())
    gradients = [p.grad.contiguous() for p, _ in order if p.grad is not None]
    matrices = (MuonMatrix * len(order))()
    for i, ((p, m), g) in enumerate(zip(order, gradients, strict=True)):
        rows, columns = p.shape
        for name, x in (("weight", p), ("momentum", m), ("gradient", g)):
            setattr(matrices[i], name, check_tensor(name, x, torch.float32, rows, columns).data_ptr())
        matrices[i].rows, matrices[i].columns = rows, columns
    library = build.library("muon", ELEMENT=dtype)
    build.call(library.heed_muon, matrices, len(matrices), lr, momentum, weight_decay)
    torch.autograd.graph.increment_version([p for p, _ in order])  # as an in-place operation of torch does
