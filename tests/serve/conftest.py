"""A server in a thread of the tests, whose steps can be held back, and the openai client."""

import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest

from benchmarks.serving import write_run
from sample import SamplingParams, load, stream_generate
from serve.app import create_app
from serve.limits import Limits
from serve.server import Server, allowed_hosts, bind
from tests.conftest import TINY

GREEDY = SamplingParams(greedy=True)


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds. The time is long enough for any machine."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("the condition never held")


class Running:
    """A server in a thread, for one model."""

    def __init__(self, model, tokenizer, name="songs", origins=(), hosts=(), port=0, **limits) -> None:
        self.model, self.tokenizer, self.limits = model, tokenizer, Limits(**limits)
        bound = bind("127.0.0.1", port)
        app = create_app(name, model, tokenizer, self.limits, list(origins), allowed_hosts(bound, list(hosts)))
        self.scheduler, self.server = app.state.scheduler, Server(app, self.limits)
        self.port = bound.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=60)
        self.permits, self.held, step = threading.Semaphore(0), threading.Event(), self.scheduler.batch.step

        def held_step():
            if self.held.is_set():
                self.permits.acquire()
            return step()

        self.scheduler.batch.step = held_step
        self.failures, fail = 0, self.scheduler._fail

        def counted_fail(error):
            self.failures += 1
            return fail(error)

        self.scheduler._fail = counted_fail
        self.thread = threading.Thread(target=self.server.run, args=([bound],))
        self.thread.start()
        eventually(lambda: self.server.started)

    def hold(self) -> None:
        """Let no step begin until `go`."""
        self.held.set()

    def go(self, steps: int = 0) -> None:
        """Let some steps happen; 0: all from now on."""
        if not steps:
            self.held.clear()
        self.permits.release(steps or 1000)

    def idle(self) -> bool:
        """Whether no sequence is left anywhere, and every row of the cache is free."""
        scheduler = self.scheduler
        left = scheduler.generations or scheduler.owners or not scheduler.inbox.empty() or not scheduler.batch.idle
        return not left and sorted(scheduler.batch.free) == list(range(self.limits.max_sequences))

    def send(self, **body) -> socket.socket:
        """Send a request; its response is not read."""
        content = json.dumps({"model": "songs", "prompt": "Song 5:"} | body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        return connection

    def samples(self) -> dict[str, float]:
        """The samples of GET /metrics."""
        lines = httpx2.get(f"{self.address}/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def parts(self, prompt, tokens: int, sampling: SamplingParams = GREEDY, **options) -> Iterator[str]:
        """What sample.py generates, a text for each token."""
        parts = stream_generate(self.model, self.tokenizer, prompt, max_new_tokens=tokens, sampling=sampling, **options)
        return (text for _, text in parts)

    def text(self, *args, **options) -> str:
        """All parts."""
        return "".join(self.parts(*args, **options))

    def close(self) -> None:
        self.go()
        self.client.close()
        self.server.should_exit = True
        self.thread.join()


@contextlib.contextmanager
def running(*args, fails: bool = False, **kwargs) -> Iterator[Running]:
    """A server that ends with the block. A step may fail only if it `fails`."""
    server = Running(*args, **kwargs)
    try:
        yield server
    finally:
        server.close()
    assert bool(server.failures) == fails


@pytest.fixture(scope="session")
def songs(runs):
    """The model and the tokenizer of the small run."""
    return load(runs / "songs")


@pytest.fixture(scope="session")
def endless(tmp_path_factory):
    """A run with random weights whose likeliest token never ends a text, called `songs`, too."""
    run = tmp_path_factory.mktemp("endless") / "songs"
    write_run(run, dataclasses.replace(TINY, vocab_size=257, context=64))
    return run


@pytest.fixture(scope="module")
def served(songs) -> Iterator[Running]:
    """A server of the small run, with four rows."""
    with running(*songs, max_sequences=4, max_queue=60) as server:
        yield server
        eventually(server.idle)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    from tests.serve.browser import CHROMIUM, FLAGS

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """visit(served, ...) is a new page with the playground. It may load nothing from elsewhere, and raise nothing."""
    from playwright.sync_api import expect

    opened, wrong = [], []

    def go(served: Running, **options) -> Any:
        page = chromium.new_context(**options).new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: "Security" in message.text and wrong.append(message.text))
        page.on("request", lambda request: request.url.startswith(served.address) or wrong.append(request.url))
        opened.append(page)
        page.goto(served.address)
        expect(page.locator("#facts")).not_to_be_empty()
        return page

    yield go
    for page in opened:
        page.context.close()
    assert not wrong
