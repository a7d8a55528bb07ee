"""Attention against its definition, written out once more: loops over positions, in fp64, sharing nothing."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
import triton

import kernels
from kernels import CAUSAL, FULL, MaskSpec, attention, document_bounds, gpu_choices, preferred
from kernels.cpu import blockwise_attention
from kernels.triton import flash_attention, flash_decoding

BACKENDS = ("reference", "sdpa")


def truth(q, k, v, sees, scale, softcap=None, alibi_slopes=None, sinks=None, away=None):
    """out and log-sum-exp; sees(b, t, s) says whether query t of sequence b sees key s, away(b, t, s) how far it is.
    Differentiable, fp64."""
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    out, lse = torch.zeros(B, T, H, D, dtype=torch.float64), torch.full((B, T, H), -math.inf, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            keys = [s for s in range(S) if sees(b, t, s)]
            for h in range(H):
                group = h * K // H
                scores = [(q[b, t, h] * k[b, s, group]).sum() * scale for s in keys]
                if softcap:
                    scores = [softcap * torch.tanh(score / softcap) for score in scores]
                if alibi_slopes is not None:
                    scores = [score - alibi_slopes[h] * away(b, t, s) for score, s in zip(scores, keys, strict=True)]
                total = sum((score.exp() for score in scores), torch.zeros((), dtype=torch.float64))
                if sinks is not None:
                    total = total + sinks[h].exp()
                lse[b, t, h] = total.log()
                for score, s in zip(scores, keys, strict=True):
                    out[b, t, h] = out[b, t, h] + score.exp() / total * v[b, s, group]
    return out, lse


def draw(B, T, S, H, K, D, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, T, H, D), (B, S, K, D), (B, S, K, D)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def assert_gradients(got, expected, ours, exact):
    """The gradients of a random combination of the outputs: those of `ours`, in fp32, are those of `exact`, in fp64."""
    weight = torch.randn(expected.shape, dtype=torch.float64)
    (got.double() * weight).sum().backward()
    (expected * weight).sum().backward()
    for x, y in zip(ours, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, atol=5e-6, rtol=1e-4)


def seen_by_distance(pattern, T, S):
    def sees(b, t, s):
        back = S - T + t - s  # how far the key lies behind the query
        if pattern.causal and back < 0:
            return False
        return pattern.window is None or abs(back) <= pattern.window - 1

    return sees


@pytest.mark.parametrize("backend", [*BACKENDS, "blocks", "cpp"])
@pytest.mark.parametrize("pattern", [CAUSAL, FULL, MaskSpec(True, 1), MaskSpec(True, 5), MaskSpec(False, 3)])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (7, 7), (1, 9), (4, 11), (9, 5)])
@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (3, 1)])
def test_attention_and_its_gradients_equal_the_definition(backend, pattern, T, S, H, K, monkeypatch):
    if backend == "blocks" and T > S:
        with pytest.raises(ValueError, match="at most as many queries as keys"):
            attention(*draw(2, T, S, H, K, 6), pattern, backend=backend)
        return
    if backend == "cpp" and (T != S or not pattern.causal):
        with pytest.raises(
            ValueError, match="'cpp' supports causal masks, windows and documents only, with as many queries as keys"
        ):
            attention(*draw(2, T, S, H, K, 6), pattern, backend=backend)
        return
    monkeypatch.setattr(blockwise_attention, "BLOCK", 3)  # small, so that small inputs cross borders of blocks
    q, k, v = (x.requires_grad_() for x in draw(2, T, S, H, K, 6))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected, _ = truth(*exact, seen_by_distance(pattern, T, S), 6**-0.5)
    got = attention(q, k, v, pattern, backend=backend)
    assert got.shape == q.shape
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=1e-5)
    assert_gradients(got, expected, (q, k, v), exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("written", [(1, 3), (8, 5), (9, 16), (23, 8)])
def test_a_cache_is_read_by_position_also_when_it_is_a_ring(backend, window, written):
    T, S = 1 if min(written) < 3 else 3, 8
    q, k, v = draw(2, T, S, 4, 2, 6)
    slots = [{p % S: p for p in range(n)} for n in written]  # what writing one token after another leaves in each slot

    def sees(b, t, s):
        query = written[b] - T + t
        return s in slots[b] and slots[b][s] <= query and (window is None or query - slots[b][s] < window)

    expected, _ = truth(*(x.double() for x in (q, k, v)), sees, 6**-0.5)
    got = attention(q, k, v, MaskSpec(True, window), cache_seqlens=torch.tensor(written), backend=backend)
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize("backend", [*BACKENDS, "blocks", "cpp"])
@pytest.mark.parametrize("pattern", [CAUSAL, FULL, MaskSpec(True, 2)])
def test_documents_do_not_see_each_other(backend, pattern, bounds, monkeypatch):
    if backend == "cpp" and not pattern.causal:
        with pytest.raises(ValueError, match="'cpp' supports causal masks, windows and documents only"):
            attention(*draw(2, 9, 9, 4, 2, 4), pattern, document_ids=torch.zeros(2, 9, dtype=torch.long), backend="cpp")
        return
    monkeypatch.setattr(blockwise_attention, "BLOCK", 2)
    q, k, v = (x.requires_grad_() for x in draw(2, 9, 9, 4, 2, 4))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 2]])
    near = seen_by_distance(pattern, 9, 9)
    expected, _ = truth(*exact, lambda b, t, s: near(b, t, s) and ids[b, t] == ids[b, s], 0.5)
    got = attention(q, k, v, pattern, document_ids=document_bounds(ids) if bounds else ids, backend=backend)
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=1e-5)
    assert_gradients(got, expected, (q, k, v), exact)


@pytest.mark.parametrize(("preferred", "chosen"), [("cpp", "Attend"), ("blocks", "blocks_attention")])
def test_documents_are_trained_with_the_same_backend(preferred, chosen, monkeypatch):
    called = []
    for owner, name in ((kernels, "blocks_attention"), (kernels.bindings.Attend, "apply"), (kernels, "_sdpa")):
        real = getattr(owner, name)
        said = getattr(owner, "__name__", "") if name == "apply" else name
        monkeypatch.setattr(owner, name, lambda *a, said=said, real=real: (called.append(said), real(*a))[1])
    monkeypatch.setattr(kernels, "preferred", lambda device: (preferred, ""))
    q, k, v = (x.requires_grad_() for x in draw(1, 9, 9, 2, 1, 4))
    attention(q, k, v, document_ids=torch.zeros(1, 9, dtype=torch.int64))
    assert called == [chosen]


@pytest.mark.parametrize(
    ("backend", "softcap", "with_slopes", "with_sinks"),
    [("reference", 2.0, True, True), ("reference", None, False, True), ("sdpa", None, True, False)],
)
@pytest.mark.parametrize("pattern", [CAUSAL, MaskSpec(False, 3)])
def test_softcap_slopes_and_sinks(backend, softcap, with_slopes, with_sinks, pattern):
    q, k, v = draw(2, 6, 8, 4, 2, 6)
    slopes, sinks = (torch.rand(4, generator=torch.Generator().manual_seed(i)) for i in range(2))
    given = {"alibi_slopes": slopes if with_slopes else None, "sinks": sinks if with_sinks else None}
    given = {name: x.requires_grad_() for name, x in given.items() if x is not None}
    exact = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    expected, lse = truth(
        *(x.double() for x in (q, k, v)), seen_by_distance(pattern, 6, 8), 0.4, softcap,
        away=lambda b, t, s: abs(2 + t - s), **exact,
    )  # fmt: skip
    capped = MaskSpec(pattern.causal, pattern.window, softcap)
    got = attention(q, k, v, capped, softmax_scale=0.4, backend=backend, **given)
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=1e-5)
    if backend == "reference":
        got_lse = attention(q, k, v, capped, softmax_scale=0.4, return_lse=True, **given)[1]
        torch.testing.assert_close(got_lse.double(), lse, atol=2e-6, rtol=1e-5)
    assert_gradients(got, expected, given.values(), [exact[name] for name in given])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_in_pages_is_a_cache(backend):
    q, k, v = draw(2, 3, 12, 4, 2, 6)
    lengths, where = torch.tensor([5, 12]), torch.tensor([[6, 1, 99, -1], [0, 3, 5, 2]], dtype=torch.int32)
    pools = [torch.full((7, 3, 2, 6), 9.0) for _ in range(2)]
    for x, pool in zip((k, v), pools, strict=True):
        for b, row in enumerate(where):
            for n, page in enumerate(row):
                if n * 3 < lengths[b]:
                    pool[page] = x[b, n * 3 : n * 3 + 3]
    got = attention(q, *pools, cache_seqlens=lengths, block_table=where, backend=backend)
    torch.testing.assert_close(got, attention(q, k, v, cache_seqlens=lengths, backend="reference"))


def test_a_document_is_a_run_of_one_number():
    q, k, v = draw(1, 6, 6, 2, 1, 4)
    again, separate = torch.tensor([[4, 4, 7, 7, 4, 4]]), torch.tensor([[0, 0, 1, 1, 2, 2]])
    torch.testing.assert_close(attention(q, k, v, document_ids=again), attention(q, k, v, document_ids=separate))


@pytest.mark.parametrize("learning", [True, False])
def test_autocast_reaches_attention(learning):
    q, k, v = draw(1, 5, 5, 2, 1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q.requires_grad_(learning), k, v.bfloat16())
    assert out.dtype == torch.bfloat16
    exact = attention(q.double(), k.double(), v.double(), backend="reference")
    torch.testing.assert_close(out.double(), exact, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("pattern", [MaskSpec(True, 1), MaskSpec(True, 40), MaskSpec(False, 40), MaskSpec(True, 999)])
@pytest.mark.parametrize(("T", "S"), [(300, 300), (130, 300)])
def test_a_window_needs_no_mask_of_all_queries_and_keys(pattern, T, S, monkeypatch):
    tensors, sdpa, masks = draw(2, T, S, 4, 2, 6, dtype=torch.float64), F.scaled_dot_product_attention, []

    def recorded(q, k, v, mask, **how):
        masks.append(mask)
        return sdpa(q, k, v, mask, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    results = []
    for backend in ("reference", "sdpa"):
        q, k, v = (x.clone().requires_grad_() for x in tensors)
        out = attention(q, k, v, pattern, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    torch.testing.assert_close(results[1], results[0])
    if pattern.window < T:
        assert len(masks) > 1 and max(mask.numel() for mask in masks) <= T * S / 3


def test_log_sum_exp_and_scale():
    q, k, v = draw(2, 5, 7, 4, 2, 6)
    expected, lse = truth(*(x.double() for x in (q, k, v)), seen_by_distance(CAUSAL, 5, 7), 0.3)
    got, got_lse = attention(q, k, v, softmax_scale=0.3, return_lse=True)
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(got_lse.double(), lse, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_keys_is_zero(backend):
    q, k, v = draw(1, 5, 2, 2, 2, 4)
    out = attention(q, k, v, backend=backend)
    assert out[:, :3].eq(0).all()
    assert out[:, 3:].ne(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_its_dtype(dtype):
    q, k, v = draw(2, 33, 33, 4, 2, 16, dtype=dtype)
    exact, _ = truth(*(x.double() for x in (q, k, v)), seen_by_distance(CAUSAL, 33, 33), 0.25)
    rounding = (exact.to(dtype).double() - exact).abs().max()
    out = attention(q, k, v, backend="reference")
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= 2 * rounding


@pytest.mark.parametrize(
    ("device", "capability", "hip", "chosen"),
    [
        ("cpu", None, None, "cpp"),
        ("mps", None, None, "sdpa"),
        ("cuda", (7, 5), None, "sdpa"),
        ("cuda", (8, 0), None, "flash"),
        ("cuda", (10, 0), None, "flash"),
        ("cuda", (9, 4), "6.4", "flash"),
    ],
)
def test_the_backend_follows_from_the_device_and_says_why(monkeypatch, device, capability, hip, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    backend, why = preferred(torch.device(device))
    assert backend == chosen
    assert why


@pytest.mark.parametrize(
    ("compiles", "chosen", "slower"), [(True, "cpp", "batched matmuls"), (False, "blocks", "torch's sdpa")]
)
def test_each_backend_of_a_cpu_has_its_own_reason(monkeypatch, compiles, chosen, slower):
    monkeypatch.setattr(kernels.cpu, "trains", lambda dtype: compiles)
    backend, why = preferred(torch.device("cpu"))
    assert backend == chosen and why.endswith(f"faster than {slower}")


@pytest.mark.parametrize(
    ("card", "train", "options", "chosen"),
    [
        ("a measured card", True, {}, "flash"),
        ("a measured card", False, {}, "sdpa"),
        ("a measured card", True, {"mask_spec": FULL}, "flash"),
        ("another card", True, {}, "sdpa"),
        ("another card", False, {"mask_spec": FULL}, "sdpa"),
        ("another card", True, {"mask_spec": MaskSpec(True, 3)}, "flash"),
        ("another card", True, {"document_ids": torch.zeros(1, 4, dtype=torch.long)}, "flash"),
        ("another card", True, {"alibi_slopes": torch.ones(2)}, "flash"),
        ("another card", False, {"cache_seqlens": torch.tensor([4])}, "decode"),
    ],
)
def test_on_a_gpu_the_faster_backend_by_measurement(monkeypatch, card, train, options, chosen):
    """The GPU is simulated: which function is called with these tensors, if they were on it."""
    measured = gpu_choices.Choices("today", {16: "flash"}, {16: "sdpa"})
    monkeypatch.setattr(gpu_choices, "GPU_CHOICES", {"a measured card": measured})
    monkeypatch.setattr(gpu_choices, "gpu_name", lambda device: card)
    monkeypatch.setattr(kernels, "preferred", lambda device: ("flash", "a GPU"))
    called = []
    for name, function in (("flash", flash_attention), ("decode", flash_decoding)):
        attribute = f"{name}_attention"
        monkeypatch.setattr(function, attribute, lambda *_, name=name: (called.append(name), None))
    monkeypatch.setattr(kernels, "_sdpa", lambda *_: called.append("sdpa"))
    q, k, v = (x.requires_grad_(train) for x in draw(1, 4, 4, 2, 1, 16))
    attention(q, k, v, **options)
    assert called == [chosen]


def test_kernels_that_cannot_run_say_why(monkeypatch):
    q, k, v = draw(1, 4, 4, 2, 1, 16)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="'flash' needs a GPU, or TRITON_INTERPRET=1; the tensors are on cpu"):
        attention(q, k, v, backend="flash")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="'decode' needs triton, which is not installed"):
        attention(q, k, v, cache_seqlens=torch.tensor([4]), backend="decode")
    assert preferred(torch.device("cuda")) == ("sdpa", "triton is not installed")


def test_views_that_are_not_contiguous():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in draw(2, 5, 5, 4, 2, 6))
    for backend in BACKENDS:
        torch.testing.assert_close(
            attention(q, k, v, backend=backend),
            attention(q.contiguous(), k.contiguous(), v.contiguous(), backend="reference"),
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "cuda"}, "'cuda' is not one of reference, sdpa, cpp, blocks, flash, decode"),
        ({"backend": "sdpa", "return_lse": True}, "cannot return the log-sum-exp"),
        ({"cache_seqlens": torch.tensor([1])}, r"cache_seqlens has shape \(1,\)"),
        ({"document_ids": torch.zeros(2, 3)}, r"document_ids has shape \(2, 3\)"),
        ({"backend": "sdpa", "sinks": torch.zeros(4)}, "neither softcap nor sinks"),
        ({"backend": "blocks", "sinks": torch.zeros(4)}, "supports causal masks, windows and documents only"),
        ({"backend": "cpp", "sinks": torch.zeros(4)}, "supports causal masks, windows and documents only"),
        ({"backend": "decode"}, "needs a cache: pass cache_seqlens"),
        ({"backend": "flash", "cache_seqlens": torch.tensor([4, 4])}, "computes whole sequences"),
        ({"sinks": torch.zeros(3)}, r"sinks has shape \(3,\)"),
        ({"block_table": torch.zeros(2, 2)}, r"block_table has shape \(2, 2\)"),
        ({"cache_seqlens": torch.tensor([4, 4]), "document_ids": torch.zeros(2, 4)}, "exclude each other"),
    ],
)
def test_mistakes_are_named(arguments, message):
    q, k, v = draw(2, 4, 4, 4, 2, 6)
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, **arguments)


def test_wrong_shapes_are_named():
    q, k, v = draw(2, 4, 4, 4, 2, 6)
    with pytest.raises(ValueError, match="3 query heads are not divisible by 2 key/value heads"):
        attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match=r"needs q \(B, T, H, D\)"):
        attention(q, k, v[:, :3])
    with pytest.raises(ValueError, match="at least 1"):
        MaskSpec(window=0)
    with pytest.raises(ValueError, match="above 0"):
        MaskSpec(softcap=0.0)
