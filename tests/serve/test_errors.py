"""Errors in OpenAI's format: what is refused and why, limits, and a failure in the middle of a generation."""

import concurrent.futures
import json
import socket

import httpx2
import openai
import pytest
import torch

from inference.engine import EagerEngine
from serve.limits import Limits
from tests.serve.conftest import eventually, running

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def post(served, body, path="completions", content_type="application/json") -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps({"model": "songs"} | body).encode()
    url = f"{served.address}/v1/{path}"
    return httpx2.post(url, content=content, headers={"Content-Type": content_type}, timeout=60)


def error(response: httpx2.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    content = response.json()["error"]
    assert content.keys() == {"message", "type", "param", "code"} and "\n" not in content["message"]
    return content


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"prompt": 5}, "prompt = 5: must be a valid string or a valid list", "prompt"),
        ({"prompt": ["a", 1]}, "prompt = ['a', 1]: must be", "prompt"),
        ({"prompt": []}, "0 prompts, n = 1: must be 1 to 64 sequences in all", None),
        ({"prompt": ["a"] * 33, "n": 2}, "33 prompts, n = 2: must be 1 to 64 sequences in all", None),
        ({"prompt": [1, 300]}, "prompt: token ids must be from 0 to 299", None),
        ({"prompt": [-1]}, "prompt: token ids must be from 0 to 299", None),
        ({"prompt": "\ud800"}, "character 0 is '\\ud800', half of a surrogate pair", None),
        ({"max_tokens": 0}, "max_tokens = 0: must be greater than or equal to 1", "max_tokens"),
        ({"max_tokens": 1025}, "max_tokens = 1025: must be at most 1024", None),
        ({"max_tokens": "9"}, "max_tokens = '9': must be a valid integer", "max_tokens"),
        ({"max_tokens": True}, "max_tokens = True: must be a valid integer", "max_tokens"),
        ({"n": 129}, "n = 129: must be less than or equal to 128", "n"),
        ({"temperature": 2.1}, "temperature = 2.1: must be less than or equal to 2", "temperature"),
        ({"temperature": float("nan")}, "temperature = nan: must be a finite number", "temperature"),
        ({"temperature": 1e-9}, "temperature = 1e-09: must be at least 1e-6", None),
        ({"top_p": 0}, "top_p = 0.0: must be above 0 and at most 1", None),
        ({"min_p": 2}, "min_p = 2.0: must be from 0 to 1", None),
        ({"seed": 2**63}, f"seed = {2**63}: must be less than {2**63}", "seed"),
        ({"logprobs": 21}, "logprobs = 21: must be less than or equal to 20", "logprobs"),
        ({"stop": ["a"] * 5}, "must be at most 4 texts of 1 to 256 characters", None),
        ({"stop": ""}, "stop = '': must be at most 4 texts of 1 to 256 characters", None),
        ({"stop": "a" * 257}, "must be at most 4 texts of 1 to 256 characters", None),
        ({"stop": [3]}, "stop = [3]: must be a valid string", "stop"),
        ({"stream_options": {"more": 1}}, "stream_options.more: is not supported", "stream_options"),
        ({"echo": True}, "echo: is not supported", "echo"),
        ({"presence_penalty": 0.5}, "presence_penalty: is not supported", "presence_penalty"),
        ({"model": 1}, "model = 1: must be a valid string", "model"),
        (b'{"prompt": "a"}', "model: is missing", "model"),
        (b"", "the body must be a JSON object, sent with Content-Type: application/json", None),
        (b"[]", "the body must be a JSON object", None),
        (b"{", "the body is not JSON: Expecting property name", None),
        (b"\xff", "There was an error parsing the body", None),
        (b"[" * 100_000, "There was an error parsing the body", None),
        (b'{"model": "songs", "seed": ' + b"1" * 5000 + b"}", "There was an error parsing the body", None),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_request_has_status_400(served, body, message, param):
    found = error(post(served, body), 400)
    assert message in found["message"]
    assert (found["type"], found["param"], found["code"]) == ("invalid_request_error", param, None)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "messages: is missing"),
        ({"messages": "hi"}, "messages = 'hi': must be a valid list"),
        ({"messages": []}, 'has no "messages"'),
        ({"messages": [{"role": "user"}]}, "messages.0.content: is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content = [{'type': 'image"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "content = [{'type': 'text'}]: must be a valid",
        ),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role = 'tool': must be one of system"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "messages[1].role = 'user': must be assistant here"),
        ({"messages": [{"role": "system", "content": "a"}]}, "ends with system: the user's message is missing"),
        (CHAT | {"tools": [{"type": "function"}]}, "tools: is not supported"),
        (CHAT | {"response_format": {"type": "json_object"}}, "response_format: is not supported"),
        (CHAT | {"top_logprobs": 21, "logprobs": True}, "top_logprobs = 21: must be"),
        (CHAT | {"logprobs": 1}, "logprobs = 1: must be a valid boolean"),
        (CHAT | {"max_completion_tokens": 9999}, "max_tokens = 9999: must be at most 1024"),
    ],
    ids=str,
)
def test_a_bad_chat_has_status_400(served, body, message):
    assert message in error(post(served, body, "chat/completions"), 400)["message"]


def test_what_a_form_of_a_web_page_could_send_is_refused(served):
    """A page may send text to any address without asking, but JSON only if the server permits its origin."""
    assert "Content-Type" in error(post(served, {"prompt": "a"}, content_type="text/plain"), 400)["message"]


def test_a_prompt_beyond_the_context_is_refused(served):
    with pytest.raises(
        openai.BadRequestError, match="the prompt has 40 tokens, but the model's context is 32"
    ) as found:
        served.client.completions.create(model="songs", prompt=[5] * 40)
    assert (found.value.code, found.value.param) == ("context_length_exceeded", "prompt")
    assert served.client.completions.create(model="songs", prompt=[5] * 32, max_tokens=3).usage.prompt_tokens == 32


def test_models_and_paths_that_do_not_exist(served):
    assert [model.id for model in served.client.models.list()] == ["songs"]
    assert served.client.models.retrieve("songs").owned_by == "heed"
    for ask in (
        lambda: served.client.models.retrieve("org/other"),
        lambda: served.client.completions.create(model="other", prompt="a"),
    ):
        with pytest.raises(openai.NotFoundError, match="must be 'songs'") as found:
            ask()
        assert (found.value.code, found.value.param) == ("model_not_found", "model")
    assert "GET /v1/other: Not Found" in error(httpx2.get(f"{served.address}/v1/other"), 404)["message"]
    assert "Method Not Allowed" in error(httpx2.get(f"{served.address}/v1/completions"), 405)["message"]


# Limits -------------------------------------------------------------------------------------------------------------


def test_a_body_that_is_too_large_has_status_413(served):
    with pytest.raises(openai.APIStatusError, match="the body has more than 1048576 bytes") as found:
        served.client.completions.create(model="songs", prompt="a" * (1 << 20))
    assert found.value.status_code == 413
    chunks = (b" " * 4096 for _ in range(300))  # without Content-Length
    url = f"{served.address}/v1/completions"
    assert error(httpx2.post(url, content=chunks, headers={"Content-Type": "application/json"}), 413)


def test_a_full_queue_has_status_429(songs):
    with running(*songs, max_sequences=1, max_queue=2) as served, concurrent.futures.ThreadPoolExecutor(3) as pool:
        served.hold()
        create = served.client.completions.create
        waiting = []
        for n in range(1, 4):
            waiting.append(pool.submit(create, model="songs", prompt=f"Song {n}:", max_tokens=4, temperature=0))
            eventually(lambda n=n: served.scheduler.unfinished() == n)
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError, match="the queue of 2 sequences is full") as found:
                create(model="songs", prompt="Song", stream=stream)
            assert (found.value.type, found.value.code) == ("rate_limit_error", "queue_full")
            assert found.value.response.headers["retry-after"] == "1"
        served.go()
        for n, future in enumerate(waiting, 1):
            assert future.result().choices[0].text == served.text(f"Song {n}:", 4)
        assert create(model="songs", prompt="Song", max_tokens=1).choices
        eventually(served.idle)


def test_a_request_that_takes_too_long_has_status_408_or_an_error_in_its_stream(songs):
    """While no step happens, and while a body does not come."""
    with running(*songs, max_sequences=1, timeout=0.2) as served:
        served.hold()
        with pytest.raises(openai.APIStatusError, match=r"took longer than 0\.2 seconds") as found:
            served.client.completions.create(model="songs", prompt="Song")
        assert (found.value.status_code, found.value.code) == (408, "timeout")
        with pytest.raises(openai.APIError, match=r"took longer than 0\.2 seconds"):
            list(served.client.completions.create(model="songs", prompt="Song", stream=True))
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            "Content-Length: 9\r\n\r\n{"
        )
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(head.encode())
            assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
        served.go()
        eventually(served.idle)


@pytest.mark.parametrize(("name", "value"), [("max_sequences", 0), ("max_queue", -1), ("timeout", float("nan"))])
def test_limits_that_make_no_sense(name, value):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} {value}: must be at least"):
        Limits(**{name: value})


# Failures -----------------------------------------------------------------------------------------------------------


def test_a_step_that_fails_ends_all_requests_and_the_next_one_is_right(songs, monkeypatch, caplog):
    """Even if it has damaged the keys and values of all rows, of which PyTorch reads more than it uses."""
    monkeypatch.setattr("inference.continuous_batching.make_engine", EagerEngine)
    with running(*songs, max_sequences=2, fails=True) as served:
        served.hold()

        def damage(tokens, cache):
            for states in cache.layers:
                for state in states:
                    state.fill_(float("nan"))
            return torch.full((len(tokens), 300), float("nan"))

        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            create = served.client.completions.create
            whole = [pool.submit(create, model="songs", prompt="Song 5:") for _ in range(2)]
            stream = pool.submit(lambda: list(create(model="songs", prompt="Song 5:", stream=True)))
            eventually(lambda: served.scheduler.unfinished() == 3)
            with monkeypatch.context() as patch:
                patch.setattr(served.scheduler.batch, "engine", damage)
                served.go()
                for future in whole:
                    with pytest.raises(openai.InternalServerError, match="the logits are not finite"):
                        future.result()
                with pytest.raises(openai.APIError, match="the logits are not finite"):
                    stream.result()
        assert "a step failed" in caplog.text
        eventually(served.idle)
        assert create(model="songs", prompt="Song 5:", temperature=0).choices[0].text == served.text("Song 5:", 16)


def test_a_scheduler_that_has_ended_is_not_healthy(songs):
    with running(*songs, max_sequences=1) as served:
        assert httpx2.get(f"{served.address}/health").json() == {"status": "ok"}
        served.scheduler.inbox.put(None)
        eventually(lambda: not served.scheduler.thread.is_alive())
        assert httpx2.get(f"{served.address}/health").status_code == 503


def test_a_mistake_of_the_server_has_status_500_and_a_traceback_in_its_log(songs, monkeypatch, capsys):
    with running(*songs, max_sequences=1) as served:
        monkeypatch.setattr(served.scheduler.metrics, "render", lambda: 1 / 0)
        assert error(httpx2.get(f"{served.address}/metrics"), 500)["type"] == "server_error"
    assert "ZeroDivisionError" in capsys.readouterr().err
