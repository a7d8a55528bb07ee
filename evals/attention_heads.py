"""What each head of a model does, over a text and over random tokens that are repeated; and are its maps right?"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from inference import attention_patterns as patterns
from inference.attention_weights import attention_weights, each_layer, layer_map
from inference.implied_maps import mixing
from model import GPT, Attention, Block

NAMED = 0.4  # weight from which on a head is named after a pattern
TEXTS, LENGTH = 4, 25  # random texts that are repeated, and tokens of each, at most: as Olsson et al.


class Head(NamedTuple):
    """What a head does. layer, head: numbers from 1. Entropy in nats, distance in tokens, patterns in shares."""

    layer: int
    head: int
    entropy: float
    evenness: float
    distance: float
    previous: float
    first: float
    induction: float

    @property
    def name(self) -> str:
        """The pattern with the largest share; "" below NAMED."""
        found = {"previous token": self.previous, "first token": self.first, "induction": self.induction}
        best = max(found, key=lambda name: found[name])
        return best if found[best] >= NAMED else ""


@torch.no_grad()
def inspect(model: GPT, tokenizer: Tokenizer, maps: list[Tensor | None]) -> list[Head]:
    """Every head of the layers that have a map. Induction is measured on texts of its own."""
    induction = induction_scores(model, tokenizer)
    heads = []
    for layer, found in enumerate(maps):
        if found is None:
            continue
        share, window = patterns.shares(found), model.config.mask_spec(layer).window
        columns = (
            patterns.entropy(share), patterns.evenness(share, window), patterns.distance(share),
            patterns.previous_token(share), patterns.first_token(share), induction[layer],
        )  # fmt: skip
        heads += [Head(layer + 1, h + 1, *numbers) for h, numbers in enumerate(torch.stack(columns, 1).tolist())]
    return heads


def induction_scores(model: GPT, tokenizer: Tokenizer) -> dict[int, Tensor]:
    """The induction score of each head, (H,), by layer, over TEXTS random texts."""
    scores: dict[int, Tensor] = {}
    for seed in range(TEXTS):
        for layer, found in enumerate(attention_weights(model, random_text(model, tokenizer, seed))):
            if found is not None:
                scores[layer] = scores.get(layer, 0) + patterns.induction(patterns.shares(found)) / TEXTS
    return scores


def random_text(model: GPT, tokenizer: Tokenizer, seed: int) -> Tensor:
    """A document that begins with random tokens, all different, followed by the same tokens again: (1 + 2 * length,),
    as many as fit, on the model's device. Raises ValueError if none do."""
    special = {token for token, about in tokenizer.inner.get_added_tokens_decoder().items() if about.special}
    others = torch.tensor([token for token in range(tokenizer.vocab_size) if token not in special])
    length = min(LENGTH, (model.config.context - 1) // 2, len(others))
    if length < 2:
        raise ValueError(f"model.context = {model.config.context}: no text can be repeated within it")
    start = torch.tensor((tokenizer.bos_tokens or [tokenizer.eot])[:1])
    return torch.cat((start, patterns.repeated(others, length, seed))).to(model.model.cos.device)


@torch.no_grad()
def losses(model: GPT, tokenizer: Tokenizer) -> tuple[float, float]:
    """Mean loss of the random texts' tokens at their first and at their second occurrence, in nats/token."""
    found = []
    for seed in range(TEXTS):
        text = random_text(model, tokenizer, seed)
        loss = -model(text[None, :-1])[0].float().log_softmax(1).gather(1, text[1:, None])[:, 0]  # (2 * length,)
        half = len(loss) // 2
        # Nothing predicts the first token of the second half: the one before it has not been there yet.
        found.append([float(loss[:half].mean()), float(loss[half + 1 :].mean())])
    first, second = torch.tensor(found).mean(0).tolist()
    return first, second


@torch.no_grad()
def difference(model: GPT, tokens: Tensor) -> float:
    """How much the maps, times the values, differ from what each layer computes on the same input: the largest
    difference of a layer, relative to its largest output. With the kernel that the model uses."""

    def look(layer: Block, x: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> float:
        found, mixer = layer_map(layer, x, cos, sin, **options), layer.self_attn
        if found is None:
            return 0.0
        x = layer.input_layernorm(x)
        with mixing(mixer, cos.shape[-1]) as (values, outs):
            mixer(x, cos, sin, None, **options)
        v = values[0].repeat_interleave(len(found) // values[0].shape[1], 1)  # (T, K, D) -> (T, H, D)
        expected = torch.einsum("hts,shd->thd", found, v.to(found.dtype))
        gate = mixer.project(x, cos, sin)[3] if isinstance(mixer, Attention) else None
        if gate is not None:
            expected = expected * gate[0].sigmoid()
        return float((expected - outs[0]).abs().max() / outs[0].abs().max().clamp(min=1e-30))

    with each_layer(model, look) as found:
        model.model(tokens[None])
    return max(found)
