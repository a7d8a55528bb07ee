"""What each token attends to: the weights of every head, as the reference kernel defines them.

No fast kernel keeps its weights. So `attention_weights` runs the model once, takes what enters each layer, and
computes the layer's weights again with kernels/reference_attention.py, from the queries and keys of model.Attention.
Mixers of zoo/ have no weights; the map that they imply takes their place, see implied_maps.py.

Shapes: T tokens, H heads.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from inference.implied_maps import implied_map
from kernels.reference_attention import DocumentBounds, reference_attention
from model import GPT, Attention, Block
from zoo.scan import upcast

Found = TypeVar("Found")


@torch.no_grad()
def attention_weights(model: GPT, tokens: Tensor) -> list[Tensor | None]:
    """The weights of every layer over a text, (H, T, T) in at least fp32: row t has those of query t over the keys,
    0 where it may not attend. Of a mixer of zoo/, the implied map, which may have negative entries, or None.

    Args:
        model: on any device, in any dtype, quantized or not; in evaluation mode. No model may run in another thread
            meanwhile.
        tokens: (T,) integers on the model's device, from 1 to the context.
    Raises:
        ValueError: no tokens, or too many.
    """
    if tokens.ndim != 1 or len(tokens) == 0:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}: must be (T,), with at least one token")
    with each_layer(model, layer_map) as found:
        model.model(tokens[None])  # (T,) -> (1, T)
    return found


def layer_map(layer: Block, x: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Tensor | None:
    """The weights or the implied map (H, T, T) of a layer with input x (1, T, C); the rest as for its `forward`."""
    mixer, x = layer.self_attn, layer.input_layernorm(x)
    if isinstance(mixer, Attention):
        return weights(mixer, x, cos, sin, **options)
    found = implied_map(mixer, x, cos, sin)
    return None if found is None else upcast(found)


def weights(
    attention: Attention, x: Tensor, cos: Tensor, sin: Tensor, document_ids: DocumentBounds | None = None
) -> Tensor:
    """The weights (H, T, T), for the layer's normed input x (1, T, C)."""
    ids = None if document_ids is None else document_ids.first  # the start of a document identifies it
    q, k, v, _ = attention.project(x, cos, sin)
    scale, slopes = attention.softmax_scale, attention.alibi_slopes
    with torch.autocast(x.device.type, enabled=False):
        return reference_attention(q, k, v, attention.mask_spec, scale, None, ids, slopes)[2][0]


@contextmanager
def each_layer(model: GPT, look: Callable[..., Found]) -> Iterator[list[Found]]:
    """A list of what `look(layer, x, cos, sin, **options)` returns for each layer that runs meanwhile, in order.

    The layers run as they are, whatever computes them: fused, compiled or divided among processes, whose weights are
    gathered when `look` is called.
    """
    found: list[Found] = []

    def hook(layer: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.append(look(layer, *inputs[:3], **options))  # without the cache

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in model.model.layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
