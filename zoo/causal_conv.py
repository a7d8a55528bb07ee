"""The short causal convolution that linear mixers put before their queries, keys and values.

Attention finds the token before another by its position. A recurrence cannot, and the convolution gives it the last few
tokens instead (Poli et al. 2023, arXiv 2302.10866, section 3; Gu & Dao 2023, arXiv 2312.00752, section 3.4).

    out_t = sum over i < K of weight_(K - 1 - i) x_(t - i), for each channel by itself

Cost: K multiply-adds per channel and token, and K - 1 numbers per channel and sequence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.scan import upcast


def causal_conv(
    x: Tensor, weight: Tensor, tail: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Convolution over time of each channel by itself, in fp32 or fp64: each token sees itself and the K - 1 before it.

    Args:
        x: (B, T, C).
        weight: (C, 1, K), as of nn.Conv1d with groups=C.
        tail: (B, K - 1, C), the tokens before the first; None: zeros.
        bias: (C,), is added.
    Returns:
        (B, T, C), and the last K - 1 tokens, the tail of the next call.
    """
    K = weight.shape[2]
    x = upcast(x)
    x = F.pad(x, (0, 0, K - 1, 0)) if tail is None else torch.cat((tail, x), 1)  # (B, K - 1 + T, C)
    bias = None if bias is None else bias.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        # As an image of height 1 in channels-last layout, which needs no transposition.
        out = F.conv2d(x.mT[:, :, None], weight[:, :, None].to(x.dtype), bias, groups=len(weight))  # (B, C, 1, T)
    return out[:, :, 0].mT, x[:, 1 - K :]
