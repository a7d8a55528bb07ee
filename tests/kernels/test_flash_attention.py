"""Flash attention against its definition in fp64: outputs, log-sum-exps and all gradients, interpreted.

The bound is FlashAttention's: at most twice the error of the same computation in the same dtype by plain torch, and a
small absolute term. Outputs are full of NaN before the kernels write them. Tiles are 16 x 16: 40 x 50 crosses borders.
"""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import CAUSAL, FULL, MaskSpec, attention
from kernels.dropout import dropout
from kernels.reference_attention import attention_mask, document_bounds, reference_attention, relative_positions
from kernels.triton import flash_attention as flash_module
from kernels.triton.flash_attention import flash_attention

SCALE = 0.3
SEED = torch.tensor([1, 2], dtype=torch.int32)


@pytest.fixture(autouse=True)
def outputs_full_of_nan(monkeypatch):
    def full_of_nan(make):
        def made(*shape, **how):
            x = make(*shape, **how)
            return x.fill_(math.nan) if x.is_floating_point() else x

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, full_of_nan(getattr(torch, name)))


def naive(q, k, v, pattern, documents, slopes, sinks, p=0.0):
    """The definition in the inputs' own dtype, every step rounded to it."""
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    scores = torch.einsum("btkgd,bskd->bkgts", q.view(B, T, K, H // K, D), k).reshape(B, H, T, S) * SCALE
    if pattern.softcap is not None:
        scores = pattern.softcap * torch.tanh(scores / pattern.softcap)
    if slopes is not None:
        scores = scores - (slopes[:, None, None] * relative_positions(T, S, q.device, None)[0].abs()).to(q.dtype)
    mask = attention_mask(pattern, T, S, q.device, None, documents)[:, None]
    scores = scores.masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(q.dtype)[:, None])
    weights = (scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    weights = dropout(weights, p, SEED, S - T, 0)
    out = torch.einsum("bkgts,bskd->btkgd", weights.view(B, K, H // K, T, S), v).reshape(B, T, H, D)
    return out, lse.transpose(1, 2)


def definition(q, k, v, pattern, documents, slopes, sinks, p=0.0):
    return reference_attention(q, k, v, pattern, SCALE, None, documents, slopes, sinks, p, SEED if p else None)[:2]


def flash(q, k, v, pattern, documents, slopes, sinks, p=0.0):
    return flash_attention(q, k, v, pattern, SCALE, documents, slopes, sinks, p, SEED if p else None)


def draw(B, T, S, H, K, D, docs=False, slopes=False, sinks=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(shape, generator=g) for shape in ((B, T, H, D), (B, S, K, D), (B, S, K, D))]
    extras = [torch.rand(H, generator=g) if slopes else None, torch.randn(H, generator=g) if sinks else None]
    numbers = torch.randint(0, 2 + S // 15, (B, S), generator=g).sort(1).values if docs else None
    return inputs, extras, numbers, torch.randn(B, T, H, D, generator=g), torch.randn(B, T, H, generator=g)


def results(function, dtype, case, pattern):
    """out, lse, and the gradients of q, k, v, and of slopes and sinks where they are."""
    inputs, extras, documents, weight, weight_lse = case
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    precise = torch.promote_types(dtype, torch.float32)
    extras = [None if x is None else x.to(precise).requires_grad_() for x in extras]
    out, lse = function(*inputs, pattern, documents, *extras)
    loss = (out * weight.to(out.dtype)).sum(dtype=precise)
    loss = loss + (lse.masked_fill(lse.isneginf(), 0.0) * weight_lse.to(lse.dtype)).sum(dtype=precise)
    loss.backward()
    return [out, lse, *(x.grad for x in (*inputs, *extras) if x is not None)]


def check(case, pattern, dtype=torch.float32, p=0.0):
    rounded = [x.to(dtype).double() for x in case[0]]  # all compute with the numbers that the dtype can hold
    exact = results(functools.partial(definition, p=p), torch.float64, (rounded, *case[1:]), pattern)
    plain = results(functools.partial(naive, p=p), dtype, case, pattern)
    ours = results(functools.partial(flash, p=p), dtype, case, pattern)
    assert ours[0].dtype == dtype
    assert ours[1].dtype == torch.float32
    for truth, theirs, mine in zip(exact, plain, ours, strict=True):
        finite = truth.isfinite()
        torch.testing.assert_close(mine.double()[~finite], truth[~finite])
        bound = 2 * (theirs.double() - truth)[finite].abs().max() if finite.any() else 0.0
        error = (mine.double() - truth)[finite].abs().max() if finite.any() else 0.0
        assert error <= bound + (2e-6 if dtype == torch.float32 else 2e-3) * (1 + truth[finite].abs().max())
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("T", "S", "H", "K", "D"),
    [
        (1, 1, 2, 2, 16),
        (1, 37, 3, 1, 24),
        (40, 50, 4, 2, 16),
        (33, 33, 2, 1, 40),
        (50, 33, 2, 2, 80),
        (20, 20, 8, 1, 16),
    ],
)
def test_causal(T, S, H, K, D, dtype):
    check(draw(1, T, S, H, K, D), CAUSAL, dtype)


@pytest.mark.parametrize(("T", "S"), [(97, 97), (113, 203), (203, 113)])
@pytest.mark.parametrize("pattern", [CAUSAL, MaskSpec(False, 20)])
def test_longer(T, S, pattern):
    check(draw(1, T, S, 1, 1, 16), pattern)


@pytest.mark.full
@pytest.mark.parametrize("pattern", [CAUSAL, MaskSpec(True, 100), FULL])
@pytest.mark.parametrize("D", [16, 64, 128, 256])
def test_long(pattern, D):
    check(draw(1, 1025, 1025, 2, 1, D), pattern)


FLAGS = {
    "full": {"pattern": FULL},
    "window": {"pattern": MaskSpec(True, 9)},
    "window of one": {"pattern": MaskSpec(True, 1)},
    "two-sided window": {"pattern": MaskSpec(False, 9)},
    "softcap": {"pattern": MaskSpec(True, None, 1.5)},
    "documents": {"docs": True},
    "slopes": {"slopes": True},
    "sinks": {"sinks": True},
    "full, documents": {"pattern": FULL, "docs": True},
    "window, documents": {"pattern": MaskSpec(True, 9), "docs": True},
    "two-sided window, documents, slopes": {"pattern": MaskSpec(False, 9), "docs": True, "slopes": True},
    "softcap, slopes": {"pattern": MaskSpec(True, None, 1.5), "slopes": True},
    "window, sinks": {"pattern": MaskSpec(True, 9), "sinks": True},
    "dropout": {"p": 0.1},
    "full, dropout": {"pattern": FULL, "p": 0.5},
    "window, documents, dropout": {"pattern": MaskSpec(True, 9), "docs": True, "p": 0.3},
    "all": {"pattern": MaskSpec(True, 20, 2.0), "docs": True, "slopes": True, "sinks": True, "p": 0.3},
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
def test_flags_and_their_pairs(flags):
    flags = dict(flags)
    pattern, p = flags.pop("pattern", CAUSAL), flags.pop("p", 0.0)
    check(draw(2, 35, 41, 2, 1, 16, **flags), pattern, p=p)


@pytest.mark.parametrize("flags", ["window, documents", "softcap, slopes", "full, dropout", "all"])
def test_flags_in_bf16(flags):
    flags = dict(FLAGS[flags])
    pattern, p = flags.pop("pattern"), flags.pop("p", 0.0)
    check(draw(1, 35, 41, 2, 1, 16, **flags), pattern, torch.bfloat16, p)


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing(sinks):
    case = draw(1, 37, 20, 2, 1, 16, sinks=sinks)  # the first 17 queries stand before all keys
    out, lse, dq, *_ = check(case, CAUSAL)
    assert out[:, :17].eq(0).all()
    assert dq[:, :17].eq(0).all()
    assert lse[:, :17].equal((case[1][1] if sinks else torch.tensor(-math.inf)).expand(1, 17, 2))


def test_nan_from_rows_that_see_nothing_goes_nowhere():
    """As torch.logaddexp sends it back to two log-sum-exps that are both -inf."""
    q, k, v = (x.requires_grad_() for x in draw(1, 20, 5, 2, 1, 16)[0])
    out, lse = flash_attention(q, k, v, CAUSAL, SCALE)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (out, torch.where(lse.isneginf(), math.nan, 1.0)))
    assert all(x.isfinite().all() for x in gradients)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 34), more=st.integers(-16, 16), K=st.integers(1, 2), G=st.integers(1, 3), D=st.integers(1, 33),
    causal=st.booleans(), window=st.none() | st.integers(1, 40), softcap=st.none() | st.floats(0.5, 50),
    docs=st.booleans(), slopes=st.booleans(), sinks=st.booleans(), p=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_case(T, more, K, G, D, causal, window, softcap, docs, slopes, sinks, p, seed):
    S = max(T + more, T if docs else 1)
    check(draw(1, T, S, G * K, K, D, docs, slopes, sinks, seed), MaskSpec(causal, window, softcap), p=p)


def test_views_that_are_not_contiguous():
    q, k, v = draw(2, 20, 20, 4, 2, 16)[0]
    expected = flash_attention(q, k, v, CAUSAL, SCALE)
    views = [torch.randn(2, 30, x.shape[2] + 3, 2 * 16) for x in (q, k, v)]
    for view, x in zip(views, (q, k, v), strict=True):
        view[:, 5:25, 1 : x.shape[2] + 1, 8:24] = x
    views = [x[:, 5:25, 1 : n + 1, 8:24] for x, n in zip(views, (4, 2, 2), strict=True)]
    assert flash_attention(*views, CAUSAL, SCALE)[0].equal(expected[0])
    turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]  # the last dimension has a stride
    assert flash_attention(*turned, CAUSAL, SCALE)[0].equal(expected[0])
    documents = (torch.arange(20)[:, None] // torch.tensor([5, 7])).T  # (B, S), S has the smaller stride
    slopes, sinks = torch.rand(4), torch.randn(4)
    expected = flash_attention(q, k, v, CAUSAL, SCALE, documents.contiguous(), slopes, sinks)
    separate = slopes.repeat_interleave(2)[::2]
    assert flash_attention(q, k, v, CAUSAL, SCALE, documents, separate, sinks.double())[0].equal(expected[0])


def test_gradients_are_the_same_bits_every_time():
    case = draw(1, 35, 41, 2, 1, 16, docs=True, slopes=True, sinks=True)
    first, second = (results(functools.partial(flash, p=0.3), torch.float32, case, CAUSAL) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_the_log_sum_exp_joins_two_halves():
    """What ring attention does with keys that lie elsewhere, gradients included."""
    q, k, v = (x.double().requires_grad_() for x in draw(1, 20, 40, 2, 1, 16)[0])
    halves = [
        flash_attention(q.float(), x.float(), y.float(), FULL, SCALE)
        for x, y in zip(k.chunk(2, 1), v.chunk(2, 1), strict=True)
    ]
    weights = torch.stack([lse for _, lse in halves]).softmax(0)
    joined = sum(weight[..., None] * out for weight, (out, _) in zip(weights, halves, strict=True))
    expected = definition(q, k, v, FULL, None, None, None)[0]
    torch.testing.assert_close(joined.double(), expected, atol=2e-6, rtol=1e-5)
    ours = torch.autograd.grad(joined.square().sum(), (q, k, v))
    theirs = torch.autograd.grad(expected.square().sum(), (q, k, v))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_bounds_of_documents():
    first, last = document_bounds(torch.tensor([[5, 5, 2, 2, 2, 5], [0, 1, 2, 3, 3, 3]]))
    assert first.tolist() == [[0, 0, 2, 2, 2, 5], [0, 1, 2, 3, 3, 3]]
    assert last.tolist() == [[2, 2, 5, 5, 5, 6], [1, 2, 3, 6, 6, 6]]


@pytest.mark.parametrize("backend", ["reference", "sdpa", "flash"])
def test_bounds_in_place_of_documents(backend, monkeypatch):
    """As a model of several layers passes them: computed once, in no call of attention."""
    (q, k, v), _, documents, *_ = draw(2, 35, 41, 2, 1, 16, docs=True)
    expected = attention(q, k, v, document_ids=documents, backend="reference")
    bounds = document_bounds(documents)
    monkeypatch.delattr(flash_module, "document_bounds")
    torch.testing.assert_close(attention(q, k, v, document_ids=bounds, backend=backend), expected)


def test_one_node_for_the_compiler():
    case = draw(1, 17, 17, 2, 1, 16, slopes=True, sinks=True)
    function = functools.partial(flash, p=0.3)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    first, second = (results(f, torch.float32, case, CAUSAL) for f in (compiled, function))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_opcheck():
    q, k, v = (x.requires_grad_() for x in draw(1, 9, 9, 2, 1, 16)[0])
    arguments = (q, k, v, True, None, None, SCALE, 0.3, None, None, torch.rand(2).requires_grad_(), None, SEED)
    torch.library.opcheck(torch.ops.heed.flash_forward.default, arguments)
    out, lse = (x.detach() for x in torch.ops.heed.flash_forward(*arguments))
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in (out, lse, out, lse, *arguments)]
    torch.library.opcheck(
        torch.ops.heed.flash_backward.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_through_the_door():
    q, k, v = draw(1, 9, 9, 2, 1, 16)[0]
    out, lse = attention(q, k, v, backend="flash", return_lse=True)
    expected, expected_lse = attention(q, k, v, backend="reference", return_lse=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_mistakes_are_named():
    q, k, v = draw(1, 4, 4, 2, 1, 16)[0]
    with pytest.raises(ValueError, match=r"q is torch.float32, k torch.float16"):
        flash_attention(q, k.half(), v, CAUSAL, SCALE)
    with pytest.raises(ValueError, match="fp32, fp16 or bf16"):
        flash_attention(q.double(), k.double(), v.double(), CAUSAL, SCALE)
    with pytest.raises(ValueError, match="up to 256, not 264"):
        flash_attention(*(torch.zeros(1, 4, 1, 264) for _ in range(3)), CAUSAL, SCALE)
