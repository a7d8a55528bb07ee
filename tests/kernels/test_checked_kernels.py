"""heed's kernels under the checker of interpreter.py: every access in bounds, no two programs in conflict."""

import pytest
import torch

from kernels import CAUSAL, MaskSpec
from kernels.cross_entropy import linear_cross_entropy
from kernels.triton.flash_attention import flash_attention
from kernels.triton.flash_decoding import decode_attention
from tests.kernels.interpreter import checked

BF16 = torch.bfloat16


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(
    ("pattern", "T", "S"), [(CAUSAL, 37, 37), (MaskSpec(True, 9, 5.0), 19, 35), (MaskSpec(False, 7), 17, 33)]
)
def test_flash(pattern, T, S, dtype):
    B, H, K, D = 2, 4, 2, 24
    packed, sinks, slopes = draw((B, S, (H + 2 * K), D), (H,), (H,), dtype=dtype)
    q, k, v = packed.requires_grad_().split([H, K, K], 2)  # not contiguous
    documents = torch.arange(S).expand(B, S) // 11
    extras, seed = [x.float().requires_grad_() for x in (slopes, sinks)], torch.tensor([1, 2], dtype=torch.int32)
    with checked() as kernels:
        out, lse = flash_attention(q[:, S - T :], k, v, pattern, 0.3, documents, *extras, 0.3, seed)
        (out.float().square().sum() + lse.sum()).backward()
        flash_attention(q[:, S - T :], k, v, pattern, 0.3)[0].sum().backward()
    assert len(kernels) == 6
    assert packed.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("page", [None, 5])
@pytest.mark.parametrize(("T", "pattern", "lengths"), [(1, CAUSAL, (1, 35, 70)), (3, MaskSpec(True, 9), (0, 20, 100))])
def test_decode(T, pattern, lengths, page, dtype):
    S, H, K, D = 35, 6, 2, 24
    q, k, v = draw((3, T, H, D), (3, S, K, D), (3, S, K, D), dtype=dtype)
    slopes, sinks = draw((H,), (H,))
    pages = None
    if page is not None:
        pages = torch.arange(3 * S // page, dtype=torch.int32).flip(0).view(3, -1)
        k, v = (x.view(-1, page, K, D) for x in (k, v))
    with checked() as kernels:
        for splits in (1, 3):
            decode_attention(q, k, v, pattern, 0.3, torch.tensor(lengths), pages, slopes, sinks, splits)
    assert kernels == ["_split", "_split", "_combine"]


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("V", [1, 16, 33])
def test_cross_entropy(V, dtype):
    x, weight = (a.requires_grad_() for a in draw((9, 8), (V, 8), dtype=dtype))
    targets = torch.arange(9) % V
    targets[3] = -100
    with checked() as kernels:
        linear_cross_entropy(x, weight, targets, z_loss=0.1, softcap=3.0, backend="triton").backward()
    assert kernels == ["_row"]
