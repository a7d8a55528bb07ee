"""The KV cache: keys and values of the tokens that a model has seen, which attention reads (kernels/__init__.py)."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor


class KVCache:
    """The KV cache: keys and values of all tokens so far, preallocated. Shapes are static, and the host never syncs.

    Layers call `update`; the caller calls `advance` once per step. The cache of a sliding-window layer is a ring
    buffer: slot = position modulo its size, large enough that `CHUNK` new tokens overwrite nothing they attend to.
    Layers without `keeps_keys` keep states in place of keys and values, and call `replace`.
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
        self.rows = torch.arange(batch, device=device)  # (B,) row of the tensors in `layers` that a sequence has
        self.selected = False  # see `select`
        self.layers: list[tuple[Tensor, ...]] = []
        mixers = [config.mixer(layer) for layer in range(config.n_layer)]
        self.keeps_keys = [getattr(mixer, "keeps_keys", False) for mixer in mixers]  # (rows, S, K, D), not states
        for layer, mixer in enumerate(mixers):
            shapes = mixer.state_shapes(config, layer, batch, context)
            kept = dtype if self.keeps_keys[layer] else torch.promote_types(dtype, torch.float32)
            self.layers.append(tuple(torch.zeros(shape, dtype=kept, device=device) for shape in shapes))

    def positions(self, T: int) -> Tensor:
        """Positions of the next T tokens, (B, T)."""
        return self.lengths[:, None] + torch.arange(T, device=self.lengths.device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, T, K, D) at the next T positions of a layer. Returns its buffers, (rows, S, K, D)."""
        keys, values = self.layers[layer]
        slots = self.positions(k.shape[1]) % keys.shape[1]  # (B, T)
        rows = self.rows[:, None]  # (B, 1)
        keys[rows, slots] = k.to(keys.dtype)
        values[rows, slots] = v.to(values.dtype)
        return keys, values

    def states(self, layer: int) -> tuple[Tensor, ...]:
        """The states of a layer, or its keys and values, (B, ...) each."""
        return tuple(state[self.rows] if self.selected else state for state in self.layers[layer])

    def replace(self, layer: int, *states: Tensor) -> None:
        """Overwrite the states of a layer."""
        for old, new in zip(self.layers[layer], states, strict=True):
            if self.selected:
                old[self.rows] = new.to(old.dtype)
            else:
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
        cache = copy(self)
        cache.lengths = self.lengths.repeat_interleave(times)
        cache.layers = [tuple(state.repeat_interleave(times, 0) for state in states) for states in self.layers]
        cache.rows = torch.arange(len(cache.lengths), device=self.rows.device)
        return cache

    def select(self, rows: Tensor, lengths: Tensor) -> KVCache:
        """A cache of some of the sequences, in any order, that shares the memory of this one.

        rows: (B,) int64, their numbers. lengths: (B,) int64, how many tokens each holds.
        """
        cache = copy(self)
        cache.rows, cache.lengths, cache.selected = rows, lengths, True
        return cache

    @property
    def block_table(self) -> Tensor | None:
        """Selected rows, for kernels.attention: the row of a sequence is its only page, so nothing is copied."""
        return self.rows[:, None].int() if self.selected else None  # (B,) -> (B, 1)

    def keeps(self, length: int, written: int) -> bool:
        """Whether a sequence that has `written` tokens can go back to its first `length`. A ring buffer keeps what a
        window needs for the last CHUNK tokens only, a state what it needs for the next one."""
        return all(
            (written <= states[0].shape[1] or written - length <= self.CHUNK) if keeps_keys else length in (0, written)
            for states, keeps_keys in zip(self.layers, self.keeps_keys, strict=True)
        )

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Let a row begin with the first `length` tokens of another one, which `keeps` them; 0 empties it."""
        for states, keeps_keys in zip(self.layers, self.keeps_keys, strict=True):
            for state in states:
                if keeps_keys:
                    size = min(length, state.shape[1])
                    state[target, :size] = state[source, :size]
                else:
                    state[target] = state[source] if length else 0
