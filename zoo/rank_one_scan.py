"""The recurrence of RWKV-7, computed chunk by chunk: a decay for each channel of the key, and a change of rank one.

Each head has a matrix S (N, P) as its state. A token multiplies every row of S by its own decay, writes what S holds
under one key to another key, adds its value under a third, and reads S with its query. zoo/scan.py has one decay per
head, and its delta rule is the case a = -k, b = beta k.

    S <- diag(exp(decay_t)) S + b_t (a_t^T S) + k_t v_t^T;   out_t = S^T q_t

The transition of S is diagonal plus rank one (Peng et al. 2025, arXiv 2503.14456, section 4; the rank-one changes of a
chunk joined by a triangular system as in Yang et al. 2024, arXiv 2406.06484, section 3.2). Cost as in zoo/scan.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.scan import upcast

CHUNK = 32  # tokens


def rank_one_scan(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None,
    size: int = CHUNK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the recurrence over T tokens, in fp32, or in fp64 for fp64 inputs.

    Args:
        q, k, a, b: (B, T, H, N). v: (B, T, H, P).
        decay: (B, T, H, N), logarithm of the factor on each row of S, from -80 / size to 0. The inverse of the decay
            over a chunk must be a number of fp32: RWKV-7's decays are at least -0.61, one chunk's at least -20.
        state: (B, H, N, P), S before the first token; None: zero.
        size: tokens per chunk, at most.
    Returns:
        out (B, T, H, P), and S after the last token.
    """
    (B, T, H, N), P = q.shape, v.shape[3]
    n = -(-T // size)  # chunks, of equal length
    L = -(-T // n)

    def split(x: Tensor) -> Tensor:
        """(B, T, H, D) -> (n, B, H, L, D), padded with zeros: tokens that do not change S."""
        x = F.pad(upcast(x), (0, 0, 0, 0, 0, n * L - T))
        return x.view(B, n, L, H, -1).permute(1, 0, 3, 2, 4).contiguous()

    with torch.autocast(q.device.type, enabled=False):
        q, k, v, a, b, decay = (split(x) for x in (q, k, v, a, b, decay))
        log = decay.cumsum(-2)  # (n, B, H, L, N) since the chunk began
        q, a = log.exp() * q, (log - decay).exp() * a  # a reads S before its token's decay
        k, b = (-log).exp() * k, (-log).exp() * b
        # (I - A) u = a^T S + tril(a k^T, -1) v, A = tril(a b^T, -1): solved for both terms, S comes later
        terms = torch.cat(((a @ k.mT).tril(-1) @ v, a), -1)  # (n, B, H, L, P + N)
        terms = torch.linalg.solve_triangular(-(a @ b.mT), terms, upper=False, unitriangular=True)
        values, recalls = terms.split((P, N), -1)
        written = k.mT @ v  # (n, B, H, N, P)
        S = q.new_zeros(B, H, N, P) if state is None else upcast(state)
        states, updates = [], []
        for i, factor in enumerate(log[..., -1:, :].exp().mT.unbind()):  # (B, H, N, 1)
            u = values[i] + recalls[i] @ S  # (B, H, L, P) what each token's a reads
            states.append(S)
            updates.append(u)
            S = factor * (S + b[i].mT @ u + written[i])
        out = q @ torch.stack(states) + (q @ b.mT).tril() @ torch.stack(updates) + (q @ k.mT).tril() @ v
    return out.permute(1, 0, 3, 2, 4).reshape(B, n * L, H, P)[:, :T], S
