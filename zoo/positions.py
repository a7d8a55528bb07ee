"""Positions other than RoPE, `model.positions`: vectors added to the embedding, or a bias on attention's scores.

    none         nothing: the causal mask alone breaks the symmetry of positions (Haviv et al. 2022, arXiv 2203.16634)
    sinusoidal   x_t + SCALE (sin(t w_0), cos(t w_0), sin(t w_1), ...), w_i = 10000^(-2i / C) (Vaswani et al. 2017, 3.5)
    learned      x_t + p_t, a trained vector for each position of the context (GPT-2: Radford et al. 2019)
    alibi        score(t, s) - m_h (t - s), a slope for each head (Press et al. 2022, arXiv 2108.12409, section 3)

Cost: none of the first three multiplies anything by another token; alibi adds one number to each score. RoPE and YaRN
are in model.py. The slopes are Bloom's, as in the authors' code; MPT's differ if the heads are no power of two.
"""

from typing import Any

import torch
from torch import Tensor, nn

POSITIONS = ("rope", "none", "sinusoidal", "learned", "alibi")
# Of the sinusoids: between the embedding's initial 0.02 and its size after training, about twice this. Vaswani et al.
# multiply the embedding by sqrt(C) instead.
SCALE = 0.1


def position_embedding(config: Any) -> nn.Module | None:
    """The module that maps positions (B, T) to the vectors (B, T, C) added to the embedding; None if there are none."""
    if config.positions == "learned":
        return nn.Embedding(config.context, config.n_embd)
    return Sinusoids(config) if config.positions == "sinusoidal" else None


class Sinusoids(nn.Module):
    """Fixed vectors of sines and cosines, whose wavelengths go from 2 pi to 20000 pi tokens."""

    table: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        t = torch.arange(config.context, dtype=torch.float64)
        i = torch.arange(0, config.n_embd, 2, dtype=torch.float64)  # 2i in the formula
        angles = torch.outer(t, 10000.0 ** (-i / config.n_embd))  # (context, C/2 rounded up)
        table = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, : config.n_embd]  # (context, C)
        self.register_buffer("table", SCALE * table.float(), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        return self.table[positions]  # (B, T) -> (B, T, C)


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi's slopes, (heads,) fp32: 2^(-8h / P), h = 1 ... P, where P is the largest power of two up to `heads`. Any
    other heads take the first, third, ... slope of 2P heads."""
    P = 2 ** (heads.bit_length() - 1)
    powers = [8 * h / P for h in range(1, P + 1)] + [4 * h / P for h in range(1, 2 * (heads - P), 2)]
    return 2.0 ** -torch.tensor(powers)
