"""The whole model through heed's Triton kernels, interpreted: training, caching and generation are as with torch."""

import pytest
import torch

import kernels
import kernels.cross_entropy
from kernels import MaskSpec, attention
from model import GPT, KVCache, ModelConfig
from tests.conftest import TINY, randomized

WINDOWED = ModelConfig(
    vocab_size=97, context=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=16, n_ffn=48, layer_pattern="SL",
    window=5,
)  # fmt: skip


@pytest.fixture
def in_triton(monkeypatch):
    """Call it, and whatever chooses a backend chooses heed's kernels; the calls of each op are counted."""
    calls = {"flash_forward": 0, "flash_backward": 0, "decode": 0, "_row": 0}

    def choose():
        for module in (kernels, kernels.cross_entropy):
            monkeypatch.setattr(module, "preferred", lambda device: ("flash", "asked for"))

    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def counted(self, *arguments, **constants):
        name = {"_forward": "flash_forward", "_dkdv": "flash_backward", "_split": "decode"}.get(
            self.fn.__name__, "_row"
        )
        calls[name] += 1
        return launch(self, *arguments, **constants)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    choose.calls = calls
    return choose


def losses(steps: int) -> list[float]:
    torch.manual_seed(0)
    model = GPT(TINY).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    g = torch.Generator().manual_seed(1)
    text = torch.randint(97, (1, 19), generator=g)  # to overfit
    seen = []
    for _ in range(steps):
        loss = model.loss(text[:, :-1], text[:, 1:]) / 18
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


def test_eight_steps_of_training(in_triton):
    expected = losses(8)
    in_triton()
    got = losses(8)
    assert in_triton.calls["flash_forward"] == in_triton.calls["flash_backward"] == 2 * 8
    assert in_triton.calls["_row"] >= 8
    assert expected[-1] < expected[0] - 1
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("config", [TINY, WINDOWED], ids=["full", "window"])
@torch.no_grad()
def test_cached_and_uncached_logits(in_triton, config):
    model = randomized(config)
    tokens = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(2))
    expected = model(tokens)
    in_triton()
    torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=1e-4)
    assert in_triton.calls["flash_forward"] == 2
    cache = KVCache(config, 2)
    got = []
    for part in tokens.split([7, 1, 1, 11], 1):  # a prompt, two tokens, a chunk
        got.append(model(part, cache))
        cache.advance(part.shape[1])
    torch.testing.assert_close(torch.cat(got, 1), expected, atol=1e-4, rtol=1e-4)
    assert in_triton.calls["decode"] == 2 * 4


def test_compiled_layers_give_the_same_gradients(in_triton):
    """As train.py compiles them on a GPU. torch.compile generates no code here: it traces through the operator."""
    in_triton()
    tokens = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(2))
    gradients = []
    for compiled in (False, True):
        model = randomized(TINY).train()
        torch._dynamo.reset()
        for layer in model.model.layers if compiled else ():
            layer.compile(fullgraph=True, backend="aot_eager")
        model.loss(tokens, tokens).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert in_triton.calls["flash_forward"] == in_triton.calls["flash_backward"] == 2 * 2
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_autocast_reaches_the_kernels():
    q, k, v = (torch.randn(1, 9, 2, 16, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v.bfloat16(), MaskSpec(), backend="flash")
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, attention(q, k, v, backend="sdpa"), atol=0.02, rtol=0.02)
    out.sum().backward()
    assert q.grad.dtype == torch.float32
