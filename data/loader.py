"""Token shards -> batches, where batch = f(seed, step, rank) and nothing else.

An epoch lays windows of `context` tokens end to end round the text, from an offset drawn for that epoch, and visits
them in an order drawn for that epoch: sampling without replacement, so that every token is predicted once before any
is predicted twice. Because the order is a function of (seed, epoch), a run resumes from its step number alone, and the
same samples come in the same order on any number of machines.

Shapes: B sequences, T = context.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from data.shards import ShardError, Shards

IGNORE = -100  # a target that counts for nothing: cross-entropy's own mark for it


class Loader:
    """Training batches. Raises ShardError if the split has fewer than context + 1 tokens."""

    def __init__(self, shards: Shards, *, context: int, seed: int):
        if shards.tokens < context + 1:
            raise ShardError(
                f"model.context = {context}: the training text has only {shards.tokens} tokens, and {context + 1} are "
                f"needed; bring more text, or a context below {shards.tokens}"
            )
        self.shards, self.context, self.seed = shards, context, seed
        self.windows = shards.tokens // context  # in an epoch
        self._epoch = lru_cache(maxsize=2)(self._draw)  # a batch may straddle two

    def _draw(self, epoch: int) -> tuple[int, np.ndarray]:
        """The offset and the order of the windows in one epoch.

        Sorted raw bits, and not numpy's `permutation`: numpy promises that the bits of a seed never change, no more.
        """
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, epoch]))
        offset = int(bits.random_raw()) % self.shards.tokens
        return offset, np.argsort(bits.random_raw(self.windows), kind="stable")

    def batch(self, step: int, sequences: int, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
        """Inputs and targets of `step`, int64 (B, T) each, B = sequences / ranks: this rank's share of `sequences`.

        Sample i of step s is number s * sequences + i of the whole run; rank r has rows r * B up to (r + 1) * B.
        """
        if sequences % ranks:
            raise ValueError(f"{sequences} sequences a step cannot be shared by {ranks} ranks; make it a multiple")
        rows = sequences // ranks
        block = np.empty((rows, self.context + 1), dtype=np.int64)
        for row in range(rows):
            epoch, index = divmod(step * sequences + rank * rows + row, self.windows)
            offset, order = self._epoch(epoch)
            block[row] = self.shards.window(offset + int(order[index]) * self.context, self.context + 1)
        return torch.from_numpy(block[:, :-1].copy()), torch.from_numpy(block[:, 1:].copy())


def validation(shards: Shards, context: int, sequences: int, eot: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole split in order, every token a target exactly once: inputs and targets (B, T), B <= sequences.

    The inputs are the split shifted by one, an end of text in front. What does not fill the last window is IGNORE.
    """
    rows = -(-shards.tokens // context)
    for first in range(0, rows, sequences):
        count = min(sequences, rows - first)
        start = first * context
        real = min(count * context, shards.tokens - start)
        y = np.full(count * context, IGNORE, dtype=np.int64)
        x = np.full(count * context, eot, dtype=np.int64)
        y[:real] = shards.window(start, real)
        x[1:real] = y[: real - 1]
        if start:
            x[0] = shards.window(start - 1, 1)[0]
        yield torch.from_numpy(x.reshape(count, context)), torch.from_numpy(y.reshape(count, context))
