"""Attention whose weights are not softmax(q k^T) under a fixed mask: a subclass computes them from queries and keys.

They are computed for BLOCK queries at a time, and once more in the backward pass (Chen et al. 2016, arXiv 1604.06174,
section 4). So what a subclass needs for each pair of a query and a key exists for BLOCK T pairs, not for T^2.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.kv_cache import KVCache
from zoo.attention_projections import AttentionProjections
from zoo.scan import upcast

BLOCK = 16  # queries


class QueryBlocks(AttentionProjections):
    """out_t = sum over s of weight(q_t, k_s) v_s for each head, with the heads of model.Attention."""

    def weights(self, q: Tensor, k: Tensor, distance: Tensor) -> Tensor:
        """q (B, H, R, D), k (B, H, S, D), how many tokens each key is before each query, (B or 1, 1, R, S), negative
        after it -> (B, H, R, S), 0 for keys after the query."""
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """q (B, H, R, D) at positions t (B or 1, R), k and v (B, H, S, D) -> (B, H, R, D)."""
        distance = t[:, None, :, None] - torch.arange(k.shape[2], device=t.device)  # (B or 1, 1, R, S)
        return self.weights(q, k, distance) @ v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        T, G = q.shape[1], q.shape[2] // k.shape[2]  # G query heads per key/value head
        t = torch.arange(T, device=x.device)[None]  # (B or 1, T) positions
        if cache is not None:
            cache.update(self.layer, k, v)
            (k, v), t = cache.states(self.layer), cache.positions(T)
        k, v = (y.repeat_interleave(G, 2) for y in (k, v))  # (B, S, K, D) -> (B, S, H, D)
        q, k, v = (upcast(y).transpose(1, 2) for y in (q, k, v))  # (B, H, T or S, D)
        out: list[Any] = []
        with torch.autocast(x.device.type, enabled=False):
            for at in range(0, T, BLOCK):
                end = at + BLOCK
                S = end if cache is None else k.shape[2]  # without a cache, the keys after the block are left out
                block = q[:, :, at:end], k[:, :, :S], v[:, :, :S], t[:, at:end]
                again = torch.is_grad_enabled()
                out.append(checkpoint(self.attend, *block, use_reentrant=False) if again else self.attend(*block))
        return self.o_proj(torch.cat(out, 2).transpose(1, 2).flatten(2).to(x.dtype))  # (B, H, T, D) -> (B, T, C)
