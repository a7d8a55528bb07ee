"""The KV cache: keys and values of the tokens that a model has seen, which attention reads (kernels/__init__.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class KVCache:
    """The KV cache: keys and values of all tokens so far, preallocated. Shapes are static, and the host never syncs.

    Layers call `update`; the caller calls `advance` once per step. The cache of a sliding-window layer is a ring
    buffer: slot = position modulo its size, large enough that `CHUNK` new tokens overwrite nothing they attend to.
    Layers of zoo/ keep states in place of keys and values, and call `replace`.
    """

    CHUNK = 256  # maximum number of tokens in one call of the model

    def __init__(
        self, config: Any, batch: int, *, max_seq_len: int | None = None, device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        """max_seq_len: tokens to make room for; default: the context. dtype: of keys and values; states are rounded
        again with every token, and have fp32 at least."""
        context = min(config.context, max_seq_len or config.context)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)  # (B,) tokens written
        self.layers: list[tuple[Tensor, ...]] = []  # of attention: keys and values
        for layer in range(config.n_layer):
            shapes = config.mixer(layer).state_shapes(config, layer, batch, context)
            kept = dtype if config.letter(layer) in "LS" else torch.promote_types(dtype, torch.float32)
            self.layers.append(tuple(torch.zeros(shape, dtype=kept, device=device) for shape in shapes))

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

    def replace(self, layer: int, *states: Tensor) -> None:
        """Overwrite the states of a layer."""
        for old, new in zip(self.layers[layer], states, strict=True):
            old.copy_(new)

    def advance(self, T: int) -> None:
        """Move on by T tokens, after all layers were updated."""
        self.lengths += T

    def reset(self) -> None:
        """Empty the cache; its memory stays allocated."""
        for tensor in (self.lengths, *(state for states in self.layers for state in states)):
            tensor.zero_()

    def repeat(self, times: int) -> KVCache:
        """A cache of times * B sequences, each sequence `times` times in a row: one prefill serves many samples."""
        copy = object.__new__(KVCache)
        copy.lengths = self.lengths.repeat_interleave(times)
        copy.layers = [tuple(state.repeat_interleave(times, 0) for state in states) for states in self.layers]
        return copy
