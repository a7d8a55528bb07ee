"""Needle in a haystack (Kamradt 2023): does a model find one sentence anywhere in its context?

A sentence, the needle, is put into a text at a depth from 0 (the start) to 1 (just before the end), and the text ends
with the sentence's first words:

    <text> The word of captain is harbour. <text> The word of captain is

Keys and words are drawn from the words of the text, so that every tokenizer can encode them. Three numbers for each
length and depth, means over the items:

exact: greedy decoding continues with the word. choice: the word is the most likely of CANDIDATES words, of which the
others are drawn like it: a model that does not read the needle has 1 / CANDIDATES. gain: log-probability of the word
minus the mean of that of the others, in nats: without the needle it is 0 on average.

A model must have learned to copy. One that was trained for minutes has not, and has a gain near 0 everywhere; what the
evaluation itself is worth is shown in tests/evals/test_needle.py, by a model that looks the answer up.
"""

import json
import random
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.shards import Shards
from data.tokenizer import Tokenizer
from evals.loglikelihood import Score, score, split
from model import GPT

CANDIDATES = 5  # words that are compared
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NEEDLE = "\nThe word of {} is {}.\n"
QUESTION = "\nThe word of {} is"
WORD = re.compile(r"\b[a-z]{4,8}\b")
SAMPLE = 1 << 16  # tokens of the text from which words are drawn

Request = tuple[list[int], list[int]]  # tokens of a context and its continuation


class Cell(NamedTuple):
    """The result at one length, in tokens, and one depth."""

    length: int
    depth: float
    exact: float
    choice: float
    gain: float


def default_lengths(context: int) -> list[int]:
    """The context, and halves of it."""
    return [context // 8, context // 4, context // 2, context]


def words_of(text: Shards, tokenizer: Tokenizer) -> list[str]:
    """The different words of the text, sorted. Raises ValueError if there are too few."""
    found = sorted(set(WORD.findall(tokenizer.decode(text.read(0, min(SAMPLE, text.tokens)).tolist()))))
    if len(found) <= CANDIDATES:
        raise ValueError(f"--needle: the text has {len(found)} different words of 4 to 8 letters; use a longer one")
    return found


def item(
    text: Shards, tokenizer: Tokenizer, words: Sequence[str], length: int, depth: float, draw: random.Random
) -> list[Request]:
    """The requests of one item, the first with the right word. A context and its word have `length` tokens together.

    Raises ValueError if the needle and the question do not fit, or there is no text around them.
    """
    key, answer, *others = draw.sample(words, CANDIDATES + 1)
    needle = tokenizer.encode(NEEDLE.format(key, answer))
    question, answers = QUESTION.format(key), [answer, *others]
    ends = [split(tokenizer, question, f" {word}") for word in answers]
    start = tokenizer.bos_tokens or [tokenizer.eot]
    question_ids = ends[0][0][len(tokenizer.bos_tokens) :]
    room = length - len(start) - len(needle) - len(question_ids) - max(len(word) for _, word in ends)
    if room < 0:
        raise ValueError(f"--lengths {length}: needle and question alone need {length - room} tokens")
    at = draw.randrange(text.tokens)
    special = {tokenizer.eot, *tokenizer.end_tokens}  # the haystack is one document
    hay = [token for token in text.read(at, 2 * room + 64).tolist() if token not in special]
    if room and not hay:
        raise ValueError(f"--needle: the text has special tokens only from token {at:,} on; use another one")
    while len(hay) < room:  # a text of very short documents
        hay += hay
    before = round(depth * room)
    context = [*start, *hay[:before], *needle, *hay[before:room], *question_ids]
    return [(context, word) for _, word in ends]


def evaluate(
    model: GPT, tokenizer: Tokenizer, text: Shards, lengths: Sequence[int], items: int,
    scorer: Callable[[GPT, Sequence[Request]], list[Score]] = score,
) -> list[Cell]:  # fmt: skip
    """The result of every length and depth. Raises ValueError for a length beyond the context or too short a one.

    The items of all depths have the same needles in the same text, so depths are compared like with like.
    """
    context = model.config.context
    if wrong := [length for length in lengths if not 1 <= length <= context]:
        raise ValueError(f"--lengths {wrong[0]}: must be from 1 to model.context = {context}")
    words = words_of(text, tokenizer)
    cells = []
    for length in lengths:
        for depth in DEPTHS:
            requests = [item(text, tokenizer, words, length, depth, random.Random(number)) for number in range(items)]
            scores = iter(scorer(model, [request for one in requests for request in one]))
            found = [[next(scores) for _ in one] for one in requests]
            exact = statistics.fmean(right.greedy for right, *_ in found)
            choice = statistics.fmean(right.logprob > max(o.logprob for o in others) for right, *others in found)
            gain = statistics.fmean(
                right.logprob - statistics.fmean(o.logprob for o in others) for right, *others in found
            )
            cells.append(Cell(length, depth, exact, choice, gain))
    return cells


def rows(cells: Sequence[Cell]) -> list[list[Any]]:
    """A row for each length and number, with a column for each depth."""
    lengths = dict.fromkeys(cell.length for cell in cells)
    return [
        [f"{length:,}", name, *(f"{getattr(cell, name):.2f}" for cell in cells if cell.length == length)]
        for length in lengths
        for name in ("exact", "choice", "gain")
    ]


def save(folder: Path, cells: Sequence[Cell], about: dict[str, Any]) -> None:
    """Write needle.json and needle.png, a map of `exact`, into a folder that exists."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    content = about | {"candidates": CANDIDATES, "cells": [cell._asdict() for cell in cells]}
    (folder / "needle.json").write_text(json.dumps(content, indent=1) + "\n")
    lengths = list(dict.fromkeys(cell.length for cell in cells))
    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    exact = [[cell.exact for cell in cells if cell.length == length] for length in lengths]
    image = axis.imshow(exact, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axis.set_xticks(range(len(DEPTHS)), [f"{depth:.0%}" for depth in DEPTHS])
    axis.set_yticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axis.set_xlabel("depth of the needle")
    axis.set_ylabel("tokens")
    figure.colorbar(image, label="exact")
    figure.savefig(folder / "needle.png", dpi=80)
    plt.close(figure)
