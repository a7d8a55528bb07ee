"""Inference engines: `engine = make_engine(model)`, then `logits = engine(tokens, cache)`.

`EagerEngine` runs model.py in PyTorch on any device. `CppEngine` computes the same on a CPU in one C++ call per step
(kernels/cpu/decode_step.cpp). `CudaGraphEngine` replays a step on a GPU as one CUDA graph. Without a C++ compiler, or
with a model that the C++ file does not support, `make_engine` prints the reason once and returns the eager engine.
"""

import dataclasses
import functools
import sys
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kernels import cpu
from kernels.cpu import decode_step
from kernels.cpu.build import check_tensor
from model import GPT, KVCache, ModelConfig

ROWS = KVCache.CHUNK  # tokens of all sequences in one C++ call, which reads the weights once for all of them
SUPPORTED = {  # fields of ModelConfig that the C++ files compute
    "vocab_size", "context", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_ffn", "tie_embeddings",
    "dropout", "attention_dropout", "window", "layer_pattern", "gate", "rope_theta", "yarn_factor",
    "yarn_original_context", "norm_eps", "router_aux_loss_coef",
}  # fmt: skip


class Engine(Protocol):
    """Computes next-token logits. `cache_dtype` is the dtype that the engine expects of keys and values."""

    cache_dtype: torch.dtype

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Append tokens (B, T) to the cache and return the logits after the last one, (B, V) fp32.

        The next call may overwrite them.
        """
        ...


def make_engine(model: GPT) -> Engine:
    """Return the fastest engine for the model on its device. The weights must not move while the engine is in use."""
    if hasattr(model, "unshard"):  # divided among processes: no one has weights of its own to point to
        return EagerEngine(model)
    if model.model.cos.device.type == "cpu":
        try:
            return CppEngine(model)
        except cpu.Unavailable as reason:
            _warn_once(f"[generating with PyTorch, several times slower than heed's C++: {reason}]")
    if model.model.cos.device.type == "cuda" and not model.config.n_expert:  # an expert's shapes depend on the tokens
        return CudaGraphEngine(model)
    return EagerEngine(model)


def check_supported(config: ModelConfig, supported: set[str]) -> None:
    """Raise cpu.Unavailable if a field outside `supported` differs from its default."""
    for field in dataclasses.fields(ModelConfig):
        if field.name not in supported and getattr(config, field.name) != field.default:
            raise cpu.Unavailable(f"heed's C++ does not support model.{field.name}")


@functools.cache
def _warn_once(line: str) -> None:
    print(line, file=sys.stderr)


class EagerEngine:
    """The model in PyTorch, on any device: the reference for other engines."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.cache_dtype = model.model.norm.weight.dtype

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        for chunk in tokens.split(KVCache.CHUNK, dim=1):  # a long prompt is prefilled chunk by chunk
            logits = self.model.next_logits(chunk, cache)  # (B, V)
            cache.advance(chunk.shape[1])
        return logits


class CudaGraphEngine:
    """The model in PyTorch on a GPU. A step of one token per sequence is captured once per cache, then replayed.

    A step launches hundreds of small kernels, which takes the host longer than the GPU needs to run them. A CUDA graph
    launches all of them at once. It is possible since a step has the same shapes at every position, and lengths and
    positions are read on the GPU. A prompt is processed eagerly.
    """

    def __init__(self, model: GPT) -> None:
        self.eager = EagerEngine(model)
        self.cache_dtype = self.eager.cache_dtype
        self.cache: KVCache | None = None  # of the captured graph, which writes to its memory

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        if tokens.shape[1] > 1:
            return self.eager(tokens, cache)
        if self.cache is not cache:
            self._capture(tokens, cache)
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits

    def _capture(self, tokens: Tensor, cache: KVCache) -> None:
        """Record a step. It runs once before, since kernels are compiled and libraries set up when first called: on a
        copy of the cache, since it changes states and lengths."""
        self.cache, self.tokens = cache, tokens.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.eager(self.tokens, cache.repeat(1))
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.eager(self.tokens, cache)


class CppEngine:
    """The C++ engine. It holds pointers to the model's weights, which must not move.

    Raises cpu.Unavailable: no compiler, an unsupported flag of `ModelConfig`, or weights of several dtypes; ValueError:
    a weight or a cache whose shape does not fit the model's configuration.
    """

    def __init__(self, model: GPT) -> None:
        config = model.config
        check_supported(config, SUPPORTED)
        if others := set(config.layer_pattern) - set("LS"):
            raise cpu.Unavailable(f"heed's C++ does not support the layers {min(others)} of model.layer_pattern")
        self.kept: list[Tensor] = []  # keeps the tensors behind the pointers alive
        matrices = [m for m in model.modules() if hasattr(m, "codes") or isinstance(m, nn.Linear | nn.Embedding)]
        types: set[Any] = {(m.codes if hasattr(m, "codes") else m.weight).dtype for m in matrices}
        if len(types) > 1:
            raise cpu.Unavailable(f"the weights have several dtypes, {', '.join(map(str, types))}")
        self.weights = types.pop()
        # Keys and values have the dtype of the norms; with int8 weights, bf16.
        self.cache_dtype = torch.bfloat16 if self.weights == torch.int8 else model.model.norm.weight.dtype
        decode_step.library(self.weights, self.cache_dtype)  # raises here, not in the first call
        decoder = model.model
        self.layers = (decode_step.Layer * config.n_layer)()
        self.cache: list[tuple[Tensor, ...]] = []  # the states of the cache that the rows of `layers` point to
        C, H, K, D, F = config.n_embd, config.n_head, config.n_kv_head, config.head_dim, config.n_ffn
        in_attention = {"q": (H * D * (2 if config.gate else 1), C), "k": (K * D, C), "v": (K * D, C), "o": (C, H * D)}
        in_mlp = {"gate": (F, C), "up": (F, C), "down": (C, F)}
        block: Any
        for number, (row, block) in enumerate(zip(self.layers, decoder.layers, strict=True)):
            attention, mlp = block.self_attn, block.mlp
            for name, shape in in_attention.items():
                setattr(row, name, self._matrix(getattr(attention, f"{name}_proj"), *shape))
            for name, shape in in_mlp.items():
                setattr(row, name, self._matrix(getattr(mlp, f"{name}_proj"), *shape))
            row.norm_in = self._floats(block.input_layernorm.weight, C)
            row.norm_mid = self._floats(block.post_attention_layernorm.weight, C)
            row.norm_q, row.norm_k = self._floats(attention.q_norm.weight, D), self._floats(attention.k_norm.weight, D)
            row.window = config.mask_spec(number).window or 0
        tables = (self._floats(table, config.context, D) for table in (decoder.cos, decoder.sin))
        V, head = config.vocab_size, model.lm_head or decoder.embed_tokens
        self.model = decode_step.Model(
            C, H, K, D, F, V, config.n_layer, config.gate, config.context, config.norm_eps, *tables,
            self._floats(decoder.norm.weight, C), self._matrix(decoder.embed_tokens, V, C), self._matrix(head, V, C),
            self.layers,
        )  # fmt: skip

    def _matrix(self, module: Any, rows: int, columns: int) -> decode_step.Matrix:
        if hasattr(module, "codes"):
            return decode_step.Matrix(self._keep(module.codes, rows, columns), self._floats(module.scales, rows, 1))
        return decode_step.Matrix(self._keep(module.weight, rows, columns), None)

    def _floats(self, tensor: Tensor, *shape: int) -> int:
        return self._keep(tensor.float(), *shape)

    def _keep(self, tensor: Tensor, *shape: int) -> int:
        self.kept.append(check_tensor("a weight", tensor.detach().contiguous(), tensor.dtype, *shape))
        return self.kept[-1].data_ptr()

    def _point_to(self, cache: KVCache) -> None:
        """Let C++ read and write this cache from now on. Raises ValueError: it is not one of this model."""
        dtype, rows = cache.layers[0][0].dtype, len(cache.layers[0][0])
        for row, (keys, values) in zip(self.layers, cache.layers, strict=True):
            for name, x in (("keys", keys), ("values", values)):
                check_tensor(name, x, dtype, rows, keys.shape[1], self.model.K, self.model.D)
                setattr(row, name, x.data_ptr())
            row.slots = keys.shape[1]
        self.cache, self.model.cache_rows = cache.layers, rows

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        if cache.layers is not self.cache:
            self._point_to(cache)
        library = decode_step.library(self.weights, cache.layers[0][0].dtype)
        logits = torch.empty(len(tokens), self.model.V, dtype=torch.float32)  # (B, V)
        *chunks, last = tokens.split(max(1, ROWS // len(tokens)), dim=1)
        for chunk in chunks:
            decode_step.decode(library, self.model, chunk, cache.rows, cache.lengths, None)
            cache.advance(chunk.shape[1])
        decode_step.decode(library, self.model, last, cache.rows, cache.lengths, logits)
        cache.advance(last.shape[1])
        return logits
