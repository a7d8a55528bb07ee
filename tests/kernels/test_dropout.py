"""Dropout of attention weights: the random numbers, the same mask in every backend, and which backend is chosen."""

import math

import pytest
import torch
import triton
import triton.language as tl

import kernels
from kernels import CAUSAL, FULL, MaskSpec, attention
from kernels.cpu import blockwise_attention
from kernels.dropout import draw_seed, dropped_numbers, keep, mix
from kernels.reference_attention import attention_mask
from kernels.triton import dropout as device
from kernels.triton import flash_attention as flash_module
from tests.kernels.test_attention import draw

SEEDS = [(0, 0), (1, 0), (0, 1), (2**31 - 1, -(2**31)), (123456789, -987654321)]
WORD = 2**32 - 1


def count(n: int, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + n, dtype=torch.int32)


def mask(seed: tuple[int, int], p: float, heads: int, T: int, S: int) -> torch.Tensor:
    """Which weights are kept, (heads, T, S)."""
    words = torch.tensor(seed, dtype=torch.int32)
    return keep(words, p, count(heads)[:, None, None], count(T)[:, None], count(S))


# 1. The random numbers ----------------------------------------------------------------------------------------------


def hashed(x: int) -> int:
    """MurmurHash3's finalizer, in Python's integers."""
    x ^= x >> 16
    x = x * 0x85EBCA6B & WORD
    x ^= x >> 13
    x = x * 0xC2B2AE35 & WORD
    return x ^ x >> 16


def test_the_hash_is_murmurhash3s():
    """The 32-bit hash of no bytes is the finalizer of the seed; its published test vectors for seeds 0, 1 and -1."""
    expected = torch.tensor([0, 0x514E28B7, 0x81F16F39 - 2**32], dtype=torch.int32)
    assert mix(torch.tensor([0, 1, -1], dtype=torch.int32)).equal(expected)
    x = torch.randint(-(2**31), 2**31, (1000,), dtype=torch.int32)
    assert [y & WORD for y in mix(x).tolist()] == [hashed(y & WORD) for y in x.tolist()]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mask_is_its_definition_in_pythons_integers(seed):
    p = 0.3
    heads, queries, keys = (torch.tensor([0, 1, n], dtype=torch.int32) for n in (70_000, 2**31 - 1, 123_456_789))
    got = keep(torch.tensor(seed, dtype=torch.int32), p, heads[:, None, None], queries[:, None], keys)
    for i, head in enumerate(heads.tolist()):
        for j, query in enumerate(queries.tolist()):
            salt, factor = (hashed(hashed(hashed(word & WORD) + head & WORD) + query & WORD) for word in seed)
            for n, key in enumerate(keys.tolist()):
                number = hashed((salt ^ key) * (factor | 1) & WORD)
                assert got[i, j, n] == ((number ^ 2**31) >= p * 2**32)  # the sign bit flipped: unsigned order


@triton.jit
def write_mask(seed, out, first_query, first_key, DROPPED: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    row = device.row_hashes(seed, tl.program_id(0).to(tl.int64) * 99_999, first_query + at[:, None])
    kept = device.keep(row, first_key + at[None, :], DROPPED)
    tl.store(out + tl.program_id(0) * N * N + at[:, None] * N + at[None, :], kept)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [1e-12, 0.1, 0.5, 1 - 1e-12])
def test_triton_computes_the_same_bits(seed, p):
    words, out = torch.tensor(seed, dtype=torch.int32), torch.zeros(3, 16, 16, dtype=torch.bool)
    write_mask[(3,)](words, out, 70_001, 2**31 - 17, dropped_numbers(p), 16)
    expected = keep(words, p, 99_999 * count(3)[:, None, None], count(16, 70_001)[:, None], count(16, 2**31 - 17))
    assert out.equal(expected)
    assert out.any() == (p < 0.9) and out.all() == (p < 0.05)


def deviation(dropped: torch.Tensor, p: float, *over: int) -> torch.Tensor:
    """Numbers of dropped weights, summed over dimensions: how many standard deviations they are from the mean."""
    n = math.prod(dropped.shape[i] for i in over)
    return (dropped.sum(over).double() - n * p) / math.sqrt(n * p * (1 - p))


def correlation(a: torch.Tensor, b: torch.Tensor, p: float) -> float:
    """Of two masks, in standard deviations from 0."""
    return float(((a.double() - p) * (b.double() - p)).sum() / (p * (1 - p)) / math.sqrt(a.numel()))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.02, 0.1, 0.5])
def test_rates_are_those_of_independent_draws(p, seed):
    """Of all weights, of every row, column, head, query and key: the mean, the largest deviation and its variance."""
    dropped = ~mask(seed, p, 16, 256, 256)
    assert abs(deviation(dropped, p, 0, 1, 2)) < 4
    for over in ((2,), (1,), (0, 1), (0, 2), (1, 2)):
        z = deviation(dropped, p, *over)
        assert z.abs().max() < 6, over
        assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / z.numel()), over


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_are_not_correlated(p, seed):
    """Nor weights at other distances: in the row, the column, on the diagonals, in the other heads."""
    dropped = ~mask(seed, p, 16, 256, 256)
    for shift in [(0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 1, -1), (1, 0, 0), (1, 1, 0), (1, 0, 1), (0, 0, 2), (0, 0, 16),
                  (0, 0, 128), (0, 16, 0), (0, 128, 0), (4, 0, 0)]:  # fmt: skip
        assert abs(correlation(dropped, dropped.roll(shift, (0, 1, 2)), p)) < 4.5, shift


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_seeds_are_not_correlated(p):
    """Steps and layers have seeds of their own. Also seeds that differ in a bit, and with heads and queries shifted."""
    masks = [~mask(seed, p, 8, 128, 128) for seed in [*SEEDS, (2, 0), (0, 2), (1, 1)]]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            for shift in [(0, 0, 0), (1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]:
                assert abs(correlation(a, b.roll(shift, (0, 1, 2)), p)) < 5, shift


def test_the_seed_is_torchs_generators():
    torch.manual_seed(3)
    first, second = (draw_seed(torch.device("cpu")) for _ in range(2))
    torch.manual_seed(3)
    assert draw_seed(torch.device("cpu")).equal(first)
    assert first.shape == (2,) and first.dtype == torch.int32 and not first.equal(second)


# 2. Attention -------------------------------------------------------------------------------------------------------

SEED = torch.tensor([5, -7], dtype=torch.int32)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "blocks", "flash"])


def dense(q, k, v, pattern, p, seed):
    """softmax(q k^T / sqrt(D)), weights dropped, times v; keys and values repeated for the heads of a group."""
    (B, T, H, D), S = q.shape, k.shape[1]
    k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))  # (B, S, H, D)
    hidden = ~attention_mask(pattern, T, S, q.device, None, None)
    weights = (torch.einsum("bthd,bshd->bhts", q, k) * D**-0.5).masked_fill(hidden, -math.inf).softmax(-1)
    kept = torch.stack(
        [keep(seed, p, count(H, b * H)[:, None, None], count(T, S - T)[:, None], count(S)) for b in range(B)]
    )
    return torch.einsum("bhts,bshd->bthd", weights * kept / (1 - p), v)


@BACKENDS
@pytest.mark.parametrize("pattern", [CAUSAL, FULL, MaskSpec(True, 5), MaskSpec(False, 3)])
@pytest.mark.parametrize(("T", "S", "H", "K"), [(1, 1, 1, 1), (20, 20, 4, 2), (4, 19, 3, 1)])
def test_attention_and_its_gradients_equal_the_definition(backend, pattern, T, S, H, K, monkeypatch):
    monkeypatch.setattr(blockwise_attention, "BLOCK", 3)  # small, so that small inputs cross borders of blocks
    inputs = [x.requires_grad_() for x in draw(2, T, S, H, K, 6)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = attention(*inputs, pattern, dropout_p=0.3, dropout_seed=SEED, backend=backend)
    expected = dense(*exact, pattern, 0.3, SEED)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
    weight = torch.randn(out.shape)
    ours = torch.autograd.grad((out * weight).sum(), inputs)
    theirs = torch.autograd.grad((expected * weight).sum(), exact)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.double(), y, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "blocks"])
def test_the_mean_over_seeds_is_attention_without_dropout(backend):
    torch.manual_seed(0)
    q, k, v = draw(1, 20, 20, 2, 1, 16)
    outs = torch.stack([attention(q, k, v, dropout_p=0.3, backend=backend) for _ in range(200)])
    z = (outs.mean(0) - attention(q, k, v, backend=backend)) / (outs.std(0) / math.sqrt(200))
    z = z[:, 4:]  # the first queries have few keys, and sums that are not normal
    assert z.abs().max() < 5 and 0.8 < z.std() < 1.2 and abs(z.mean()) < 0.5


@BACKENDS
def test_without_dropout_nothing_changes(backend):
    q, k, v = draw(2, 9, 9, 4, 2, 16)
    state = torch.get_rng_state()
    out = attention(q, k, v, dropout_p=0.0, dropout_seed=SEED, backend=backend)
    assert out.equal(attention(q, k, v, backend=backend))
    assert torch.get_rng_state().equal(state)
    assert not out.equal(attention(q, k, v, dropout_p=0.1, backend=backend))


@pytest.mark.parametrize("backend", ["reference", "flash"])
def test_the_log_sum_exp_is_that_of_all_weights(backend):
    q, k, v = draw(1, 20, 20, 2, 1, 16)
    _, expected = attention(q, k, v, return_lse=True, backend=backend)
    _, lse = attention(q, k, v, dropout_p=0.5, return_lse=True, backend=backend)
    assert lse.equal(expected)


@pytest.mark.parametrize(
    ("preferred", "options", "chosen"),
    [
        ("cpp", {}, "blocks"),
        ("cpp", {"document_ids": torch.zeros(1, 9)}, "blocks"),
        ("cpp", {"alibi_slopes": torch.ones(2)}, "reference"),
        ("cpp", {"mask_spec": MaskSpec(True, 3)}, "blocks"),
        ("sdpa", {}, "reference"),
        ("flash", {}, "flash"),
        ("flash", {"mask_spec": FULL}, "flash"),
    ],
)
def test_a_backend_that_supports_it_is_chosen(preferred, options, chosen, monkeypatch):
    called = []

    def recorded(name, function):
        return lambda *a: (called.append(name), function(*a))[1]

    monkeypatch.setattr(kernels, "preferred", lambda device: (preferred, ""))
    monkeypatch.setattr(kernels, "faster_backend", lambda *_: "sdpa")
    for module, name in ((kernels, "blocks"), (kernels, "reference"), (flash_module, "flash")):
        function = f"{name}_attention"
        monkeypatch.setattr(module, function, recorded(name, getattr(module, function)))
    attention(*(x.requires_grad_() for x in draw(1, 9, 9, 2, 1, 16)), dropout_p=0.1, **options)
    assert called == [chosen]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "sdpa"}, "'sdpa' does not support dropout_p; reference, blocks and flash do"),
        ({"backend": "cpp"}, "'cpp' does not support dropout_p"),
        ({"backend": "decode"}, "'decode' does not support dropout_p"),
        ({"cache_seqlens": torch.tensor([4])}, "dropout_p = 0.1 is for training, without a cache"),
        ({"dropout_p": 1.0}, "dropout_p = 1.0: must be at least 0 and below 1"),
        ({"dropout_seed": torch.tensor(3)}, r"dropout_seed has shape \(\) and dtype torch.int64; must be two words"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        attention(*draw(1, 4, 4, 2, 1, 16), **({"dropout_p": 0.1} | options))
