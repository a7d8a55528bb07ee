"""The chat format: from a JSONL file to turns, tokens and the loss mask, and the prompt template.

    {"messages": [{"role": "system", "content": "Be brief."},      optional, first
                  {"role": "user", "content": "Who wrote it?"},    user and assistant alternate,
                  {"role": "assistant", "content": "Marlowe."}]}   the assistant's turn is last

is rendered as ChatML, in which two special tokens enclose each turn:

    <|im_start|>user\\nWho wrote it?<|im_end|>\\n<|im_start|>assistant\\nMarlowe.<|im_end|>\\n

Content never produces a special token: `<|im_end|>` typed by a user is encoded as its ten characters. Only the answers
count in the loss, each with the token that ends it (`Marlowe.<|im_end|>`). A tokenizer that has both special tokens
uses this template, so the template is stored with the tokenizer.
"""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import tokenizers

from data.chunking import Piece
from data.shards import FIRST, NO_TARGET, TARGET
from data.tokenizer import Tokenizer, TokenizerError

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>")
ROLES = ("system", "user", "assistant")

Turns = list[tuple[str, str]]  # (role, content)


def chat_template() -> str:
    """The template in Jinja, for transformers' `chat_template`."""
    return (
        "{% for turn in messages %}<|im_start|>{{ turn['role'] + '\\n' + turn['content'] }}<|im_end|>{{ '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>{{ 'assistant\\n' }}{% endif %}"
    )


# 1. From a file to turns --------------------------------------------------------------------------------------------


def read(file: Path) -> Iterator[Piece]:
    """The conversations of a JSONL file, one piece per line. Raises ValueError, "file:line: reason"."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    turns = parse(json.loads(line.decode("utf-8-sig")))
                except (ValueError, RecursionError) as error:  # RecursionError: too many nested brackets
                    raise ValueError(f"{file}:{number}: {_reason(error)}") from None
                yield Piece("".join(f"{role}\n{content}\n" for role, content in turns), ends=True, turns=tuple(turns))


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 (byte {error.start} of the line)"
    return f"is not JSON ({error})" if isinstance(error, json.JSONDecodeError) else str(error)


def parse(row: Any, last: str = "assistant") -> Turns:
    """The turns of one line. `last`: the role of the last one. Raises ValueError with the reason."""
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError('has no "messages"; a line is {"messages": [{"role": "user", "content": "..."}, ...]}')
    turns: Turns = []
    expected: tuple[str, ...] = ("system", "user")
    for at, message in enumerate(messages):
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        if role not in ROLES:
            raise ValueError(f"messages[{at}].role = {role!r}: must be one of {', '.join(ROLES)}")
        if role not in expected:
            raise ValueError(f"messages[{at}].role = {role!r}: must be {' or '.join(expected)} here, roles alternate")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"messages[{at}].content = {content!r}: must be text that is not empty")
        try:
            content.encode()
        except UnicodeEncodeError:
            raise ValueError(f"messages[{at}].content: has half of a surrogate pair, not valid text") from None
        turns.append((role, content))
        expected = ("assistant",) if role == "user" else ("user",)
    if turns[-1][0] != last:
        missing = "assistant's answer" if last == "assistant" else f"{last}'s message"
        raise ValueError(f"ends with {turns[-1][0]}: the {missing} is missing")
    return turns


# 2. From turns to tokens --------------------------------------------------------------------------------------------


def add_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer itself if it has the two special tokens, else a copy with them added at the end."""
    if all(tokenizer.inner.token_to_id(token) is not None for token in SPECIAL_TOKENS):
        return tokenizer
    copy = tokenizers.Tokenizer.from_str(tokenizer.inner.to_str())
    copy.add_special_tokens(list(SPECIAL_TOKENS))
    return Tokenizer(copy, end=tokenizer.end)


def encode(tokenizer: Tokenizer, conversations: list[Turns]) -> list[tuple[list[int], list[int]]]:
    """The ids and the loss mask (TARGET, NO_TARGET or FIRST for each id) of each conversation.

    Role and content of a turn are tokenized as one text, as in other tools. Raises TokenizerError.
    """
    start, end = special_tokens(tokenizer)
    newline, header = tokenizer.encode("\n"), tokenizer.encode("assistant\n")
    texts = iter(tokenizer.encode_batch([f"{role}\n{content}" for turns in conversations for role, content in turns]))
    encoded = []
    for turns in conversations:
        ids, loss_mask = list[int](), list[int]()
        for role, _ in turns:
            part = next(texts)
            # The tokens of the header are part of the prompt during generation. The answer follows them.
            given = common_prefix(header, part) if role == "assistant" else len(part)
            last = TARGET if role == "assistant" else NO_TARGET
            ids += [start, *part, end, *newline]
            loss_mask += (
                [NO_TARGET] * (1 + given) + [TARGET] * (len(part) - given) + [last] + [NO_TARGET] * len(newline)
            )
        loss_mask[0] = FIRST
        encoded.append((ids, loss_mask))
    return encoded


def common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the common prefix."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def render_prompt(tokenizer: Tokenizer, turns: Turns, max_tokens: int, answer: int = 0) -> list[int]:
    """The prompt for an answer: the turns, then the header of the assistant's turn.

    If the conversation has more than `max_tokens` tokens less `answer`, the oldest turns are dropped, except the system
    message and the last turn. If these two have more than `max_tokens`, the beginning of the last turn's text is left
    out. Raises TokenizerError if the tokenizer has no special tokens, or the system message leaves no room.
    """
    header = [special_tokens(tokenizer)[0], *tokenizer.encode("assistant\n")]
    parts = [ids for ids, _ in encode(tokenizer, [[turn] for turn in turns])]
    size, first = sum(map(len, parts)) + len(header), int(turns[0][0] == "system")
    while size > max_tokens - answer and len(parts) - first > 1:
        size -= len(parts[first]) + len(parts[first + 1])
        del parts[first : first + 2]  # a question and its answer
    if size > max_tokens:
        last = parts[-1]
        kept = 1 + common_prefix(tokenizer.encode(f"{turns[-1][0]}\n"), last[1:])  # the header of the last turn
        room = max_tokens - (size - len(last)) - kept
        end = 1 + len(tokenizer.encode("\n"))  # of the last turn
        if first and room <= end:
            reason = f"the system message is {end + 1 - room} tokens too long"
            raise TokenizerError(f"{reason}: it leaves no room for a message")
        parts[-1] = last[:kept] + last[-max(room, end) :]
    return [*chain.from_iterable(parts), *header]


def special_tokens(tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids of the two special tokens. Raises TokenizerError if the tokenizer does not have them."""
    start, end = (tokenizer.inner.token_to_id(token) for token in SPECIAL_TOKENS)
    if start is None or end is None:
        raise TokenizerError(
            f"this tokenizer has no {' and '.join(SPECIAL_TOKENS)}: it was not trained to chat; "
            "train it with python train.py chat --init-from RUN --data.source chat.jsonl"
        )
    return start, end
