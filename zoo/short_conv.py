"""C, the gated short convolution of LFM2 (Liquid AI 2025, arXiv 2511.23404): a token sees itself and two before it.

Two gates, linear in the token, decide what enters the convolution and what leaves it. Between layers of another kind,
it provides the last few tokens at little cost and leaves what is farther away to the others (Arora et al. 2024,
"Based", arXiv 2402.18668).

    out_t = W_o (c_t * sum over i < CONV of weight_(CONV - 1 - i) * b_(t - i) * y_(t - i)),   (b_t, c_t, y_t) = W_i x_t

Cost: O(C^2) per token and (CONV - 1) C numbers per sequence, whatever the context.
Weights and computation are those of transformers' Lfm2ShortConv without bias.
"""

from typing import Any

from torch import Tensor, nn

from kernels.kv_cache import KVCache
from zoo.causal_conv import causal_conv

CONV = 3  # tokens that the convolution reads


class ShortConv(nn.Module):
    """The mechanism above, over all n_embd channels."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        C = config.n_embd
        self.layer = layer
        self.in_proj = nn.Linear(C, 3 * C, bias=False)  # C rows of b, then of c and of x
        self.conv = nn.Conv1d(C, C, CONV, groups=C, bias=False)  # only its weight is used
        self.out_proj = nn.Linear(C, C, bias=False)

    @staticmethod
    def state_shapes(config: Any, layer: int, batch: int, context: int) -> list[tuple[int, ...]]:
        """The inputs of the convolution from the last tokens."""
        return [(batch, CONV - 1, config.n_embd)]

    @staticmethod
    def multiply_adds(config: Any) -> int:
        """None: all products are with weights."""
        return 0

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        (tail,) = (None,) if cache is None else cache.states(self.layer)
        b, c, y = self.in_proj(x).chunk(3, 2)  # (B, T, 3 * C) -> (B, T, C) each
        y, tail = causal_conv(b * y, self.conv.weight, tail)
        if cache is not None:
            cache.replace(self.layer, tail)
        return self.out_proj((c * y).to(x.dtype))
