"""Seeded bugs for kernels/triton/flash_attention.py, and the probe that must see each of them."""

import math
from unittest.mock import patch

import torch

from kernels.reference_attention import CAUSAL, FULL, MaskSpec, reference_attention

# name, text in the source, what it becomes, how often it occurs if not once
MUTANTS: list[tuple[str, str, str] | tuple[str, str, str, int]] = [
    # which keys
    ("the query's own key not seen", "visible & (distance >= 0)", "visible & (distance > 0)"),
    ("one key of the future seen", "visible & (distance >= 0)", "visible & (distance >= -1)"),
    ("a window of one key more", "(tl.abs(distance) < WINDOW)", "(tl.abs(distance) <= WINDOW)"),
    ("keys past the end seen", "visible = key < S", "visible = key < S + 9"),
    ("a document's first key not seen", "(key >= first)", "(key > first)"),
    ("a document sees the next one's first key", "(key < last)", "(key <= last)"),
    ("the diagonal aligned to the start", "query = (t + S - T)[:, None]", "query = t[:, None]", 2),
    ("dk/dv: the diagonal aligned to the start", "query = (t + S - T)[None, :]", "query = t[None, :]"),
    # which blocks
    ("the diagonal's block skipped", "tl.minimum(high, most + 1)", "tl.minimum(high, most - M + 1)"),
    ("a window's later keys skipped", "tl.minimum(high, most + WINDOW)", "tl.minimum(high, most + 1)"),
    ("a window's first block skipped", "least - WINDOW + 1)", "least + 1)"),
    ("a document's block skipped", "tl.load(first + b * S + least)", "tl.load(first + b * S + most)"),
    ("a document ends early", "tl.load(last + b * S + most)", "tl.load(last + b * S + least)"),
    ("dk/dv: a block of queries too few", "tl.maximum(low - (S - T), 0) // M", "tl.maximum(low + M - (S - T), 0) // M"),
    ("dk/dv: the last queries of a window skipped", "tl.minimum(high, end + WINDOW)", "tl.minimum(high, start + 1)"),
    ("dk/dv: the first queries of a window skipped", "start - WINDOW + 1)", "start + 1)"),
    ("dk/dv: a document's last queries skipped", "tl.load(last + b * S + end)", "tl.load(last + b * S + start)"),
    ("dk/dv: queries before all keys forgotten", "low, high = S - T, S", "low, high = 0, S"),
    # which blocks need a mask
    ("the diagonal's block without a mask", "start + S - T + 1) if CAUSAL", "start + S - T + N) if CAUSAL"),
    ("the last keys' block without a mask", "else high, 0) // N * N", "else high + N - 1, 0) // N * N"),
    ("no mask for a window", "if WINDOW is None and first is None", "if first is None"),
    ("no mask for documents", "if WINDOW is None and first is None", "if WINDOW is None"),
    # scores
    ("scores in base e", "score = product * (scale * LOG2E)", "score = product * scale"),
    ("slopes uphill", "score -= slope", "score += slope"),
    ("softcap in base e", "tanh * (SOFTCAP * LOG2E)", "tanh * SOFTCAP"),
    ("tanh(x / 2) for tanh(x)", "2 * tl.sigmoid(2 * x) - 1", "2 * tl.sigmoid(x) - 1"),
    ("tanh near 0 is x", "near = x * (945", "near = x  # * (945"),
    # the online softmax
    ("no rescale of the values", "sums * rescale[:, None]", "sums"),
    ("no rescale of the sum", "total * rescale", "total"),
    ("rows without keys are NaN", 'base = tl.where(higher == float("-inf"), 0.0, higher)', "base = higher"),
    ("a sink has no weight", "* LOG2E, total + 1.0", "* LOG2E, total"),
    ("the log-sum-exp in base 2", "(top + tl.log2(total)) * LN2", "top + tl.log2(total)"),
    ("the output not divided", "sums / tl.where(total == 0, 1.0, total)[:, None]", "sums"),
    # where things lie
    ("forward: keys of another group", "b * k_b + h // G * k_h", "b * k_b + h % (H // G) * k_h", 2),
    ("values with the keys' head stride", "b * v_b + h // G * v_h", "b * v_b + h // G * k_h", 2),
    ("dk/dv: heads of another group", "h, here = kv * G + i // blocks", "h, here = kv + i // blocks * K"),
    ("dk/dv: only the first head of a group", "range(0, G * blocks)", "range(0, blocks)"),
    ("dk/dv: each block for another head", "kv * G + i // blocks, low", "kv * G + i % G, low"),
    ("dk/dv: the next head from where the last ended", "low + i % blocks * M", "low + i * M"),
    ("dk/dv: the last block of queries of a head skipped", "tl.cdiv(high - low, M)", "(high - low) // M"),
    ("every sequence is the first", "q, b * q_b + h * q_h", "q, h * q_h", 3),
    # the backward
    ("delta's sign", "(dweight - d[:, None])", "(dweight + d[:, None])"),
    ("the log-sum-exp's gradient added", "1) - tl.load(dlse", "1) + tl.load(dlse"),
    ("dk/dv: no delta", "(dweight - d[None, :])", "dweight"),
    ("dq without scale", "_store(sums * scale, dq", "_store(sums, dq"),
    ("dk without scale", "_store(dkeys * scale, dk", "_store(dkeys, dk"),
    ("softcap's derivative dropped", "dscore *= 1 - tanh * tanh", "dscore *= 1", 2),
    ("slopes' gradient has the wrong sign", "dslopes + of_row, -distance_sums", "dslopes + of_row, distance_sums"),
    ("slopes' gradient without the distance", "dscore * tl.abs(query - key), 1", "dscore, 1"),
    ("sinks' gradient has the wrong sign", "else -((sinks", "else ((sinks"),
    ("rows without keys have gradients", 'tl.where(base == float("-inf"), float("inf"), base * LOG2E)', "base * LOG2E"),
    ("rows without keys pass on what comes back", 'd = tl.where(base == float("inf"), 0.0, d)', "pass"),
    ("slopes and sinks read as if they lay together", "x.float().contiguous()", "x.float()"),
    ("rows past the end have weights", 'mask=real, other=float("inf"))', "mask=real, other=-99.0)"),
    # dropout: which weights
    ("dropout: queries from the first one's position", "seed, b * H + h, query)", "seed, b * H + h, query - S + T)", 3),
    ("dk/dv: query and key swapped", "(seed, b * H + h, query), key", "(seed, b * H + h, key), query"),
    ("the same mask for all heads", "row_hashes(seed, b * H + h", "row_hashes(seed, b", 3),
    ("the same mask for all sequences", "row_hashes(seed, b * H + h", "row_hashes(seed, h", 3),
    ("dk/dv: the mask of another head", "(seed, b * H + h, query), key", "(seed, b * H + kv, query), key"),
    # dropout: what becomes of them
    ("forward: nothing dropped", "weight = tl.where(keep(row, key, DROPPED), weight, 0.0)", "pass"),
    (
        "dropped before the log-sum-exp",
        """            total = total * rescale + tl.sum(weight, 1)
            if seed is not None:
                weight = tl.where(keep(row, key, DROPPED), weight, 0.0)
""",
        """            if seed is not None:
                weight = tl.where(keep(row, key, DROPPED), weight, 0.0)
            total = total * rescale + tl.sum(weight, 1)
""",
    ),
    ("forward: the kept not scaled", "sums *= RESCALE", "pass"),
    ("dq: nothing dropped", "tl.where(keep(row, key, DROPPED), dweight * RESCALE, 0.0)", "dweight * RESCALE"),
    ("dq: the kept not scaled", "DROPPED), dweight * RESCALE, 0.0)", "DROPPED), dweight, 0.0)"),
    ("dv: nothing dropped", "read = tl.where(kept, weight, 0.0)", "pass"),
    ("dv: the kept not scaled", "dvalues *= RESCALE", "pass"),
    ("dk: nothing dropped", "tl.where(kept, dweight * RESCALE, 0.0)", "dweight * RESCALE"),
    ("dk: the kept not scaled", "tl.where(kept, dweight * RESCALE, 0.0)", "tl.where(kept, dweight, 0.0)"),
    ("dk: no delta for dropped weights", "dscore = weight * (dweight", "dscore = read * (dweight"),
]  # fmt: skip


def probe(flash_attention) -> None:
    """AssertionError unless outputs and all gradients are right, with NaN in the outputs before they are written."""
    g = torch.Generator().manual_seed(1)
    empty = torch.empty

    def full_of_nan(*shape, **how):
        return empty(*shape, **how).fill_(math.nan)

    cases = [  # in the order in which all mutants together are seen soonest
        # B, T, S, pattern, documents, slopes, sinks, dropout
        (1, 21, 3, CAUSAL, False, False, False, 0.0),
        (1, 36, 18, MaskSpec(False, None, 1.0), False, True, True, 0.0),
        (1, 40, 40, MaskSpec(False, 14), False, False, True, 0.0),
        (1, 40, 40, FULL, True, False, False, 0.0),
        (1, 36, 37, MaskSpec(True, 9), True, False, False, 0.0),
        (2, 20, 36, CAUSAL, False, False, False, 0.4),
    ]
    seed = torch.tensor([1, 2], dtype=torch.int32)
    for B, T, S, pattern, with_documents, with_slopes, with_sinks, p in cases:
        inputs = [
            torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((B, T, 4, 8), (B, S, 2, 8), (B, S, 4, 8))
        ]
        extras = [
            torch.rand(8, generator=g)[::2] if with_slopes else None,
            torch.randn(8, generator=g)[::2] if with_sinks else None,
        ]
        dropout = (p, seed) if p else (0.0, None)
        documents = (torch.arange(S) * 5 // S).expand(B, S) if with_documents else None
        weight, weight_lse = torch.randn(B, T, 4, 8, generator=g), torch.randn(B, T, 4, generator=g)
        results = []
        for function, dtype in ((reference_attention, torch.float64), (flash_attention, torch.float32)):
            leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in (*inputs, *extras)]
            q, k, v, slopes, sinks = leaves
            v = v[:, :, ::2]  # so that values do not lie as keys do
            with patch.object(torch, "empty", full_of_nan):
                if function is flash_attention:
                    out, lse = flash_attention(q, k, v, pattern, 0.5, documents, slopes, sinks, *dropout)
                else:
                    out, lse, _ = reference_attention(q, k, v, pattern, 0.5, None, documents, slopes, sinks, *dropout)
                # What comes back for the log-sum-exp of nothing may well be NaN: of logaddexp it is.
                weights = [weight, weight_lse.masked_fill(lse.isneginf(), math.nan)]
                torch.autograd.backward((out, lse), [w.to(x.dtype) for w, x in zip(weights, (out, lse), strict=True)])
            results.append([out, lse, *(x.grad for x in leaves if x is not None)])
        for truth, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours.double(), truth, atol=1e-4, rtol=1e-4)
