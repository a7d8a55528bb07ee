"""Ring attention: keys and values travel around n devices, while each computes its own queries with those it has.

Blockwise attention with a device per block (Liu et al. 2023, arXiv 2310.01889), for causal masks and the balanced
division of tokens of kernels/context_parallel.py. As in flash attention, only the output and the log-sum-exp of each
row are kept; with those over all keys, the backward pass of a block of keys gives exactly its share of the gradients.

In step i, device r has the keys and values of device r - i:

    i = 0    its own two chunks are one causal sequence
    i <= r   of an earlier device: all queries attend to the first chunk, none to the second
    i > r    of a later device: the second chunk of queries attends to both, the first to none

So no block but the first has a mask. Two parts (o, l) of a row, output and log-sum-exp, become one:

    l = log(exp(l_1) + exp(l_2))    o = exp(l_1 - l) o_1 + exp(l_2 - l) o_2

Shapes: B sequences; a device has 2c tokens; H query heads, K key/value heads, D head size.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import CAUSAL, FULL, MaskSpec, attention, preferred
from kernels.reference_attention import reference_backward


class Ring(torch.autograd.Function):
    """Causal attention: `apply(q, k, v, softmax_scale, backend, group)`, q (B, 2c, H, D), k and v (B, 2c, K, D)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: str | None, group: Any
    ) -> Tensor:
        backend = backend or ("flash" if preferred(q.device)[0] == "flash" else "reference")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out = lse = torch.empty(0)
        kv = torch.stack((k, v))  # (2, B, 2c, K, D)
        for step, last, queries, keys in steps(group, q.shape[1]):
            arrived = None if last else pass_on(kv, group)
            k_block, v_block = kv[:, :, keys]
            mask_spec = FULL if step else CAUSAL
            part, part_lse = attention(
                q[:, queries], k_block, v_block, mask_spec, softmax_scale=scale, backend=backend, return_lse=True
            )
            if step == 0:
                out, lse = part.to(part_lse.dtype), part_lse  # (B, 2c, H, D), (B, 2c, H), in at least fp32
            else:
                both = torch.logaddexp(lse[:, queries], part_lse)
                share, part_share = ((x - both).exp()[..., None] for x in (lse[:, queries], part_lse))
                out[:, queries] = out[:, queries] * share + part * part_share
                lse[:, queries] = both
            kv = arrived() if arrived else kv
        out = out.to(q.dtype)
        ctx.save_for_backward(out, lse, q, k, v)
        ctx.arguments, ctx.group = (scale, backend), group
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        out, lse, q, k, v = ctx.saved_tensors
        kv, returned = torch.stack((k, v)), None
        dq, dkv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, kv))
        for step, last, queries, keys in steps(ctx.group, q.shape[1]):
            arrived = None if last else pass_on(kv, ctx.group)
            rows = [x[:, queries].contiguous() for x in (dout, out, lse, q)]
            gradients = block_backward(step == 0, *ctx.arguments, *rows, *kv[:, :, keys])
            dkv = returned() if returned else dkv  # the gradients travel with their keys, one step behind
            for total, gradient in zip((dq[:, queries], *dkv[:, :, keys]), gradients, strict=True):
                total += gradient
            returned = pass_on(dkv, ctx.group)  # after the last step, this brings them home
            kv = arrived() if arrived else kv
        dk, dv = returned() if returned else dkv
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def steps(group: Any, tokens: int) -> Iterator[tuple[int, bool, slice, slice]]:
    """The number of each step, whether it is the last, its queries and its keys, of the `tokens` of a device."""
    first, second, both = slice(tokens // 2), slice(tokens // 2, None), slice(None)
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    for step in range(n):
        queries, keys = (both, both) if step == 0 else (both, first) if step <= rank else (second, both)
        yield step, step == n - 1, queries, keys


def pass_on(x: Tensor, group: Any) -> Callable[[], Tensor]:
    """Begin to send x to the next device. What is returned waits for that of the device before, and returns it."""
    rank, n, received = dist.get_rank(group), dist.get_world_size(group), torch.empty_like(x)
    after, before = (dist.get_global_rank(group, (rank + step) % n) for step in (1, -1))
    both = [dist.P2POp(dist.isend, x, after, group), dist.P2POp(dist.irecv, received, before, group)]
    works = dist.batch_isend_irecv(both)

    def wait() -> Tensor:
        for work in works:
            work.wait()
        return received

    return wait


def block_backward(
    causal: bool, scale: float, backend: str, dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, ...]:
    """What a block of keys contributes to dq, and its dk and dv, from the output and log-sum-exp over all keys."""
    if backend == "flash":
        rest = causal, None, None, scale, 0.0, None, None, None, None, None  # no window, softcap, dropout ...
        return torch.ops.heed.flash_backward(dout, torch.zeros_like(lse), out, lse, q, k, v, *rest)[:3]
    return reference_backward(dout, out, lse, q, k, v, MaskSpec(causal), scale)
