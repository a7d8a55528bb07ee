"""Random requests, whole, streamed, damaged, cut off and abandoned: no wrong text, nothing left behind."""

import asyncio
import collections
import gc
import json
import random
import socket
import struct

import pytest

from sample import SamplingParams
from tests.serve.conftest import GREEDY, Running, eventually, running

CLIENTS = 16
PROMPTS = ("", "Song 5:", "Song 12: the 5 birds sing", "bees", "to the 1 ants.\nSong")
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"


def cases(served: Running) -> list[tuple[dict, list[str]]]:
    """Bodies of requests, and the texts of their choices according to sample.py."""
    numbers, found = random.Random(0), []
    for seed in range(24):
        prompt, tokens, n = numbers.choice(PROMPTS), numbers.randrange(1, 40), numbers.choice((1, 1, 1, 2, 3))
        temperature, stop = numbers.choice((0, 0.9)), numbers.choice(([], [" the"], ["\n", "bees to"]))
        sampling = SamplingParams(temperature) if temperature else GREEDY
        texts = [served.text(prompt, tokens, sampling, seed=seed + i, stop=stop) for i in range(n)]
        body = {"model": "songs", "prompt": prompt, "max_tokens": tokens, "n": n, "seed": seed, "stop": stop}
        found.append((body | {"temperature": temperature}, texts))
    return found


class Client:
    """Sends requests that are chosen at random, one after another."""

    def __init__(self, served: Running, requests: list[tuple[dict, list[str]]], seed: int) -> None:
        self.served, self.requests, self.numbers = served, requests, random.Random(seed)
        self.outcomes: collections.Counter[str] = collections.Counter()

    async def run(self, count: int) -> None:
        actions = (self.whole, self.stream, self.stream, self.leave, self.leave, self.damaged, self.cut_off)
        for _ in range(count):
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.served.port)
            body, texts = self.numbers.choice(self.requests)
            await self.numbers.choice(actions)(body, texts)
            if self.numbers.random() < 0.3:  # a reset in place of an orderly end
                linger = struct.pack("ii", 1, 0)
                self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.writer.close()

    def send(self, content: bytes) -> None:
        self.writer.write(f"{HEAD}Content-Length: {len(content)}\r\n\r\n".encode() + content)

    async def answer(self) -> tuple[int, bytes]:
        """Status and body of the whole response."""
        head, _, content = (await self.reader.read(-1)).partition(b"\r\n\r\n")
        return int(head.split()[1]), content

    async def whole(self, body: dict, texts: list[str]) -> None:
        self.send(json.dumps(body).encode())
        status, content = await self.answer()
        self.outcomes[str(status)] += 1
        if status == 200:
            assert [choice["text"] for choice in json.loads(content)["choices"]] == texts
        else:
            assert status == 429 and "error" in json.loads(content)

    async def parts(self, body: dict, most: int = 1 << 30) -> tuple[dict[int, str], bool]:
        """The texts of a stream, or of its first events, and whether it was complete."""
        self.send(json.dumps(body | {"stream": True}).encode())
        texts: dict[int, str] = collections.defaultdict(str)
        async for line in self.reader:
            if line == b"data: [DONE]\n":
                return texts, True
            if line.startswith(b"data: "):
                (choice,) = json.loads(line[6:])["choices"]
                texts[choice["index"]] += choice["text"]
                most -= 1
                if most == 0:
                    break
        return texts, False

    async def stream(self, body: dict, texts: list[str]) -> None:
        got, complete = await self.parts(body)
        self.outcomes["streamed" if complete else "refused"] += 1
        assert not complete or [got[index] for index in range(len(texts))] == texts
        assert complete or not got

    async def leave(self, body: dict, texts: list[str]) -> None:
        """In the middle of a stream, or before the response."""
        if self.numbers.random() < 0.5:
            self.send(json.dumps(body).encode())
            await asyncio.sleep(self.numbers.choice((0, 0, 0.001, 0.01)))
        else:
            got, _ = await self.parts(body, self.numbers.randrange(1, 8))
            assert all(texts[index].startswith(text) for index, text in got.items())
        self.outcomes["left"] += 1

    async def damaged(self, body: dict, texts: list[str]) -> None:
        content = bytearray(json.dumps(body).encode())
        for _ in range(self.numbers.randrange(1, 6)):
            at = self.numbers.randrange(len(content))
            content[at : at + self.numbers.randrange(3)] = self.numbers.randbytes(self.numbers.randrange(3))
        self.send(bytes(content))
        status, answer = await self.answer()
        self.outcomes[f"damaged {status}"] += 1
        assert status in (200, 400, 404, 429)
        assert ("error" in json.loads(answer)) == (status != 200)

    async def cut_off(self, body: dict, texts: list[str]) -> None:
        """In the head or in the body of the request."""
        content = json.dumps(body).encode()
        request = f"{HEAD}Content-Length: {len(content)}\r\n\r\n".encode() + content
        self.writer.write(request[: self.numbers.randrange(len(request))])
        self.outcomes["cut off"] += 1


def objects() -> collections.Counter[str]:
    """How many objects of each type there are."""
    gc.collect()
    return collections.Counter(type(each).__qualname__ for each in gc.get_objects())


@pytest.mark.parametrize("count", [480, pytest.param(10_000, marks=pytest.mark.full)])
def test_random_requests_leave_nothing_behind(songs, count):
    with running(*songs, max_sequences=4, max_queue=20, max_tokens=64) as served:
        requests, outcomes = cases(served), collections.Counter()

        async def clients(seed: int, each: int) -> None:
            many = [Client(served, requests, seed + number) for number in range(CLIENTS)]
            await asyncio.gather(*(client.run(each) for client in many))
            for client in many:
                outcomes.update(client.outcomes)

        def left() -> collections.Counter[str]:
            """What is there when nothing is to be done."""
            eventually(served.idle)
            eventually(lambda: not served.server.server_state.connections and not served.server.server_state.tasks)
            return objects()

        asyncio.run(clients(0, 10))  # also fills caches
        before = left()
        tasks = len(asyncio.all_tasks(served.scheduler.loop))
        asyncio.run(clients(1000, count // CLIENTS - 10))
        grown = left() - before
        # One object left behind by each request would be as many; weak references come and go.
        assert sum(grown.values()) < count - 10 * CLIENTS, grown.most_common(10)
        assert len(asyncio.all_tasks(served.scheduler.loop)) <= tasks
        assert served.scheduler.thread.is_alive()
        assert all(outcomes[name] > 5 for name in ("200", "streamed", "left", "damaged 400", "cut off"))
        assert outcomes["429"] + outcomes["refused"] + outcomes["damaged 429"] > 0
        assert sum(outcomes.values()) == count
