"""OpenAI's API: requests, checked and turned into sequences; responses and errors, as OpenAI's clients read them.

What heed does not have, such as tools, is refused: no field is ignored that would change the text. Beyond OpenAI's
fields there are those of heed's sampling, top_k, min_p and repetition_penalty, and of completions, as in vLLM,
return_token_ids: the tokens of each choice, `token_ids`.
"""

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from functools import lru_cache
from typing import Annotated, Any, ClassVar

from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

from data import chat_format
from data.tokenizer import Tokenizer
from inference import continuous_batching
from inference.sampling import SamplingParams
from inference.stop_strings import GeneratedText
from model import ModelConfig
from serve.limits import Limits
from serve.scheduler import Generation, GenerationFailed, Part

# 1. Errors ----------------------------------------------------------------------------------------------------------


class ApiError(HTTPException):
    """An error in OpenAI's format. param: the field of the request that is wrong. code: a name for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message, headers={"Retry-After": "1"} if status == 429 else None)
        kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """The error as a response."""
        return JSONResponse(self.content, self.status_code, self.headers)


def invalid(errors: Sequence[Any]) -> ApiError:
    """One line about the first field in which pydantic found an error."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}")
    if first["type"] == "value_error":  # of a check below
        return ApiError(400, first["msg"].removeprefix("Value error, "))
    path = [str(part) for part in first["loc"][1:]]
    if not path:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    same = [error for error in errors if error["loc"][1] == first["loc"][1]]  # one for each type that a field may have
    name = ".".join(path if len(same) == 1 else path[:1])
    if first["type"] in ("missing", "extra_forbidden"):
        return ApiError(400, f"{name}: is {'missing' if first['type'] == 'missing' else 'not supported'}", path[0])
    right = " or ".join(dict.fromkeys(error["msg"].removeprefix("Input should be ") for error in same))
    return ApiError(400, f"{name} = {first['input']!r:.80}: must be {right}", path[0])


# 2. Requests --------------------------------------------------------------------------------------------------------


class Body(BaseModel):
    """An object in a request. Values are not converted: "1" is not a number."""

    UNUSED: ClassVar = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
    NEUTRAL: ClassVar = {"best_of": 1, "response_format": {"type": "text"}, "parallel_tool_calls": True}
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def drop_neutral(cls, body: Any) -> Any:
        """Leave out what is null, and fields of OpenAI's that do not change the text, or not with this value."""
        if not isinstance(body, dict):
            return body

        def changes(name: str, value: Any) -> bool:
            return bool(value) and name not in cls.UNUSED and value != cls.NEUTRAL.get(name)

        given = {name: value for name, value in body.items() if value is not None}
        return {name: value for name, value in given.items() if name in cls.model_fields or changes(name, value)}


class StreamOptions(Body):
    include_usage: bool = False


class GenerationRequest(Body):
    """What both kinds of requests have."""

    model: str
    n: int = Field(1, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    def check(self, limits: Limits, new_tokens: int, prompts: int) -> None:
        """Raise ValueError for what exceeds a limit."""
        if new_tokens > limits.max_tokens:
            raise ValueError(f"max_tokens = {new_tokens}: must be at most {limits.max_tokens}")
        if not 1 <= prompts * self.n <= limits.max_sequences + limits.max_queue:
            most = limits.max_sequences + limits.max_queue
            raise ValueError(f"{prompts} prompts, n = {self.n}: must be 1 to {most} sequences in all")

    def sequences(
        self, tokenizer: Tokenizer, prompts: list[list[int]], new_tokens: int, num_logprobs: int | None
    ) -> Generation:
        """n sequences for each prompt; sequence i of all has the seed `seed + i`. Raises ValueError."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if len(stop) > 4 or not all(1 <= len(text) <= 256 for text in stop):
            raise ValueError(f"stop = {self.stop!r:.80}: must be at most 4 texts of 1 to 256 characters")
        sampling = SamplingParams(
            self.temperature or 1.0, self.top_k, self.top_p, self.min_p, self.repetition_penalty,
            greedy=self.temperature == 0,
        )  # fmt: skip
        seed = secrets.randbits(62) if self.seed is None else self.seed
        each = [prompt for prompt in prompts for _ in range(self.n)]
        sequences = [
            continuous_batching.Sequence(list(prompt), sampling, seed + i, num_logprobs)
            for i, prompt in enumerate(each)
        ]
        return Generation(sequences, [GeneratedText(tokenizer, stop, prompt) for prompt in each], new_tokens)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. A prompt must fit into the context; the text may be longer, as in sample.generate."""

    KIND: ClassVar = {"message": "text_completion", "delta": "text_completion"}

    prompt: str | list[str] | list[int] | list[list[int]] = ""
    logprobs: int | None = Field(None, ge=0, le=20)
    return_token_ids: bool = False

    def generation(self, tokenizer: Tokenizer, config: ModelConfig, limits: Limits) -> Generation:
        """What is to be generated. Raises ApiError and ValueError."""
        given: list[Any] = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        given = [given] if given and isinstance(given[0], int) else given
        new_tokens = self.max_tokens or min(16, limits.max_tokens)
        self.check(limits, new_tokens, len(given))
        prompts = [tokenizer.encode_prompt(prompt) for prompt in given]
        for ids in prompts:
            if len(ids) > config.context:
                message = f"the prompt has {len(ids)} tokens, but the model's context is {config.context}"
                raise ApiError(400, message, "prompt", "context_length_exceeded")
            check_ids(tokenizer, ids, "prompt")
        return self.sequences(tokenizer, prompts, new_tokens, self.logprobs)

    def choice(self, tokenizer: Tokenizer, parts: list[Part], where: str) -> dict[str, Any]:
        """The text and the log-probabilities of some parts."""
        choice: dict[str, Any] = {"text": "".join(part.text for part in parts), "logprobs": None}
        found = [token_logprobs(tokenizer, part) for part in parts if part.logprobs]
        if found:
            choice["logprobs"] = {
                "tokens": [token["token"] for token in found],
                "token_logprobs": [token["logprob"] for token in found],
                "top_logprobs": [
                    {top["token"]: top["logprob"] for top in [*token["top_logprobs"], token]} for token in found
                ],
            }
        if self.return_token_ids:
            choice["token_ids"] = [part.token for part in parts]
        return choice


def check_ids(tokenizer: Tokenizer, ids: list[int], field: str) -> None:
    """Raise ValueError if one of the ids, at least one, is not a token's."""
    if not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
        raise ValueError(f"{field}: token ids must be from 0 to {tokenizer.vocab_size - 1}")


def join_texts(content: Any) -> Any:
    """The text of a list of parts that are all texts. Other lists are returned as they are, to be refused."""
    if not isinstance(content, list):
        return content
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    return "".join(texts) if len(texts) == len(content) else content


class Message(Body):
    role: str
    content: Annotated[str, BeforeValidator(join_texts)]


def chat_prompt(tokenizer: Tokenizer, messages: list[Message], context: int, new_tokens: int) -> list[int]:
    """The prompt for an answer of up to `new_tokens`. Raises ValueError."""
    rows = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role  # OpenAI's newer name
        rows.append({"role": role, "content": message.content})
    turns = chat_format.parse({"messages": rows}, last="user")
    half, quarter = (min(new_tokens, context // part) for part in (2, 4))
    return chat_format.render_prompt(tokenizer, turns, context - quarter, half - quarter)


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions. If a conversation is too long, its oldest turns are left out, as in sample.py."""

    KIND: ClassVar = {"message": "chat.completion", "delta": "chat.completion.chunk"}

    messages: list[Message]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    def generation(self, tokenizer: Tokenizer, config: ModelConfig, limits: Limits) -> Generation:
        """What is to be generated. Raises ValueError."""
        new_tokens = self.max_completion_tokens or self.max_tokens or limits.max_tokens
        self.check(limits, new_tokens, 1)
        prompt = chat_prompt(tokenizer, self.messages, config.context, new_tokens)
        return self.sequences(tokenizer, [prompt], new_tokens, self.top_logprobs if self.logprobs else None)

    def choice(self, tokenizer: Tokenizer, parts: list[Part], where: str) -> dict[str, Any]:
        """The text and the log-probabilities of some parts. where: "message", or "delta" in a stream."""
        role = {"role": "assistant"} if parts[0].number == 1 else {}
        found = [token_logprobs(tokenizer, part) for part in parts if part.logprobs]
        text = "".join(part.text for part in parts)
        return {where: {**role, "content": text}, "logprobs": {"content": found} if found else None}


# 3. Responses -------------------------------------------------------------------------------------------------------


def token_logprobs(tokenizer: Tokenizer, part: Part) -> dict[str, Any]:
    """The log-probability of a part's token and of the most likely ones, all with their texts and their bytes."""
    assert part.logprobs
    logprob, top = part.logprobs.logprob, part.logprobs.top
    (token, *tops) = (spell(tokenizer, i) | {"logprob": p} for i, p in [(part.token, logprob), *top])
    return token | {"top_logprobs": tops}


@lru_cache(1 << 16)
def spell(tokenizer: Tokenizer, token: int) -> dict[str, Any]:
    """The text of a token and its bytes; if it is no text, as in the middle of a character, its name in the vocabulary,
    and None."""
    once = tokenizer.decode([token])
    text = tokenizer.decode([token, token])[len(once) :]  # some decoders drop the space before the first token
    if text and "\ufffd" not in once:
        return {"token": text, "bytes": list(text.encode())}
    return {"token": tokenizer.inner.id_to_token(token) or f"<{token}>", "bytes": None}


class ApiResponse:
    """The response to a request, whole or as a stream."""

    def __init__(self, request: CompletionRequest | ChatRequest, tokenizer: Tokenizer, generation: Generation) -> None:
        self.request, self.tokenizer, self.generation = request, tokenizer, generation
        prefix = "cmpl" if isinstance(request, CompletionRequest) else "chatcmpl"
        self.head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": request.model}

    def body(self, where: str, choices: list[list[Part]], **usage: Any) -> dict[str, Any]:
        """The JSON of a response or of a chunk, with the parts of some choices."""
        found = [
            {"index": parts[0].choice, "finish_reason": parts[-1].finish_reason}
            | self.request.choice(self.tokenizer, parts, where)
            for parts in choices
        ]
        return self.head | {"object": self.request.KIND[where], "choices": found} | usage

    def usage(self) -> dict[str, Any]:
        """The numbers of tokens, after the last one. A prompt counts once, however many choices it has."""
        prompts = self.generation.sequences[:: self.request.n]
        prompt = sum(sequence.prompt_size for sequence in prompts)
        completion = sum(sequence.num_generated for sequence in self.generation.sequences)
        cached = {"cached_tokens": sum(sequence.num_reused for sequence in prompts)}
        total = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return total | {"prompt_tokens_details": cached}

    async def whole(self) -> dict[str, Any]:
        """The JSON of the whole response. Raises ApiError."""
        choices: list[list[Part]] = [[] for _ in self.generation.sequences]
        try:
            async for part in self.generation:
                choices[part.choice].append(part)
        except GenerationFailed as failed:
            raise ApiError(500, str(failed)) from None
        return self.body("message", choices, usage=self.usage())

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events: a chunk for each token that adds something, then [DONE], or an error."""
        counted = self.request.stream_options.include_usage
        try:
            async for part in self.generation:
                if part.text or part.logprobs or part.number == 1 or part.finish_reason:
                    yield event(self.body("delta", [[part]], **{"usage": None} if counted else {}))
            if counted:
                yield event(self.body("delta", [], usage=self.usage()))
            yield "data: [DONE]\n\n"
        except GenerationFailed as failed:
            yield event(ApiError(500, str(failed)).content)


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"
