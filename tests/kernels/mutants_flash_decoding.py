"""Seeded bugs for kernels/triton/flash_decoding.py, and the probe that must see each of them."""

from unittest.mock import patch

import torch

from kernels.reference_attention import CAUSAL, MaskSpec, reference_attention, relative_positions

VALUES_UNMASKED = "v_h)[:, None] + column[None, :], mask=read | (column < D)[None, :]"

MUTANTS: list[tuple[str, str, str]] = [
    # which keys
    ("a length less by one", "tl.load(lengths + b).to(tl.int32)", "tl.load(lengths + b).to(tl.int32) - 1"),
    ("a window of one key more", "(tl.abs(distance) < WINDOW)", "(tl.abs(distance) <= WINDOW)"),
    ("a window's first key skipped", "first - WINDOW + 1", "first - WINDOW + 2"),
    ("a window's last keys skipped", "last + WINDOW)", "last + 1)"),
    ("the query's own key not seen", "(distance >= 0)", "(distance > 0)"),
    ("the last key of all skipped", "tl.minimum(high, last + 1)", "tl.minimum(high, last)"),
    ("keys of a block's later rows skipped", "(block * BLOCK_M + BLOCK_M - 1) // G", "block * BLOCK_M // G"),
    ("a ring without modulo", "tl.where(slot < S, slot, slot - S)", "slot"),
    ("keys that were written over seen twice", "tl.maximum(length - S, 0), length", "0, length"),
    ("keys beyond the length count", "visible = inside[None, :]", "visible = distance == distance"),
    ("values beyond the length are read", "v_h)[:, None] + column[None, :], mask=read", VALUES_UNMASKED),
    # where they lie
    ("heads of a group dealt out in turn", "kv * G + row % G", "kv + row % G * K"),
    ("a page's stride and a slot's swapped", "page * v_b + slot * v_s", "page * v_s + slot * v_b"),
    ("every sequence has the first one's pages", "pages + b * (S // PAGE)", "pages"),
    ("keys' head stride for values", "kv * v_h", "kv * k_h"),
    ("every block of rows is the first", "row = block * BLOCK_M +", "row ="),
    # scores
    ("no scale", 'input_precision="ieee") * scale', 'input_precision="ieee")'),
    ("slopes uphill", "score -= slope", "score += slope"),
    ("softcap not multiplied back", "SOFTCAP * accurate_tanh(", "accurate_tanh("),
    # softmax
    ("no rescale of the values", "sum_of_values *= rescale[:, None]", "pass"),
    ("no rescale of the sum", "total * rescale", "total"),
    ("a sink in every split", "tl.where(split == 0, sink, top), tl.where(split == 0, 1.0, total)", "sink, total + 1"),
    ("a row that sees nothing is NaN", 'tl.where(higher == float("-inf"), 0.0, higher)', "higher"),
    ("an empty split is NaN", "tl.where(total == 0, 1.0, total)[:, None]", "total[:, None]"),
    ("the log-sum-exp in base 2", "top + tl.log(total), mask", "top + tl.log2(total), mask"),
    # splits
    ("the last part of the keys dropped", "tl.num_programs(1)) * BLOCK_N", "tl.num_programs(1) + 1) * BLOCK_N"),
    ("parts overlap", "low + (split + 1) * share, high", "low + (split + 1) * share + 1, high"),
    ("all splits write one part", "((split * B + b) * T + t)", "(b * T + t)"),
    ("parts added, not weighed", "weight[:, None] * part", "part"),
    ("the last split not in the sum", "mask=each < splits", "mask=each < splits - 1"),
    ("the combined log-sum-exp without its maximum", "tl.store(lse + row, top + ", "tl.store(lse + row, "),
    ("a row without keys in any split is NaN", 'tl.where(top == float("-inf"), 0.0, top)', "top"),
]  # fmt: skip


def probe(decode_attention) -> None:
    """AssertionError unless out and log-sum-exp are right, with NaN in outputs and slots before they are written."""
    window, both_ways, tanh, soft = (
        MaskSpec(True, 9),
        MaskSpec(False, 5),
        MaskSpec(False, None, 1.0),
        MaskSpec(softcap=50.0),
    )
    cases = [  # pattern, (T, S, H, K), lengths, page, with slopes, with sinks, splits
        (CAUSAL, (2, 32, 4, 2), (9, 32), 4, False, False, 1),
        (window, (2, 20, 4, 2), (33, 15), None, True, True, 2),
        (CAUSAL, (2, 20, 4, 2), (30, 20), None, False, False, 1),
        (tanh, (1, 96, 2, 2), (95, 7), None, False, True, 2),
        (both_ways, (20, 40, 1, 1), (40,), None, False, False, 1),
        (soft, (1, 20, 2, 1), (1, 2), None, False, False, 1),
        (CAUSAL, (3, 20, 2, 1), (0, 2), None, False, True, 1),
        (CAUSAL, (3, 20, 2, 1), (0, 2), None, False, False, 2),
    ]
    for pattern, (T, S, H, K), written, page, with_slopes, with_sinks, splits in cases:
        g = torch.Generator().manual_seed(S + T)
        B, D, lengths = len(written), 16, torch.tensor(written)
        q, k, v = (torch.randn(B, length, heads, D, generator=g) for length, heads in ((T, H), (S, K), (S, K)))
        slopes = torch.rand(H, generator=g) if with_slopes else None
        sinks = torch.randn(H, generator=g) if with_sinks else None
        exact = (x.double() for x in (q, k, v))
        expected, expected_lse, _ = reference_attention(*exact, pattern, 0.3, lengths, None, slopes, sinks)
        unused = ~relative_positions(T, S, q.device, lengths)[1][:, :, None, None]
        k, v = (x.masked_fill(unused, float("nan")) for x in (k, v))
        v, pages = v.transpose(1, 2).contiguous().transpose(1, 2), None  # its strides are not those of k
        if page is not None:  # (B, S, K, D) -> (B * S / page, page, K, D), last page first
            k, v = (x.reshape(-1, page, K, D).flip(0) for x in (k, v))
            pages = torch.arange(len(k), dtype=torch.int32).flip(0).view(B, -1)
        empty = torch.empty
        with patch.object(torch, "empty", lambda *shape, made=empty, **how: made(*shape, **how).fill_(float("nan"))):
            out, lse = decode_attention(q, k, v, pattern, 0.3, lengths, pages, slopes, sinks, splits)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-6)
