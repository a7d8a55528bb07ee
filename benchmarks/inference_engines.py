"""The engines of `python -m benchmarks inference`: heed, transformers, llama.cpp and nanoGPT, with the same weights.

Each engine runs in a separate process with its own memory and threads; the processes alternate. An engine loads the
folder written by `write`, generates greedily, and reports the time of each token.
"""

import ctypes
import dataclasses
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inference.huge_pages import use_huge_pages
from inference.quantize import quantize
from kernels.cpu import build
from model import GPT, ModelConfig
from sample import SamplingParams, generate
from training.device_memory import peak_memory

Generate = Callable[[list[int], int, int], Iterator[np.ndarray]]
"""(prompt, batch, tokens) -> `tokens` arrays with the next token of each sequence of the batch."""

# name: (precision, required package)
ENGINES = {
    "heed fp32": ("fp32", ""),
    "heed bf16": ("bf16", ""),
    "heed int8": ("int8", ""),
    "heed eager": ("fp32", ""),
    "transformers": ("fp32", "transformers"),
    "transformers compiled": ("fp32", "transformers"),
    "transformers bf16": ("bf16", "transformers"),
    "llama.cpp F32": ("fp32", "llama_cpp"),
    "llama.cpp BF16": ("bf16", "llama_cpp"),
    "llama.cpp BF16 in C++": ("bf16", "llama_cpp"),  # shows what the loop in Python costs
    "llama.cpp Q8_0": ("int8", "llama_cpp"),
    "nanoGPT": ("fp32", ""),
}
GGUF = {
    "llama.cpp F32": "f32", "llama.cpp BF16": "bf16", "llama.cpp BF16 in C++": "bf16", "llama.cpp Q8_0": "q8_0",
}  # fmt: skip


def missing(name: str) -> str:
    """The missing packages of an engine, "" if none."""
    needs = [ENGINES[name][1]] + ["gguf"] * (name in GGUF)
    return ", ".join(need for need in needs if need and not importlib.util.find_spec(need))


def write(folder: Path, config: ModelConfig, names: list[str]) -> None:
    """Write a model with random weights in the format of each engine."""
    torch.manual_seed(0)
    model = GPT(config).eval()
    for name, weight in model.named_parameters():
        if "embed" in name:  # larger than at initialization, to avoid near ties between the most likely tokens
            weight.data *= 5
    torch.save(model.state_dict(), folder / "model.pt")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    if formats := {GGUF[name] for name in names if name in GGUF}:
        from convert import to_gguf
        from data.tokenizer import Tokenizer

        tokenizer = Tokenizer.train("byte", [])
        for dtype in formats:
            to_gguf.write(folder / f"{dtype}.gguf", model, tokenizer, dtype, "random", "nothing")


def heed(folder: Path, name: str, nanogpt: Path | None, device: str) -> Generate:
    """sample.generate with weights in fp32, bf16 or int8, or without the C++ engine."""
    model = GPT(ModelConfig(**json.loads((folder / "config.json").read_text()))).eval()
    model.load_state_dict(torch.load(folder / "model.pt"))
    model.to(device)
    if name.split()[1] in ("bf16", "int8"):
        quantize(model, name.split()[1])
    else:
        use_huge_pages(model)
    if name == "heed eager":
        os.environ["CXX"] = "false"  # a compiler that fails

    def generate_tokens(prompt: list[int], batch: int, tokens: int) -> Iterator[np.ndarray]:
        for step in generate(
            model, prompt, max_new_tokens=tokens, num_samples=batch, sampling=SamplingParams(greedy=True)
        ):
            yield step.cpu().numpy()

    return generate_tokens


def transformers(folder: Path, name: str, nanogpt: Path | None, device: str) -> Generate:
    """Qwen3ForCausalLM.generate; if compiled, with the static cache."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    c = ModelConfig(**json.loads((folder / "config.json").read_text()))
    theirs = Qwen3Config(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_ffn, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.context, tie_word_embeddings=c.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = Qwen3ForCausalLM(theirs).eval()
    model.load_state_dict(torch.load(folder / "model.pt"), strict=False)  # a tied head is not in the file
    model.tie_weights()
    model.to(device)
    if name.endswith("bf16"):
        model.to(torch.bfloat16)
    options = {}
    if name.endswith("compiled"):
        model.forward = torch.compile(model.forward)
        options = {"cache_implementation": "static"}

    class Recorder:
        """A stopping criterion that records each step and never stops."""

        def __init__(self) -> None:
            self.steps: list[tuple[float, np.ndarray]] = []

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            self.steps.append((time.perf_counter(), ids[:, -1].cpu().numpy().copy()))
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def generate_tokens(prompt: list[int], batch: int, tokens: int) -> Iterator[Any]:
        recorder = Recorder()
        ids = torch.tensor([prompt] * batch, device=device)
        greedy = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "stopping_criteria": [recorder]}
        model.generate(ids, attention_mask=torch.ones_like(ids), **greedy, **options)
        yield from recorder.steps

    return generate_tokens


def llama(folder: Path, name: str, nanogpt: Path | None, device: str) -> Generate:
    """llama.cpp's llama_decode with one batch per step, called from Python or from llama_loop.cpp. The KV cache is fp32
    with F32, else 16 bits, the default."""
    import llama_cpp as lib

    silent = lib.llama_log_callback(lambda *_: None)
    vars(lib)["silent"] = silent  # keeps the callback alive as long as the library
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    lib.llama_backend_init()
    path = folder / f"{GGUF[name]}.gguf"
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    config = json.loads((folder / "config.json").read_text())
    contexts: dict[tuple[int, int], Any] = {}  # (batch, positions): context

    def context(batch: int, size: int) -> Any:
        if (batch, size) not in contexts:
            for old in contexts.values():
                lib.llama_free(old)
            contexts.clear()
            params = lib.llama_context_default_params()
            params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = batch * size, batch, 512, 512
            params.n_threads = params.n_threads_batch = torch.get_num_threads()
            params.kv_unified = False
            if GGUF[name] == "f32":
                params.type_k = params.type_v = lib.GGML_TYPE_F32
            contexts[batch, size] = lib.llama_init_from_model(model, params)
        lib.llama_memory_clear(lib.llama_get_memory(contexts[batch, size]), True)
        return contexts[batch, size]

    def decode(ctx: Any, tokens: list[int], positions: list[int], sequences: list[int], wanted: int) -> np.ndarray:
        """One llama_decode; the most likely tokens after the last `wanted` tokens."""
        n = len(tokens)
        batch = lib.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for i in range(n):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = tokens[i], positions[i], 1
            batch.seq_id[i][0], batch.logits[i] = sequences[i], i >= n - wanted
        failed = lib.llama_decode(ctx, batch)
        lib.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        V = config["vocab_size"]
        return np.ctypeslib.as_array(lib.llama_get_logits(ctx), (wanted, V)).argmax(1)

    def cpp_loop(ctx: Any, step: np.ndarray, position: int, tokens: int) -> Iterator[tuple[float, np.ndarray]]:
        """The rest of the generation by llama_loop.cpp: (time, tokens (batch,)) of each step."""
        made, seconds = np.empty((tokens, len(step)), np.int32), np.empty(tokens)
        arrays = (np.ctypeslib.as_ctypes(array) for array in (step.astype(np.int32), made, seconds))
        called = (
            ctypes.cast(f, ctypes.c_void_p) for f in (lib.llama_decode, lib.llama_get_logits, lib.llama_batch_init)
        )
        generate_in_cpp = build.library(str(Path(__file__).with_name("llama_loop"))).generate
        start = time.perf_counter()
        failed = generate_in_cpp(
            ctypes.c_void_p(ctx), *called, *arrays, len(step), position, tokens, config["vocab_size"]
        )
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        yield from zip((start + seconds).tolist(), made, strict=True)

    def generate_tokens(prompt: list[int], batch: int, tokens: int) -> Iterator[Any]:
        size = -(-(len(prompt) + tokens) // 256) * 256
        ctx = context(batch, size)
        for begin in range(0, len(prompt), 512):
            chunk = prompt[begin : begin + 512]
            step = decode(ctx, chunk, list(range(begin, begin + len(chunk))), [0] * len(chunk), 1)
        for other in range(1, batch):  # as in heed, prefill runs once for all samples
            lib.llama_memory_seq_cp(lib.llama_get_memory(ctx), 0, other, -1, -1)
        step = step.repeat(batch)
        yield step
        if name.endswith("in C++"):
            yield from cpp_loop(ctx, step, len(prompt), tokens - 1)
            return
        for position in range(len(prompt), len(prompt) + tokens - 1):
            step = decode(ctx, step.tolist(), [position] * batch, list(range(batch)), batch)
            yield step

    return generate_tokens


def nano(folder: Path, name: str, nanogpt: Path | None, device: str) -> Generate:
    """nanoGPT's GPT class with the same width, depth and vocabulary, its generate, and its own random weights."""
    assert nanogpt is not None
    spec = importlib.util.spec_from_file_location("nanogpt_model", nanogpt / "model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    c = json.loads((folder / "config.json").read_text())
    sizes = {"block_size": c["context"], "vocab_size": c["vocab_size"], "n_layer": c["n_layer"]}
    model = module.GPT(
        module.GPTConfig(**sizes, n_head=c["n_head"], n_embd=c["n_embd"], dropout=0.0, bias=False)
    ).eval()
    steps: list[float] = []
    model.register_forward_hook(lambda *_: steps.append(time.perf_counter()))

    def generate_tokens(prompt: list[int], batch: int, tokens: int) -> Iterator[Any]:
        steps.clear()
        made = model.generate(torch.tensor([prompt] * batch), tokens, top_k=1)
        yield from zip(steps, made[:, len(prompt) :].T.numpy(), strict=True)

    return generate_tokens


def serve(
    connection: Connection, name: str, folder: Path, nanogpt: Path | None, threads: int, device: str = "cpu"
) -> None:
    """The process of an engine; llama.cpp and nanoGPT run on a CPU alone.

    Replies to (prompt, batch, tokens) with the time of each token in seconds, the tokens (tokens, batch), and the peak
    memory in MB that the model and generation have added to the process.
    """
    torch.set_num_threads(threads)
    makers = {"heed": heed, "transformers": transformers, "llama.cpp": llama, "nanoGPT": nano}
    if ENGINES[name][1]:
        importlib.import_module(ENGINES[name][1])
    before = peak_memory(torch.device(device))
    try:
        with torch.inference_mode():
            generate_tokens = makers[name.split()[0]](folder, name, nanogpt, device)
            connection.send("ready")
            while request := connection.recv():
                start, times, made = time.perf_counter(), [], []
                for step in generate_tokens(*request):
                    at, tokens = step if isinstance(step, tuple) else (time.perf_counter(), step)
                    times.append(at - start)
                    made.append(tokens)
                connection.send((times, np.stack(made), (peak_memory(torch.device(device)) - before) / 1e6))
    except Exception as error:  # reported to the main process; the other engines continue
        connection.send(f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}")
