"""The short convolution compared with nn.Conv1d, in one call and in many."""

import pytest
import torch

from zoo.causal_conv import causal_conv


def check(causal_conv) -> None:
    """AssertionError unless it equals a padded Conv1d, however the tokens are split into calls."""
    torch.manual_seed(0)
    conv = torch.nn.Conv1d(10, 10, 4, groups=10, padding=3, dtype=torch.float64)
    x = torch.randn(2, 23, 10, dtype=torch.float64)
    expected = conv(x.mT)[:, :, :23].mT
    for parts in ((23,), (1,) * 23, (2, 1, 15, 5)):
        tail, out = None, []
        for part in x.split(parts, 1):
            y, tail = causal_conv(part, conv.weight, tail, conv.bias)
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), expected, atol=1e-14, rtol=0)
        assert torch.equal(tail, x[:, -3:])


def test_equals_conv1d():
    check(causal_conv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp32_within_bf16_autocast(dtype):
    x, weight, bias = torch.randn(2, 9, 10).to(dtype), torch.randn(10, 1, 4), torch.randn(10)
    expected = causal_conv(x.float(), weight, None, bias)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(causal_conv(x, weight, None, bias), expected, atol=0, rtol=0)
