"""Queries, keys and values as model.Attention computes them, for mixers that differ in which keys a query reads.

Their parameters have its names and shapes, so weights that were trained with attention can be loaded. There is no gate.
"""

from typing import Any, ClassVar

from torch import Tensor, nn


class AttentionProjections(nn.Module):
    """The four projections of grouped-query attention, QK-norm and RoPE, and a cache of keys and values."""

    keeps_keys = True
    rotary = True  # whether queries and keys are rotated
    unsupported: ClassVar[dict[str, Any]] = {"positions": "alibi", "scale_scores": False, "gate": True}

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        C, H, K, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.layer, self.head_dim = layer, D
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, K * D, bias=False)
        self.v_proj = nn.Linear(C, K * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        self.q_norm = nn.RMSNorm(D, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(D, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    @staticmethod
    def state_shapes(config: Any, layer: int, batch: int, context: int) -> list[tuple[int, ...]]:
        """Keys and values."""
        return [(batch, context, config.n_kv_head, config.head_dim)] * 2  # (B, S, K, D)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> q (B, T, H, D), k and v (B, T, K, D); q and k normed, and rotated if `rotary`."""
        q, k, v = (p(x).unflatten(2, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:  # as model.apply_rotary_emb: sin's first half is negated
            q, k = (y * cos + y.roll(self.head_dim // 2, -1) * sin for y in (q, k))
        return q, k, v
