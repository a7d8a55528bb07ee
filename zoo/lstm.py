"""R, the LSTM (Hochreiter & Schmidhuber 1997, section 4; the forget gate: Gers, Schmidhuber & Cummins 2000, section 3).

The state is two vectors: the cell c, which each token fades and adds to, and the output h, which the gates of the next
token read. Since the gates depend on h, tokens are computed one after another: unlike the other recurrences of zoo/, an
LSTM has no parallel form for training and prefill.

    (i, f, g, o)_t = W x_t + b + U h_(t - 1) + b'
    c_t = sigmoid(f_t) c_(t - 1) + sigmoid(i_t) tanh(g_t),   h_t = sigmoid(o_t) tanh(c_t),   out_t = h_t

Cost: O(C^2) per token and 2 C numbers per sequence, whatever the context. The hidden size is n_embd, without heads, so
no output projection is needed: 8 C^2 weights. torch's nn.LSTM computes it, in fp32, since c sums over many tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kernels.kv_cache import KVCache
from zoo.scan import upcast


class LSTM(nn.Module):
    """The mechanism above, in one layer."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.lstm = nn.LSTM(config.n_embd, config.n_embd, batch_first=True)

    def init_own_weights(self) -> None:
        """Initialize all weights: matrices as nn.LSTM's, uniform up to 1 / sqrt(C), biases with 0, b of the forget gate
        with 1: a cell remembers a few tokens at first (Gers et al. 2000: a positive bias; Jozefowicz 2015: 1)."""
        self.lstm.reset_parameters()
        _, _, b, b2 = self.lstm.all_weights[0]
        nn.init.zeros_(b)
        nn.init.zeros_(b2)
        nn.init.ones_(b.chunk(4)[1])  # of i, f, g and o

    @staticmethod
    def state_shapes(config: Any, layer: int, batch: int, context: int) -> list[tuple[int, ...]]:
        """h and c."""
        return [(batch, config.n_embd)] * 2

    @staticmethod
    def multiply_adds(config: Any) -> int:
        """None: all products are with weights."""
        return 0

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        weights = {name: upcast(p) for name, p in self.lstm.named_parameters()}
        states = None if cache is None else tuple(state[None] for state in cache.states(self.layer))  # (1, B, C) each
        with torch.autocast(x.device.type, enabled=False):
            out, (h, c) = functional_call(self.lstm, weights, (upcast(x), states))  # (B, T, C), and (1, B, C) each
        if cache is not None:
            cache.replace(self.layer, h[0], c[0])
        return out.to(x.dtype)
