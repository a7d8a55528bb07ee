"""Evaluation tasks from a JSONL file, one item per line.

    {"task": "lambada", "text": "She opened the door and saw the dog"}
    {"task": "cloze", "text": "The ____ sat on the mat.", "choices": ["cat", "idea"], "answer": 0}
    {"task": "choice", "prompt": "Grass is", "choices": ["green", "blue", "loud"], "answer": 0}

lambada: predict the last word from the text before it; correct if each of its tokens is the model's most likely token.
cloze: a choice replaces ____; the text from there to the end is scored, given the text before it.
choice: a choice follows the prompt, separated by a space unless one of them has white space there.
`answer` is the index of the correct choice, from 0. Other fields are ignored.
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.tokenizer import Tokenizer
from evals.loglikelihood import check, score, split
from model import GPT

BLANK = "____"
FIELDS: dict[str, dict[str, type]] = {
    "lambada": {"text": str},
    "cloze": {"text": str, "choices": list, "answer": int},
    "choice": {"prompt": str, "choices": list, "answer": int},
}


class Item(NamedTuple):
    """One line: (context, continuation) of every option, and the index of the correct one."""

    task: str
    options: list[tuple[str, str]]
    answer: int
    where: str


class Mean(NamedTuple):
    """A mean and its standard error; NaN for a single item."""

    value: float
    error: float

    def __str__(self) -> str:
        digits = 2 if self.value >= 10 else 3
        return f"{self.value:,.{digits}f}" + ("" if math.isnan(self.error) else f" ± {self.error:,.{digits}f}")


class Result(NamedTuple):
    """Results of a task.

    accuracy: share of items whose correct option is the most likely. per_byte: the same, with log-probabilities divided
    by the length of the option in bytes. perplexity: of the last word as a whole.
    """

    task: str
    items: int
    accuracy: Mean
    per_byte: Mean | None
    perplexity: Mean | None


def read(path: Path) -> list[Item]:
    """Read the items of a file. Raises ValueError for the first invalid line, with its number."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    items = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                items.append(parse(json.loads(line), where))
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error}") from None
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
    if not items:
        raise ValueError(f"{path}: has no items; one JSON object per line, see the top of evals/tasks.py")
    return items


def parse(row: Any, where: str) -> Item:
    """Convert one line to an item. Raises ValueError that names the invalid field."""
    task = row.get("task") if isinstance(row, dict) else None
    if task not in FIELDS:
        raise ValueError(f"task = {task!r}: must be one of {', '.join(FIELDS)}")
    for field, kind in FIELDS[task].items():
        if type(row.get(field)) is not kind:
            named = {str: "a string", list: "a list of strings", int: "a whole number"}[kind]
            raise ValueError(f"{field} = {row.get(field)!r}: must be {named}")
    if task == "lambada":
        text = row["text"].rstrip()
        word = text.split()[-1] if text else ""
        if word == text.strip():
            raise ValueError(f"text = {row['text']!r}: must have a word and text before it")
        return Item(task, [(text[: -len(word)], word)], 0, where)
    choices, answer = row["choices"], row["answer"]
    if len(choices) < 2 or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError(f"choices = {choices!r}: must be two or more strings, none empty")
    if not 0 <= answer < len(choices):
        raise ValueError(f"answer = {answer}: must be from 0 to {len(choices) - 1}, the index of a choice")
    if task == "cloze":
        if row["text"].count(BLANK) != 1:
            raise ValueError(f"text = {row['text']!r}: must contain {BLANK} exactly once")
        before, after = row["text"].split(BLANK)
        return Item(task, [(before, choice + after) for choice in choices], answer, where)
    prompt = row["prompt"]
    return Item(task, [(prompt, join(prompt, choice)) for choice in choices], answer, where)


def join(prompt: str, choice: str) -> str:
    """The choice, with a leading space if one must separate it from the prompt."""
    return choice if not prompt or prompt[-1].isspace() or choice[0].isspace() else f" {choice}"


def evaluate(model: GPT, tokenizer: Tokenizer, items: Sequence[Item]) -> list[Result]:
    """The results of each task in `items`. Raises ValueError for an item that cannot be scored."""
    requests = []
    for item in items:
        try:
            pairs = [split(tokenizer, context, continuation) for context, continuation in item.options]
            for _, continuation in pairs:
                check(model, continuation)
        except ValueError as error:
            raise ValueError(f"{item.where}: {error}") from None
        requests += pairs
    scores = iter(score(model, requests))
    found = [[next(scores) for _ in item.options] for item in items]
    results = []
    for task in FIELDS:
        own = [(item, options) for item, options in zip(items, found, strict=True) if item.task == task]
        if own and task == "lambada":
            right = mean([float(options[0].greedy) for _, options in own])
            results.append(Result(task, len(own), right, None, perplexity([o[0].logprob for _, o in own])))
        elif own:
            plain = [best([s.logprob for s in options]) == item.answer for item, options in own]
            bytewise = [
                best([s.logprob / size(option) for s, option in zip(options, item.options, strict=True)]) == item.answer
                for item, options in own
            ]
            results.append(Result(task, len(own), mean(plain), mean(bytewise), None))
    return results


def size(option: tuple[str, str]) -> int:
    """Length of an option in bytes, without the space that separates it from its context."""
    return len(option[1].strip().encode())


def best(values: list[float]) -> int:
    """Index of the largest value; of equal ones, the first."""
    return values.index(max(values))


def mean(values: Sequence[float]) -> Mean:
    """The mean, and its standard error: the sample standard deviation over sqrt(n)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(statistics.fmean(values), error)


def perplexity(logprobs: Sequence[float]) -> Mean:
    """exp of the mean negative log-probability; the standard error is propagated to first order."""
    exponent = mean([-p for p in logprobs])
    return Mean(math.exp(exponent.value), math.exp(exponent.value) * exponent.error)
