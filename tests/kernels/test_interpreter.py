"""The interpreter's bfloat16 against torch's, and the checker against bugs that it must see."""

import contextlib

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from tests.kernels.interpreter import AccessError, checked, install, narrow, widen

BF16, INF, NAN = torch.bfloat16, float("inf"), float("nan")


def numbers(seed: int = 0) -> torch.Tensor:
    """256 bfloat16 numbers of all sizes, and the special ones."""
    x = torch.randn(256, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 3, 256)
    x[:8] = torch.tensor([0.0, -0.0, INF, -INF, NAN, 1.0, 1e-40, 3.3e38])
    return x.to(BF16)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=0, atol=0, equal_nan=True)


# 1. bfloat16 --------------------------------------------------------------------------------------------------------


def test_rounding_is_torchs():
    halves = torch.arange(1 << 16, dtype=torch.int32) << 16  # every bfloat16, and what lies about half way to the next
    for offset in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (halves + offset).view(torch.float32)
        same(torch.from_numpy(widen(narrow(x.numpy()))), x.to(BF16))
    install()  # a second time changes nothing
    same(torch.from_numpy(widen(narrow(x.numpy()))), x.to(BF16))


@triton.jit
def _cast(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


@pytest.mark.parametrize("other", [torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8])
def test_casts(other):
    x = (torch.randn(512, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 100).to(other)
    if other.is_floating_point:
        x[:6] = torch.tensor([0.0, -0.0, INF, -INF, NAN, 257.0])
    y = torch.empty(512, dtype=BF16)
    _cast[(1,)](x, y, N=512)
    same(y, x.to(BF16))
    back = torch.empty(512, dtype=other)
    finite = torch.where(y.isfinite() & (y >= 0), y, 0.0) if not other.is_floating_point else y
    _cast[(1,)](finite, back, N=512)
    same(back, finite.to(other))


@triton.jit
def _toward_zero(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at).to(tl.bfloat16, fp_downcast_rounding="rtz"))


def test_a_cast_may_truncate():
    x, y = torch.tensor([1.999, -1.999]), torch.empty(2, dtype=BF16)
    _toward_zero[(1,)](x, y, N=2)
    same(y, torch.tensor([1.9921875, -1.9921875], dtype=BF16))


@triton.jit
def _arithmetic(x, y, out, flags, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + 0 * N + at, a + b)
    tl.store(out + 1 * N + at, a - b)
    tl.store(out + 2 * N + at, a * b)
    tl.store(out + 3 * N + at, a / b)
    tl.store(out + 4 * N + at, a * 2 + 0.3)
    tl.store(out + 5 * N + at, 3 - a)
    tl.store(out + 6 * N + at, -a)
    tl.store(out + 7 * N + at, tl.abs(a))
    tl.store(out + 8 * N + at, tl.maximum(a, b))
    tl.store(out + 9 * N + at, tl.where(a < b, a, b))
    tl.store(out + 10 * N + at, tl.full((N,), 0.1, tl.bfloat16))
    tl.store(out + 11 * N + at, tl.zeros((N,), tl.bfloat16) + a)
    tl.store(out + 12 * N + at, tl.exp(a.to(tl.float32)))
    tl.store(out + 13 * N + at, tl.fma(a, b, a))
    tl.store(out + 14 * N + at, tl.load(x + at, mask=at < 10, other=-1.5))
    tl.store(out + 15 * N + at, tl.minimum(a, 0.5))
    tl.store(flags + 0 * N + at, a < b)
    tl.store(flags + 1 * N + at, a >= b)
    tl.store(flags + 2 * N + at, a == a)
    tl.store(flags + 3 * N + at, (a != b) & (a > 1))
    tl.store(flags + 4 * N + at, a.to(tl.int1))


def test_arithmetic():
    a, b = numbers(0), numbers(1).flip(0)
    out, flags = torch.empty(16, 256, dtype=BF16), torch.empty(5, 256, dtype=torch.bool)
    _arithmetic[(1,)](a, b, out, flags, N=256)
    expected = [
        a + b, a - b, a * b, a / b, (a * 2) + 0.3, 3 - a, 0 - a, a.abs(), torch.fmax(a, b), torch.where(a < b, a, b),
        torch.full_like(a, 0.1), a + 0, a.float().exp(), a.double() * b.double() + a.double(),
        torch.where(torch.arange(256) < 10, a, -1.5), torch.fmin(a, torch.tensor(0.5)),
    ]  # fmt: skip
    for n, (ours, theirs) in enumerate(zip(out, expected, strict=True)):
        torch.testing.assert_close(
            ours, theirs.to(BF16), rtol=0, atol=0, equal_nan=True, msg=lambda m, n=n: f"{n}: {m}"
        )
    for ours, theirs in zip(flags, [a < b, a >= b, a == a, (a != b) & (a > 1), a != 0], strict=True):
        assert torch.equal(ours, theirs)


@triton.jit
def _products(x, y, out, sums, scans, biggest, best, M: tl.constexpr, N: tl.constexpr):
    row, column = tl.arange(0, M), tl.arange(0, N)
    a = tl.load(x + row[:, None] * N + column[None, :])  # (M, N)
    b = tl.load(y + row[:, None] * N + column[None, :])
    tl.store(out + row[:, None] * M + row[None, :], tl.dot(a, tl.trans(b), input_precision="ieee"))
    tl.store(sums + row, tl.sum(a, 1))
    tl.store(sums + M, tl.sum(a))
    tl.store(scans + row[:, None] * N + column[None, :], tl.cumsum(a, 1))
    tl.store(biggest + row, tl.max(a, 1))
    tl.store(best + row, tl.argmax(a, 1))


def test_products_and_reductions():
    a, b = (torch.randn(16, 32, generator=torch.Generator().manual_seed(n)).to(BF16) for n in (0, 1))
    out, sums, scans = torch.empty(16, 16), torch.empty(17, dtype=BF16), torch.empty(16, 32, dtype=BF16)
    biggest, best = torch.empty(16, dtype=BF16), torch.empty(16, dtype=torch.int32)
    _products[(1,)](a, b, out, sums, scans, biggest, best, M=16, N=32)
    torch.testing.assert_close(out, a.float() @ b.float().T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums[:16], a.sum(1), rtol=2**-8, atol=0)
    torch.testing.assert_close(sums[16], a.sum(), rtol=2**-8, atol=0)
    torch.testing.assert_close(scans, a.cumsum(1), rtol=2**-8, atol=2**-8)
    same(biggest, a.amax(1))
    assert torch.equal(best, a.float().argmax(1).int())


@triton.jit
def _square(x, y, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(y + at, tl.dot(tl.load(x + at), tl.load(x + at), input_precision=PRECISION))


def test_fp32_products_must_ask_for_full_precision():
    x, y = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)), torch.empty(16, 16)
    _square[(1,)](x, y, N=16, PRECISION="ieee")
    torch.testing.assert_close(y, x @ x)
    with pytest.raises(AssertionError, match="input_precision"), checked():
        _square[(1,)](x, y, N=16, PRECISION=None)
    _square[(1,)](x.to(BF16), y, N=16, PRECISION=None)  # there is nothing to lose


# 2. The checker -----------------------------------------------------------------------------------------------------


@triton.jit
def _copy(x, y, n, SHIFT: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASK:
        tl.store(y + at, tl.load(x + at + SHIFT, mask=at < n), mask=at < n)
    else:
        tl.store(y + at, tl.load(x + at + SHIFT))


@triton.jit
def _copy_two(x, more, y, n, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at + SHIFT, mask=at < n) + tl.load(more + at, mask=at < n), mask=at < n)


@triton.jit
def _sum_by(total, x, HOW: tl.constexpr):
    n = tl.program_id(0)
    if HOW == "atomic":
        tl.atomic_add(total, tl.load(x + n))
    elif HOW == "store":
        tl.store(total, tl.load(x + n))
    elif HOW == "neighbour":
        tl.store(x + n, tl.load(x + (n + 1) % tl.num_programs(0)))
    else:
        tl.atomic_add(total, tl.load(x + n))
        tl.store(x + n, tl.load(total))


@triton.jit
def _rows(x, y, n, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(y + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.load(x + at, mask=tl.arange(0, BLOCK) < n))


@triton.jit
def _late(x, y):
    tl.store(y + tl.program_id(0), tl.load(x))
    if tl.program_id(0) == 2:
        tl.store(x, 0.0)


def flagged(words: str = ""):
    """A context that wants an AccessError with these words, or without words none at all."""
    return pytest.raises(AccessError, match=words) if words else contextlib.nullcontext()


@pytest.mark.parametrize(
    ("shift", "mask", "words"),
    [
        (0, True, ""),
        (1, True, r"_copy, program \(2, 0, 0\): load at x \+ 40 .* is outside"),
        (-1, True, r"_copy, program \(0, 0, 0\): load at x \+ -1 .* is outside"),
        (10**12, True, "is outside"),
        (0, False, r"load at x \+ 40 .* is outside"),
    ],
)
def test_bounds(shift, mask, words):
    x, y = torch.arange(40.0), torch.empty(40)
    with flagged(words), checked() as kernels:
        _copy[(3,)](x, y, 40, SHIFT=shift, MASK=mask, BLOCK=16)
    assert kernels == ["_copy"]
    assert words or torch.equal(x, y)


def test_a_view_ends_where_its_elements_end():
    whole, y = torch.zeros(100, dtype=torch.int16), torch.empty(40, dtype=torch.int16)
    with flagged(), checked():
        _copy[(3,)](whole[8:48], y, 40, SHIFT=0, MASK=True, BLOCK=16)
    with flagged(r"x \+ 40 .* outside"), checked():
        _copy[(3,)](whole[8:48], y, 40, SHIFT=1, MASK=True, BLOCK=16)
    with flagged(r"y \+ 40 .* outside"), checked():  # a store
        _copy[(3,)](whole, y, 41, SHIFT=0, MASK=True, BLOCK=16)


def test_a_neighbour_in_the_same_storage_is_outside():
    both, y = torch.zeros(2, 40), torch.empty(40)  # as k and v are when one product made them
    with flagged(), checked():
        _copy_two[(3,)](both[0], both[1], y, 40, SHIFT=0, BLOCK=16)
    with flagged(r"x \+ 40 .* outside"), checked():
        _copy_two[(3,)](both[0], both[1], y, 40, SHIFT=1, BLOCK=16)


def test_padding_belongs_to_the_row_but_no_other_columns():
    padded, y = torch.zeros(4, 16)[:, :13], torch.empty(4, 16)
    with flagged(), checked():
        _rows[(4,)](padded, y, 16, padded.stride(0), BLOCK=16)
    heads = torch.zeros(4, 3, 8)[:, 0]  # (4, 24) of which a head has 8 columns
    with flagged(), checked():
        _rows[(4,)](heads, y, 8, heads.stride(0), BLOCK=16)
    with flagged("outside"), checked():
        _rows[(5,)](padded, torch.empty(5, 16), 16, padded.stride(0), BLOCK=16)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("atomic", ""),
        ("store", r"_sum_by, program \(1, 0, 0\): store at total \+ 0 .* meets a store by program \(0, 0, 0\)"),
        ("neighbour", r"program \(1, 0, 0\): store at x \+ 1 .* meets a load by program \(0, 0, 0\)"),
        ("both", r"program \(1, 0, 0\): atomic at total \+ 0 .* meets a load by program \(0, 0, 0\)"),
    ],
)
def test_races(how, words):
    total, x = torch.zeros(1), torch.ones(5)
    with flagged(words), checked():
        _sum_by[(5,)](total, x, HOW=how)
    assert words or total == 5


def test_a_race_with_several_programs():
    x = torch.ones(5)
    with flagged(r"program \(2, 0, 0\): store at x \+ 0 .* meets a load by program several"), checked():
        _late[(3,)](x, torch.empty(3))


def test_the_same_bugs_pass_unseen_without_it():
    total, x = torch.zeros(1), torch.ones(5)
    _sum_by[(5,)](total, x, HOW="store")
    assert total == 1
