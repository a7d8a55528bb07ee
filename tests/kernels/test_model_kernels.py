"""The whole model through heed's Triton kernels, interpreted: training, caching and generation are as with torch."""

import dataclasses
import types

import pytest
import torch

import kernels
import kernels.cross_entropy
from kernels import MaskSpec, attention, gpu_choices
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
        monkeypatch.setattr(kernels, "faster_backend", lambda *_: "flash")

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


@pytest.mark.parametrize(
    ("flags", "checkpointing"),
    [({}, False), ({"layer_pattern": "S", "window": 5}, False), ({"attention_dropout": 0.3}, True)],
)
def test_a_block_is_one_graph(in_triton, flags, checkpointing):
    """As train.py compiles it on a GPU: a graph break would cost more than the compiled code saves."""
    model, tokens = randomized(dataclasses.replace(TINY, **flags)).train(), torch.arange(20)[None]
    in_triton()

    def gradients():
        torch.manual_seed(1)
        return torch.autograd.grad(model.loss(tokens, tokens), list(model.parameters()))

    expected = gradients()
    model.model.activation_checkpointing = checkpointing
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(), expected, atol=1e-4, rtol=1e-4)


def test_the_choice_of_a_backend_is_a_constant_of_the_graph(monkeypatch):
    """torch.compile cannot trace torch's functions for the name and the capability of a GPU."""
    gpu = types.SimpleNamespace(major=9, minor=0, name="NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: gpu)
    monkeypatch.setitem(gpu_choices.GPU_CHOICES, "NVIDIA H200", gpu_choices.Choices("today", {64: "flash"}, {}))

    def chosen(x):
        device = torch.device("cuda", 0)
        names = [kernels.preferred(device)[0], *(gpu_choices.faster_backend(device, D, True) for D in (64, 128))]
        return x + sum(10**i * (name == "flash") for i, name in enumerate(names))

    assert torch.compile(chosen, fullgraph=True, backend="eager")(torch.zeros(1)) == 11


@pytest.mark.parametrize("config", [TINY, WINDOWED], ids=["full", "window"])
@torch.no_grad()
def test_a_batch_of_selected_rows_decodes_with_a_row_as_a_page(in_triton, config):
    model, rows, lengths = randomized(config), [3, 0, 1], [7, 19, 2]
    tokens = torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(2))
    expected = torch.stack([logits[n] for n, logits in zip(lengths, model(tokens), strict=True)])
    in_triton()
    cache = KVCache(config, 4)
    for row, length, text in zip(rows, lengths, tokens, strict=True):
        model(text[None, :length], cache.select(torch.tensor([row]), torch.tensor([0])))
    before = in_triton.calls["decode"]
    following = torch.stack([text[n] for n, text in zip(lengths, tokens, strict=True)])[:, None]  # (B, 1)
    got = model(following, cache.select(torch.tensor(rows), torch.tensor(lengths)))[:, 0]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert in_triton.calls["decode"] == before + 2


def test_autocast_reaches_the_kernels():
    q, k, v = (torch.randn(1, 9, 2, 16, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v.bfloat16(), MaskSpec(), backend="flash")
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, attention(q, k, v, backend="sdpa"), atol=0.02, rtol=0.02)
    out.sum().backward()
    assert q.grad.dtype == torch.float32
