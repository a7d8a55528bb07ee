"""The playground: its page, and what the page shows of a text.

The page is one file without external resources: the files of serve/page/ put into index.html. Its content security
policy permits this very script and style and no others, and requests to this server only.

What is shown of a text is computed by the eager model and by inference/attention_weights.py, so it says how the text
looks to the model whoever wrote it. It may differ from the log-probabilities of a stream by rounding.
"""

import base64
import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from fastapi.responses import HTMLResponse
from pydantic import model_validator
from torch import Tensor

from data import chat_format
from data.tokenizer import Tokenizer, TokenizerError
from inference.attention_weights import attention_weights
from model import GPT, ModelConfig
from serve.limits import Limits
from serve.openai_api import ApiError, Body, Message, chat_prompt, check_ids, spell
from training.flops import count_parameters

PAGE = Path(__file__).with_name("page")
SCRIPTS = ("distribution", "client", "text", "maps", "session", "show", "main")  # .js, in the order in which they run
MAP_BYTES = 1 << 23  # of a response; of a model with 12 layers of 12 heads, 340 tokens
RIVALS = 6  # most likely tokens at each position

# 1. The page --------------------------------------------------------------------------------------------------------


def page() -> HTMLResponse:
    """The response to GET /."""
    style = (PAGE / "style.css").read_text(encoding="utf-8")
    script = "\n".join((PAGE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    html = (PAGE / "index.html").read_text(encoding="utf-8").replace("STYLE", style).replace("SCRIPT", script)
    policy = (
        f"default-src 'none'; style-src {sha256(style)}; script-src {sha256(script)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
    return HTMLResponse(html, headers=headers)


def sha256(text: str) -> str:
    """A source of a content security policy: the inline text with this hash."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def about(name: str, config: ModelConfig, tokenizer: Tokenizer, limits: Limits) -> dict[str, Any]:
    """What the page has to know of the run."""
    try:
        can_chat = bool(chat_format.special_tokens(tokenizer))
    except TokenizerError:
        can_chat = False
    return {
        "name": name, "can_chat": can_chat, "parameters": count_parameters(config),
        "mixers": [config.mixer(layer).__name__ for layer in range(config.n_layer)], "heads": config.n_head,
        "context": config.context, "vocabulary": config.vocab_size, "max_tokens": limits.max_tokens,
    }  # fmt: skip


# 2. A text ----------------------------------------------------------------------------------------------------------


class InspectRequest(Body):
    """POST /playground/inspect: a text, its tokens, or a conversation up to the header of the next answer.

    max_tokens: of that answer.
    """

    text: str | None = None
    tokens: list[int] | None = None
    messages: list[Message] | None = None
    max_tokens: int = 1

    @model_validator(mode="after")
    def has_one(self) -> "InspectRequest":
        """Raise ValueError if there is not one of the three."""
        if sum(field is not None for field in (self.text, self.tokens, self.messages)) != 1:
            raise ValueError("the body must have one of text, tokens and messages")
        return self

    def ids(self, tokenizer: Tokenizer, config: ModelConfig) -> list[int]:
        """The tokens, at most the context. Raises ApiError and ValueError."""
        if self.messages is not None:
            ids = chat_prompt(tokenizer, self.messages, config.context, self.max_tokens)
        else:
            ids = tokenizer.encode_prompt(self.text if self.tokens is None else self.tokens)  # type: ignore[arg-type]
        check_ids(tokenizer, ids, "tokens")
        if len(ids) > config.context:
            message = f"the text has {len(ids)} tokens, but the model's context is {config.context}"
            raise ApiError(400, message, code="context_length_exceeded")
        return ids


def most_inspected(config: ModelConfig) -> int:
    """How many tokens are inspected, at least one: they must fit into the context, and their maps into MAP_BYTES."""
    pairs = MAP_BYTES // (config.n_layer * config.n_head)  # T (T + 1) / 2 of T tokens
    return min(config.context, max(1, (math.isqrt(8 * pairs + 1) - 1) // 2))


@torch.inference_mode()
def inspect(model: GPT, tokenizer: Tokenizer, tokens: list[int]) -> dict[str, Any]:
    """How a text looks to the model, as JSON. Of a long text, its last tokens, as a text of their own.

    tokens: all ids. skipped: how many tokens are before the others, the T that are inspected. texts: of all ids that
    occur here. named: ids without a text of their own, such as special tokens. logprobs: of each of the T tokens after
    those before it; the first has none. rivals: the most likely tokens at each position and their log-probabilities,
    those of the first position left out; so the last ones follow the text. logits: after the text, (V,) fp32 in base64.
    maps: of each layer, see `pack`. Raises ApiError.
    """
    skipped = max(0, len(tokens) - most_inspected(model.config))
    ids = torch.tensor(tokens[skipped:], device=model.model.cos.device)  # (T,)
    logits = model(ids[None])[0].float()  # (T, V)
    if not bool(logits.isfinite().all()):
        raise ApiError(500, "the logits are not finite numbers: the weights are damaged, or overflow in this dtype")
    logprobs = logits.log_softmax(1)
    own = logprobs[:-1].gather(1, ids[1:, None])[:, 0].tolist()
    top = logprobs.topk(min(RIVALS, logits.shape[1]), dim=1)  # (T, RIVALS)
    rivals = [list(zip(*row, strict=True)) for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
    spelled = {token: spell(tokenizer, token) for token in {*tokens, *top.indices.flatten().tolist()}}
    return {
        "tokens": tokens,
        "skipped": skipped,
        "texts": {token: spelling["token"] for token, spelling in spelled.items()},
        "named": [token for token, spelling in spelled.items() if spelling["bytes"] is None],
        "logprobs": [None, *own],
        "rivals": rivals,
        "logits": encode(logits[-1]),
        "maps": [None if weights is None else pack(weights) for weights in attention_weights(model, ids)],
    }


def pack(weights: Tensor) -> dict[str, Any]:
    """The attention weights (H, T, T) of a layer in one byte each, without those of later keys.

    largest: the largest absolute weight of each head. roots: sqrt(|weight| / largest) * 255, row by row, the rows of
    H x T (T + 1) / 2 bytes, in base64. With the root, a weight of 1/256 still has 16 of the 255 steps.
    """
    row, column = torch.tril_indices(weights.shape[1], weights.shape[2], device=weights.device)
    lower = weights.abs()[:, row, column]  # (H, T, T) -> (H, T (T + 1) / 2)
    largest = lower.amax(1, keepdim=True).clamp(min=1e-30)  # (H, 1)
    roots = (lower / largest).sqrt().mul(255).round().to(torch.uint8)
    return {"largest": largest[:, 0].tolist(), "roots": encode(roots)}


def encode(values: Tensor) -> str:
    """The bytes of a tensor, little-endian, in base64."""
    return base64.b64encode(values.cpu().contiguous().numpy().tobytes()).decode()
