"""K, linear attention (Katharopoulos et al. 2020, arXiv 2006.16236, equations 7 to 20): attention that is a recurrence.

Attention weighs a value by exp(q . k). With phi(q) . phi(k) in its place, the query can be taken out of the sum over
the keys: what is left are a matrix S and a vector z per head, to which each token adds, and which each query reads.
Weights are positive, as phi is, and add up to 1.

    S <- S + phi(k_t) v_t^T;   z <- z + phi(k_t);   out_t = S^T phi(q_t) / (z . phi(q_t));   phi(x) = elu(x) + 1

Cost: O(H D^2) per token and K D (D + 1) numbers per sequence. All around it is model.Attention's, GQA and QK-norm
included. The paper adds positions to the embedding; heed's RoPE rotates q and k before phi, so weights stay positive.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kernels.kv_cache import KVCache
from zoo.attention_projections import AttentionProjections
from zoo.scan import scan, upcast


class LinearAttention(AttentionProjections):
    """The mechanism above, with the heads of model.Attention."""

    keeps_keys = False  # but a state

    @staticmethod
    def state_shapes(config: Any, layer: int, batch: int, context: int) -> list[tuple[int, ...]]:
        """S with z as its last column, for each group of query heads."""
        return [(batch, config.n_kv_head, 1, config.head_dim, config.head_dim + 1)]

    @staticmethod
    def multiply_adds(config: Any) -> int:
        """S is written by each key, S and z are read by each query."""
        H, K, D = config.n_head, config.n_kv_head, config.head_dim
        return K * D**2 + H * D * (D + 1)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        (S,) = (None,) if cache is None else cache.states(self.layer)
        q, k, v = (upcast(y) for y in self.project(x, cos, sin))  # (B, T, H, D), (B, T, K, D) twice
        decay = q.new_zeros(1, x.shape[1], 1)  # none
        out, S = weighted_mean(phi(q), phi(k), v, decay, S)  # (B, T, H, D)
        if cache is not None:
            cache.replace(self.layer, S)
        return self.o_proj(out.flatten(2).to(x.dtype))  # (B, T, H, D) -> (B, T, H * D) -> (B, T, C)


def phi(x: Tensor) -> Tensor:
    """elu(x) + 1, without the rounding of small values to 0."""
    return x.clamp(max=0).exp() + x.relu()


def weighted_mean(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """For each token t: the mean of the values v_s, s <= t, with the weights q_t . k_s, times the decay from s to t.

    Args:
        q: (B, T, H, N), k: (B, T, K, N), none negative. v: (B, T, K, P).
        decay: (B or 1, T, K or 1), logarithm.
        state: (B, K, 1, N, P + 1), as returned for the tokens before; None: there are none.
    Returns:
        (B, T, H, P), and the next state: sums over the tokens of k v^T, and of k in the last column.
    """
    q = q.unflatten(2, (k.shape[2], -1))  # (B, T, K, H/K, N)
    v = F.pad(v, (0, 1), value=1.0)  # a column that sums the weights
    out, state = scan(q, k[:, :, :, None], v[:, :, :, None], decay[..., None], None, state)
    total = out[..., -1:].clamp(min=1e-30)  # 0 if all weights underflow
    return (out[..., :-1] / total).flatten(2, 3), state  # (B, T, K, H/K, P) -> (B, T, H, P)
