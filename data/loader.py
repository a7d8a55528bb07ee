"""From token shards to batches. A batch is a function of (seed, step, rank) alone.

An epoch divides the text into sequences of `context` tokens, starting at a random offset, and visits them in random
order: sampling without replacement, so no token is predicted twice in an epoch. Fewer than `context` tokens are left
out, others in each epoch. Offset and order depend on (seed, epoch) alone. A run resumes from its step number, and any
number of processes gets the same samples in the same order.

Shapes: B sequences, T = context.
"""

from array import array
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from data.mixture import BLOCK, AnyShards, MixedShards, apportion, schedule
from data.shards import TARGET, ShardError, Shards
from kernels.reference_attention import IGNORE_INDEX


class Loader:
    """Training batches. Raises ShardError if the split has fewer than context + 1 tokens."""

    def __init__(self, shards: Shards, *, context: int, seed: int):
        if shards.tokens < context + 1:
            raise ShardError(
                f"model.context = {context}: the training text of {shards.manifest.source!r} has only {shards.tokens} "
                f"tokens, and {context + 1} are needed; use more text, or a context below {shards.tokens}"
            )
        self.shards, self.context, self.seed = shards, context, seed
        self.num_sequences = shards.tokens // context  # in an epoch
        self._epoch = lru_cache(maxsize=2)(self._shuffle)  # a batch may span two epochs

    def _shuffle(self, epoch: int) -> tuple[int, np.ndarray]:
        """Offset and order of the sequences of an epoch.

        Sorts raw bits instead of using numpy's `permutation`: numpy guarantees only that a seed's bits do not change.
        """
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, epoch]))
        offset = int(bits.random_raw()) % self.shards.tokens
        return offset, np.argsort(bits.random_raw(self.num_sequences), kind="stable")

    def batch(self, step: int, sequences: int, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
        """Inputs and targets of `step`, int64 (B, T) each, B = sequences / ranks.

        Sample i of step s is number s * sequences + i of the run. Rank r has rows r * B to (r + 1) * B - 1.
        """
        if sequences % ranks:
            raise ValueError(f"{sequences} sequences per step are not divisible by {ranks} ranks")
        rows = sequences // ranks
        x, y = np.empty((2, rows, self.context), dtype=np.int64)
        for row in range(rows):
            x[row], y[row] = self.sample(step * sequences + rank * rows + row)
        return torch.from_numpy(x), torch.from_numpy(y)

    def sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets (T,) of a sample of the run."""
        epoch, index = divmod(number, self.num_sequences)
        offset, order = self._epoch(epoch)
        return self._sequence(offset, int(order[index]))

    def _sequence(self, offset: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets (T,) of one sequence of an epoch."""
        tokens = self.shards.read(offset + number * self.context, self.context + 1)
        return tokens[:-1], tokens[1:]


class Conversations(Loader):
    """Training batches of conversations: the targets are the tokens of answers, all others are IGNORE_INDEX.

    A sequence starts with a conversation and is filled with the following ones. A conversation that does not fit is
    truncated, does not count in the loss, and starts the next sequence; only one longer than a sequence continues in
    the next. So every target is predicted once per epoch.
    """

    def __init__(self, shards: Shards, *, context: int, seed: int):
        self.shards, self.context, self.seed = shards, context, seed
        begins = shards.conversations()
        self.starts = array("q", [0])  # starts of the sequences, and the end of the split
        while (start := self.starts[-1]) < shards.tokens:
            last = int(begins[np.searchsorted(begins, start + context + 1, side="right") - 1])  # it does not fit
            self.starts.append(last if last > start else start + context)
        self.num_sequences = len(self.starts) - 1
        self._epoch = lru_cache(maxsize=2)(self._shuffle)

    def _sequence(self, offset: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        start, beyond = self.starts[number], self.starts[number + 1]
        tokens = self.shards.read(start, self.context + 1)
        targets = np.arange(start + 1, start + 1 + self.context)
        counted = (self.shards.read_mask(start + 1, self.context) == TARGET) & (targets <= beyond)
        return tokens[:-1], np.where(counted, tokens[1:], IGNORE_INDEX)

    def in_order(self, sequences: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All sequences once, inputs and targets (B, T), B <= sequences."""
        for first in range(0, self.num_sequences, sequences):
            rows = [self._sequence(0, number) for number in range(first, min(first + sequences, self.num_sequences))]
            x, y = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
            yield x, y


class Mixture(Loader):
    """Training batches of a mixture: each sequence is the next one of the source whose turn it is, see `mixture.py`."""

    def __init__(self, parts: list[tuple[Shards, float]], *, context: int, seed: int):
        self.context = context
        self.loaders = [open_loader(shards, context=context, seed=seed) for shards, _ in parts]
        weights = [weight for _, weight in parts]
        self.counts, (self.sources, self.before) = apportion(weights), schedule(weights)

    def sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        block, at = divmod(number, BLOCK)
        source = self.sources[at]
        return self.loaders[source].sample(block * self.counts[source] + int(self.before[at]))


def open_loader(shards: AnyShards, *, context: int, seed: int) -> Loader:
    """The loader that fits the training text. Raises ShardError if a source has fewer than context + 1 tokens."""
    if isinstance(shards, MixedShards):
        return Mixture(shards.parts, context=context, seed=seed)
    return (Conversations if shards.chat else Loader)(shards, context=context, seed=seed)


def validation(shards: Shards, context: int, sequences: int, eot: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole split in order, every token a target exactly once: inputs and targets (B, T), B <= sequences.

    The inputs are the split shifted by one, after an end-of-text token. The rest of the last sequence is IGNORE_INDEX.
    For conversations, every token of an answer is a target once, in the sequences of `Conversations`.
    """
    if shards.chat:
        yield from Conversations(shards, context=context, seed=0).in_order(sequences)
        return
    rows = -(-shards.tokens // context)
    for first in range(0, rows, sequences):
        count = min(sequences, rows - first)
        start = first * context
        real = min(count * context, shards.tokens - start)
        y = np.full(count * context, IGNORE_INDEX, dtype=np.int64)
        x = np.full(count * context, eot, dtype=np.int64)
        y[:real] = shards.read(start, real)
        x[1:real] = y[: real - 1]
        if start:
            x[0] = shards.read(start - 1, 1)[0]
        yield torch.from_numpy(x.reshape(count, context)), torch.from_numpy(y.reshape(count, context))
