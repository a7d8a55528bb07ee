"""Signs of collapse, measured at every evaluation on the first tokens of the validation text; with data.document_mask
on the longest document in them.

A layer of attention can fail in two ways that the loss shows late or never. Its heads may do nothing: attend to all
tokens alike, or to the first one only (Xiao et al. 2024, arXiv 2309.17453). And its tokens may become alike, since a
weighted mean brings them together (Dong et al. 2021, arXiv 2103.03404). Recorded are

    uniform_heads       share of the heads whose weights have at least EVEN of the entropy of equal weights
    first_token_heads   share of the heads with at least SINK of their weight on the first token
    similarity_1, ...   mean cosine similarity of two tokens after layer 1, 2, ...: 1 if all have one direction

The first two count the heads of attention, layers L and S, and are missing without them. Cost: a forward pass of at
most LENGTH tokens, and computing their weights a second time. It draws no random numbers: a run with and without it is
the same.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.mixture import AnyShards
from inference.attention_patterns import evenness, first_token
from inference.attention_weights import each_layer, weights
from kernels.kv_cache import KVCache
from model import GPT, Attention, Block, ModelConfig
from training.device import Machine

LENGTH = KVCache.CHUNK  # tokens, at most: 256
EVEN, SINK = 0.95, 0.9
MANY, ALIKE = 0.5, 0.95  # share of heads, and similarity after the last layer, from which on there is advice


@torch.no_grad()  # as in validation_loss.py
def measure(model: GPT, text: AnyShards, machine: Machine) -> dict[str, float]:
    """The records above by name; none for a text or a context of a single token. In training: all processes take part,
    on the same tokens, as layers may be divided among them."""
    part, most = text.parts[0][0], min(LENGTH, model.config.context)
    tokens = torch.from_numpy(part.read(0, min(most, part.tokens)))
    if (start := model.model.document_start) is not None:  # the model sees one document at a time, from this token on
        tokens = torch.cat((torch.tensor([start]), tokens))[:most]
        begins = (tokens == start).nonzero()[1:, 0]
        tokens = max(tokens.tensor_split(begins), key=len)
    tokens = tokens.to(machine.device)
    if (T := len(tokens)) < 2:
        return {}
    # With a cache, processes that share sequences (context parallelism) compute whole ones, each alone.
    cache = KVCache(model.config, 1, max_seq_len=T, device=machine.device)
    similarities: list[float] = []

    def look(layer: Block, x: Tensor, cos: Tensor, sin: Tensor) -> list[tuple[bool, bool]]:
        """Of each head: whether it is uniform, and whether it is on the first token. x (1, T, C) is the layer's
        input."""
        similarities.append(similarity(x[0]))
        mixer: Any = layer.self_attn
        if not isinstance(mixer, Attention):
            return []
        found = weights(mixer, layer.input_layernorm(x), cos, sin)  # (H, T, T)
        even, sink = evenness(found, mixer.mask_spec.window) >= EVEN, first_token(found) >= SINK
        return list(zip(even.tolist(), sink.tolist(), strict=True))

    last = model.model.layers[-1].register_forward_hook(lambda _, inputs, out: similarities.append(similarity(out[0])))
    model.eval()
    try:
        with each_layer(model, look) as found, machine.autocast():
            model(tokens[None], cache)
    finally:
        last.remove()
        model.train()
    heads = [head for layer in found for head in layer]
    records = {"uniform_heads": 0, "first_token_heads": 1} if heads else {}
    shares = {name: sum(head[at] for head in heads) / len(heads) for name, at in records.items()}
    return shares | {f"similarity_{layer}": value for layer, value in enumerate(similarities[1:], 1)}


def similarity(x: Tensor) -> float:
    """Mean cosine similarity of two different tokens. x (T, C)."""
    x = F.normalize(x.cpu().double(), dim=1)  # an Apple GPU has no fp64
    T = len(x)
    return float((x.sum(0).square().sum() - x.square().sum()) / (T * (T - 1)))  # of all pairs


def advice(found: dict[str, float], config: ModelConfig) -> str:
    """A line for the log if there are signs of collapse, else "". It begins with a line break."""
    signs = []
    if (idle := found.get("uniform_heads", 0.0) + found.get("first_token_heads", 0.0)) >= MANY:
        flags = [f"model.{name} = true" for name in ("gate", "qk_norm") if can_turn_on(config, name)]
        remedy = " and ".join(flags) or "lower learning rates"
        what = "attend to all tokens alike or to the first one only"
        signs.append(f"{idle:.0%} of the heads {what} (what may help: {remedy})")
    if (alike := found.get(f"similarity_{config.n_layer}", 0.0)) >= ALIKE:
        # No remedy here: what prevents it in docs/11, the placement of norms and the initial values, model.py has.
        signs.append(f"tokens are alike after the last layer (cosine similarity {alike:.2f}; usual early in training)")
    return f"\nsigns of collapse: {'; '.join(signs)}" if signs else ""


def can_turn_on(config: ModelConfig, flag: str) -> bool:
    """Whether a flag of attention is off, and all layers permit it."""
    on: dict[str, Any] = {flag: True}
    try:
        dataclasses.replace(config, **on)
    except ValueError:  # a mixer of zoo/ does not support it
        return False
    return not getattr(config, flag)
