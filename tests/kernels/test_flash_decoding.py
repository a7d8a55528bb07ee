"""Decoding's kernels against the definition in fp64, in Triton's interpreter, with NaN wherever nothing may be read."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import CAUSAL, FULL, MaskSpec
from kernels.reference_attention import attention_mask, reference_attention, relative_positions
from kernels.triton.flash_decoding import decode_attention

NAN = float("nan")
SOFT = MaskSpec(softcap=2.0)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def outputs_full_of_nan(monkeypatch):
    """What a kernel does not write is seen."""
    empty = torch.empty

    def full_of_nan(*shape, **how):
        made = empty(*shape, **how)
        return made.fill_(NAN) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", full_of_nan)


def draw(B, T, S, H, K, D, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, T, H, D), (B, S, K, D), (B, S, K, D)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def extras(H, slopes=True, sinks=True):
    """ALiBi's slopes and attention sinks of H heads, or None."""
    g = torch.Generator().manual_seed(1)
    return torch.rand(H, generator=g) if slopes else None, torch.randn(H, generator=g) if sinks else None


def same_in_torch(q, k, v, pattern, scale, lengths, slopes, sinks):
    """The definition once more, every step rounded to q's dtype: what a plain implementation would reach."""
    B, T, H, _ = q.shape
    S, G = k.shape[1], H // k.shape[2]
    k, v = k.repeat_interleave(G, 2), v.repeat_interleave(G, 2)  # (B, S, K, D) -> (B, S, H, D)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    if pattern.softcap is not None:
        scores = pattern.softcap * torch.tanh(scores / pattern.softcap)
    if slopes is not None:
        scores = scores - (slopes[:, None, None] * relative_positions(T, S, q.device, lengths)[0].abs()[:, None]).to(
            q.dtype
        )
    scores = scores.masked_fill(~attention_mask(pattern, T, S, q.device, lengths, None)[:, None], -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(q.dtype)[None, :, None, None].expand(B, H, T, 1)], -1)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1).nan_to_num(0)[..., :S], v)


def check(q, k, v, pattern, lengths, slopes=None, sinks=None, splits=None, scale=None):
    """Against fp64, with NaN in the slots that hold no key."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rest = pattern, scale, lengths
    exact, exact_lse, _ = reference_attention(*(x.double() for x in (q, k, v)), *rest, None, slopes, sinks)
    plain = same_in_torch(q, k, v, *rest, slopes, sinks)
    unused = ~relative_positions(q.shape[1], k.shape[1], q.device, lengths)[1]  # (B, S)
    k, v = (x.masked_fill(unused[:, :, None, None], NAN) for x in (k, v))
    out, lse = decode_attention(q, k, v, *rest, None, slopes, sinks, splits)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    error, allowed = (out.double() - exact).abs().max(), 2 * (plain.double() - exact).abs().max()
    assert error <= allowed + 5e-7, f"error {error:.1e}, allowed {allowed:.1e}"
    torch.testing.assert_close(lse.double(), exact_lse, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 2, 7])
@pytest.mark.parametrize(
    ("T", "lengths"),
    [(1, (1, 16, 17)), (1, (48, 33, 2)), (3, (3, 48, 32)), (3, (0, 1, 47))],
)
def test_lengths_that_differ(dtype, splits, T, lengths):
    q, k, v = draw(3, T, 48, 4, 2, 24, dtype)
    check(q, k, v, CAUSAL, torch.tensor(lengths), splits=splits)


@pytest.mark.parametrize("splits", [1, 2, 7])
@pytest.mark.parametrize("pattern", [MaskSpec(True, 1), MaskSpec(True, 9), MaskSpec(True, 30), CAUSAL, FULL])
def test_a_ring(pattern, splits):
    """T=3 queries and a cache of 20 slots: not yet full, just full, come round once, many times."""
    q, k, v = draw(5, 3, 20, 2, 1, 16)
    check(q, k, v, pattern, torch.tensor([11, 20, 21, 33, 1000]), splits=splits)


@pytest.mark.parametrize(
    ("T", "H", "K"), [(1, 3, 3), (1, 8, 1), (3, 6, 3), (3, 8, 1), (3, 3, 1), (40, 2, 2), (40, 3, 1)]
)
def test_groups_of_heads_and_blocks_of_rows(T, H, K):
    q, k, v = draw(2, T, 50, H, K, 16)
    check(q, k, v, CAUSAL, torch.tensor([40, 50]))


@pytest.mark.parametrize("pattern", [MaskSpec(True, 7), MaskSpec(False, 7), FULL, CAUSAL])
@pytest.mark.parametrize(("lengths", "splits"), [((40, 75), 2), ((5, 41), 1)])
def test_a_chunk_of_a_prompt(pattern, lengths, splits):
    q, k, v = draw(2, 40, 48, 2, 1, 16)
    check(q, k, v, pattern, torch.tensor(lengths), splits=splits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 16, 24, 80, 128])
def test_head_sizes(dtype, D):
    q, k, v = draw(2, 2, 37, 4, 2, D, dtype)
    check(q, k, v, CAUSAL, torch.tensor([20, 37]))


FLAGS = {
    "window": {"window": 9},
    "full": {"causal": False},
    "softcap": {"softcap": 2.0},
    "slopes": {},
    "sinks": {},
}


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("flags", [f for n in (1, 2, 5) for f in itertools.combinations(FLAGS, n)], ids="+".join)
def test_flags_alone_in_pairs_and_all(flags, splits):
    pattern = MaskSpec(**{name: value for flag in flags for name, value in FLAGS[flag].items()})
    slopes, sinks = extras(4, "slopes" in flags, "sinks" in flags)
    q, k, v = draw(2, 2, 37, 4, 2, 16)
    check(q, k, v, pattern, torch.tensor([19, 44]), slopes, sinks, splits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [5.0, 50.0])
def test_softcap_keeps_its_digits(dtype, softcap):
    """A large cap on small scores is where tanh by exp alone would lose them; with scale 3 tanh saturates."""
    for scale in (0.1, 3.0):
        q, k, v = draw(2, 1, 37, 4, 2, 64, dtype)
        check(q, k, v, MaskSpec(softcap=softcap), torch.tensor([19, 37]), scale=scale)


@pytest.mark.parametrize("splits", [1, 4])
def test_rows_without_keys_give_zero_and_the_sink(splits):
    q, k, v = draw(2, 3, 20, 4, 2, 16)
    lengths = torch.tensor([2, 0])  # the first query of sequence 0 stands before its beginning
    _, sinks = extras(4)
    for given_sinks in (None, sinks, torch.full((4,), -math.inf)):
        out, lse = decode_attention(q, k * NAN, v * NAN, CAUSAL, 0.25, torch.zeros(2, dtype=torch.int64), None, None,
                                    given_sinks, splits)  # fmt: skip
        assert out.eq(0).all()
        assert torch.equal(lse, (torch.full((4,), -math.inf) if given_sinks is None else given_sinks).expand(2, 3, 4))
        check(q, k, v, CAUSAL, lengths, None, given_sinks, splits)


def paged(x, page, g):
    """(B, S, K, D) -> a pool of pages in any order, others among them full of NaN, and the table (B, N)."""
    B, S = x[0].shape[:2]
    N = S // page
    places = torch.randperm(B * N + 3, generator=g)[: B * N].view(B, N)
    pools = []
    for cache in x:
        pool = torch.full((B * N + 3, page, *cache.shape[2:]), NAN, dtype=cache.dtype)
        pool[places] = cache.unflatten(1, (N, page))  # (B, S, K, D) -> (B, N, page, K, D)
        pools.append(pool)
    return *pools, places.to(torch.int32)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("page", [1, 5, 16, 80])
@pytest.mark.parametrize(("pattern", "lengths"), [(CAUSAL, (1, 80, 31)), (MaskSpec(True, 9), (7, 80, 190))])
def test_paged_equals_contiguous_bit_for_bit(pattern, lengths, page, splits):
    q, k, v = draw(3, 2, 80, 4, 2, 16)
    lengths = torch.tensor(lengths)
    unused = ~relative_positions(2, 80, q.device, lengths)[1][:, :, None, None]
    k, v = (x.masked_fill(unused, NAN) for x in (k, v))
    slopes, sinks = extras(4)
    expected = decode_attention(q, k, v, pattern, 0.3, lengths, None, slopes, sinks, splits)
    k_pool, v_pool, pages = paged((k, v), page, torch.Generator().manual_seed(2))
    beyond = torch.arange(80 // page)[None, :] * page >= lengths[:, None]
    pages = pages.masked_fill(beyond, 1 << 30)  # entries that no sequence has reached lead nowhere
    got = decode_attention(q, k_pool, v_pool, pattern, 0.3, lengths, pages, slopes, sinks, splits)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert not got[0].isnan().any()


def test_strided_inputs():
    """A slice of a larger cache, heads before positions, one length for all; a last dimension that is strided."""
    q, k, v = draw(2, 3, 40, 4, 2, 24)
    lengths = torch.tensor([30]).expand(2)
    expected = decode_attention(q, k, v, CAUSAL, 0.2, lengths)
    wide = torch.full((5, 90, 3, 32), NAN)
    wide[1:5:2, 20:60, 1:, 8:] = k
    heads_first = v.transpose(1, 2).contiguous().transpose(1, 2)
    last_strided = k.transpose(1, 3).contiguous().transpose(1, 3)
    for keys in (wide[1:5:2, 20:60, 1:, 8:], last_strided):
        queries = q.transpose(0, 2).contiguous().transpose(0, 2)
        got = decode_attention(queries, keys, heads_first, CAUSAL, 0.2, lengths)
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(ours, theirs)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_whatever_fits(data):
    pick = data.draw
    B, T, S = pick(st.integers(1, 3)), pick(st.integers(1, 6)), pick(st.integers(1, 40))
    K, G, D = pick(st.integers(1, 2)), pick(st.integers(1, 3)), pick(st.integers(1, 20))
    q, k, v = draw(B, T, S, K * G, K, D, seed=pick(st.integers(0, 99)))
    window = pick(st.none() | st.integers(1, 45))
    pattern = MaskSpec(pick(st.booleans()), window, pick(st.sampled_from([None, 1.0])))
    lengths = torch.tensor(pick(st.lists(st.integers(0, 90), min_size=B, max_size=B)))
    slopes, sinks = extras(K * G, pick(st.booleans()), pick(st.booleans()))
    check(q, k, v, pattern, lengths, slopes, sinks, pick(st.sampled_from([None, 1, 2, 5])))


def test_twice_the_same_bit_for_bit():
    q, k, v = draw(1, 1, 64, 2, 1, 16)
    first, second = (decode_attention(q, k, v, CAUSAL, 0.25, torch.tensor([60]), splits=4) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 7])
@pytest.mark.parametrize(
    ("T", "H", "K", "D"), [(1, 8, 1, 128), (1, 6, 2, 80), (3, 4, 4, 64), (16, 6, 2, 24), (97, 1, 1, 64)]
)
@pytest.mark.parametrize(
    "pattern", [CAUSAL, FULL, MaskSpec(True, 33), MaskSpec(False, 33, 5.0), MaskSpec(softcap=30.0)]
)
def test_a_larger_grid(dtype, splits, T, H, K, D, pattern):
    q, k, v = draw(2, T, 130, H, K, D, dtype)
    check(q, k, v, pattern, torch.tensor([1, 128]), splits=splits)
    check(q, k, v, pattern, torch.tensor([131, 1025]), *extras(H), splits)
