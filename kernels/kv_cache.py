"""The KV cache: keys and values of the tokens that a model has seen, which attention reads (kernels/__init__.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class KVCache:
    """The KV cache: keys and values of all tokens so far, preallocated. Shapes are static, and the host never syncs.

    Layers call `update`; the caller calls `advance` once per step. The cache of a sliding-window layer is a ring
    buffer: slot = position modulo its size, large enough that `CHUNK` new tokens overwrite nothing they attend to.
    """

    CHUNK = 256  # maximum number of tokens in one call of the model

    def __init__(
        self, config: Any, batch: int, *, max_seq_len: int | None = None, device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        """max_seq_len: tokens to make room for; default: the context."""
        context = min(config.context, max_seq_len or config.context)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)  # (B,) tokens written
        self.layers: list[tuple[Tensor, Tensor]] = []
        for layer in range(config.n_layer):
            window = config.mask_spec(layer).window
            size = context if window is None else min(context, window + self.CHUNK - 1)
            shape = (batch, size, config.n_kv_head, config.head_dim)  # (B, S, K, D)
            self.layers.append(
                (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            )

    def positions(self, T: int) -> Tensor:
        """Positions of the next T tokens, (B, T)."""
        return self.lengths[:, None] + torch.arange(T, device=self.lengths.device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, T, K, D) at the next T positions of a layer. Returns its buffers, (B, S, K, D)."""
        keys, values = self.layers[layer]
        B, T = k.shape[:2]
        slots = self.positions(T) % keys.shape[1]  # (B, T)
        rows = torch.arange(B, device=k.device)[:, None]  # (B, 1)
        keys[rows, slots] = k.to(keys.dtype)
        values[rows, slots] = v.to(values.dtype)
        return keys, values

    def advance(self, T: int) -> None:
        """Move on by T tokens, after all layers were updated."""
        self.lengths += T

    def reset(self) -> None:
        """Empty the cache; its memory stays allocated."""
        self.lengths.zero_()

    def repeat(self, times: int) -> KVCache:
        """A cache of times * B sequences, each sequence `times` times in a row: one prefill serves many samples."""
        copy = object.__new__(KVCache)
        copy.lengths = self.lengths.repeat_interleave(times)
        copy.layers = [(k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for k, v in self.layers]
        return copy
