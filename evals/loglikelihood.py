"""Log-likelihoods of continuations after contexts, in batches.

Shapes: B sequences, T tokens of the longest, N scored tokens, C width, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data.tokenizer import Tokenizer
from model import GPT

BATCH = 8192  # tokens at once, padding included


class Score(NamedTuple):
    """The log-probability of a continuation in nats, and whether each of its tokens is the model's most likely."""

    logprob: float
    greedy: bool


def split(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokenize a context and its continuation, as lm-eval does.

    Trailing white space of the context moves to the continuation, as in tokens such as " word". Both are tokenized as
    one text, and the number of tokens of the context is removed from the front. An empty context starts a document.
    """
    end = len(context.rstrip())
    context, continuation = context[:end], context[end:] + continuation
    if not context:
        return tokenizer.bos_tokens or [tokenizer.eot], tokenizer.encode(continuation)
    ids = tokenizer.encode(context)
    return tokenizer.bos_tokens + ids, tokenizer.encode(context + continuation)[len(ids) :]


def check(model: GPT, continuation: list[int]) -> None:
    """Raise ValueError for a continuation that cannot be scored."""
    if not 1 <= len(continuation) <= model.config.context:
        raise ValueError(
            f"{len(continuation)} tokens to score: must be 1 to model.context = {model.config.context}; a continuation "
            "must start at a token boundary, best with a space"
        )


@torch.inference_mode()
def score(model: GPT, requests: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
    """The score of each (context, continuation), in order. A context that is too long is truncated on the left.

    Raises ValueError: see `check`.
    """
    room, device = model.config.context, model.model.cos.device
    for _, continuation in requests:
        check(model, continuation)
    texts = [(context + continuation)[-room - 1 :] for context, continuation in requests]
    scores: dict[int, Score] = {}
    for numbers in batches([len(text) - 1 for text in texts]):
        T = len(texts[numbers[0]]) - 1
        # causal attention ignores the padding at the end
        tokens = torch.zeros(len(numbers), T, dtype=torch.long)  # (B, T)
        at = []  # (row, first, last + 1) of the scored positions
        for row, number in enumerate(numbers):
            inputs, scored = texts[number][:-1], len(requests[number][1])
            tokens[row, : len(inputs)] = torch.tensor(inputs)
            at.append((row, len(inputs) - scored, len(inputs)))
        hidden = model.model(tokens.to(device))  # (B, T, C)
        logits = model.head(torch.cat([hidden[row, i:j] for row, i, j in at])).float()  # (N, C) -> (N, V)
        targets = torch.tensor([token for number in numbers for token in requests[number][1]], device=device)  # (N,)
        logprobs = -F.cross_entropy(logits, targets, reduction="none")  # (N,)
        likeliest = logits.argmax(1) == targets  # (N,)
        sizes = [j - i for _, i, j in at]
        for number, p, top in zip(numbers, logprobs.split(sizes), likeliest.split(sizes), strict=True):
            scores[number] = Score(float(p.double().sum()), bool(top.all()))
    return [scores[number] for number in range(len(requests))]


def batches(lengths: list[int]) -> list[list[int]]:
    """Group the indices of `lengths`, longest first: at most BATCH tokens per group when padded, or one sequence."""
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= BATCH:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups
