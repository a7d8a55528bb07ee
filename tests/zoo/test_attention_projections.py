"""The projections that mixers share with attention, compared with it."""

import dataclasses

import torch

from kernels import attention
from model import precompute_rope
from tests.conftest import TINY, randomized
from zoo.attention_projections import AttentionProjections


@torch.no_grad()
def check(cls) -> None:
    """AssertionError unless attention over its queries, keys and values equals model.Attention of the same weights."""
    for qk_norm in (True, False):
        config = dataclasses.replace(TINY, qk_norm=qk_norm, norm_eps=1e-3)
        expected, x = randomized(config).model.layers[0].self_attn, torch.randn(2, 32, 32)
        ours = cls(config, 0)
        ours.load_state_dict(expected.state_dict(), strict=True)
        cos, sin = (table[None, :, None] for table in precompute_rope(config))
        out = ours.o_proj(attention(*ours.project(x, cos, sin)).flatten(2))
        torch.testing.assert_close(out, expected(x, cos, sin, None), atol=1e-5, rtol=0)


def test_attention_over_them_equals_attention():
    check(AttentionProjections)
