"""A, additive attention (Bahdanau et al. 2015, arXiv 1409.0473, 3.1 and A.1.2): the first attention, here causal.

The score of a query and a key is not their product, but the output of a small network with one hidden layer. Its first
matrix has a part for the query and one for the key, so each token is multiplied by it once. The paper's queries come
from a decoder and its keys from an encoder; here both come from one text, and there are several heads.

    out_t = softmax over s <= t of (v_a . tanh(q_t + k_s)) v_s;   q_t = W_a x_t, k_s = U_a x_s, one v_a for each head

Cost: attention's in multiply-adds and in cache, but also O(T H D) tanh per token, and no large matmul. This makes it
the slowest mixer, and is why Vaswani et al. 2017 (section 3.2.1) prefer products. A block of queries needs H BLOCK T D
numbers per sequence (zoo/query_blocks.py). Queries and keys are normed, if `qk_norm` is true, but not rotated: the
tanh of a sum of rotated vectors is not a function of t - s. Positions come from `positions` = sinusoidal or learned,
or from other layers: with LSTMs, "RA", similar to the paper's gated recurrent units.

Luong et al. 2015 (arXiv 1508.04025, section 3.1, equation 8) compare more scores. Two are flags of attention, L: "dot",
h_t . h_s, is scale_scores = false and qk_norm = false; "general", h_t . W h_s, is the same with W = W_q^T W_k.
"""

from typing import Any

import torch
from torch import Tensor, nn

from zoo.query_blocks import QueryBlocks


class AdditiveAttention(QueryBlocks):
    """The mechanism above, with the projections and heads of model.Attention: q_proj is W_a and k_proj is U_a."""

    rotary = False

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(config, layer)
        self.v_a = nn.Parameter(torch.empty(config.n_head * config.head_dim))

    def init_own_weights(self) -> None:
        """Initialize v_a as a row of a matrix: scores have a standard deviation below 1."""
        nn.init.normal_(self.v_a, std=self.head_dim**-0.5)

    @staticmethod
    def multiply_adds(config: Any) -> int:
        """Scores and weighted sum, over (context + 1) / 2 keys in the mean."""
        return config.n_head * config.head_dim * (config.context + 1)

    def weights(self, q: Tensor, k: Tensor, distance: Tensor) -> Tensor:
        hidden = (q[:, :, :, None] + k[:, :, None]).tanh()  # (B, H, R, S, D)
        scores = hidden @ self.v_a.to(hidden.dtype).view(-1, 1, self.head_dim, 1)  # (B, H, R, S, 1)
        return scores[..., 0].masked_fill(distance < 0, -torch.inf).softmax(-1)
