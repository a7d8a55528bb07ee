"""decode_step.cpp, a model's step as one call: the structures that it takes, and the call."""

import ctypes
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p

import torch
from torch import Tensor

from kernels import cpu
from kernels.cpu.build import check_tensor


class Matrix(Structure):
    """As in the C++ file, and so are the next two."""

    _fields_ = (("weight", c_void_p), ("scale", c_void_p))


class Layer(Structure):
    _fields_ = (
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, c_void_p) for name in ("norm_in", "norm_mid", "norm_q", "norm_k", "keys", "values")),
        *((name, c_int64) for name in ("slots", "window")),
    )


class Model(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("C", "H", "K", "D", "F", "V", "layers", "gated", "context")),
        ("eps", c_double),
        *((name, c_void_p) for name in ("cos", "sin", "norm")),
        ("embed", Matrix),
        ("head", Matrix),
        ("layer", POINTER(Layer)),
        ("cache_rows", c_int64),
    )


def library(weights: torch.dtype, cache: torch.dtype) -> ctypes.CDLL:
    """decode_step.cpp for weights and a cache of these types. Raises cpu.Unavailable."""
    return cpu.library("decode_step", WEIGHTS=weights, CACHE=cache)


def decode(
    found: ctypes.CDLL, model: Model, tokens: Tensor, rows: Tensor, lengths: Tensor, logits: Tensor | None
) -> None:
    """tokens (B, T) int64 after those that the cache holds -> the next one's logits (B, V) fp32, or None.

    rows, lengths (B,) int64: the row of the cache that a sequence has, and how many tokens it holds.

    Writes keys and values into the cache that `model` points to.

    Raises:
        IndexError: as torch would, a token that is not in the vocabulary, a position beyond the context or the cache.
        ValueError: other dtypes and shapes.
    """
    (B, T), tokens = tokens.shape, tokens.contiguous()
    check_tensor("tokens", tokens, torch.int64, B, T)
    check_tensor("rows", rows, torch.int64, B)
    check_tensor("lengths", lengths, torch.int64, B)
    if logits is not None:
        check_tensor("logits", logits, torch.float32, B, model.V)
    if cpu.call(found.heed_decode, model, B, T, tokens, rows, lengths, logits):
        raise IndexError(f"needs tokens from 0 to {model.V - 1}, 1 to {model.context} of them, and room in the cache")
