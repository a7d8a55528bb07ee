"""The truth for mixers that are attention with a mask: every score, in fp64."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model import ModelConfig, apply_rotary_emb, precompute_rope


def dense_attention(weights: dict[str, Tensor], x: Tensor, mask: Tensor, config: ModelConfig) -> Tensor:
    """Attention of model.Attention's weights, head by head. x (T, C); mask (H, T, T), true where a query reads a key.
    Returns (T, C)."""
    D, G, T = config.head_dim, config.n_head // config.n_kv_head, len(x)
    cos, sin = (table[:T].to(x.dtype) for table in precompute_rope(config))

    def head(name: str, h: int) -> Tensor:
        return x @ weights[f"{name}_proj.weight"][h * D : (h + 1) * D].T  # (T, D)

    out = []
    for h in range(config.n_head):
        q, k = (
            apply_rotary_emb(F.rms_norm(head(name, i), (D,), weights[f"{name}_norm.weight"], config.norm_eps), cos, sin)
            for name, i in (("q", h), ("k", h // G))
        )
        scores = (q @ k.T / D**0.5).masked_fill(~mask[h], -torch.inf)
        out.append(scores.softmax(-1) @ head("v", h // G))
    return torch.cat(out, 1) @ weights["o_proj.weight"].T
