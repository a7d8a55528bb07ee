"""Q, a top-k memory ("Memorizing Transformers": Wu et al. 2022, arXiv 2203.08913, section 3): attention to few keys.

A query reads the keys of a window of the last tokens, and of all keys before the window only the k with the highest
scores. Each head and each query has its own k keys.

    out_t = softmax over s in near(t) + far(t) of (q_t . k_s / sqrt(D)) v_s
    near(t) = {t - WINDOW + 1, ..., t},   far(t) = the TOP_K of s <= t - WINDOW with the largest q_t . k_s

A single softmax over both sets (as in Focused Transformer: Tworkowski et al. 2023, arXiv 2307.03170, section 3) needs
no further parameters: the layer equals attention if TOP_K is large, and a sliding window if TOP_K = 0. Wu et al. have
two, and a learned gate for each head between them, so the memory gets the same total weight however badly its keys
fit. Their memory holds earlier segments of a document, without gradients and positions; here it is the context, with
both.

Cost: the weighted sum is over WINDOW + TOP_K keys, but all scores are computed, and sorted, to find them: O(T H D) per
token, as attention. The paper's approximate index avoids that. The cache is attention's.
"""

from typing import Any

import torch
from torch import Tensor

from zoo.query_blocks import QueryBlocks

WINDOW = 16  # keys, the query's own included
TOP_K = 16  # keys before the window


class TopKMemory(QueryBlocks):
    """The mechanism above, with the projections and heads of model.Attention."""

    @staticmethod
    def multiply_adds(config: Any) -> float:
        """Scores over all keys up to a query, and the weighted sum over those that are read."""
        T = config.context
        keys = sum(range(1, T + 1)) + sum(min(t, WINDOW + TOP_K) for t in range(1, T + 1))
        return config.n_head * config.head_dim * keys / T

    def weights(self, q: Tensor, k: Tensor, distance: Tensor) -> Tensor:
        scores = q @ k.mT * self.head_dim**-0.5  # (B, H, R, S)
        old = distance >= WINDOW
        # Of equal scores the first, however large the cache is: torch.topk does not say which.
        best = scores.masked_fill(~old, -torch.inf).argsort(dim=-1, descending=True, stable=True)[..., :TOP_K]
        far = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) & old
        near = (distance >= 0) & ~old
        return scores.masked_fill(~(near | far), -torch.inf).softmax(-1)
