"""M, Mamba-2 (Dao & Gu 2024, arXiv 2405.21060, sections 5 to 7): a state space model as linear attention.

A head's state S has STATE numbers for each channel of its input x; B_t and C_t, shared by all heads, are the key under
which the token x_t is written and the query with which S is read. With a large step size dt_t, a token is written
strongly and the past decays. A short convolution mixes x, B and C with those of the three tokens before.

    S <- exp(-exp(A_log) dt_t) S + B_t (dt_t x_t)^T;   y_t = S^T C_t + D x_t;   out_t = W RMSNorm(y_t silu(z_t))
    dt_t = softplus(W_dt x_t + dt_bias)

Cost: O(H D STATE) per token and (STATE + 3) H D + 6 STATE numbers per sequence, H = 2 n_head: the inner width is twice
that of attention. Weights and computation are those of transformers' Mamba2Mixer with one group of B and C.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.kv_cache import KVCache
from zoo.causal_conv import causal_conv
from zoo.scan import init_decay, scan, upcast

STATE = 64  # numbers per channel
CONV = 4  # tokens that the convolution reads


class Mamba2(nn.Module):
    """The mechanism above, with 2 n_head heads of head_dim."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        C, H, D = config.n_embd, 2 * config.n_head, config.head_dim
        mixed = H * D + 2 * STATE  # channels of x, B and C
        self.layer, self.inner = layer, H * D
        self.in_proj = nn.Linear(C, H * D + mixed + H, bias=False)  # z, then x, B and C, then dt
        self.conv1d = nn.Conv1d(mixed, mixed, CONV, groups=mixed)  # only its weight and bias are used
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.A_log = nn.Parameter(torch.empty(H))
        self.D = nn.Parameter(torch.empty(H))
        self.norm = nn.RMSNorm(H * D, eps=config.norm_eps)
        self.out_proj = nn.Linear(H * D, C, bias=False)

    def init_own_weights(self) -> None:
        """Initialize the decay and the convolution's bias; the rest is as in GPT.init_weights."""
        init_decay(self.A_log, self.dt_bias)
        nn.init.zeros_(self.conv1d.get_parameter("bias"))

    @staticmethod
    def state_shapes(config: Any, layer: int, batch: int, context: int) -> list[tuple[int, ...]]:
        """S, and the inputs of the convolution from the last tokens."""
        H, D = 2 * config.n_head, config.head_dim
        return [(batch, H, STATE, D), (batch, CONV - 1, H * D + 2 * STATE)]

    @staticmethod
    def multiply_adds(config: Any) -> int:
        """S is written, and read."""
        return 2 * 2 * config.n_head * config.head_dim * STATE

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        inner, H = self.inner, len(self.D)
        S, tail = (None, None) if cache is None else cache.states(self.layer)
        z, xBC, dt = self.in_proj(x).split((inner, inner + 2 * STATE, H), 2)  # (B, T, H * D), (B, T, mixed), (B, T, H)
        xBC, tail = causal_conv(xBC, self.conv1d.weight, tail, self.conv1d.bias)
        values, keys, queries = F.silu(xBC).split((inner, STATE, STATE), 2)  # x (B, T, H * D), B and C (B, T, STATE)
        values = values.unflatten(2, (H, -1))  # (B, T, H, D)
        dt = F.softplus(upcast(dt) + self.dt_bias)[..., None]  # (B, T, H, 1)
        decay = -upcast(self.A_log).exp() * dt[..., 0]
        y, S = scan(queries[:, :, None], keys[:, :, None], dt * values, decay, None, S)  # (B, T, H, D)
        if cache is not None:
            cache.replace(self.layer, S, tail)
        y = (y + self.D[:, None] * values).flatten(2) * F.silu(upcast(z))  # (B, T, H, D) -> (B, T, H * D)
        return self.out_proj(self.norm(y.to(self.norm.weight.dtype)))  # (B, T, H * D) -> (B, T, C)
