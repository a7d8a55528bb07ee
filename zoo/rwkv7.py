"""W, RWKV-7 (Peng et al. 2025, arXiv 2503.14456, section 4): the delta rule with a decay and a rate per channel.

A head's state S maps keys to values, as in Gated DeltaNet; but each channel of the key has its own decay and its own
rate of correction, and the key that is corrected is not the one that is written. Decay, rate and gate come from
matrices of low rank. Each of the six inputs is a learned mixture of a token with the one before it (token shift).

    S <- diag(w_t) S - (a_t kk_t) (kk_t^T S) + k_t v_t^T;   out_t = (GroupNorm(S^T r_t) + (r_t . r_k k_t) v_t) g_t
    w_t = exp(-e^-0.5 sigmoid(w0 + tanh(x w1) w2)),   a_t = sigmoid(a0 + x a1 a2),   g_t = sigmoid(x g1) g2
    kk_t = k k_k / |k k_k|,   k_t = k (1 + (a_t - 1) k_a),   x = x_t + mix (x_(t - 1) - x_t)

Cost: O(H D^2) per token and H D^2 + C numbers per sequence. Names and initial values are those of the author's code
(github.com/BlinkDL/RWKV-LM), each layer as its first: the others mix in the first layer's values.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.kv_cache import KVCache
from zoo.rank_one_scan import rank_one_scan
from zoo.scan import upcast


class RWKV7(nn.Module):
    """The mechanism above, with n_head heads of head_dim."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        C, H, D = config.n_embd, config.n_head, config.head_dim
        self.layer, self.n_layer, self.n_head = layer, config.n_layer, H
        small, large = (max(32, round(factor * C**0.5 / 32) * 32) for factor in (2.5, 5))  # ranks

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape))

        self.x_rwkvag = empty(6, 1, 1, C)  # the author's x_r, x_w, x_k, x_v, x_a and x_g
        self.w0, self.w1, self.w2 = empty(H * D), empty(C, small), empty(small, H * D)
        self.a0, self.a1, self.a2 = empty(H * D), empty(C, small), empty(small, H * D)
        self.g1, self.g2 = empty(C, large), empty(large, H * D)
        self.k_k, self.k_a, self.r_k = (empty(H * D) for _ in range(3))
        self.receptance, self.key, self.value = (nn.Linear(C, H * D, bias=False) for _ in range(3))
        self.output = nn.Linear(H * D, C, bias=False)
        self.ln_x = nn.GroupNorm(H, H * D, eps=64e-5)

    @torch.no_grad()
    def init_own_weights(self) -> None:
        """Initialize all weights: channels remember from two to some thousand tokens, and the output is 0 at first."""
        C, H, HD = self.x_rwkvag.shape[3], self.n_head, len(self.w0)
        power = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2]).view(6, 1, 1, 1) * (1 - self.layer / self.n_layer)
        self.x_rwkvag.copy_(1 - (torch.arange(C) / C) ** power)
        rising, within = torch.linspace(0, 1, HD), torch.linspace(-1, 1, HD // H)
        within = (within * within.abs()).repeat(H)  # from -1 to 1 in each head
        depth = self.layer / max(self.n_layer - 1, 1)  # from 0 to 1
        self.w0.copy_(-5.5 + 6 * rising ** (1 + depth**0.3) + 2.5 * within)
        self.a0.copy_(-0.39 + 0.4 * rising + 0.3 * within)
        self.k_k.copy_(0.76 - 0.1 * rising)
        nn.init.constant_(self.k_a, 1.02)
        nn.init.constant_(self.r_k, -0.04)
        for first, second in ((self.w1, self.w2), (self.a1, self.a2), (self.g1, self.g2)):
            nn.init.zeros_(first)
            nn.init.orthogonal_(second, gain=0.1 * max(1, second.shape[0] / second.shape[1]) ** 0.5)
        for linear, bound in ((self.receptance, 0.5), (self.key, 0.05), (self.value, 0.5), (self.output, 0.0)):
            nn.init.uniform_(linear.weight, -bound * C**-0.5, bound * C**-0.5)
        nn.init.constant_(self.ln_x.weight, ((self.layer + 1) / self.n_layer) ** 0.7)
        nn.init.zeros_(self.ln_x.bias)

    @staticmethod
    def state_shapes(config: Any, layer: int, batch: int, context: int) -> list[tuple[int, ...]]:
        """S, and the last token's input."""
        H, D = config.n_head, config.head_dim
        return [(batch, H, D, D), (batch, 1, config.n_embd)]

    @staticmethod
    def multiply_adds(config: Any) -> int:
        """S is read by kk, written twice, and read by r."""
        return 4 * config.n_head * config.head_dim**2

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        S, last = (None, None) if cache is None else cache.states(self.layer)
        x, dtype = upcast(x), x.dtype
        before = F.pad(x, (0, 0, 1, -1)) if last is None else torch.cat((last, x[:, :-1]), 1)  # (B, T, C)
        xr, xw, xk, xv, xa, xg = torch.lerp(x, before, upcast(self.x_rwkvag)).to(self.w0.dtype)  # (B, T, C) each
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)  # (B, T, H * D) each, as w, a and g
        w = self.w0 + (xw @ self.w1).tanh() @ self.w2
        a = (self.a0 + xa @ self.a1 @ self.a2).sigmoid()
        g = (xg @ self.g1).sigmoid() @ self.g2
        vectors = (r, v, w, a, k * self.k_k, k * (1 + (a - 1) * self.k_a), r * self.r_k)
        r, v, w, a, kk, k, r_k = (upcast(y).unflatten(2, (self.n_head, -1)) for y in vectors)  # (B, T, H, D) each
        kk = F.normalize(kk, dim=-1)
        out, S = rank_one_scan(r, k, v, -(math.e**-0.5) * w.sigmoid(), -kk, kk * a, S)  # (B, T, H, D)
        if cache is not None:
            cache.replace(self.layer, S, x[:, -1:])
        out = self.ln_x(out.flatten(2).flatten(0, 1).to(self.ln_x.weight.dtype)).view_as(g)  # as (B * T, H * D)
        out = out + ((r_k * k).sum(-1, keepdim=True) * v).flatten(2)
        return self.output((out * g).to(dtype))  # (B, T, H * D) -> (B, T, C)
