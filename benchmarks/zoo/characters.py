"""The text of experiments that train a small language model: Shakespeare's plays, one token per character."""

from collections.abc import Callable

from benchmarks.zoo.fit import Batch
from data.loader import Loader
from data.prepare import prepare
from data.shards import Shards

SOURCE = "shakespeare"  # as `data.source` of a run


def characters(context: int, sequences: int, seed: int) -> tuple[int, Callable[[int], Batch]]:
    """The size of the vocabulary, and the training batches: inputs and targets (sequences, context) by step."""
    text = Shards(prepare(SOURCE, tokenizer="char", log=lambda line: None), "train")
    loader = Loader(text, context=context, seed=seed)
    return text.manifest.vocab_size, lambda step: loader.batch(step, sequences)
