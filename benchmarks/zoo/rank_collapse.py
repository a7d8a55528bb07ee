"""Do all tokens become alike with depth? Rank collapse, in models without training.

Attention replaces a token by a mean of tokens, so a stack of attention alone makes all of them equal, and residual
connections prevent it (Dong et al. 2021, arXiv 2103.03404). Measured: the mean cosine similarity of two tokens of a
sequence after each of 48 layers, with random weights and tokens that are all different. It is 1 if the tokens have one
direction. The blocks are

- attention alone, without residual connection and feed-forward network;
- post-norm, the norm after each residual connection (Vaswani et al. 2017, section 3.1);
- pre-norm, the norm before attention and feed-forward network, as in model.py (Xiong et al. 2020, arXiv 2002.04745).

Initial values are "plain": embeddings of size 1, and matrices that keep the size of their input; "scaled": the matrices
that write to the residual stream divided by sqrt(2 n_layer); or "heed": model.py's, which are the scaled ones with
embeddings of size 0.02.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.zoo.pictures import Curves, Panel, draw
from benchmarks.zoo.results import Point, Row, groups, markdown, mean
from model import GPT, Block, KVCache, ModelConfig

EXCLUSIVE = False
LAYERS, LENGTH, VOCAB = 48, 64, 256
DEPTHS = (1, 2, 4, 8, 16, 32, 48)
MEASURES = tuple(f"similarity at {depth}" for depth in DEPTHS)


def attention_alone(block: Block, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
    """Block.forward with attention only. The norm keeps the size of x, and no cosine depends on it."""
    return block.self_attn(block.input_layernorm(x), cos, sin, cache)


def post_norm(block: Block, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
    """Block.forward with each norm after the residual connection."""
    x = block.input_layernorm(x + F.dropout(block.self_attn(x, cos, sin, cache), block.dropout, block.training))
    return block.post_attention_layernorm(x + F.dropout(block.mlp(x), block.dropout, block.training))


BLOCKS: dict[str, Callable[..., Tensor]] = {
    "attention alone": attention_alone,
    "post-norm": post_norm,
    "pre-norm": Block.forward,
}


def use_blocks(model: GPT, blocks: str) -> None:
    """Replace the forward of every layer by one of BLOCKS, in place."""
    for block in model.model.layers:
        block.forward = functools.partial(BLOCKS[blocks], block)


def points(scale: str, seeds: int) -> list[Point]:
    kinds = [("attention alone", "plain"), ("pre-norm", "heed")]
    kinds += [(blocks, values) for values in ("plain", "scaled") for blocks in ("post-norm", "pre-norm")]
    return [
        {"blocks": blocks, "initial_values": values, "seed": seed} for seed in range(seeds) for blocks, values in kinds
    ]


@torch.no_grad()
def measure(blocks: str, initial_values: str, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    model = GPT(
        ModelConfig(
            vocab_size=VOCAB, context=LENGTH, n_layer=LAYERS, n_embd=64, n_head=4, n_kv_head=4, head_dim=16, n_ffn=176
        )
    )
    initialize(model, initial_values)
    use_blocks(model, blocks)
    similarities = list[float]()
    for block in model.model.layers:
        block.register_forward_hook(lambda *call: similarities.append(similarity(call[-1])))
    model(torch.rand(8, VOCAB).argsort(1)[:, :LENGTH])  # distinct tokens
    return {f"similarity at {depth}": similarities[depth - 1] for depth in DEPTHS}


def initialize(model: GPT, values: str) -> None:
    """Change the initial values of model.py to "plain" or "scaled", in place."""
    for name, p in model.named_parameters():
        if values != "heed" and name.endswith("embed_tokens.weight"):
            torch.nn.init.normal_(p)
        if values == "plain" and name.endswith(("o_proj.weight", "down_proj.weight")):
            p.mul_((2 * model.config.n_layer) ** 0.5)


def similarity(x: Tensor) -> float:
    """Mean cosine similarity of two different tokens of a sequence. x (B, T, C)."""
    x = F.normalize(x.double(), dim=2)
    T = x.shape[1]
    return float((x.sum(1).square().sum(1).mean() - T) / (T * (T - 1)))  # all pairs, without those of a token itself


def table(rows: list[Row]) -> str:
    body = [
        [*kind, *(f"{mean(own, name):.3f}" for name in MEASURES)]
        for kind, own in groups(rows, "blocks", "initial_values").items()
    ]
    return markdown(["blocks", "initial values", *MEASURES], body)


def picture(rows: list[Row], path: Path) -> None:
    kinds = groups(rows, "blocks", "initial_values").items()
    curves: Curves = {", ".join(kind): (DEPTHS, [mean(own, name) for name in MEASURES]) for kind, own in kinds}
    draw(path, [[Panel(curves, "layers", "cosine similarity of tokens", log="x")]])
