"""Fused linear cross-entropy: the output head and the loss in one, without ever storing all logits.

Chunk by chunk of tokens, three matmuls with one step between them:

    logits = x W^T  ->  the step: each row gives its loss and becomes the loss's gradient  ->  dx = g W,  dW += g^T x

The forward pass computes the gradients, too: the backward pass only multiplies them by the gradient of the returned
scalar (Liger Kernel: Hsu et al. 2024, arXiv 2410.10989). One reused chunk of logits replaces the (N, V) tensors, of
which autograd would store several.

The step, with s a row's scores (logits, softcapped or not), t its target and z the factor of the z-loss:

    lse = log sum_j exp(s_j)     loss = lse - s_t + z lse^2     dloss/ds_j = (1 + 2 z lse) exp(s_j - lse) - [j = t]

On a GPU the step is a Triton kernel (kernels/triton/cross_entropy.py), on a CPU C++ (kernels/cpu/cross_entropy.cpp),
elsewhere plain torch. The matmuls are the vendor's library's.

Shapes: N tokens, C width, V vocabulary; a chunk has `rows` tokens.
"""

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from kernels import cpu, preferred
from kernels.cpu import bindings
from kernels.reference_attention import IGNORE_INDEX

BACKENDS = ("torch", "cpp", "triton") if importlib.util.find_spec("triton") else ("torch", "cpp")

# Maximum size of a chunk of logits in bytes, and the fewest tokens that are worth a matmul.
# On a GPU every chunk moves 12 bytes per number of dW (bf16) to add 6 * rows operations: on an H100 that makes the
# matmuls longer by 590 / rows (a bound), so a chunk needs thousands of rows. 1 GiB is 3,456 at a vocabulary of 151,936.
# On a CPU a chunk stays in the cache between the matmul and the step.
GPU_BYTES, GPU_ROWS = 1 << 30, 128
CPU_BYTES, CPU_ROWS = 4 << 20, 256


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sum over the tokens of -log softmax(x W^T)[target], in nats.

    Args:
        x: (N, C), fp32, fp16 or bf16. weight: (V, C), in x's dtype or fp32: the matmuls are computed in x's dtype.
            Under autocast both may be fp32; the matmuls are computed in its dtype, as in F.linear.
        targets: (N,) int64; a token whose target is IGNORE_INDEX (-100) is left out.
        z_loss: adds z_loss * lse^2 for every token, to keep the log-sum-exp of the logits near 0 (PaLM: Chowdhery et
            al. 2022, section 5).
        softcap: logits become softcap * tanh(logit / softcap) (Gemma 2: arXiv 2408.00118, section 2).
        backend: of the step, "torch", "cpp" or "triton"; None chooses by the device.
    Returns:
        Scalar, fp32, differentiable once with respect to x and weight.
    Raises:
        ValueError: mismatched shapes or dtypes, an unknown backend; on a CPU, a target that is neither IGNORE_INDEX
            nor in the vocabulary. On a GPU that is not checked, and such a target makes the loss NaN.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or targets.shape != x.shape[:1]:
        got = ", ".join(str(tuple(a.shape)) for a in (x, weight, targets))
        raise ValueError(f"linear_cross_entropy needs x (N, C), weight (V, C) and targets (N,); got {got}")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"x is {x.dtype}, weight {weight.dtype}: x is fp32, fp16 or bf16, weight the same or fp32")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}, not torch.int64")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap = {softcap}: must be above 0")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r} is not one of {', '.join(BACKENDS)}")
    dx_wanted, dweight_wanted = (torch.is_grad_enabled() and a.requires_grad for a in (x, weight))
    return _op(x, weight, targets, z_loss, softcap, backend, dx_wanted, dweight_wanted)[0]


def chunk_rows(N: int, V: int, itemsize: int, device: str) -> int:
    """Tokens per chunk, each of V logits of itemsize bytes: as few chunks as the limits above allow, equally long."""
    bound, fewest = (GPU_BYTES, GPU_ROWS) if device == "cuda" else (CPU_BYTES, CPU_ROWS)
    most = max(bound // (V * itemsize) // fewest, 1) * fewest
    chunks = max(math.ceil(N / most), 1)
    return max(math.ceil(N / (chunks * fewest)), 1) * fewest


def loss_and_gradients(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float,
    softcap: float | None,
    backend: str | None,
    dx_wanted: bool,
    dweight_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, a scalar; dx (N, C) in x's dtype; dW (V, C) in fp32. A gradient that is not needed is empty."""
    N, V = len(x), len(weight)
    if x.device.type == "cpu" and bool(((targets != IGNORE_INDEX) & ((targets < 0) | (targets >= V))).any()):
        low, high = int(targets.min()), int(targets.max())
        raise ValueError(f"targets are between {low} and {high}: must be 0 to {V - 1}, or {IGNORE_INDEX}")
    if backend is None:
        in_cpp = "cpp" if x.device.type == "cpu" and cpu.trains(x.dtype) else "torch"
        backend = "triton" if preferred(x.device)[0] == "flash" else in_cpp
    losses = torch.empty(N, dtype=torch.float32, device=x.device)
    dx = x.new_empty(x.shape) if dx_wanted else x.new_empty(0)
    dweight = weight.new_empty(weight.shape, dtype=torch.float32) if dweight_wanted else x.new_empty(0)
    if backend == "cpp":
        gradients = dx if dx_wanted else None, dweight if dweight_wanted else None
        bindings.linear_cross_entropy(x, weight, targets, losses, *gradients, z_loss, softcap)
        return losses.sum(), dx, dweight
    dweight.zero_()
    step = _step_in_torch
    if backend == "triton":  # imported here: not every system has Triton
        from kernels.triton.cross_entropy import cross_entropy_step as step
    w = weight.to(x.dtype)
    stride = math.ceil(V / 32) * 32  # rows are aligned for the matmuls and the kernel, also if V is odd
    rows = chunk_rows(N, stride, x.element_size(), x.device.type)
    chunk = torch.empty(min(rows, N), stride, dtype=x.dtype, device=x.device)
    # oneDNN's AMX matmul reads up to a multiple of 32 columns and multiplies the padding by 0, which keeps NaN.
    chunk[:, V:] = 0
    chunk = chunk[:, :V]
    for first in range(0, N, rows):
        part = slice(first, min(first + rows, N))
        logits = chunk[: part.stop - first]
        torch.mm(x[part], w.t(), out=logits)  # (rows, C) (C, V) -> (rows, V)
        step(logits, targets[part], losses[part], z_loss, softcap, dx_wanted or dweight_wanted)
        if dx_wanted:
            torch.mm(logits, w, out=dx[part])  # (rows, V) (V, C) -> (rows, C)
        if dweight_wanted and x.dtype == torch.float32:
            dweight.addmm_(logits.t(), x[part])  # (V, rows) (rows, C) -> (V, C)
        elif dweight_wanted:
            dweight += logits.t() @ x[part]  # the matmul of a chunk is rounded, the sum over chunks is not
    return losses.sum(), dx, dweight


def _step_in_torch(
    logits: Tensor, targets: Tensor, losses: Tensor, z_loss: float, softcap: float | None, gradient: bool
) -> None:
    """Write the losses (rows,), and overwrite the logits (rows, V) with their gradient, if `gradient`."""
    scores = logits.float()  # fp32 logits are not copied: the following operations are in place
    if softcap is not None:
        scores.div_(softcap).tanh_()
        slope = 1 - scores.square()  # (rows, V), dscore/dlogit
        scores.mul_(softcap)
    counts = (targets != IGNORE_INDEX)[:, None]  # (rows, 1), as all below but the scores
    at = targets[:, None].clamp(min=0)
    at_target, top = scores.gather(1, at), scores.amax(1, keepdim=True)
    total = scores.sub_(top).exp_().sum(1, keepdim=True)
    lse = top + total.log()
    losses.copy_(((total.log() + (top - at_target) + z_loss * lse.square()) * counts)[:, 0])
    if gradient:
        scores.mul_((1 + 2 * z_loss * lse) / total * counts)
        scores.scatter_add_(1, at, -counts.float())
        if softcap is not None:
            scores.mul_(slope)
        logits.copy_(scores)


# One node for torch.compile, with three outputs: the loss, and the gradients that its backward only scales.
_op = torch.library.custom_op("heed::linear_cross_entropy", loss_and_gradients, mutates_args=())


@_op.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dx_wanted, dweight_wanted = rest[-2:]
    dx = torch.empty_like(x) if dx_wanted else x.new_empty(0)
    dweight = torch.empty_like(weight, dtype=torch.float32) if dweight_wanted else x.new_empty(0)
    return x.new_empty((), dtype=torch.float32), dx, dweight


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros of the size of dx and dW as gradients of these
    ctx.dtype = inputs[1].dtype


@torch.autograd.function.once_differentiable
def _scale(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    dx, dweight = ctx.saved_tensors
    dx_wanted, dweight_wanted = ctx.needs_input_grad[:2]
    # Only now is dW rounded to the weight's dtype: before it is scaled, a sum of all tokens may pass fp16's range.
    return dx * grad if dx_wanted else None, (dweight * grad).to(ctx.dtype) if dweight_wanted else None, *[None] * 6


_op.register_autograd(_scale, setup_context=_keep)
