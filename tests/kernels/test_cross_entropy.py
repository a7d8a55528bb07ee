"""The head and the loss in one, against their definition in fp64: in torch, in C++ and in Triton's interpreter."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import cross_entropy
from kernels.cross_entropy import chunk_rows, linear_cross_entropy
from kernels.triton import tiles
from kernels.triton.cross_entropy import cross_entropy_step

BACKENDS = ("torch", "cpp", "triton")
TERMS = [{}, {"z_loss": 0.1}, {"softcap": 3.0}, {"z_loss": 0.1, "softcap": 3.0}]


def truth(x, weight, targets, z_loss=0.0, softcap=None):
    """One token after another, each with its logits, their softmax and Z as they are written on paper."""
    total = 0 * (x.sum() + weight.sum())
    for row, target in zip(x, targets.tolist(), strict=True):
        if target != -100:
            logits = weight @ row
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            log_z = logits.max() + torch.log(torch.exp(logits - logits.max()).sum())
            total = total - (logits[target] - log_z) + z_loss * log_z**2
    return total


def draw(N, C, V, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(N, C, generator=g), 2 * torch.randn(V, C, generator=g) * C**-0.5
    targets = torch.randint(V, (N,), generator=g)
    targets[::5] = -100
    return x.to(dtype), weight.to(dtype), targets


def results(f, x, weight, targets, factor=1.0, **terms):
    """loss, dx, dW: of the loss times a factor."""
    x, weight = (a.detach().clone().requires_grad_() for a in (x, weight))
    loss = f(x, weight, targets, **terms)
    (loss * factor).backward()
    return loss.detach(), x.grad, weight.grad


def compare(x, weight, targets, factor=1.0, *, backend=None, rtol=1e-5, atol=1e-5, **terms):
    got = results(linear_cross_entropy, x, weight, targets, factor, backend=backend, **terms)
    expected = results(truth, x.double(), weight.double(), targets, factor, **terms)
    assert [a.dtype for a in got] == [torch.float32, x.dtype, weight.dtype]
    for ours, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=rtol, atol=atol)


@pytest.fixture
def small_chunks(monkeypatch):
    """16 tokens a chunk."""
    monkeypatch.setattr(cross_entropy, "CPU_ROWS", 16)
    monkeypatch.setattr(cross_entropy, "CPU_BYTES", 1)


@pytest.fixture
def memory_is_nan(monkeypatch):
    """What is allocated and not written is seen."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, original=original, **k: original(*a, **k).fill_(float("nan")))


@pytest.mark.usefixtures("small_chunks", "memory_is_nan")
@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("N", "C", "V"), [(2, 8, 65), (16, 5, 16), (37, 24, 65)])
def test_loss_and_gradients_equal_the_definition(backend, N, C, V, terms):
    compare(*draw(N, C, V, seed=3), 0.3, backend=backend, **terms)


@pytest.mark.usefixtures("memory_is_nan")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("N", "V"), [(9, 1000), (6, 4096), (4, 50257), (2, 151936)])
def test_every_vocabulary(backend, N, V, monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED", tiles.Tile(1, 64 if V < 4096 else 4096, 4, 1))
    compare(*draw(N, 8, V, seed=1), backend=backend, z_loss=0.01, softcap=20.0)


def test_chunks_of_the_size_that_is_really_used():
    x, weight, targets = draw(600, 8, 4096)
    assert chunk_rows(600, 4096, 4, "cpu") == 256
    compare(x, weight, targets, rtol=1e-4)


@pytest.mark.usefixtures("small_chunks", "memory_is_nan")
@pytest.mark.parametrize("V", [33, 65, 79, 96])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_matmuls_find_zeros_in_padding(backend, V):
    """On a processor with AMX, oneDNN reads the padding of a strided bf16 matrix: NaN there would be NaN in dx."""
    padding = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            for a in args if "mm" in str(function) else ():
                if isinstance(a, torch.Tensor) and a.stride(1) == 1 and a.stride(0) > a.shape[1]:
                    columns = (len(a), a.stride(0) - a.shape[1])
                    padding.append(a.as_strided(columns, a.stride(), a.storage_offset() + a.shape[1]).clone())
            return function(*args, **kwargs or {})

    with Spy():
        cross_entropy.loss_and_gradients(*draw(37, 24, V, torch.bfloat16), 0.1, 3.0, backend, True, True)
    assert bool(padding) == (V % 32 > 0)
    assert all((columns == 0).all() for columns in padding)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_as_good_as_torchs(backend, dtype):
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.importorskip("tests.kernels.interpreter", reason="Triton's interpreter does not round bf16").install()

    def plain(x, weight, targets):
        return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")

    x, weight, targets = draw(50, 32, 65, dtype)
    if backend == "cpp" and dtype == torch.float16:
        with pytest.raises(ValueError, match=r"'cpp' needs fp32 or bf16 on a CPU and a C.. compiler, not torch.fl"):
            linear_cross_entropy(x, weight, targets, backend=backend)
        return
    got = results(linear_cross_entropy, x, weight, targets, backend=backend)
    theirs = results(plain, x, weight, targets)
    exact = results(truth, x.double(), weight.double(), targets)
    for ours, torchs, e, name in zip(got, theirs, exact, ("loss", "dx", "dW"), strict=True):
        error, bound = (ours.double() - e).abs().max(), 2 * (torchs.double() - e).abs().max()
        assert error <= bound + 1e-6 * e.abs().max(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_is_that_of_linear(backend):
    """The matmuls are bf16's, the weight's gradient is fp32 and was never rounded."""
    x, weight, targets = draw(40, 32, 65)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(linear_cross_entropy, x, weight, targets, backend=backend)
        again = results(linear_cross_entropy, x.bfloat16(), weight, targets, backend=backend)
        theirs = results(
            lambda x, w, t: F.cross_entropy(F.linear(x, w).float(), t, reduction="sum"), x, weight, targets
        )
    exact = results(truth, x.double(), weight.double(), targets)
    assert [a.dtype for a in got] == [torch.float32] * 3
    assert [a.dtype for a in again] == [torch.float32, torch.bfloat16, torch.float32]
    for ours, torchs, e in zip(got, theirs, exact, strict=True):
        assert (ours.double() - e).abs().max() <= 2 * (torchs.double() - e).abs().max() + 1e-6 * e.abs().max()
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(got, again, strict=True))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_equals_torch(dtype):
    x, weight, targets = draw(20, 16, 65, dtype)
    for terms in (TERMS[0], TERMS[3]):
        one, other = (
            results(linear_cross_entropy, x, weight, targets, backend=b, **terms) for b in ("torch", "triton")
        )
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 2e-3, atol=1e-5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(0, 40), st.integers(1, 9), st.integers(1, 70), st.sampled_from(BACKENDS), st.sampled_from(TERMS),
    st.sampled_from([0.0, 1.0, 30.0]), st.sampled_from([1.0, -0.25]), st.sampled_from([1, 16]), st.integers(0, 1000),
)  # fmt: skip
def test_any_case(N, C, V, backend, terms, size, factor, rows, seed):
    x, weight, targets = draw(N, C, V, seed=seed)
    with mock.patch.multiple(cross_entropy, CPU_ROWS=rows, CPU_BYTES=1):
        compare(size * x, weight, targets, factor, backend=backend, rtol=1e-4, atol=1e-4, **terms)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_do_not_overflow(backend):
    g = torch.Generator().manual_seed(0)
    weight = torch.randint(-10_000, 10_001, (65, 4), generator=g).float()
    x, targets = torch.eye(4), torch.tensor([0, 64, 7, -100])  # the logits are columns of the weight, exact
    compare(x, weight, targets, backend=backend)
    compare(x, weight, targets, backend=backend, softcap=30.0, z_loss=1e-4, rtol=1e-4)  # 1 - tanh(100 / 30)^2


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_counts_when_all_is_ignored(backend):
    x, weight, targets = draw(7, 8, 65)
    loss, dx, dweight = results(linear_cross_entropy, x, weight, targets.fill_(-100), z_loss=0.1, backend=backend)
    assert loss == 0 and not dx.any() and not dweight.any()
    assert linear_cross_entropy(x[:0], weight, targets[:0], backend=backend) == 0


@pytest.mark.usefixtures("small_chunks")
def test_a_sum_beyond_fp16_is_scaled_before_it_is_rounded():
    x, weight = torch.full((4096, 1), 100.0, dtype=torch.float16), torch.zeros(2, 1, dtype=torch.float16)
    _, _, dweight = results(linear_cross_entropy, x, weight, torch.zeros(4096, dtype=torch.long), 1 / 4096)
    assert dweight.tolist() == [[-50.0], [50.0]]  # 4096 * 100 * 0.5 is more than 65504


def test_a_target_outside_the_vocabulary():
    x, weight, targets = draw(6, 8, 65)
    for wrong in (65, -1, -101, 1 << 40):
        targets[3] = wrong
        with pytest.raises(ValueError, match=rf"are between .*{wrong}.*0 to 64, or -100"):
            linear_cross_entropy(x, weight, targets)
        losses = torch.zeros(6)  # as on a GPU, where nobody looks
        cross_entropy_step(torch.zeros(6, 80)[:, :65], targets, losses, 0.0, None, True)
        assert losses.isnan().tolist() == [False, False, False, True, False, False]


class Watch(TorchDispatchMode):
    """The sizes of all that is computed, and how many matmuls."""

    def __init__(self):
        super().__init__()
        self.largest, self.matmuls = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.matmuls += "mm" in function.name()
        sizes = [a.numel() for a in torch.utils._pytree.tree_leaves(out) if isinstance(a, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_nearly_as_large_as_the_logits(dtype):
    N, V = 4096, 2048
    x, weight, targets = draw(N, 4, V, dtype)
    rows = chunk_rows(N, V, dtype.itemsize, "cpu")
    for wanted, matmuls in (((True, True), 3), ((True, False), 2), ((False, True), 2), ((False, False), 1)):
        with Watch() as watch:
            cross_entropy.loss_and_gradients(x, weight, targets, 0.1, 3.0, "torch", *wanted)
        assert watch.largest <= rows * V <= N * V // 4
        assert watch.matmuls == N // rows * matmuls


def test_gradients_are_made_only_for_who_wants_them():
    x, weight, targets = draw(6, 8, 65)
    x.requires_grad_()
    with mock.patch.object(cross_entropy, "_op", wraps=cross_entropy._op) as op:
        linear_cross_entropy(x, weight, targets).backward()
        with torch.no_grad():
            linear_cross_entropy(x, weight, targets)
    assert [call.args[-2:] for call in op.call_args_list] == [(True, False), (False, False)]
    assert x.grad is not None
