"""Weight-only quantization for inference: bfloat16, or int8 with one scale per row.

Generating a token reads every weight, so fewer bytes per weight mean more tokens per second. int8 is symmetric absmax
quantization per row (Dettmers et al. 2022, section 2.1):

    weight[row, column] ~ codes[row, column] * scales[row],   scales[row] = max |weight[row]| / 127
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.huge_pages import use_huge_pages
from model import GPT


class Int8(nn.Module):
    """An int8 matrix that replaces a linear layer or an embedding."""

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
        """The dequantized matrix, (rows, columns) fp32, computed at each access."""
        return self.codes * self.scales

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding:
            return self.codes[x] * self.scales[x]  # (B, T) -> (B, T, C)
        return F.linear(x, self.weight)


def quantize(model: GPT, kind: str) -> GPT:
    """Convert the model's weights to `kind`, "bf16" or "int8", for inference and evaluation. Changes `model` in place.

    RoPE tables stay fp32; with int8, so do the gains of the norms. Returns the model.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if kind == "bf16":
                for weight in child.parameters(recurse=False):
                    weight.data = weight.data.bfloat16()
            elif isinstance(child, nn.Linear | nn.Embedding):
                setattr(parent, name, Int8(child.weight, isinstance(child, nn.Embedding)))
    return use_huge_pages(model)
