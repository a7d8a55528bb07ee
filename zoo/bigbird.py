"""B, BigBird (Zaheer et al. 2020, arXiv 2007.14062, section 2 and appendix D), causal: sparse attention by blocks.

The tokens are divided into blocks, and every query of a block reads the same few blocks of keys: the first block of
the text, the last blocks up to its own, and some drawn at random from those between. So any token can influence any
later one over a few layers, with few keys per query. The draw depends on layer and block alone: it is the same in
training and in inference, with and without a cache, and for every context.

    out_t = softmax over s <= t in blocks(t / BLOCK) of (q_t . k_s / sqrt(D)) v_s
    blocks(i) = {0} + {i - WINDOW + 1, ..., i} + RANDOM of {1, ..., i - WINDOW}

Cost: O(T BLOCK (1 + WINDOW + RANDOM) H D): the blocks are gathered, there is no T x T mask. The cache is that of full
attention, because every block may be drawn later. The paper draws per head and lets the first blocks read everything,
which a causal model cannot.
"""

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention
from kernels.kv_cache import KVCache
from zoo.attention_projections import AttentionProjections

BLOCK = 16  # tokens
WINDOW = 2  # blocks, the query's own included
RANDOM = 3  # blocks


class BigBird(AttentionProjections):
    """The mechanism above, with the heads of model.Attention."""

    blocks: Tensor
    count: Tensor

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(config, layer)
        rows = blocks_read(layer, -(-config.context // BLOCK))
        padded = [row + [0] * (1 + WINDOW + RANDOM - len(row)) for row in rows]
        self.register_buffer("blocks", torch.tensor(padded), persistent=False)  # (context / BLOCK, blocks)
        self.register_buffer("count", torch.tensor([len(row) for row in rows]), persistent=False)

    @staticmethod
    def state_shapes(config: Any, layer: int, batch: int, context: int) -> list[tuple[int, ...]]:
        """Keys and values, in whole blocks."""
        return [(batch, -(-context // BLOCK) * BLOCK, config.n_kv_head, config.head_dim)] * 2

    @staticmethod
    def multiply_adds(config: Any) -> int:
        """Scores and weighted sum over all keys that are gathered."""
        return 2 * config.n_head * config.head_dim * (1 + WINDOW + RANDOM) * BLOCK

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        B, T, H, D = q.shape
        if cache is None:  # gather once for the queries of a block
            rows = BLOCK
            q, k, v = (F.pad(y, (0, 0, 0, 0, 0, -T % BLOCK)) for y in (q, k, v))
            positions = torch.arange(q.shape[1], device=x.device).expand(B, -1)
            row = torch.arange(B, device=x.device)
        else:  # the first query may be anywhere in its block: gather for each
            rows = 1
            k, v = cache.update(self.layer, k, v)
            positions, row = cache.positions(T), cache.rows
        last = positions[:, rows - 1 :: rows]  # (B, T / rows) of each group's queries
        pages = self.blocks[last // BLOCK]  # (B, T / rows, blocks), ascending: a query's own block is the last
        pages = pages + row[:, None, None] * (k.shape[1] // BLOCK)
        lengths = (self.count[last // BLOCK] - 1) * BLOCK + last % BLOCK + 1
        q = q.unflatten(1, (-1, rows)).flatten(0, 1).to(k.dtype)  # (B * T / rows, rows, H, D)
        k, v = (y.unflatten(1, (-1, BLOCK)).flatten(0, 1) for y in (k, v))  # (B * S / BLOCK, BLOCK, K, D)
        out = attention(  # each group of queries is a sequence of its own with a paged cache
            q, k, v, cache_seqlens=lengths.flatten(), block_table=pages.flatten(0, 1).int(), backend="sdpa"
        )
        return self.o_proj(out.reshape(B, -1, H * D)[:, :T].to(x.dtype))  # (B * T / rows, rows, H, D) -> (B, T, C)


def blocks_read(layer: int, n: int) -> list[list[int]]:
    """Blocks of keys that each of n blocks of queries reads, ascending. Of `random` only random() is used, whose
    sequence is the same in all versions of Python: it belongs to the weights that were trained with it."""
    generator, rows = random.Random(layer), []
    for i in range(n):
        drawn: set[int] = set()
        while len(drawn) < min(RANDOM, i - WINDOW):
            drawn.add(1 + int(generator.random() * (i - WINDOW)))
        rows.append(sorted({0, *drawn, *range(max(0, i - WINDOW + 1), i + 1)}))
    return rows
