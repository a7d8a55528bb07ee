"""python -m benchmarks serving: throughput and latency of the HTTP server with several clients.

Three servers have the same random weights in bf16 and take turns in this one run: heed, heed with one sequence at a
time, and that of llama-cpp-python, where it is installed; it generates one sequence at a time. Each client sends its
requests one after another and reads their streams: prompts of 16 to 256 characters, no two of them equal, and the
likeliest token, always as many. The clients share the machine with the server.
"""

import asyncio
import dataclasses
import importlib.util
import itertools
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.inference import SIZES, TINY
from benchmarks.report import table, write_csv
from benchmarks.subprocess_runner import ROOT
from data.tokenizer import Tokenizer
from model import GPT, ModelConfig
from training import checkpoint

PATIENCE = 600  # tries to connect, ten a second
PRINTABLE = [chr(code) for code in range(32, 127)]


def write_run(run: Path, config: ModelConfig) -> tuple[GPT, Tokenizer]:
    """Write a run with random weights. The logits of an end token and of all that is not printable are 0, so that the
    likeliest token is a character, and no text ends."""
    torch.manual_seed(0)
    config = dataclasses.replace(config, tie_embeddings=False)  # else the likeliest token is the last one again
    model, tokenizer = GPT(config).eval(), Tokenizer.train("byte", [])
    kept = torch.zeros(config.vocab_size, 1)
    kept[tokenizer.encode("".join(PRINTABLE))] = 5.0  # above 1, to avoid near ties between the most likely tokens
    model.head_weight.data *= kept
    run.mkdir(parents=True)
    tokenizer.save(run / "tokenizer.json")
    checkpoint.save(run, 0, model, [], {"config": {"model": dataclasses.asdict(config)}})
    return model, tokenizer


class ServerProcess:
    """A server in a process of its own."""

    def __init__(self, name: str, *words: str) -> None:
        self.name = name
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
        command = [sys.executable, "-m", *words, "--port", str(self.port)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=self.log)

    def wait(self) -> None:
        """Wait until it accepts connections. Raises ValueError if it does not start."""
        for _ in range(PATIENCE):
            if self.process.poll() is None:
                try:
                    socket.create_connection(("127.0.0.1", self.port)).close()
                    return
                except OSError:
                    time.sleep(0.1)
        self.close()
        self.log.seek(0)
        raise ValueError(f"{self.name}: {(self.log.read().strip() or 'does not start').splitlines()[-1]}")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    async def ask(self, prompt: str, tokens: int) -> list[float]:
        """Seconds from a request to each of its tokens. Raises ValueError if there are fewer than asked for, and
        OSError."""
        body = {"model": "random", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        content, times = json.dumps(body).encode(), []
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json"
        start = time.perf_counter()
        writer.write(f"{head}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
        async for line in reader:
            if line.startswith(b'data: {"id"'):
                times.append(time.perf_counter() - start)
        writer.close()
        if len(times) < tokens:
            raise ValueError(f"{self.name}: {len(times)} tokens instead of {tokens}")
        return times[:tokens]  # a server may have a last chunk without a token

    async def load(self, clients: int, requests: int, tokens: int, seed: int) -> tuple[float, list[list[float]]]:
        """The seconds that all clients need for all their requests, and the times of each request, as of `ask`."""
        numbers, times = random.Random(seed), []
        prompts = ["".join(numbers.choices(PRINTABLE, k=numbers.randint(16, 256))) for _ in range(clients * requests)]

        async def client(number: int) -> None:
            for prompt in prompts[number::clients]:
                times.append(await self.ask(prompt, tokens))

        start = time.perf_counter()
        await asyncio.gather(*(client(number) for number in range(clients)))
        return time.perf_counter() - start, times


def start_servers(folder: Path, config: ModelConfig, sequences: int, threads: int) -> list[ServerProcess]:
    """heed, heed with one sequence at a time and, if it is installed, llama.cpp."""
    model, tokenizer = write_run(folder / "random", config)
    heed = ("serve", str(folder / "random"), "--quantize", "bf16", "--max-sequences")
    started = [
        ServerProcess("heed", *heed, str(sequences)),
        ServerProcess("heed, one at a time", *heed, "1"),
    ]
    needed = ("llama_cpp", "gguf", "sse_starlette", "starlette_context", "pydantic_settings")
    if missing := [name for name in needed if not importlib.util.find_spec(name)]:
        print(f"llama.cpp skipped: missing {', '.join(missing)}")
        return started
    from convert import to_gguf

    to_gguf.write(folder / "random.gguf", model, tokenizer, "bf16", "random", "nothing")
    settings = {
        "model": folder / "random.gguf", "host": "127.0.0.1", "n_ctx": config.context, "n_threads": threads,
        "n_threads_batch": threads, "logits_all": False, "interrupt_requests": False, "verbose": False,
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [*started, ServerProcess("llama.cpp", "llama_cpp.server", *words)]


def run(clients: list[int], requests: int, tokens: int, repetitions: int, out: Path | None, quick: bool) -> int:
    """Print a table, a row for each server and number of clients; write serving.csv into `out`. Returns the exit
    status."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        threads, config = torch.get_num_threads(), dataclasses.replace(TINY, context=512) if quick else SIZES["10M"]
        servers = start_servers(Path(folder), config, max(clients), threads)
        try:
            for server in servers:
                server.wait()
            for number in clients:
                taken: dict[ServerProcess, list[float]] = {server: [] for server in servers}
                times: dict[ServerProcess, list[list[float]]] = {server: [] for server in servers}
                for turn in range(-1, repetitions):  # the first warms up
                    for server in servers:
                        try:
                            seconds, found = asyncio.run(server.load(number, requests, tokens, seed=turn))
                        except OSError as error:
                            raise ValueError(f"{server.name}, {number} clients: {error}") from None
                        if turn >= 0:
                            taken[server].append(seconds)
                            times[server] += found
                for server in servers:
                    total = number * requests * tokens
                    row = {"server": server.name, "clients": number}
                    row["tokens/s"] = total / statistics.median(taken[server])
                    rows.append(row | latencies(times[server]))
                    print(f"{server.name}, {number} clients: {row['tokens/s']:,.0f} tokens/s", file=sys.stderr)
        finally:
            for server in servers:
                server.close()
    print(f"torch {torch.__version__}, {threads} threads; {requests} requests per client, {tokens} tokens each")
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    print("tokens/s: of all clients, median of the repetitions. TTFT: time to first token, queue and prefill included.")
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_csv(out / "serving.csv", rows)
        print(f"wrote {out / 'serving.csv'}")
    return 0


def latencies(times: list[list[float]]) -> dict[str, float]:
    """Medians and 95th percentiles in milliseconds, of the first tokens and of the times between two tokens."""
    first = [1000 * seconds[0] for seconds in times]
    gaps = [1000 * (b - a) for seconds in times for a, b in itertools.pairwise(seconds)]
    found = {}
    for name, values in (("TTFT ms", first), ("ms/token", gaps)):
        found[f"{name} p50"] = statistics.median(values)
        found[f"{name} p95"] = statistics.quantiles(values, n=20, method="inclusive")[-1]
    return found
