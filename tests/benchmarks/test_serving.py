"""python -m benchmarks serving: its arithmetic, its endless model, and the whole path on a tiny model."""

import asyncio
import csv
import dataclasses

import pytest

from benchmarks import __main__ as bench
from benchmarks import serving
from sample import SamplingParams, load, stream_generate
from tests.conftest import TINY, command


def test_latencies():
    times = [[0.001 * n, 0.001 * n + 0.01, 0.001 * n + 0.03] for n in range(1, 22)]
    found = serving.latencies(times)
    expected = {"TTFT ms p50": 11, "TTFT ms p95": 20, "ms/token p50": 15, "ms/token p95": 20}
    assert found == pytest.approx(expected)


def test_the_likeliest_token_never_ends_a_text(tmp_path):
    serving.write_run(tmp_path / "run", dataclasses.replace(TINY, vocab_size=260))
    model, tokenizer = load(tmp_path / "run")
    sampling = SamplingParams(greedy=True)
    parts = [text for _, text in stream_generate(model, tokenizer, "a", max_new_tokens=300, sampling=sampling)]
    assert len(parts) == 300 and set(parts) <= set(serving.PRINTABLE) and len(set(parts)) > 5


def test_the_whole_path(tmp_path):
    done = command("benchmarks", "serving", "--quick", f"--out={tmp_path}", where=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "serving.csv").open()))
    servers = dict.fromkeys(row["server"] for row in rows)
    assert list(servers)[:2] == ["heed", "heed, one at a time"]
    assert ("llama.cpp skipped: missing " in done.stdout) == ("llama.cpp" not in servers)
    assert [(row["clients"], row["server"]) for row in rows] == [(n, name) for n in "13" for name in servers]
    for row in rows:
        assert float(row["tokens/s"]) > 0
        for name in ("TTFT ms", "ms/token"):
            assert 0 < float(row[f"{name} p50"]) <= float(row[f"{name} p95"])


def test_a_server_that_does_not_start_or_stops_early_is_one_line():
    with pytest.raises(ValueError, match=r"^heed: serve: --max-queue -1: must be"):
        serving.ServerProcess("heed", "serve", "run", "--max-queue", "-1").wait()

    class Short(serving.ServerProcess):
        def __init__(self) -> None:
            self.name = "short"

    async def ask() -> None:
        async def answer(reader, writer):
            await reader.readuntil(b"}")
            writer.write(b'HTTP/1.1 200 OK\r\n\r\ndata: {"id": 1}\n\ndata: [DONE]\n\n')
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            short = Short()
            short.port = server.sockets[0].getsockname()[1]
            await short.ask("a", 2)

    with pytest.raises(ValueError, match="short: 1 tokens instead of 2"):
        asyncio.run(ask())


@pytest.mark.parametrize("words", [["--clients", "0"], ["--requests", "1"], ["--max-new-tokens", "769"]])
def test_errors_are_one_line(words):
    with pytest.raises(ValueError, match="clients, repetitions: at least 1; requests: at least 2"):
        bench.main(bench.arguments(["serving", *words]))
