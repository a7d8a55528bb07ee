"""Continuous batching: sequences of different lengths join and leave the batch between two steps.

    batch = ContinuousBatch(model, max_sequences=8)
    batch.add(Sequence(prompt))
    while not batch.idle:
        for sequence in batch.step():
            print(sequence.tokens[-1])  # and batch.remove(sequence) when its text ends

A step generates one token for every running sequence (iteration-level scheduling: Yu et al. 2022, "Orca", section 4.1)
and prefills at most about KVCache.CHUNK tokens of prompts, so a long prompt delays the others by one chunk at a time
(chunked prefill: Agrawal et al. 2023, "SARATHI", section 4). Each sequence has a row of one preallocated KV cache, long
enough for the whole context: a sequence that has begun never has to wait for memory.

A row keeps its keys and values when its sequence leaves. A new prompt copies the longest prefix that some row has, so
the turns of a chat, several samples of a prompt and prompts with the same system message are prefilled once.

Each sequence gets the tokens that `sample.generate` yields for it alone, whatever else is in the batch. With heed's C++
engine in fp32 the logits are equal bit for bit, in bf16 and int8 for fewer than 32 sequences. Otherwise, and after a
copied prefix, they are equal up to rounding.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.chat_format import common_prefix
from data.tokenizer import Tokenizer
from inference.engine import CudaGraphEngine, make_engine
from inference.sampling import SamplingParams
from inference.stop_strings import GeneratedText
from model import GPT, KVCache


@dataclass(eq=False)
class Sequence:
    """A prompt, at least one token, and its continuation.

    tokens: the prompt, to which each step appends. seed: of its random numbers. num_logprobs: how many of the most
    likely tokens to record at each step; None records nothing. logprobs: what was recorded, for each generated token.
    num_reused: tokens of the prompt that were not prefilled, since the cache had them.
    """

    tokens: list[int]
    sampling: SamplingParams = SamplingParams()
    seed: int = 0
    num_logprobs: int | None = None
    logprobs: list["Logprobs"] = field(default_factory=list)
    num_reused: int = 0

    def __post_init__(self) -> None:
        self.prompt_size = len(self.tokens)
        self.start = 0  # the model attends to the tokens from here on
        self.row = -1  # of the cache
        self.random: torch.Generator | None = None

    @property
    def num_generated(self) -> int:
        """How many tokens follow the prompt."""
        return len(self.tokens) - self.prompt_size


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of a step, before temperature and the like: of the token, and of the most likely ones."""

    logprob: float
    top: list[tuple[int, float]]


class ContinuousBatch:
    """Generates up to `max_sequences` sequences together; others wait, first come, first served."""

    def __init__(self, model: GPT, max_sequences: int) -> None:
        self.context, self.device = model.config.context, model.model.cos.device
        self.engine = make_engine(model)
        graph = isinstance(self.engine, CudaGraphEngine)  # it steps one view of the cache, padded with a spare row
        self.cache = KVCache(model.config, max_sequences + graph, device=self.device, dtype=self.engine.cache_dtype)
        self.padded = self._view([max_sequences] * max_sequences, [0] * max_sequences) if graph else None
        self.seen = torch.zeros(max_sequences, model.config.vocab_size, dtype=torch.bool, device=self.device)
        self.cached: list[list[int]] = [[] for _ in range(max_sequences)]  # tokens whose keys and values a row holds
        self.free = deque(range(max_sequences))  # rows without a sequence, the least recently used first
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence join as soon as a row is free."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Let a sequence leave, at any time between two steps. Does nothing if it has left."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self.running.remove(sequence)
            self.free.append(sequence.row)

    def reset(self) -> None:
        """Let every sequence leave and clear the cache. For a step that has raised: what its rows hold is unknown."""
        for sequence in [*self.waiting, *self.running]:
            self.remove(sequence)
        self.cached = [[] for _ in self.cached]
        self.cache.reset()

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Generate a token for every sequence whose prompt is in the cache. Returns these sequences."""
        for sequence in self.running:
            if len(sequence.tokens) - sequence.start > self.context:  # as in sample.generate
                sequence.start = len(sequence.tokens) - max(1, self.context // 2)
                self._begin_row(sequence.row, sequence.row, [])
        ready = [sequence for sequence in self.running if len(self._pending(sequence)) == 1]
        logits = [self._append(ready, 1)] if ready else []
        prefilled = 0
        while prefilled < KVCache.CHUNK:
            reader = next((sequence for sequence in self.running if self._pending(sequence)), None) or self._admit()
            if reader is None:
                break
            size = min(len(self._pending(reader)), KVCache.CHUNK)
            last = self._append([reader], size)
            prefilled += size
            if not self._pending(reader):
                ready.append(reader)
                logits.append(last)
        if ready:
            self._sample(ready, torch.cat(logits))
        return ready

    def _pending(self, sequence: Sequence) -> list[int]:
        """Tokens of a running sequence that are not in the cache."""
        return sequence.tokens[sequence.start + len(self.cached[sequence.row]) :]

    def _append(self, sequences: list[Sequence], size: int) -> Tensor:
        """Append the next `size` tokens of each sequence to its row. Returns the logits after the last one, (B, V)."""
        tokens = [self._pending(sequence)[:size] for sequence in sequences]
        rows = [sequence.row for sequence in sequences]
        lengths = [len(self.cached[row]) for row in rows]
        for row, new in zip(rows, tokens, strict=True):
            self.cached[row] += new
        if size > 1 or self.padded is None:
            return self.engine(torch.tensor(tokens, device=self.device), self._view(rows, lengths))
        spare = len(self.cached) - len(rows)
        view = self._view(rows + [len(self.cached)] * spare, lengths + [0] * spare)
        self.padded.rows.copy_(view.rows)
        self.padded.lengths.copy_(view.lengths)
        logits = self.engine(torch.tensor(tokens + [[0]] * spare, device=self.device), self.padded)
        return logits[: len(rows)].clone()  # the next call overwrites them

    def _view(self, rows: list[int], lengths: list[int]) -> KVCache:
        """Some rows of the cache, which hold so many tokens."""
        return self.cache.select(torch.tensor(rows, device=self.device), torch.tensor(lengths, device=self.device))

    def _admit(self) -> Sequence | None:
        """The next waiting sequence, if there is one and a row is free. Its row begins with the longest prefix of its
        tokens that any row has; the last token is computed anew, for its logits."""
        if not self.waiting or not self.free:
            return None
        sequence, row = self.waiting.popleft(), self.free.popleft()
        sequence.start, sequence.row = max(0, len(sequence.tokens) - self.context), row
        sequence.random = torch.Generator(self.device).manual_seed(sequence.seed)
        tokens = sequence.tokens[sequence.start :]
        shared = [min(common_prefix(tokens, cached), len(tokens) - 1) for cached in self.cached]
        shared = [n if self.cache.keeps(n, len(cached)) else 0 for n, cached in zip(shared, self.cached, strict=True)]
        source = max(range(len(shared)), key=shared.__getitem__)
        length = shared[source]
        self._begin_row(row, source, tokens[:length])
        sequence.num_reused = length
        self.seen[row] = False
        self.seen[row, sequence.tokens] = True
        self.running.append(sequence)
        return sequence

    def _begin_row(self, row: int, source: int, tokens: list[int]) -> None:
        """Let a row begin with the first tokens of another one, or with none."""
        if source != row or not tokens:
            self.cache.copy_row(source, row, len(tokens))
        self.cached[row] = tokens

    def _sample(self, sequences: list[Sequence], logits: Tensor) -> None:
        """Append a token to each sequence, sampled from its row of the logits (B, V)."""
        groups: dict[SamplingParams, list[int]] = {}  # sequences that sample in the same way do it at once
        for number, sequence in enumerate(sequences):
            groups.setdefault(sequence.sampling, []).append(number)
        rows = torch.tensor([sequence.row for sequence in sequences], device=self.device)
        chosen = torch.empty(len(sequences), 1, dtype=torch.long, device=self.device)
        for sampling, numbers in groups.items():
            uniform = [
                torch.rand(1, 1, generator=sequences[n].random, dtype=torch.float32, device=self.device)
                for n in numbers
            ]
            chosen[numbers] = sampling.sample(logits[numbers], self.seen[rows[numbers]], torch.cat(uniform))
        self.seen[rows, chosen[:, 0]] = True
        self._record(sequences, logits, chosen)
        for sequence, token in zip(sequences, chosen[:, 0].tolist(), strict=True):
            sequence.tokens.append(token)

    def _record(self, sequences: list[Sequence], logits: Tensor, chosen: Tensor) -> None:
        """Record the log-probabilities that were asked for. logits (B, V), chosen (B, 1)."""
        asked = [number for number, sequence in enumerate(sequences) if sequence.num_logprobs is not None]
        if not asked:
            return
        logprobs = logits[asked].log_softmax(1)  # (N, V)
        most = max(sequences[number].num_logprobs or 0 for number in asked)
        top = logprobs.topk(min(most, logits.shape[1]), dim=1)
        own = logprobs.gather(1, chosen[asked])[:, 0].tolist()
        for number, logprob, values, ids in zip(asked, own, top.values.tolist(), top.indices.tolist(), strict=True):
            size = sequences[number].num_logprobs
            sequences[number].logprobs.append(Logprobs(logprob, list(zip(ids, values, strict=True))[:size]))


def stream_batch(
    batch: ContinuousBatch, tokenizer: Tokenizer, prompts: Iterable[str | list[int]], *, max_new_tokens: int = 200,
    sampling: SamplingParams = SamplingParams(), seed: int = 0, stop: Iterable[str] = (), whole_lines: bool = False,
) -> Iterator[tuple[int, str]]:  # fmt: skip
    """As `sample.stream_generate`, for a sample of each prompt; sample n has the seed `seed + n`. A prompt that begins
    like an earlier one of the same batch, as in a chat, does not have its beginning prefilled again."""
    samples = {}
    for number, prompt in enumerate(prompts):
        ids = tokenizer.encode_prompt(prompt)
        sequence = Sequence(ids, sampling, seed + number)
        samples[sequence] = (number, GeneratedText(tokenizer, list(stop), ids, whole_lines))
    for sequence in samples:
        batch.add(sequence)
    try:
        while not batch.idle:
            for sequence in batch.step():
                number, text = samples[sequence]
                yield number, text.add_token(sequence.tokens[-1], last=sequence.num_generated == max_new_tokens)
                if text.finished:
                    batch.remove(sequence)
    finally:
        for sequence in samples:
            batch.remove(sequence)
