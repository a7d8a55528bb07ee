"""Mixtures: text from several sources, each with a weight, its share of the training tokens.

A mixture is a folder of the cache with one tokenizer.json and a manifest.json that names the prepared folder of each
source and its weight. The sources are prepared on their own, so other weights need no new tokens.

The weights hold in every block of BLOCK sequences exactly, and in every batch to within one sequence of each source:
the places of a source are evenly spaced in the block. Which source a sequence comes from is a function of its number
in the run alone. A source is read in its own epochs: when all of its sequences were read once, they are cut and
shuffled again. So a small source with a large weight is repeated, and each source is sampled without replacement.

In validation, the loss of a mixture is the mean of its sources' losses with the weights, each over all of the source's
held-out text: an estimate of the loss on the training distribution.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.shards import PREPARE_AGAIN, ShardError, Shards, read_manifest

BLOCK = 10_000  # sequences; weights are rounded to 1 / BLOCK


def apportion(weights: list[float]) -> list[int]:
    """Sequences of each source in a block, in proportion to the weights; the largest remainders are rounded up."""
    exact = [weight / sum(weights) * BLOCK for weight in weights]
    counts = [int(share) for share in exact]
    largest = sorted(range(len(exact)), key=lambda source: counts[source] - exact[source])
    for source in largest[: BLOCK - sum(counts)]:
        counts[source] += 1
    return counts


def schedule(weights: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """For each sequence of a block its source, and how many sequences of that source come before: (BLOCK,) each."""
    counts = apportion(weights)
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    order = np.argsort(places, kind="stable")
    sources = np.repeat(np.arange(len(counts)), counts)[order]
    before = np.concatenate([np.arange(count) for count in counts])[order]
    return sources, before


class MixedShards:
    """One split of a mixture, with the attributes of `Shards`.

    parts: the split of each source and its weight; the weights sum to 1. tokens, num_targets: of all sources together.
    bytes: of as many targets in the proportions of the weights, so that `num_targets / bytes` fits the mean loss.
    """

    def __init__(self, parts: list[tuple[Shards, float]]):
        self.parts = parts
        self.tokens = sum(shards.tokens for shards, _ in parts)
        self.num_targets = sum(shards.num_targets for shards, _ in parts)
        self.chat = all(shards.chat for shards, _ in parts)
        self.bytes = round(self.num_targets * sum(weight * s.bytes / s.num_targets for s, weight in parts))

    def prefix(self, tokens: int, decode: Callable[[list[int]], str]) -> "MixedShards":
        """The first documents of each source, each as many tokens as its weight says; see `Shards.prefix`."""
        parts = [(shards.prefix(math.ceil(tokens * weight), decode), weight) for shards, weight in self.parts]
        return self if parts == self.parts else MixedShards(parts)


AnyShards = Shards | MixedShards


def open_shards(folder: Path, split: str, verify: bool = True) -> AnyShards:
    """A split of a prepared folder, of one source or of a mixture. See `Shards`."""
    manifest = read_manifest(folder)
    if "sources" not in manifest:
        return Shards(folder, split, verify)
    try:
        sources = [(folder.parent / source["folder"], float(source["weight"])) for source in manifest["sources"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(f"{folder / 'manifest.json'}: is damaged ({error}); {PREPARE_AGAIN}") from None
    return MixedShards([(Shards(part, split, verify), weight) for part, weight in sources])
