"""D, Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464, section 3): linear attention that forgets and corrects itself.

A head's state S is a matrix that maps keys to values. Before a token writes its value, it fades the whole state by a
decay and subtracts what S holds under its key: so a key written twice has its last value, not the sum of both. A short
convolution mixes each query, key and value with those of the three tokens before it.

    S <- a_t S;   S <- S + k_t (b_t (v_t - S^T k_t))^T;   out_t = RMSNorm(S^T q_t / sqrt(D)) silu(z_t)
    a_t = exp(-exp(A_log) softplus(W_a x_t + dt_bias)),   b_t = sigmoid(W_b x_t),   |k_t| = |q_t| = 1

Cost: O(H D^2) per token and H D^2 + 9 H D numbers per sequence, whatever the context; attention keeps 2 K D per token.
Weights and computation are those of transformers' Qwen3NextGatedDeltaNet with as many key heads as value heads.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.kv_cache import KVCache
from zoo.causal_conv import causal_conv
from zoo.scan import init_decay, scan, upcast

CONV = 4  # tokens that the convolution reads


class GatedDeltaNet(nn.Module):
    """The mechanism above, with n_head heads of head_dim."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        C, H, D = config.n_embd, config.n_head, config.head_dim
        self.layer, self.n_head, self.head_dim = layer, H, D
        self.in_proj_qkvz = nn.Linear(C, H * 4 * D, bias=False)  # a head's D rows of q, then of k, v and z
        self.in_proj_ba = nn.Linear(C, H * 2, bias=False)
        self.conv1d = nn.Conv1d(3 * H * D, 3 * H * D, CONV, groups=3 * H * D, bias=False)  # only its weight is used
        self.A_log = nn.Parameter(torch.empty(H))
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.norm = nn.RMSNorm(D, eps=config.norm_eps)
        self.out_proj = nn.Linear(H * D, C, bias=False)

    def init_own_weights(self) -> None:
        """Initialize the decay; the rest is as in GPT.init_weights."""
        init_decay(self.A_log, self.dt_bias)

    @staticmethod
    def state_shapes(config: Any, layer: int, batch: int, context: int) -> list[tuple[int, ...]]:
        """S, and the inputs of the convolution from the last tokens."""
        H, D = config.n_head, config.head_dim
        return [(batch, H, D, D), (batch, CONV - 1, 3 * H * D)]

    @staticmethod
    def multiply_adds(config: Any) -> int:
        """S is read by the key, written, and read by the query."""
        return 3 * config.n_head * config.head_dim**2

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        (B, T, _), H, D = x.shape, self.n_head, self.head_dim
        S, tail = (None, None) if cache is None else cache.states(self.layer)
        qkv, z = self.in_proj_qkvz(x).view(B, T, H, 4, D).split((3, 1), 3)  # (B, T, H, 3 and 1, D)
        b, a = upcast(self.in_proj_ba(x)).view(B, T, H, 2).unbind(3)  # (B, T, H) each
        qkv, tail = causal_conv(qkv.transpose(2, 3).flatten(2), self.conv1d.weight, tail)  # (B, T, 3 * H * D)
        q, k, v = F.silu(qkv).view(B, T, 3, H, D).unbind(2)  # (B, T, H, D) each
        decay = -upcast(self.A_log).exp() * F.softplus(a + self.dt_bias)  # (B, T, H)
        out, S = scan(unit(q) * D**-0.5, unit(k), v, decay, b.sigmoid(), S)  # (B, T, H, D)
        if cache is not None:
            cache.replace(self.layer, S, tail)
        out = self.norm(out.to(self.norm.weight.dtype)) * F.silu(z[..., 0, :])
        return self.out_proj(out.flatten(2))  # (B, T, H, D) -> (B, T, H * D) -> (B, T, C)


def unit(x: Tensor) -> Tensor:
    """The last dimension scaled to length 1; the 1e-6 as in Qwen3-Next."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
