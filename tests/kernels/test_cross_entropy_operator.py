"""The head and the loss in one: its chunks, what the compiler sees of it, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import cross_entropy
from kernels.cross_entropy import chunk_rows, linear_cross_entropy
from tests.kernels.test_cross_entropy import BACKENDS, compare, draw, results


@pytest.mark.parametrize(
    ("N", "V", "itemsize", "device", "rows"),
    [
        (8192, 151_936, 2, "cuda", 2816),  # 3 chunks: at most 3,456 tokens fit
        (8192, 50_257, 2, "cuda", 8192),
        (32_768, 50_257, 2, "cuda", 8192),
        (2048, 4096, 4, "cpu", 256),
        (2048, 4096, 2, "cpu", 512),
        (300, 151_936, 4, "cpu", 256),
        (0, 65, 4, "cpu", 256),
    ],
)
def test_chunk_rows(N, V, itemsize, device, rows):
    assert chunk_rows(N, V, itemsize, device) == rows


@given(st.integers(1, 100_000), st.integers(1, 300_000), st.sampled_from([2, 4]), st.sampled_from(["cpu", "cuda"]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_chunks_keep_their_bounds_and_are_equal(N, V, itemsize, device):
    most, fewest = (1 << 30, 128) if device == "cuda" else (4 << 20, 256)
    rows = chunk_rows(N, V, itemsize, device)
    assert rows % fewest == 0
    assert rows == fewest or rows * V * itemsize <= most
    chunks = -(-N // rows)
    assert rows - fewest < N / chunks  # no shorter chunks would be as few


def test_the_compiler_sees_one_node():
    seen = []

    def backend(graph, inputs):
        seen.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    x, weight, targets = draw(12, 8, 65)
    one = torch.compile(linear_cross_entropy, fullgraph=True, backend=backend)(x, weight.requires_grad_(), targets)
    one.backward()
    assert [name for name in seen[0] if "getitem" not in name] == ["heed.linear_cross_entropy.default"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_it_is_the_same(backend):
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (12, 17):
        x, weight, targets = draw(N, 8, 65)
        with torch.autocast("cpu", torch.bfloat16, enabled=N == 17):
            one = results(linear_cross_entropy, x, weight, targets, 0.5, backend=backend)
            other = results(compiled, x, weight, targets, 0.5, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("wanted", [(True, True), (False, True), (False, False)])
def test_the_op_keeps_torchs_rules(wanted):
    x, weight, targets = draw(12, 8, 65)
    x, weight = (a.requires_grad_(w) for a, w in zip((x, weight), wanted, strict=True))
    torch.library.opcheck(cross_entropy._op, (x, weight, targets, 0.1, 3.0, None, *wanted))


def test_it_is_differentiated_once_only():
    x, weight, targets = draw(6, 8, 65)
    loss = linear_cross_entropy(x.requires_grad_(), weight, targets)
    (dx,) = torch.autograd.grad(loss**2, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_views_that_are_not_contiguous():
    x, weight, targets = draw(37, 8, 65)
    strided = x.t().contiguous().t(), weight.t().contiguous().t(), targets.repeat_interleave(2)[::2]
    for backend in BACKENDS:
        compare(*strided, backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, 7)}, r"got \(6, 7\), \(65, 8\), \(6,\)"),
        ({"targets": torch.zeros(5).long()}, r"got \(6, 8\), \(65, 8\), \(5,\)"),
        ({"targets": torch.zeros(6)}, "targets are torch.float32, not torch.int64"),
        ({"x": torch.zeros(6, 8).double()}, "x is torch.float64"),
        ({"weight": torch.zeros(65, 8).half()}, "weight torch.float16: x is fp32, fp16 or bf16, weight the same"),
        ({"softcap": 0.0}, "softcap = 0.0"),
        ({"backend": "cuda"}, "'cuda' is not one of torch, cpp, triton"),
    ],
)
def test_mistakes_are_named(change, message):
    x, weight, targets = draw(6, 8, 65)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{"x": x, "weight": weight, "targets": targets} | change)
