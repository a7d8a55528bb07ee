"""The scheduler: a thread that steps a ContinuousBatch and hands its tokens to the requests that wait for them.

    event loop                          thread
    submit, cancel  ---- inbox ---->    between two steps: sequences join and leave
                                        a step: a token for every running sequence
    generation.parts  <-- parts ----    the text of each token

The batch belongs to the thread; the list of generations and the metrics belong to the event loop. They exchange
functions to call and parts of texts, so nothing is locked and no step waits for a client.
"""

import asyncio
import concurrent.futures
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from inference.continuous_batching import ContinuousBatch, Logprobs, Sequence
from inference.stop_strings import GeneratedText
from model import GPT
from serve.metrics import Metrics

MAX_BETWEEN = 8  # functions that may wait for their turn between two steps
T = TypeVar("T")
FinishReason = Literal["stop", "length"]


class QueueFull(Exception):
    """Too many sequences wait already."""


class GenerationFailed(Exception):
    """The generation has ended before its texts; the message says why."""


@dataclass(frozen=True)
class Part:
    """What a step adds to a sequence: a token, and the text that is final after it, often "".

    choice: the sequence's index in its generation. number: of the token, from 1. finish_reason: None if it goes on.
    """

    choice: int
    number: int
    token: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


class Generation:
    """The sequences that one request waits for: `async for part in generation`.

    sequences, texts: one text for each sequence. max_tokens: after which a text is cut off.
    """

    def __init__(self, sequences: list[Sequence], texts: list[GeneratedText], max_tokens: int) -> None:
        self.sequences, self.texts, self.max_tokens = sequences, texts, max_tokens
        self.parts: asyncio.Queue[Part | GenerationFailed] = asyncio.Queue()
        self.unfinished = len(sequences)
        self.times: list[float] = []  # when each sequence got its last token, or was submitted; in seconds

    async def __aiter__(self) -> AsyncIterator[Part]:
        """The parts of all sequences as they come. Raises GenerationFailed."""
        unfinished = len(self.sequences)
        while unfinished:
            part = await self.parts.get()
            if isinstance(part, GenerationFailed):
                raise part
            unfinished -= part.finish_reason is not None
            yield part


Result = tuple[Generation, Part | GenerationFailed]


class Scheduler:
    """Generates up to `max_sequences` sequences together, while up to `max_queue` wait."""

    def __init__(self, model: GPT, max_sequences: int, max_queue: int) -> None:
        self.batch = ContinuousBatch(model, max_sequences)
        self.capacity = max_sequences + max_queue
        self.inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self.delivered = threading.Semaphore()  # the thread is at most one step ahead of what was handed out
        self.between: deque[Callable[[], None]] = deque()  # of the thread: to call between two steps, one at a time
        self.owners: dict[Sequence, tuple[Generation, int]] = {}  # of the thread: whose sequence it is, and its index
        self.generations: set[Generation] = set()  # of the event loop
        self.num_between = 0  # of the event loop: how many wait for `between_steps`
        self.metrics = Metrics(self.running, lambda: max(0, self.unfinished() - self.running()))

    # In the event loop ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread. Tokens come to the running event loop."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    async def close(self) -> None:
        """End the thread after its step."""
        self.inbox.put(None)
        await asyncio.to_thread(self.thread.join)

    def running(self) -> int:
        """How many sequences have a row of the cache."""
        return len(self.batch.running)

    def unfinished(self) -> int:
        """How many sequences run or wait."""
        return sum(generation.unfinished for generation in self.generations)

    def submit(self, generation: Generation) -> None:
        """Let the sequences of a generation join, as soon as rows are free. Raises QueueFull."""
        if self.unfinished() + generation.unfinished > self.capacity:
            raise QueueFull
        generation.times = [time.perf_counter()] * len(generation.sequences)
        self.generations.add(generation)
        self.inbox.put(partial(self._join, generation))

    def cancel(self, generation: Generation, failed: GenerationFailed | None = None) -> None:
        """End a generation: its client has left, or it has failed, which its client is told. If it has ended, do
        nothing."""
        if generation in self.generations:
            self.generations.remove(generation)
            self.metrics.sequences.add(generation.unfinished, outcome="error" if failed else "cancelled")
            if failed:
                generation.parts.put_nowait(failed)
            self.inbox.put(partial(self._leave, generation))

    def cancel_all(self, failed: GenerationFailed) -> None:
        """End all generations."""
        for generation in list(self.generations):
            self.cancel(generation, failed)

    async def between_steps(self, work: Callable[[], T]) -> T:
        """The result of a function that the thread calls between two steps; of several, one.

        Raises what it raises, and QueueFull if MAX_BETWEEN wait already.
        """
        if self.num_between >= MAX_BETWEEN:
            raise QueueFull
        done: concurrent.futures.Future[T] = concurrent.futures.Future()

        def call() -> None:
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(work())
                except Exception as error:
                    done.set_exception(error)

        self.inbox.put(partial(self.between.append, call))
        self.num_between += 1
        try:
            return await asyncio.wrap_future(done)
        finally:
            self.num_between -= 1

    def _deliver(self, results: list[Result]) -> None:
        """Hand out what a step has made."""
        self.delivered.release()
        now = time.perf_counter()
        for generation, part in results:
            if isinstance(part, GenerationFailed):
                self.cancel(generation, part)
            elif generation in self.generations:  # else cancelled during the step
                self._count(generation, part, now)
                generation.parts.put_nowait(part)
                generation.unfinished -= part.finish_reason is not None
                if not generation.unfinished:
                    self.generations.remove(generation)

    def _count(self, generation: Generation, part: Part, now: float) -> None:
        """Update the metrics; `now` in seconds."""
        histogram = self.metrics.first_token if part.number == 1 else self.metrics.next_token
        histogram.observe(now - generation.times[part.choice])
        generation.times[part.choice] = now
        self.metrics.generated_tokens.add()
        if part.number == 1:
            sequence = generation.sequences[part.choice]
            self.metrics.prompt_tokens.add(sequence.prompt_size)
            self.metrics.cached_tokens.add(sequence.num_reused)
        if part.finish_reason:
            self.metrics.sequences.add(outcome=part.finish_reason)

    # In the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            while (self.batch.idle and not self.between) or not self.inbox.empty():
                call = self.inbox.get()
                if call is None:
                    return
                call()
            if self.between:
                self.between.popleft()()
                if self.batch.idle:
                    continue
            try:
                results = [self._part(sequence) for sequence in self.batch.step()]
            except Exception as error:  # out of memory, or logits that are not finite; which sequence it is, is unknown
                logging.getLogger(__name__).exception("a step failed")
                results = self._fail(GenerationFailed(f"generation failed: {error}"))
            self.delivered.acquire()
            self.loop.call_soon_threadsafe(self._deliver, results)

    def _join(self, generation: Generation) -> None:
        for choice, sequence in enumerate(generation.sequences):
            self.owners[sequence] = (generation, choice)
            self.batch.add(sequence)

    def _leave(self, generation: Generation) -> None:
        for sequence in generation.sequences:
            self.owners.pop(sequence, None)
            self.batch.remove(sequence)

    def _part(self, sequence: Sequence) -> Result:
        """The text of a sequence's new token. A sequence whose text has ended leaves."""
        generation, choice = self.owners[sequence]
        text, number, token = generation.texts[choice], sequence.num_generated, sequence.tokens[-1]
        added = text.add_token(token, last=number == generation.max_tokens)
        logprobs = sequence.logprobs[-1] if sequence.logprobs else None
        if not text.finished:
            return generation, Part(choice, number, token, added, logprobs, None)
        del self.owners[sequence]
        self.batch.remove(sequence)
        return generation, Part(choice, number, token, added, logprobs, "stop" if text.ended else "length")

    def _fail(self, error: GenerationFailed) -> list[Result]:
        """Every generation has failed; those to come begin with an empty cache."""
        failed = {generation for generation, _ in self.owners.values()}
        self.owners.clear()
        self.batch.reset()
        return [(generation, error) for generation in failed]
