"""Context parallelism: the n devices of a group share each sequence, and each computes attention for its own tokens.

A sequence is divided into 2n chunks, and device r has chunks r and 2n - 1 - r ("zig-zag"). Late tokens attend to more
keys than early ones, so all devices compute about equally much. Only attention needs tokens of other devices:

    gather   each device gets all keys and values (Llama 3: arXiv 2407.21783, section 3.3.2). Any causal mask.
    ring     keys and values travel from device to device while each computes its queries with those that it has, and
             combines the results by their log-sum-exps (RingAttention: Liu et al. 2023, arXiv 2310.01889). No device
             ever has all keys, and messages overlap with the computation. The plain causal mask only: layers with
             another one, documents or ALiBi gather.
    ulysses  all-to-all from some tokens of all heads to all tokens of some heads, and back (DeepSpeed Ulysses: Jacobs
             et al. 2023, arXiv 2309.14509). Any causal mask; n must divide the key/value heads.

Numbers that a device sends per layer in the forward pass. In the backward pass, gather and ulysses send as many again,
ring twice as many, half of them (the gradients) in fp32, and those n times instead of n - 1:

    gather, ring   2 (n - 1) B (T / n) K D        ulysses   2 (n - 1) / n B (T / n) (H + K) D

Shapes: n devices; B sequences of T tokens, of which a device has T / n = 2c; H query heads, K key/value heads, D head
size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import CAUSAL, DocumentBounds, MaskSpec, attention
from kernels.ring_attention import Ring

METHODS = ("gather", "ring", "ulysses")


@dataclass(frozen=True)
class ContextParallel:
    """The group of devices that share a sequence, and how they compute attention, one of METHODS."""

    group: dist.ProcessGroup
    method: str

    @property
    def rank(self) -> int:
        """The number of this device in the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """n, the number of devices."""
        return dist.get_world_size(self.group)

    def split(self, x: Tensor) -> Tensor:
        """This device's part of whole sequences: (B, T, ...) -> (B, 2c, ...). T must be divisible by 2n."""
        return by_device(x, self.size)[self.rank]

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask_spec: MaskSpec = CAUSAL, *, alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None, document_ids: Tensor | DocumentBounds | None = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """`kernels.attention` for tokens that were divided by `split`. All devices of the group call it.

        Args:
            q: (B, 2c, H, D). k, v: (B, 2c, K, D).
            document_ids: of whole sequences, (B, T).
            options: as of `kernels.attention`. With cache_seqlens, a device has whole sequences, and computes alone.
        Returns:
            (B, 2c, H, D).
        Raises:
            ValueError: a mask that is not causal, dropout of attention weights, heads that cannot be divided.
        """
        heads: dict[str, Any] = {"alibi_slopes": alibi_slopes, "sinks": sinks}
        ids = document_ids.first if isinstance(document_ids, DocumentBounds) else document_ids
        options["document_ids"] = ids  # the start of a document identifies it
        if options.get("cache_seqlens") is not None:
            return attention(q, k, v, mask_spec, **heads, **options)
        if not mask_spec.causal or options.get("dropout_p"):
            raise ValueError(f"context parallelism needs a causal mask and no dropout_p; got {mask_spec}, {options}")
        if torch.is_autocast_enabled(q.device.type):  # before they are sent
            q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
        if self.method == "ulysses":
            return self._ulysses(q, k, v, mask_spec, heads, options)
        if self.method == "ring" and mask_spec == CAUSAL and alibi_slopes is None is sinks and document_ids is None:
            return Ring.apply(q, k, v, options.get("softmax_scale"), options.get("backend"), self.group)
        return self._gather(q, k, v, mask_spec, **heads, **options)

    def _gather(
        self, q: Tensor, k: Tensor, v: Tensor, mask_spec: MaskSpec, document_ids: Tensor | None, **options: Any
    ) -> Tensor:
        """A chunk of queries attends to the keys up to its end, of which they are the last: kernels need no change."""
        n, c = self.size, q.shape[1] // 2
        kv = torch.cat((k, v), 2).expand(n, -1, -1, -1, -1)  # (n, B, 2c, 2K, D), the same for all
        k, v = in_order(AllToAll.apply(kv, self.group)).chunk(2, 2)  # (B, T, K, D) each
        parts = []
        for chunk, queries in zip((self.rank, 2 * n - 1 - self.rank), q.split(c, 1), strict=True):
            end = (chunk + 1) * c
            keys = slice(0 if mask_spec.window is None else max(0, end - c - mask_spec.window + 1), end)
            options["document_ids"] = None if document_ids is None else document_ids[:, keys]
            parts.append(attention(queries, k[:, keys], v[:, keys], mask_spec, **options))
        return torch.cat(parts, 1)

    def _ulysses(
        self, q: Tensor, k: Tensor, v: Tensor, mask_spec: MaskSpec, heads: dict[str, Any], options: dict[str, Any]
    ) -> Tensor:
        n = self.size
        if k.shape[2] % n:
            raise ValueError(f"ulysses divides the key/value heads among {n} devices; there are {k.shape[2]}")
        of_device = [x.unflatten(2, (n, -1)) for x in (q, k, v)]  # (B, 2c, H, D) -> (B, 2c, n, H/n, D)
        x = torch.cat(of_device, 3).movedim(2, 0)  # (n, B, 2c, (H + 2K) / n, D)
        q, k, v = in_order(AllToAll.apply(x, self.group)).split([y.shape[3] for y in of_device], 2)
        mine: dict[str, Any] = {name: x if x is None else x.chunk(n)[self.rank] for name, x in heads.items()}
        out = attention(q, k, v, mask_spec, **mine, **options)  # (B, T, H/n, D)
        out = AllToAll.apply(by_device(out, n), self.group)  # (n, B, 2c, H/n, D)
        return out.movedim(0, 2).flatten(2, 3)  # (B, 2c, n, H/n, D) -> (B, 2c, H, D)


def by_device(x: Tensor, n: int) -> Tensor:
    """Whole sequences as the parts of n devices: (B, T, ...) -> (n, B, 2c, ...)."""
    chunks = x.unflatten(1, (2 * n, -1)).transpose(0, 1)  # (2n, B, c, ...)
    early, late = chunks.chunk(2)  # (n, B, c, ...) each
    return torch.cat((early, late.flip(0)), 2)


def in_order(parts: Tensor) -> Tensor:
    """The inverse of `by_device`: (n, B, 2c, ...) -> (B, T, ...)."""
    early, late = parts.chunk(2, 2)  # (n, B, c, ...) each
    return torch.cat((early, late.flip(0))).transpose(0, 1).flatten(1, 2)  # (2n, B, c, ...) -> (B, 2n * c, ...)


class AllToAll(torch.autograd.Function):
    """`apply(x, group)`: x[i] goes to device i, the result's [i] is from it. Gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, x = group, x.contiguous()
        dist.all_to_all_single(received := torch.empty_like(x), x, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return AllToAll.apply(dy, ctx.group), None
