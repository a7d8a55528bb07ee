"""How weights lie in memory, for speaking on a CPU: each token reads all of them, and that is what takes the time.

`quantize` makes them fewer bytes. In int8 a row has a scale (Dettmers et al. 2022, section 2.1, "absmax", a row at
a time):

    weight[row, column] ~ codes[row, column] * scales[row],   scales[row] = the row's largest magnitude / 127

`gather` puts them side by side into large pages of memory, which are read a third faster than small ones.
"""

import mmap

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT


class Int8(nn.Module):
    """A matrix in int8: in the place of a linear layer or an embedding it computes what that did."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, embedding: bool) -> None:
        """weight (rows, columns), fp32."""
        super().__init__()
        self.embedding = embedding
        largest = weight.detach().float().abs().amax(1, keepdim=True)  # (rows, 1)
        scales = largest.clamp(min=1e-30) / 127
        self.register_buffer("codes", (weight.detach() / scales).round().to(torch.int8))  # (rows, columns)
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> Tensor:
        """The matrix that the codes stand for, (rows, columns) fp32: made anew each time, never kept."""
        return self.codes * self.scales

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding:
            return self.codes[x] * self.scales[x]  # (B, T) -> (B, T, C)
        return F.linear(x, self.weight)


def quantize(model: GPT, kind: str) -> GPT:
    """The same model with its weights in `kind`, bf16 or int8, to speak and to be judged, not to be trained on. Changes
    `model`. Positions stay fp32, and in int8 the gains of the norms do."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if kind == "bf16":
                for weight in child.parameters(recurse=False):
                    weight.data = weight.data.bfloat16()
            elif isinstance(child, nn.Linear | nn.Embedding):
                setattr(parent, name, Int8(child.weight, isinstance(child, nn.Embedding)))
    return gather(model)


def large_pages(size: int) -> mmap.mmap | bytearray:
    """A buffer of `size` bytes, in large pages where Linux has them (madvise(2), MADV_HUGEPAGE). A tensor in it keeps
    it."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return bytearray(size)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    return block


def gather(model: GPT) -> GPT:
    """The same model with its matrices in one block of memory, in large pages. Changes `model`; on a GPU, does
    nothing."""
    matrices = [x for x in (*model.parameters(), *model.buffers()) if x.ndim == 2]
    if matrices[0].device.type != "cpu":
        return model
    sizes = [-(-x.nbytes // 64) * 64 for x in matrices]  # each begins a line of the cache
    block, begin = large_pages(sum(sizes)), 0
    with torch.inference_mode(matrices[0].is_inference()):  # what may be trained stays so
        for matrix, size in zip(matrices, sizes, strict=True):
            place = torch.frombuffer(block, dtype=matrix.dtype, count=matrix.numel(), offset=begin).view(matrix.shape)
            matrix.data = place.copy_(matrix.data)
            begin += size
    return model
