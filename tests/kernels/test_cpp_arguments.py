"""What Python passes to the C++ code: a tensor of another dtype or shape is a ValueError, not a read past its end, and
torch's default dtype changes nothing."""

import copy
import dataclasses

import pytest
import torch

from inference.engine import CppEngine, make_engine
from inference.sampling import SamplingParams
from kernels import attention
from kernels.cpu import bindings, fused_layers
from kernels.cpu.bindings import Heads
from model import KVCache
from tests.conftest import TINY, randomized
from tests.training.test_apply_fused_layers import fused
from training.config import OptimConfig
from training.optimizers import build_optimizers

B, T, C, H, K, D, F, V = 2, 8, 6, 4, 2, 4, 10, 12
N = (H + 2 * K) * D
HEADS = Heads(H, K, D, 0, 0.5, 1e-6)
BF16 = torch.bfloat16


def attention_backward(dout, qkv, out, lse):
    ones = torch.ones(T, D)
    return bindings.attention_backward(dout, qkv, out, lse, None, None, ones, ones, HEADS)


def muon_step(weight, momentum):
    weight.grad = torch.zeros_like(weight)  # torch has checked a gradient's dtype and shape
    bindings.muon_step([weight], [momentum], torch.float32, 0.1, 0.9, 0.0)


# The check comes first, so the packed weights are not needed.
def feed_forward(x, gain, *weights):
    return fused_layers.FeedForward.apply(x, gain, 1e-6, 0.0, None, None, *weights)


def attention_half(x, gain, *weights):
    return fused_layers.Attention.apply(x, gain, 1e-6, 0.0, None, None, None, None, None, None, HEADS, *weights)


# Each function, and the names and shapes of its tensors. They are fp32, `targets` int64.
FUNCTIONS = {
    "norm": (lambda x, gain: bindings.norm(x, gain, 1e-6, BF16), {"x": (B, T, C), "gain": (C,)}),
    "norm_backward": (bindings.norm_backward, {"dy": (B, T, C), "x": (B, T, C), "gain": (C,), "inverse": (B, T)}),
    "attention": (
        lambda *tensors: bindings.attention(*tensors, HEADS),
        {"qkv": (B, T, N), "gain_q": (D,), "gain_k": (D,), "cos": (T, D), "sin": (T, D)},
    ),
    "attention_backward": (
        attention_backward,
        {"dout": (B, T, H * D), "qkv": (B, T, N), "out": (B, T, H * D), "lse": (B, H, 64)},
    ),
    "linear_cross_entropy": (
        lambda *tensors: bindings.linear_cross_entropy(*tensors, 0.0, None),
        {"x": (T, C), "weight": (V, C), "targets": (T,), "losses": (T,), "dx": (T, C), "dw": (V, C)},
    ),
    "muon_step": (muon_step, {"weight": (F, C), "momentum": (F, C)}),
    "FeedForward": (feed_forward, {"x": (B, T, C), "gain": (C,), "gate": (F, C), "up": (F, C), "down": (C, F)}),
    "Attention": (
        attention_half,
        {"x": (B, T, C), "gain": (C,), "q": (H * D, C), "k": (K * D, C), "v": (K * D, C), "o": (C, H * D)},
    ),
}
# Another dtype is no mistake: it is cast, or chooses what is computed in.
ANY_DTYPE = {"norm_backward dy", "linear_cross_entropy weight", "attention qkv", "attention_backward qkv"}
ANY_DTYPE |= {f"attention {name}" for name in ("gain_q", "gain_k", "cos", "sin")}
ANY_ROWS = {"norm x", "attention qkv", "FeedForward x", "Attention x", "Attention q"}  # the first dimension is free


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_tensor_of_another_dtype_or_shape(name):
    function, shapes = FUNCTIONS[name]
    good = {key: torch.zeros(shape, dtype=torch.int64 if key == "targets" else None) for key, shape in shapes.items()}
    if name not in ("FeedForward", "Attention"):
        function(*good.values())
    for key, x in good.items():
        wrong = [x[..., :-1].contiguous(), x[..., None]]
        wrong += [x[:-1]] if x.ndim > 1 and f"{name} {key}" not in ANY_ROWS else []
        wrong += [x.to(torch.int32 if key == "targets" else BF16)] if f"{name} {key}" not in ANY_DTYPE else []
        for bad in wrong:
            with pytest.raises(ValueError, match=r"C\+\+|does not hold|values to unpack"):
                function(*{**good, key: bad}.values())


@torch.inference_mode()
def test_a_cache_and_weights_that_do_not_fit_the_engine():
    run, tokens = CppEngine(randomized(TINY)), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="tokens is torch"):
        run(tokens.int(), KVCache(TINY, 2))
    with pytest.raises(ValueError, match="rows is"):
        run(tokens, KVCache(TINY, 3))
    two = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="lengths is"):
        run(tokens, KVCache(TINY, 3).select(two, torch.tensor([0])))
    for rows in (two - 1, two + 2):
        with pytest.raises(IndexError, match="room in the cache"):
            run(tokens, KVCache(TINY, 3).select(rows, two))
    with pytest.raises(ValueError, match="keys is"):
        run(tokens, KVCache(dataclasses.replace(TINY, n_kv_head=1), 2))
    mixed = KVCache(TINY, 2)
    mixed.layers[1] = tuple(x.bfloat16() for x in mixed.layers[1])
    with pytest.raises(ValueError, match="keys is torch"):
        run(tokens, mixed)
    model = randomized(TINY)
    model.model.layers[1].mlp.up_proj.weight.data = torch.zeros(47, 32)
    with pytest.raises(ValueError, match="a weight is"):
        CppEngine(model)


@torch.inference_mode()
@pytest.mark.parametrize("flags", [{}, {"window": 5, "layer_pattern": "S"}])
def test_a_cache_that_is_full_is_an_error(flags):
    """Without the check the oldest keys are overwritten, and the text goes on with wrong attention."""
    config = dataclasses.replace(TINY, context=600, **flags)
    run, cache = CppEngine(randomized(config)), KVCache(config, 1, max_seq_len=9)
    run(torch.zeros(1, 5, dtype=torch.long), cache)
    run(torch.zeros(1, 4, dtype=torch.long), cache)
    if flags:  # a ring of 9 slots holds a window of 5 and 4 new tokens more, again and again
        run(torch.zeros(1, 5, dtype=torch.long), cache)
    with pytest.raises(IndexError, match="room in the cache"):
        run(torch.zeros(1, 6 if flags else 1, dtype=torch.long), cache)


@pytest.fixture(params=[BF16, torch.float64], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(before)


def test_the_default_dtype_changes_nothing(default_dtype):
    """Training and decoding steps, bit for bit."""
    model = randomized(dataclasses.replace(TINY, yarn_factor=4.0, yarn_original_context=8))
    tokens = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(0))

    def steps(model):
        optimizers = build_optimizers(fused(model.train()), OptimConfig(), torch.float32)
        for _ in range(2):
            model.loss(tokens, tokens).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        q, k, v = (x.clone().requires_grad_() for x in torch.ones(3, 1, 9, 2, 4, dtype=torch.float32).unbind())
        attention(q, k, v, backend="cpp").sum().backward()
        with torch.inference_mode():
            run, cache = make_engine(model.eval()), KVCache(TINY, 2)
            logits = [run(piece, cache) for piece in tokens.split(5, dim=1)]
            token = SamplingParams().sample(logits[-1], logits[-1] > 9, torch.full((2, 1), 0.3, dtype=torch.float32))
        return [*model.parameters(), q.grad, v.grad, *logits, token]

    other = copy.deepcopy(model)
    expected = steps(model)
    default_dtype()
    for got, right in zip(steps(other), expected, strict=True):
        assert got.dtype == right.dtype
        assert torch.equal(got, right)
