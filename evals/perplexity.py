"""Perplexity and bits per byte of a text under a model, computed like the validation loss in training."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

from data.chunking import Piece
from data.mixture import AnyShards, open_shards
from data.prepare import Splitter, prepare, write
from data.shards import Shards
from data.sources import Corpus, CorpusError, open_corpus
from data.tokenizer import KINDS, Tokenizer
from model import GPT
from training import device
from training.checkpoint import CheckpointError, find, read_state
from training.config import Config
from training.distributed import World
from training.validation_loss import validate


class AllValidation(Splitter):
    """All pieces of a corpus in the validation split."""

    def __init__(self, corpus: Corpus):
        self.corpus = corpus

    def __iter__(self) -> Iterator[tuple[str | None, Piece]]:
        return (("val", piece) for piece in self.corpus.pieces())


def tokens_of(source: str, text_column: str, limit: int, tokenizer: Tokenizer, folder: Path) -> Shards:
    """Tokenize a whole text into `folder`. Raises CorpusError and TokenizerError."""
    try:
        corpus = open_corpus(source, text_column=text_column, limit=limit, tokenizer=tokenizer)
        manifest = write(folder, AllValidation(corpus), tokenizer, log=lambda _: None)
    except CorpusError as error:  # replace config keys by this command's options
        raise CorpusError(
            str(error).replace("data.source =", "--text").replace("data.text_column =", "--text-column")
        ) from None
    (folder / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest)))
    return Shards(folder, "val")


def own_validation(run: Path, config: Config) -> AnyShards:
    """The validation text of a run, cached or tokenized again. Raises CheckpointError if it has none or another."""
    trained_on = read_state(find(run, "latest"), verify=())["identity"]["text"]
    if not trained_on:
        raise CheckpointError(f"{run} was imported and has no validation text; give --text FILE")
    data = config.data.preparation
    if config.data.tokenizer not in KINDS:  # a file, which may be gone: the run has a copy
        data["tokenizer"] = str(run / "tokenizer.json")
    folder = prepare(**data)
    if folder.name != trained_on:
        raise CheckpointError(f"{run}: data.source = {config.data.name!r} has changed since; name a --text")
    return open_shards(folder, "val")


def measure(model: GPT, text: AnyShards, config: Config, machine: device.Machine) -> list[str]:
    """Tokens, bytes, documents, nats/token, perplexity and bits per byte, formatted."""
    manifests = [part.manifest for part, _ in text.parts]
    loss = validate(model, text, config, World(), machine, manifests[0].eot)
    assert loss is not None  # nothing stops it
    model.eval()
    bits = loss * text.num_targets / text.bytes / math.log(2)
    documents = sum(manifest.splits["val"]["documents"] for manifest in manifests)
    counts = [f"{count:,}" for count in (text.num_targets, text.bytes, documents)]
    return [*counts, f"{loss:.4f}", f"{math.exp(loss):,.2f}", f"{bits:.4f}"]
