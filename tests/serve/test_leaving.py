"""Clients that leave free their rows; a signal ends the server after what it has begun, a second one at once."""

import contextlib
import json
import signal
import socket
import subprocess
import sys

import httpx2
import openai
import pytest

from sample import load
from serve.__main__ import main
from tests.conftest import ROOT, USER_ENV, command
from tests.serve.conftest import eventually, running

# Clients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(songs, stream):
    """Two clients have the two rows and leave after some tokens; two leave while they wait."""
    with running(*songs, max_sequences=2, max_queue=4) as served:
        served.hold()
        connections = []
        for number in range(1, 5):
            connections.append(served.send(max_tokens=1000, stream=stream))
            eventually(lambda number=number: served.scheduler.unfinished() == number)
        served.go(3)
        eventually(lambda: served.samples()["heed_generated_tokens_total"] >= 4)
        assert served.samples()["heed_sequences_running"] == served.samples()["heed_sequences_waiting"] == 2
        if stream:
            assert b"data: {" in connections[0].recv(9999)
        for connection in connections:
            connection.close()
        eventually(lambda: served.scheduler.unfinished() == 0)
        served.go()
        eventually(served.idle)
        assert served.samples()['heed_sequences_total{outcome="cancelled"}'] == 4
        assert served.samples()["heed_generated_tokens_total"] < 20
        found = served.client.completions.create(model="songs", prompt="Song 5:", temperature=0)
        assert found.choices[0].text == served.text("Song 5:", 16)


def test_a_client_that_does_not_read_neither_delays_others_nor_keeps_a_row(endless):
    """Its texts are generated; the response waits until it reads, leaves, or its time is over."""
    with running(*load(endless), max_sequences=4, max_queue=40) as served:
        served.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        silent = served.send(max_tokens=200, n=8, stream=True, logprobs=20, temperature=0)
        found = served.client.completions.create(model="songs", prompt="Song 5:", temperature=0)
        assert found.choices[0].text == served.text("Song 5:", 16)
        eventually(served.idle)
        assert served.server.server_state.tasks
        silent.close()
        eventually(lambda: not served.server.server_state.tasks)


# Signals ------------------------------------------------------------------------------------------------------------


def stream(client: openai.OpenAI, tokens: int):
    return client.completions.create(model="songs", prompt="a", max_tokens=tokens, temperature=0, stream=True)


@contextlib.contextmanager
def process(run, *words: str):
    """`python -m serve` in a process of its own, and a client."""
    started = subprocess.Popen(
        [sys.executable, "-m", "serve", str(run), "--port", "0", "--max-tokens", "1000000", *words],
        cwd=ROOT, env=USER_ENV | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = started.stdout.readline()
        assert line.startswith("serving http://127.0.0.1:"), line + started.stderr.read()
        yield started, openai.OpenAI(base_url=line.split()[1], api_key="none", max_retries=0, timeout=60)
    finally:
        started.kill()
        started.communicate()


def test_the_first_signal_lets_what_runs_and_what_waits_finish(endless):
    """As after a signal, which only the main thread of a process receives."""
    with running(*load(endless), max_sequences=1) as served:
        served.hold()
        chunks = stream(served.client, 50)
        served.go(2)
        begun = [next(chunks)]
        waiting = served.send(max_tokens=20, temperature=0, prompt="b")
        eventually(lambda: served.scheduler.unfinished() == 2)
        served.server.handle_exit(signal.SIGTERM, None)
        eventually(lambda: refused(served.client))
        served.go()
        texts = [chunk.choices[0].text for chunk in [*begun, *chunks]]
        assert "".join(texts) == served.text("a", 50) and len(texts) == 50
        answer = b"".join(iter(lambda: waiting.recv(9999), b""))
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["text"] == served.text("b", 20)
        served.thread.join()
        assert served.idle()


def test_a_process_that_was_stopped_has_exit_status_0(endless):
    with process(endless) as (server, client):
        chunks = stream(client, 300)
        begun = [next(chunks) for _ in range(3)]
        server.send_signal(signal.SIGINT)
        assert len([*begun, *chunks]) == 300
        assert server.wait() == 0
        assert server.communicate() == ("", "")


def test_a_second_signal_ends_at_once(endless):
    with process(endless) as (server, client):
        next(stream(client, 1_000_000))
        server.send_signal(signal.SIGTERM)
        eventually(lambda: refused(client))  # the first one was handled
        server.send_signal(signal.SIGINT)
        assert server.wait() == -signal.SIGINT


def refused(client: openai.OpenAI) -> bool:
    try:
        client.with_options(timeout=60).models.list()
    except openai.APIConnectionError:
        return True
    return False


def test_what_does_not_finish_in_time_is_told_so(endless):
    with running(*load(endless), max_sequences=1, max_tokens=1_000_000, grace=0) as served:
        chunks = stream(served.client, 1_000_000)
        next(chunks)
        waiting = served.send(max_tokens=1_000_000, temperature=0)
        eventually(lambda: served.scheduler.unfinished() == 2)
        served.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.APIError, match="the server ends"):
            list(chunks)
        assert waiting.recv(9999).startswith(b"HTTP/1.1 500 ")
        served.thread.join()
        assert served.idle()


# The command --------------------------------------------------------------------------------------------------------


def test_help_does_not_import_torch(tmp_path):
    done = command("serve", "--help", where=tmp_path, PYTHONVERBOSE="1")
    assert done.returncode == 0 and "--max-sequences N" in done.stdout
    assert not any(f"import '{name}'" in done.stderr for name in ("torch", "fastapi", "uvicorn"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/nothing"], "runs/nothing: no such run"),
        (["SONGS", "--max-queue", "-1"], "--max-queue -1: must be at least 0"),
        (["SONGS", "--port", "70000"], "--host 127.0.0.1 --port 70000: "),
        (["SONGS", "--host", "no.such.host.invalid"], "--host no.such.host.invalid --port 8000: "),
        (["SONGS", "--checkpoint", "step-9", "--port", "0"], "no checkpoint 'step-9'"),
    ],
)
def test_errors_are_one_line(runs, words, message, capsys):
    assert main([str(runs / "songs") if word == "SONGS" else word for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("serve: ") and message in line


def test_a_port_in_use_is_one_line(served, runs, capsys):
    assert main([str(runs / "songs"), "--port", str(served.port)]) == 2
    assert f"--port {served.port}: " in capsys.readouterr().err


def test_without_the_extra_the_command_says_what_to_install(runs, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "serve.app", raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main([str(runs / "songs")]) == 2
    assert (
        capsys.readouterr().err == "serve: import of fastapi halted; None in sys.modules: pip install -e '.[serve]'\n"
    )


def test_pages_of_other_origins_are_refused_unless_they_are_named(songs):
    """A browser sends JSON to another origin only after it has asked with OPTIONS."""
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    for origins in ((), ("http://localhost:3000",)):
        with running(*songs, origins=origins, max_sequences=1) as served:
            for origin in ("http://localhost:3000", "http://other"):
                url, headers = f"{served.address}/v1/completions", asked | {"Origin": origin}
                allowed = httpx2.options(url, headers=headers).headers.get("access-control-allow-origin")
                assert allowed == (origin if origin in origins else None)
                assert ("access-control-allow-origin" in httpx2.get(url, headers=headers).headers) == (
                    origin in origins
                )
