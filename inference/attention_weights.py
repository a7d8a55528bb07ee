"""What each token attends to: the weights of every head, as the reference kernel defines them.

No fast kernel keeps its weights. So `attention_weights` runs the model once, takes what enters each layer, and
computes the layer's weights again with kernels/reference_attention.py, from the queries and keys of model.Attention.

Shapes: T tokens, H query heads.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from kernels.reference_attention import reference_attention
from model import GPT, Attention, Block

Found = TypeVar("Found")


@torch.no_grad()
def attention_weights(model: GPT, tokens: Tensor) -> list[Tensor | None]:
    """The weights of every layer over a text, (H, T, T) in at least fp32: row t has those of query t over the keys,
    0 where it may not attend. None for a layer that is not attention.

    Args:
        model: on any device, in any dtype, quantized or not; in evaluation mode. It must not run in another thread
            meanwhile.
        tokens: (T,) integers on the model's device, from 1 to the context.
    Raises:
        ValueError: no tokens, or too many.
    """
    if tokens.ndim != 1 or len(tokens) == 0:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}: must be (T,), with at least one token")
    with each_layer(model, layer_weights) as found:
        model.model(tokens[None])  # (T,) -> (1, T)
    return [None if weights is None else weights[0] for weights in found]


def layer_weights(layer: Block, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """The weights (B, H, T, T) of a layer whose input is x (B, T, C); cos and sin as for `Block.forward`."""
    attention: Any = layer.self_attn
    if not isinstance(attention, Attention):
        return None
    q, k, v, _ = attention.project(layer.input_layernorm(x), cos, sin)
    scale, slopes = attention.softmax_scale, attention.alibi_slopes
    return reference_attention(q, k, v, attention.mask_spec, scale, alibi_slopes=slopes)[2]


@contextmanager
def each_layer(model: GPT, look: Callable[[Block, Tensor, Tensor, Tensor], Found]) -> Iterator[list[Found]]:
    """A list of what `look(layer, x, cos, sin)` returns for each layer that runs meanwhile, in order.

    The layers run as they are, whatever computes them: fused, compiled or divided among processes, whose weights are
    gathered when `look` is called.
    """
    found: list[Found] = []

    def hook(layer: Any, inputs: tuple[Any, ...]) -> None:
        found.append(look(layer, *inputs[:3]))

    handles = [layer.register_forward_pre_hook(hook) for layer in model.model.layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
