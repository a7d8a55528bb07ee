"""P, Performer (Choromanski et al. 2020, arXiv 2009.14794, section 2): softmax attention from random features, FAVOR+.

For normally distributed w, exp(q . k) is the expectation of exp(w . q - |q|^2 / 2) exp(w . k - |k|^2 / 2). Linear
attention with m such features therefore estimates softmax attention. The error falls as 1 / sqrt(m), less for vectors w
that are orthogonal, but grows as exp(|q + k|^2 / 2): q and k must be short.

    phi(x)_i = exp(w_i . x' - |x'|^2 / 2) / sqrt(m),   x' = x / D^(1/4)
    S <- S + phi(k_t) v_t^T;   z <- z + phi(k_t);   out_t = S^T phi(q_t) / (z . phi(q_t))

A factor on all features of a query, or on those of all keys, changes nothing. So the largest feature of each query is
made 1, and so is the largest one of all keys so far: when it grows, S and z decay. The authors take the largest one of
the whole text, which later tokens change; and they draw new vectors w in training, where here a layer has its own.
Cost: O(H m D) per token and K m (D + 1) + K numbers per sequence, m = FEATURES * D. All around it is model.Attention's.
"""

import random
from typing import Any

import torch
from torch import Tensor

from kernels.kv_cache import KVCache
from zoo.attention_projections import AttentionProjections
from zoo.linear_attention import weighted_mean
from zoo.scan import upcast

FEATURES = 2  # for each dimension of a head


class Performer(AttentionProjections):
    """The mechanism above, with the heads of model.Attention."""

    keeps_keys = False  # but a state
    w: Tensor

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(config, layer)
        self.register_buffer("w", random_vectors(layer, FEATURES, config.head_dim), persistent=False)  # (m, D)

    @staticmethod
    def state_shapes(config: Any, layer: int, batch: int, context: int) -> list[tuple[int, ...]]:
        """S with z as its last column, and the logarithm of the keys' largest feature."""
        K, D = config.n_kv_head, config.head_dim
        return [(batch, K, 1, FEATURES * D, D + 1), (batch, 1, K)]

    @staticmethod
    def multiply_adds(config: Any) -> int:
        """Each query and key is multiplied by w. S is written by each key, S and z are read by each query."""
        H, K, D = config.n_head, config.n_kv_head, config.head_dim
        return FEATURES * D * (2 * (H + K) * D + H)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        S = None
        q, k, v = (upcast(y) for y in self.project(x, cos, sin))  # (B, T, H, D), (B, T, K, D) twice
        q, k = (y * y.shape[3] ** -0.25 for y in (q, k))
        with torch.autocast(x.device.type, enabled=False):
            q, k = q @ self.w.T, k @ self.w.T - k.square().sum(3, keepdim=True) / 2  # (B, T, H or K, m) logarithms
        largest = k.detach().amax(3)  # (B, T, K)
        first = largest[:, :1]
        if cache is not None:
            S, before = cache.states(self.layer)
            first = torch.where(cache.lengths[:, None, None] > 0, before, first)  # (B, 1, K)
        largest = torch.cat((first, largest), 1).cummax(1).values  # (B, 1 + T, K) until now
        q, k = (q - q.detach().amax(3, keepdim=True)).exp(), (k - largest[:, 1:, :, None]).exp()
        out, S = weighted_mean(q, k, v, largest[:, :-1] - largest[:, 1:], S)  # (B, T, H, D)
        if cache is not None:
            cache.replace(self.layer, S, largest[:, -1:])
        return self.o_proj(out.flatten(2).to(x.dtype))  # (B, T, H, D) -> (B, T, H * D) -> (B, T, C)


def random_vectors(layer: int, blocks: int, D: int) -> Tensor:
    """(blocks * D, D): normally distributed vectors, orthogonal within a block. They belong to the weights that were
    trained with them: of `random` only random() is used, whose sequence is the same in all versions of Python."""
    generator = random.Random(layer)
    uniform = [generator.random() for _ in range(blocks * D * D)]
    normal = torch.special.ndtri(torch.tensor(uniform, dtype=torch.float64)).view(blocks, D, D)
    Q, R = torch.linalg.qr(normal.mT)  # a row's direction without those of the rows before, up to its sign
    lengths = normal.norm(dim=2, keepdim=True) * R.diagonal(dim1=1, dim2=2).sign()[..., None]  # (blocks, D, 1)
    return (lengths * Q.mT).flatten(0, 1).float()
