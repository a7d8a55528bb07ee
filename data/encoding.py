"""Tokenization of pieces, in several processes if the text is large.

The result does not depend on the number of processes: each piece is encoded by itself, and batches are returned in
order. A process is `python -m data.encoding`. It reads pickled batches from stdin, writes pickled results to stdout,
and exits when its stdin is closed, which a kill of the parent does, too. The processes of `multiprocessing` would
import the parent's main module, with train.py all of torch, and would survive a parent that is killed.
"""

import contextlib
import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from data import chat_format
from data.chunking import Piece
from data.tokenizer import Tokenizer, TokenizerError

SMALL = 32  # batches: a text with fewer is encoded in this process, by the threads of the library

Batch = list[tuple[str | None, Piece]]  # each piece with its split
# For each piece: the ids, the UTF-8 bytes of the targets' text, and for conversations the loss mask.
Encoded = list[tuple[np.ndarray, int, np.ndarray | None]]


def token_dtype(tokenizer: Tokenizer) -> str:
    """The dtype of ids on disk."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def encode(tokenizer: Tokenizer, pieces: list[Piece]) -> Encoded:
    """The ids, bytes and loss mask of each piece."""
    dtype = token_dtype(tokenizer)
    if pieces[0].turns:
        answers = [sum(len(text.encode()) for role, text in piece.turns if role == "assistant") for piece in pieces]
        encoded = chat_format.encode(tokenizer, [list(piece.turns) for piece in pieces])
        return [
            (np.array(ids, dtype), size, np.array(loss_mask, np.uint8))
            for (ids, loss_mask), size in zip(encoded, answers, strict=True)
        ]
    texts = iter(tokenizer.encode_batch([piece.text for piece in pieces if not piece.ids]))
    ids = [np.frombuffer(piece.ids, "<u2") if piece.ids else np.array(next(texts), dtype) for piece in pieces]
    return [(part, len(piece.text.encode()), None) for part, piece in zip(ids, pieces, strict=True)]


def encode_ahead(
    tokenizer: Tokenizer, batches: Iterator[Batch], processes: int | None = None
) -> Iterator[tuple[Batch, Encoded]]:
    """Each batch with its encoding, in order. `processes` encode the next batches meanwhile; default: one per core.

    Raises TokenizerError if a text cannot be encoded, or a process was killed.
    """
    head = list(islice(batches, SMALL))
    if len(head) < SMALL:
        yield from ((batch, encode(tokenizer, [piece for _, piece in batch])) for batch in head)
        return
    count = processes or cores()
    workers = [Worker(tokenizer) for _ in range(count)]
    idle = queue.SimpleQueue[Worker]()
    for worker in workers:
        idle.put(worker)

    def task(batch: Batch) -> Encoded:
        worker = idle.get()
        try:
            return worker.encode([piece for _, piece in batch])
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(count)  # a thread waits for a worker
    waiting = deque[tuple[Batch, Future[Encoded]]]()
    try:
        for batch in chain(head, batches):
            waiting.append((batch, threads.submit(task, batch)))
            if len(waiting) > 2 * count:
                batch, future = waiting.popleft()
                yield batch, future.result()
        while waiting:
            batch, future = waiting.popleft()
            yield batch, future.result()
    finally:
        for worker in workers:
            worker.process.kill()
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Worker:
    """A process that encodes batches."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        single = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "data.encoding"],
            cwd=Path(__file__).resolve().parent.parent, env=os.environ | single, start_new_session=True,  # no Ctrl-C
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.start: Any = (tokenizer.inner.to_str(), tokenizer.end)

    def encode(self, pieces: list[Piece]) -> Encoded:
        """Like `encode`. Raises TokenizerError, also if the process has ended."""
        into, out = self.process.stdin, self.process.stdout
        assert into and out
        try:
            if self.start:
                pickle.dump(self.start, into)
                self.start = None
            pickle.dump(pieces, into)
            into.flush()
            result = pickle.load(out)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise TokenizerError(
                f"tokenization: one of the processes has ended with status {self.process.wait()}; the same command "
                "continues; if memory runs out, python -m data prepare --processes sets how many there are"
            ) from None
        if isinstance(result, TokenizerError):
            raise result
        return result

    def close(self) -> None:
        """Wait for the process that was killed, and close its pipes."""
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            with contextlib.suppress(BrokenPipeError):  # a batch that it did not read
                pipe.close()


def main() -> None:
    """Encode the batches on stdin until it is closed."""
    into, out = sys.stdin.buffer, sys.stdout.buffer
    try:
        content, end = pickle.load(into)
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(content), end=end)
        while True:
            pieces = pickle.load(into)
            result: Any
            try:
                result = encode(tokenizer, pieces)
            except TokenizerError as error:
                result = error
            pickle.dump(result, out)
            out.flush()
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):  # the parent has ended
        os._exit(0)


if __name__ == "__main__":
    main()
