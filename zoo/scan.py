"""The recurrence that linear attention, retention, Mamba-2 and Gated DeltaNet share, computed chunk by chunk.

Each head has a matrix S (N, P) as its state. A token multiplies S by a decay, adds its value under its key, and reads S
with its query. The delta rule first subtracts the value that S already holds under the key.

    S <- exp(decay_t) S;   u_t = v_t, or beta_t (v_t - S^T k_t);   S <- S + k_t u_t^T;   out_t = S^T q_t

Within a chunk of L tokens this is a few matmuls and, for the delta rule, a triangular system; only S passes from chunk
to chunk (Yang et al. 2024, arXiv 2406.06484, section 3.2; with decay arXiv 2412.06464, section 3.3; without the delta
rule Dao & Gu 2024, arXiv 2405.21060, section 6). A head costs O(L (N + P) + N P) per token, whatever the context, and
keeps N P numbers. A single token is a chunk of length 1: training, prefill and decoding are one function.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # tokens


def scan(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None = None, state: Tensor | None = None,
    size: int = CHUNK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the recurrence over T tokens, in fp32, or in fp64 for fp64 inputs.

    Args:
        q, k: (B, T, H, N). v: (B, T, H, P).
        decay: (B, T, H), logarithm of the factor on S, at most 0.
        beta: (B, T, H), in [0, 1], for the delta rule, whose keys have length 1; None: u_t = v_t.
        state: (B, H, N, P), S before the first token; None: zero.
        size: tokens per chunk, at most.
        Without beta, H may be several dimensions, and they broadcast: queries and keys that all heads share are
        (B, T, 1, N), and G queries of each of K heads (B, T, K, G, N) read keys (B, T, K, 1, N).
    Returns:
        out (B, T, H, P), and S after the last token.
    """
    T, N, P = q.shape[1], q.shape[-1], v.shape[-1]
    n = -(-T // size)  # chunks, of equal length
    L = -(-T // n)

    def split(x: Tensor) -> Tensor:
        """(B, T, H, D) -> (n, B, H, L, D), padded with zeros: tokens that do not change S."""
        x = upcast(x) if n * L == T else F.pad(upcast(x), (0, 0) * (x.ndim - 2) + (0, n * L - T))
        return x.unflatten(1, (n, L)).movedim((1, 2), (0, -2)).contiguous()

    with torch.autocast(q.device.type, enabled=False):
        q, k, v, log = split(q), split(k), split(v), split(decay[..., None]).cumsum(-2)  # log: since the chunk began
        whole = log[..., -1:, :]  # (n, B, H, 1, 1) decay over the chunk, as a logarithm
        future = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1)
        mask = (log - log.mT).masked_fill_(future, -math.inf).exp_()  # (n, B, H, L, L) decay from token s to token t
        early, late = log.exp(), (whole - log).exp() * k
        heads = torch.broadcast_shapes(*(x.shape[1:-2] for x in (k, v, log)))  # (B, H)
        S = q.new_zeros(*heads, N, P) if state is None else upcast(state)
        if beta is None:
            values, recalls = v.unbind(), [None] * n
        else:  # (I + A) u = beta (v - early S^T k), A = tril(beta k k^T mask, -1): solved for both terms, S comes later
            b = split(beta[..., None])
            terms = torch.cat((b * v, early * b * k), -1)  # (n, B, H, L, P + N)
            terms = torch.linalg.solve_triangular((b * k) @ k.mT * mask, terms, upper=False, unitriangular=True)
            values, recalls = (x.unbind() for x in terms.split((P, N), -1))
        states, updates = [], []
        for value, recall, key, factor in zip(values, recalls, late.mT.unbind(), whole.exp().unbind(), strict=True):
            u = value if recall is None else value - recall @ S  # (B, H, L, P)
            states.append(S)
            updates.append(u)
            S = factor * S + key @ u
        out = (early * q) @ torch.stack(states) + (q @ k.mT * mask) @ torch.stack(updates)  # (n, B, H, L, P)
    return out.movedim((0, -2), (1, 2)).flatten(1, 2)[:, :T], S


def upcast(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def init_decay(A_log: Tensor, dt_bias: Tensor) -> None:
    """Initialize the decay exp(-exp(A_log) softplus(... + dt_bias)) as Mamba-2's authors do: exp(A_log) uniform in
    [1, 16], softplus(dt_bias) log-uniform in [0.001, 0.1]. A head remembers from about one to a thousand tokens."""
    with torch.no_grad():
        A_log.uniform_(1, 16).log_()
        dt = torch.empty_like(dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp_()
        dt_bias.copy_(dt + (-torch.expm1(-dt)).log())  # the inverse of softplus
