"""Context parallelism on 2 to 4 processes: outputs and gradients are those of the definition over whole sequences."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from kernels import CAUSAL, FULL, MaskSpec, attention, document_bounds
from kernels.context_parallel import METHODS, ContextParallel, by_device, in_order
from tests.training.ranks import call
from tests.training.sent_bytes import Sent
from training import distributed

B, H, K, D = 2, 8, 4, 6
WINDOWS = [1, 3, 7, 100]
CASES = {  # what attention is called with, besides q, k and v
    "causal": {},
    "a scale": {"softmax_scale": 0.3},
    **{f"a window of {window}": {"mask_spec": MaskSpec(window=window)} for window in WINDOWS},
    "a softcap": {"mask_spec": MaskSpec(softcap=1.5)},
    "ALiBi": {"alibi_slopes": torch.linspace(0.1, 0.9, H)},
    "sinks, a window": {"sinks": torch.linspace(-1, 1, H), "mask_spec": MaskSpec(window=5)},
    "documents": {"document_ids": "ids"},
    "bounds of documents": {"document_ids": "bounds"},
}


def tensors(T: int, dtype: torch.dtype = torch.float64, heads: int = H, size: int = D):
    random = torch.Generator().manual_seed(0)
    shapes = [(B, T, heads, size), *[(B, T, heads // 2, size)] * 2, (B, T, heads, size)]
    q, k, v, dout = (torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes)
    ids = (torch.rand(B, T, generator=random) < 0.15).cumsum(1)
    return q, k, v, dout, ids


def definition(q, k, v, ids, mask_spec=CAUSAL, softmax_scale=None, alibi_slopes=None, sinks=None, document_ids=None):
    """softmax(q k^T) v, query by query."""
    group, out = q.shape[2] // k.shape[2], torch.zeros_like(q)
    for b, t, h in itertools.product(*(range(n) for n in q.shape[:3])):
        keys = [
            s
            for s in range(t + 1)
            if t - s < (mask_spec.window or 10**9) and (document_ids is None or ids[b, s] == ids[b, t])
        ]
        scores = k[b, keys, h // group] @ q[b, t, h] * (softmax_scale or q.shape[3] ** -0.5)
        if mask_spec.softcap:
            scores = mask_spec.softcap * torch.tanh(scores / mask_spec.softcap)
        if alibi_slopes is not None:
            scores = scores - alibi_slopes[h].double() * (t - torch.tensor(keys))
        extra = scores[:0] if sinks is None else sinks[h : h + 1].double()
        weights = torch.cat((scores, extra)).softmax(0)[: len(keys)]
        out = out.index_put(tuple(map(torch.tensor, (b, t, h))), weights @ v[b, keys, h // group])
    return out


def joined(method: str) -> ContextParallel:
    distributed.init_distributed()
    return ContextParallel(dist.group.WORLD, method)


def computed(rank: int, method: str, T: int, names):
    """For each case: this process's part of the output and of dq, dk, dv."""
    parallel, found = joined(method), {}
    q, k, v, dout, ids = tensors(T)
    for name in names:
        options = dict(CASES[name])
        if kind := options.get("document_ids"):
            options["document_ids"] = ids if kind == "ids" else document_bounds(ids)
        mine = [parallel.split(x).requires_grad_() for x in (q, k, v)]
        out = parallel.attention(*mine, backend="reference", **options)
        out.backward(parallel.split(dout))
        found[name] = [x.detach().numpy() for x in (out, *(x.grad for x in mine))]
    return found


def check(n: int, method: str, names=tuple(CASES), chunk: int = 3, call=call) -> None:
    """AssertionError unless the parts of all processes are the definition's, in order."""
    T = 2 * n * chunk
    results = call(n, computed, method, T, names)
    for name in names:
        q, k, v, dout, ids = tensors(T)
        whole = [x.requires_grad_() for x in (q, k, v)]
        right = definition(*whole, ids, **CASES[name])
        right.backward(dout)
        for i, expected in enumerate((right, *(x.grad for x in whole))):
            for rank, part in enumerate(
                torch.from_numpy(result[name][i]) for result in results
            ):  # chunks r and 2n - 1 - r
                chunks = expected.split(chunk, 1)
                torch.testing.assert_close(part, torch.cat((chunks[rank], chunks[-1 - rank]), 1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [2, 4])
def test_attention_of_several_processes_is_that_of_one(n, method):
    check(n, method, CASES if n == 2 else ("causal", "a window of 7", "ALiBi"))


def test_three_processes_in_a_ring():
    check(3, "ring", ["causal"], chunk=1)


def flash(rank: int, dtype, backend):
    parallel = joined("ring")
    *mine, dout, _ = (parallel.split(x) for x in tensors(24, torch.promote_types(dtype, torch.float32), 2, 16))
    mine = [x.requires_grad_() for x in mine]
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):  # what is sent is bf16
        out = parallel.attention(*mine, backend=backend)
    assert out.dtype == dtype
    out.backward(dout.to(dtype))
    return [x.detach().float().numpy() for x in (out, *(x.grad for x in mine))]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_a_ring_of_flash_attention(dtype, error):
    """heed's Triton kernels, forward and backward, block by block, in the interpreter."""
    pytest.importorskip("triton")
    for found, expected in zip(call(2, flash, dtype, "flash"), call(2, flash, torch.float64, "reference"), strict=True):
        for mine, right in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(mine), torch.from_numpy(right), atol=error, rtol=error)


def test_the_division_is_undone_and_the_work_is_equal():
    x = torch.randn(2, 24, 3)
    for n in (1, 2, 3, 4, 6):
        parts = by_device(x, n)
        assert parts.shape == (n, 2, 24 // n, 3) and torch.equal(in_order(parts), x)
        pairs = by_device(torch.arange(1, 25)[None], n).sum((1, 2))  # a query at position t attends to t + 1 keys
        assert len(set(pairs.tolist())) == 1


def refused(rank: int):
    parallel, errors = joined("ulysses"), []
    q, k, v = (torch.zeros(1, 2, heads, 4) for heads in (6, 3, 3))
    for options in ({}, {"mask_spec": FULL}, {"dropout_p": 0.1}):
        try:
            parallel.attention(q, k, v, **options)
        except ValueError as error:
            errors.append(str(error))
    return errors


def test_what_needs_whole_sequences_is_refused():
    heads, mask, dropout = call(2, refused)[1]
    assert heads == "ulysses divides the key/value heads among 2 devices; there are 3"
    assert mask.startswith("context parallelism needs a causal mask and no dropout_p; got MaskSpec(causal=False")
    assert "'dropout_p': 0.1" in dropout


def with_a_cache(rank: int):
    parallel = joined("gather")
    q, k, v = tensors(8)[:3]
    lengths = torch.tensor([8, 5])
    return parallel.attention(q[:, -1:], k, v, cache_seqlens=lengths).numpy()


def test_with_a_cache_each_process_computes_alone():
    q, k, v = tensors(8)[:3]
    right = attention(q[:, -1:], k, v, cache_seqlens=torch.tensor([8, 5]))
    for found in call(2, with_a_cache):
        assert torch.equal(torch.from_numpy(found), right)


def communicated(rank: int, n: int, method: str, T: int):
    """Bytes that the first of n processes sends, forward and backward. The other ones are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n)
    parallel = ContextParallel(dist.group.WORLD, method)
    q, k, v, dout, _ = tensors(T, torch.bfloat16)
    mine = [parallel.split(x).requires_grad_() for x in (q, k, v)]
    with Sent() as forward:
        out = parallel.attention(*mine, backend="reference")
    with Sent() as backward:
        out.backward(parallel.split(dout))
    return [sum(sent.bytes.values()) for sent in (forward, backward)]


@pytest.mark.parametrize("n", [2, 4])
def test_communicated_bytes_are_those_of_the_formula(n):
    """The numbers are bf16, the ring's gradients fp32."""
    T = 16 * n
    keys = 2 * B * T // n * K * D
    for method in ("gather", "ring", "ulysses"):
        (found,) = call(1, communicated, n, method, T)
        if method == "ulysses":
            expected = [2 * 2 * (n - 1) * B * (T // n) * (H + K) * D // n] * 2
        else:
            sent = 2 * (n - 1) * keys
            expected = [sent, sent + 4 * n * keys if method == "ring" else sent]
        assert found == expected, method
