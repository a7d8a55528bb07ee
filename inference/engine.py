"""How a model reads on: `read = reader(model)`, then `logits = read(tokens, cache)`, as fast as this machine can.

`plainly` is the definition, in torch, for every device. On a CPU kernels/cpu/decode_step.cpp computes the same in one call;
where it cannot (no compiler, a model of a kind that it does not know), torch serves, and one line says why.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kernels import cpu
from kernels.cpu import decode_step
from model import GPT, KVCache, ModelConfig

Reader = Callable[[Tensor, KVCache], Tensor]

ROWS = 64  # tokens in one call of the C++ file, of all sequences: so many stay in a core's cache
KNOWN = {
    "vocab_size", "context", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_ffn", "tie_embeddings",
    "dropout", "window", "layer_pattern", "gate", "rope_theta", "yarn_factor", "yarn_original_context", "norm_eps",
}  # fmt: skip


def plainly(model: GPT, tokens: Tensor, cache: KVCache) -> Tensor:
    """tokens (B, T), which follow those in the cache -> logits of what comes next, (B, V) fp32. Advances the cache."""
    for piece in tokens.split(KVCache.CHUNK, dim=1):
        hidden = model.model(piece, cache)  # (B, T, C)
        cache.advance(piece.shape[1])
    return model.head(hidden[:, -1]).float()  # (B, C) -> (B, V)


def refuse_unknown(config: ModelConfig, known: set[str]) -> None:
    """Raises cpu.Unavailable when a flag that C++ does not know, perhaps a later one, is not as it is by default."""
    for field in dataclasses.fields(ModelConfig):
        if field.name not in known and getattr(config, field.name) != field.default:
            raise cpu.Unavailable(f"it does not know model.{field.name}")


def reader(model: GPT) -> Reader:
    """What reads tokens for `model` from now on: see `plainly`. The weights must stay where they are meanwhile."""
    if model.model.cos.device.type == "cpu":
        try:
            return CpuReader(model)
        except cpu.Unavailable as reason:
            _say(f"[torch serves, some times slower than heed's C++: {reason}]")
    return functools.partial(plainly, model)


@functools.cache
def _say(line: str) -> None:
    """Once a process."""
    print(line, file=sys.stderr)


def cache_dtype(model: GPT, read: Reader) -> torch.dtype:
    """What `read` keeps keys and values in: the precision of the norms, and in C++ bf16 beside weights in int8."""
    narrow = isinstance(read, CpuReader) and read.weights == torch.int8
    return torch.bfloat16 if narrow else model.model.norm.weight.dtype


class CpuReader:
    """Calls the C++ file with pointers to the model's own weights. Raises cpu.Unavailable."""

    def __init__(self, model: GPT) -> None:
        config = model.config
        refuse_unknown(config, KNOWN)
        self.kept: list[Tensor] = []  # the pointers' tensors
        matrices = [m for m in model.modules() if hasattr(m, "codes") or isinstance(m, nn.Linear | nn.Embedding)]
        kinds: set[Any] = {(m.codes if hasattr(m, "codes") else m.weight).dtype for m in matrices}
        if len(kinds) > 1:
            raise cpu.Unavailable(f"its weights are of several types, {', '.join(map(str, kinds))}")
        self.weights = kinds.pop()
        decode_step.library(self.weights, cache_dtype(model, self))  # raises now, not later
        decoder = model.model
        self.layers = (decode_step.Layer * config.n_layer)()
        block: Any
        for number, (row, block) in enumerate(zip(self.layers, decoder.layers, strict=True)):
            attention, mlp = block.self_attn, block.mlp
            for name in ("q", "k", "v", "o"):
                setattr(row, name, self._matrix(getattr(attention, f"{name}_proj")))
            for name in ("gate", "up", "down"):
                setattr(row, name, self._matrix(getattr(mlp, f"{name}_proj")))
            row.norm_in = self._floats(block.input_layernorm.weight)
            row.norm_mid = self._floats(block.post_attention_layernorm.weight)
            row.norm_q, row.norm_k = self._floats(attention.q_norm.weight), self._floats(attention.k_norm.weight)
            row.window = config.mask_spec(number).window or 0
        self.model = decode_step.Model(
            config.n_embd, config.n_head, config.n_kv_head, config.head_dim, config.n_ffn, config.vocab_size,
            config.n_layer, config.gate, config.context, config.norm_eps, self._floats(decoder.cos),
            self._floats(decoder.sin), self._floats(decoder.norm.weight), self._matrix(decoder.embed_tokens),
            self._matrix(model.lm_head or decoder.embed_tokens), self.layers,
        )  # fmt: skip

    def _matrix(self, module: Any) -> decode_step.Matrix:
        if hasattr(module, "codes"):
            return decode_step.Matrix(self._keep(module.codes), self._floats(module.scales))
        return decode_step.Matrix(self._keep(module.weight), None)

    def _floats(self, tensor: Tensor) -> int:
        return self._keep(tensor.float())

    def _keep(self, tensor: Tensor) -> int:
        self.kept.append(tensor.detach().contiguous())
        return self.kept[-1].data_ptr()

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        library = decode_step.library(self.weights, cache.layers[0][0].dtype)
        for row, (keys, values) in zip(self.layers, cache.layers, strict=True):
            row.keys, row.values, row.slots = keys.data_ptr(), values.data_ptr(), keys.shape[1]
        for piece in tokens.split(max(1, ROWS // len(tokens)), dim=1):
            logits = decode_step.decode(library, self.model, piece, cache.lengths)
            cache.advance(piece.shape[1])
        return logits
