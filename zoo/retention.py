"""T, retention (Sun et al. 2023, arXiv 2307.08621, equations 3 to 8): linear attention that fades at a fixed rate.

Without softmax, the sum over keys is a matrix S per head. Each token first multiplies it by gamma, a constant of the
head: head h = 0, 1, ... sees the last 2^(5 + h) tokens or so. RoPE gives relative positions, which together with the
decay are the paper's xPos.

    S <- gamma_h S + k_t v_t^T;   out_t = W_o (RMSNorm(S^T q_t / sqrt(D)) silu(W_g x_t));   gamma_h = 1 - 2^(-5 - h)

Cost: O(H D^2) per token and K D^2 numbers per sequence. The norm of each head's output, in place of a division by the
sum of the weights, is that of the authors' code (torchscale), where the paper has GroupNorm; the values are as wide as
the keys, where its models have twice the width. With `qk_norm`, queries and keys are normed as in model.Attention, not
in the paper. Groups of query heads (GQA) share a key, value and gamma.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.kv_cache import KVCache
from zoo.attention_projections import AttentionProjections
from zoo.scan import scan, upcast


class Retention(AttentionProjections):
    """The mechanism above, with the heads of model.Attention."""

    keeps_keys = False  # but a state

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(config, layer)
        self.g_proj = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias=False)
        self.group_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps, elementwise_affine=False)

    @staticmethod
    def state_shapes(config: Any, layer: int, batch: int, context: int) -> list[tuple[int, ...]]:
        """S, for each group of query heads."""
        return [(batch, config.n_kv_head, 1, config.head_dim, config.head_dim)]

    @staticmethod
    def multiply_adds(config: Any) -> int:
        """S is written by each key, and read by each query."""
        return (config.n_kv_head + config.n_head) * config.head_dim**2

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        (S,) = (None,) if cache is None else cache.states(self.layer)
        q, k, v = self.project(x, cos, sin)  # (B, T, H, D), (B, T, K, D) twice
        T, K, D = k.shape[1:]
        h = torch.arange(K, device=x.device, dtype=upcast(x).dtype)
        decay = torch.log1p(-(2.0 ** (-5 - h))).expand(1, T, K)
        q = q.unflatten(2, (K, -1)) * D**-0.5  # (B, T, K, H/K, D)
        out, S = scan(q, k[:, :, :, None], v[:, :, :, None], decay[..., None], None, S)  # (B, T, K, H/K, D)
        if cache is not None:
            cache.replace(self.layer, S)
        out = self.group_norm(out).flatten(2) * F.silu(self.g_proj(x))  # (B, T, H * D)
        return self.o_proj(out.to(x.dtype))  # (B, T, H * D) -> (B, T, C)
