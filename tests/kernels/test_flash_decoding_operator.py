"""How decoding's keys are split, what the compiler sees of it, and what it refuses."""

import math

import pytest
import torch

from kernels import CAUSAL, MaskSpec, attention
from kernels.reference_attention import relative_positions
from kernels.triton import flash_decoding
from kernels.triton.flash_decoding import choose_splits, decode_attention
from tests.kernels.test_flash_decoding import NAN, check, draw, extras


@pytest.mark.parametrize(
    ("programs", "blocks", "processors", "splits"),
    [
        (8, 128, 132, 32),  # H100, B1 K8, 8k tokens in blocks of 64: 256 programs instead of 8
        (8, 2048, 132, 33),  # 128k tokens
        (1, 2048, 132, 256),  # one key/value head: as many as are allowed
        (128, 128, 132, 2),  # B16: one wave of 256
        (512, 128, 132, 1),  # B64 fills the GPU alone
        (8, 1, 132, 1),  # a short cache
        (8, 3, 132, 3),
        (8, 0, 132, 1),
    ],
)
def test_the_split_heuristic_fills_a_gpu(programs, blocks, processors, splits):
    assert choose_splits(programs, blocks, processors) == splits


@pytest.mark.parametrize("programs", [1, 3, 8, 40, 132, 133, 160, 1000])
def test_the_split_heuristic_is_never_worse_than_one_split(programs):
    for blocks in (1, 2, 17, 128, 1000):
        splits = choose_splits(programs, blocks, 132)
        waves = math.ceil(programs * splits / 264)
        assert 1 <= splits <= min(blocks, 256)
        assert waves * (math.ceil(blocks / splits) + 1) <= math.ceil(programs / 264) * (blocks + 1)


def test_splits_follow_from_shapes_alone(monkeypatch):
    """The lengths may be on a device that nobody waits for; a window bounds what is read, so also how it is split."""
    seen = []
    monkeypatch.setattr(flash_decoding, "choose_splits", lambda *counts: seen.append(counts) or 2)
    q, k, v = draw(2, 1, 64, 4, 2, 16)
    for pattern in (CAUSAL, MaskSpec(True, 20), MaskSpec(False, 20)):
        check(q, k, v, pattern, torch.tensor([3, 64]))
    assert seen == [(4, 4, 8), (4, 2, 8), (4, 3, 8)]


def test_a_window_leaves_the_rest_unread():
    """What lies before the window is not read, wherever blocks begin; NaN there would go through a mask of scores."""
    q, k, v = draw(1, 2, 64, 2, 1, 16)
    for length in (40, 64, 70, 130):
        lengths = torch.tensor([length])
        distance, _ = relative_positions(2, 64, q.device, lengths)  # (1, T, S)
        read = ((distance >= 0) & (distance < 9)).any(1)[:, :, None, None]
        expected = decode_attention(q, k, v, MaskSpec(True, 9), 0.25, lengths)[0]
        k_, v_ = (x.masked_fill(~read, NAN) for x in (k, v))
        assert torch.equal(decode_attention(q, k_, v_, MaskSpec(True, 9), 0.25, lengths)[0], expected)


@pytest.mark.parametrize("by", ["decode_attention", "attention"])
def test_compiled_in_one_graph(by):
    q, k, v = draw(2, 1, 40, 4, 2, 16)
    window, pages = MaskSpec(True, 20), torch.arange(4).view(2, 2).to(torch.int32)
    pools = [x.view(4, 20, 2, 16) for x in (k, v)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, lengths):
        if by == "attention":
            out, lse = attention(
                q, *pools, window, cache_seqlens=lengths, block_table=pages, backend="decode", return_lse=True
            )
        else:
            out, lse = decode_attention(q, *pools, window, 0.25, lengths, pages)
        return out * 2, lse

    for lengths in (torch.tensor([5, 40]), torch.tensor([17, 90])):
        out, lse = step(q, lengths)
        expected, expected_lse = decode_attention(q, k, v, window, 0.25, lengths)
        assert torch.equal(out, expected * 2) and torch.equal(lse, expected_lse)


def test_the_operator_keeps_torchs_rules():
    q, k, v = draw(1, 2, 20, 2, 1, 16)
    slopes, sinks = extras(2)
    lengths, pages = torch.tensor([9]), torch.tensor([[0, 1]], dtype=torch.int32)
    pools = [x.view(2, 10, 1, 16) for x in (k, v)]
    for arguments in (
        (q, k, v, True, None, None, 0.25, lengths, None, None, None, None),
        (q, *pools, False, 5, 2.0, 0.25, lengths, pages, slopes, sinks, 2),
    ):
        torch.library.opcheck(torch.ops.heed.decode, arguments)


def test_attention_dispatches_here():
    q, k, v = draw(2, 1, 20, 4, 2, 16)
    lengths = torch.tensor([7, 20])
    expected = attention(q, k, v, cache_seqlens=lengths, backend="reference")
    torch.testing.assert_close(
        attention(q, k, v, cache_seqlens=lengths, backend="decode"), expected, atol=2e-6, rtol=1e-5
    )
    with pytest.raises(ValueError, match="needs a cache: pass cache_seqlens"):
        attention(q, k, v, backend="decode")


def test_mistakes_are_named():
    q, k, v = draw(1, 1, 20, 2, 1, 16)
    lengths = torch.tensor([7])
    with pytest.raises(ValueError, match=r"one dtype, fp32, fp16 or bf16; q is torch\.float32, k torch\.float16"):
        decode_attention(q, k.half(), v.half(), CAUSAL, 0.25, lengths)
    with pytest.raises(ValueError, match=r"q is torch\.float64"):
        decode_attention(q.double(), k.double(), v.double(), CAUSAL, 0.25, lengths)
    with pytest.raises(ValueError, match="decode has no gradients"):
        decode_attention(q.clone().requires_grad_(), k, v, CAUSAL, 0.25, lengths)
    with torch.no_grad():
        decode_attention(q.clone().requires_grad_(), k, v, CAUSAL, 0.25, lengths)
