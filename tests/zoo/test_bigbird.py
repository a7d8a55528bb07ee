"""Causal BigBird compared with dense attention under its mask, and with attention where all blocks are read."""

import dataclasses

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model import Attention, KVCache, precompute_rope
from tests.conftest import TINY, randomized
from tests.zoo.dense_attention import dense_attention
from zoo.bigbird import BigBird, blocks_read

CONFIG = dataclasses.replace(TINY, context=300, layer_pattern="B")


def mask(blocks: list[list[int]], T: int) -> Tensor:
    """(T, T), by the definition in zoo/bigbird.py: 16 tokens per block, 2 blocks of window, 3 random ones."""
    seen = torch.zeros(T, T, dtype=torch.bool)
    for t in range(T):
        i = t // 16
        always = {0, i, max(i - 1, 0)}
        drawn = set(blocks[i]) - always
        assert len(drawn) == min(3, max(0, i - 2)) and all(1 <= block <= i - 2 for block in drawn)
        for s in range(t + 1):
            seen[t, s] = s // 16 in always | drawn
    return seen


def tables(dtype: torch.dtype, T: int) -> list[Tensor]:
    """cos and sin, (1, T, 1, D)."""
    return [table[None, :T, None].to(dtype) for table in precompute_rope(CONFIG)]


@torch.no_grad()
def check(cls) -> None:
    """AssertionError unless the outputs equal dense attention's, in one call and in several with a cache, beyond the
    first block of a batch and of a context that is no multiple of a block."""
    torch.manual_seed(0)
    mixer, x = cls(CONFIG, 1).double(), torch.randn(2, 293, CONFIG.n_embd, dtype=torch.float64)
    for p in mixer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    rows = [row[:n] for row, n in zip(mixer.blocks.tolist(), mixer.count.tolist(), strict=True)]
    seen = mask(rows, 293).expand(CONFIG.n_head, -1, -1)
    expected = torch.stack([dense_attention(mixer.state_dict(), row, seen, CONFIG) for row in x])
    cos, sin = tables(torch.float64, 293)
    torch.testing.assert_close(mixer(x, cos, sin, None), expected, atol=1e-12, rtol=0)
    cache, at = KVCache(dataclasses.replace(CONFIG, n_layer=2), 2, dtype=torch.float64), 0
    for T in (1, 2, 200, 1, 89):
        part = slice(at, at + T)
        out = mixer(x[:, part], cos[:, part], sin[:, part], cache)
        torch.testing.assert_close(out, expected[:, part], atol=1e-12, rtol=0)
        cache.advance(T)
        at += T


def test_outputs_equal_dense_attention_under_the_mask():
    check(BigBird)


def test_equals_attention_up_to_six_blocks():
    """First block, window and three random ones are all there are. The weights are those of attention."""
    attention = randomized(dataclasses.replace(CONFIG, layer_pattern="L")).double().model.layers[0].self_attn
    assert type(attention) is Attention
    mixer, x = BigBird(CONFIG, 0).double(), torch.randn(2, 96, CONFIG.n_embd, dtype=torch.float64)
    mixer.load_state_dict(attention.state_dict(), strict=True)
    rope = tables(torch.float64, 96)
    torch.testing.assert_close(mixer(x, *rope, None), attention(x, *rope, None), atol=1e-12, rtol=0)


def test_blocks_are_the_same_for_every_context_and_never_change():
    assert blocks_read(0, 40)[:20] == blocks_read(0, 20)
    assert blocks_read(0, 40) != blocks_read(1, 40)
    assert blocks_read(0, 20)[19] == [0, 2, 8, 14, 18, 19]
    drawn = torch.tensor([blocks_read(layer, 23)[22] for layer in range(200)]).flatten().bincount()
    assert 15 < drawn[1:21].min() < drawn[1:21].max() < 50  # 30 on average


def test_memory_grows_with_the_length_not_with_its_square():
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor):
                    self.numbers = max(self.numbers, tensor.numel())
            return out

    config, largest = dataclasses.replace(CONFIG, context=2048), []
    mixer = BigBird(config, 0)
    for T in (1024, 2048):
        cos, sin = (table[None, :T, None] for table in precompute_rope(config))
        with Largest() as mode:
            mixer(torch.randn(1, T, config.n_embd), cos, sin, None).sum().backward()
        largest.append(mode.numbers)
    assert largest[1] == 2 * largest[0] < 2048**2
