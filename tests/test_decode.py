"""Decoding's kernels against the definition in fp64, in Triton's interpreter, with NaN wherever nothing may be read."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import CAUSAL, FULL, Pattern, attention
from kernels import decode as module
from kernels.decode import choose_splits, decode_attention
from kernels.reference import distances, reference_attention, visible
from tests import interpreter

NAN = float("nan")
SOFT = Pattern(softcap=2.0)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

interpreter.install()


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
        scores = scores - (slopes[:, None, None] * distances(T, S, q.device, lengths)[0].abs()[:, None]).to(q.dtype)
    scores = scores.masked_fill(~visible(pattern, T, S, q.device, lengths, None)[:, None], -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(q.dtype)[None, :, None, None].expand(B, H, T, 1)], -1)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1).nan_to_num(0)[..., :S], v)


def check(q, k, v, pattern, lengths, slopes=None, sinks=None, splits=None, scale=None):
    """Against fp64, with NaN in the slots that hold no key."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rest = pattern, scale, lengths
    exact, exact_lse, _ = reference_attention(*(x.double() for x in (q, k, v)), *rest, None, slopes, sinks)
    plain = same_in_torch(q, k, v, *rest, slopes, sinks)
    unused = ~distances(q.shape[1], k.shape[1], q.device, lengths)[1]  # (B, S)
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
@pytest.mark.parametrize("pattern", [Pattern(True, 1), Pattern(True, 9), Pattern(True, 30), CAUSAL, FULL])
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


@pytest.mark.parametrize("pattern", [Pattern(True, 7), Pattern(False, 7), FULL, CAUSAL])
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
    pattern = Pattern(**{name: value for flag in flags for name, value in FLAGS[flag].items()})
    slopes, sinks = extras(4, "slopes" in flags, "sinks" in flags)
    q, k, v = draw(2, 2, 37, 4, 2, 16)
    check(q, k, v, pattern, torch.tensor([19, 44]), slopes, sinks, splits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [5.0, 50.0])
def test_softcap_keeps_its_digits(dtype, softcap):
    """A large cap on small scores is where tanh by exp alone would lose them; with scale 3 tanh saturates."""
    for scale in (0.1, 3.0):
        q, k, v = draw(2, 1, 37, 4, 2, 64, dtype)
        check(q, k, v, Pattern(softcap=softcap), torch.tensor([19, 37]), scale=scale)


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
@pytest.mark.parametrize(("pattern", "lengths"), [(CAUSAL, (1, 80, 31)), (Pattern(True, 9), (7, 80, 190))])
def test_paged_equals_contiguous_bit_for_bit(pattern, lengths, page, splits):
    q, k, v = draw(3, 2, 80, 4, 2, 16)
    lengths = torch.tensor(lengths)
    unused = ~distances(2, 80, q.device, lengths)[1][:, :, None, None]
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
    pattern = Pattern(pick(st.booleans()), window, pick(st.sampled_from([None, 1.0])))
    lengths = torch.tensor(pick(st.lists(st.integers(0, 90), min_size=B, max_size=B)))
    slopes, sinks = extras(K * G, pick(st.booleans()), pick(st.booleans()))
    check(q, k, v, pattern, lengths, slopes, sinks, pick(st.sampled_from([None, 1, 2, 5])))


def test_twice_the_same_bit_for_bit():
    q, k, v = draw(1, 1, 64, 2, 1, 16)
    first, second = (decode_attention(q, k, v, CAUSAL, 0.25, torch.tensor([60]), splits=4) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


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
    monkeypatch.setattr(module, "choose_splits", lambda *counts: seen.append(counts) or 2)
    q, k, v = draw(2, 1, 64, 4, 2, 16)
    for pattern in (CAUSAL, Pattern(True, 20), Pattern(False, 20)):
        check(q, k, v, pattern, torch.tensor([3, 64]))
    assert seen == [(4, 4, 8), (4, 2, 8), (4, 3, 8)]


def test_a_window_leaves_the_rest_unread():
    """What lies before the window is not read, wherever blocks begin; NaN there would go through a mask of scores."""
    q, k, v = draw(1, 2, 64, 2, 1, 16)
    for length in (40, 64, 70, 130):
        lengths = torch.tensor([length])
        distance, _ = distances(2, 64, q.device, lengths)  # (1, T, S)
        read = ((distance >= 0) & (distance < 9)).any(1)[:, :, None, None]
        expected = decode_attention(q, k, v, Pattern(True, 9), 0.25, lengths)[0]
        k_, v_ = (x.masked_fill(~read, NAN) for x in (k, v))
        assert torch.equal(decode_attention(q, k_, v_, Pattern(True, 9), 0.25, lengths)[0], expected)


@pytest.mark.parametrize("by", ["decode_attention", "attention"])
def test_compiled_in_one_graph(by):
    q, k, v = draw(2, 1, 40, 4, 2, 16)
    window, pages = Pattern(True, 20), torch.arange(4).view(2, 2).to(torch.int32)
    pools = [x.view(4, 20, 2, 16) for x in (k, v)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, lengths):
        if by == "attention":
            out, lse = attention(q, *pools, window, lengths=lengths, pages=pages, backend="decode", return_lse=True)
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


def test_the_door_leads_here():
    q, k, v = draw(2, 1, 20, 4, 2, 16)
    lengths = torch.tensor([7, 20])
    expected = attention(q, k, v, lengths=lengths, backend="reference")
    torch.testing.assert_close(attention(q, k, v, lengths=lengths, backend="decode"), expected, atol=2e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="it needs lengths"):
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


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 7])
@pytest.mark.parametrize(
    ("T", "H", "K", "D"), [(1, 8, 1, 128), (1, 6, 2, 80), (3, 4, 4, 64), (16, 6, 2, 24), (97, 1, 1, 64)]
)
@pytest.mark.parametrize("pattern", [CAUSAL, FULL, Pattern(True, 33), Pattern(False, 33, 5.0), Pattern(softcap=30.0)])
def test_a_larger_grid(dtype, splits, T, H, K, D, pattern):
    q, k, v = draw(2, T, 130, H, K, D, dtype)
    check(q, k, v, pattern, torch.tensor([1, 128]), splits=splits)
    check(q, k, v, pattern, torch.tensor([131, 1025]), *extras(H), splits)
