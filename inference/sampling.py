"""Sampling: logits to probabilities (temperature, top-k, top-p, min-p, repetition penalty) to a token.

Shapes: B samples, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; each field is documented in `python sample.py --help`."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    greedy: bool = False

    def __post_init__(self) -> None:
        for name, holds, right in (
            ("temperature", self.temperature >= 1e-6, "at least 1e-6; for the most likely token use greedy"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 1e-6 <= self.repetition_penalty <= 1e6, "from 1e-6 to 1e6"),
        ):
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)}: must be {right}")

    def sample(self, logits: Tensor, seen: Tensor, uniform: Tensor) -> Tensor:
        """Sample one token per row, (B, 1), by inverting the cumulative distribution at a random point.

        logits: (B, V) fp32. seen: (B, V) bool, tokens of the text so far. uniform: (B, 1) random numbers from [0, 1).
        Raises ValueError if a row of logits has NaN or infinity, or nothing to choose.
        """
        if not bool(logits.amax(1).isfinite().all()):
            raise ValueError("the logits are not finite numbers: the weights are damaged, or overflow in this dtype")
        probabilities = self.probabilities(logits, seen)  # (B, V)
        if self.greedy:
            return probabilities.argmax(1, keepdim=True)
        sums = probabilities.cumsum(1)  # torch.multinomial needs V random numbers per row
        return torch.searchsorted(sums, (1 - uniform) * sums[:, -1:])  # 1 - uniform > 0: no token of probability 0

    def probabilities(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Sampling probabilities (B, V) from fp32 logits (B, V). seen: (B, V) bool, tokens of the text so far."""
        if self.repetition_penalty != 1.0:  # Keskar et al. 2019 (CTRL), section 4.1, for either sign of the logits
            penalized = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalized, logits)
        if self.greedy:
            return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[1]:  # Fan et al. 2018
            kth = logits.topk(self.top_k, dim=1).values[:, -1:]  # (B, 1)
            logits = logits.masked_fill(logits < kth, float("-inf"))
        if self.top_p < 1.0:  # Holtzman et al. 2020: the fewest most likely tokens whose sum reaches p, at least one
            ordered, order = logits.softmax(1).sort(1, descending=True)
            beyond = ordered.cumsum(1) - ordered >= self.top_p  # the more likely tokens already reach p
            logits = logits.masked_fill(torch.zeros_like(beyond).scatter_(1, order, beyond), float("-inf"))
        probabilities = logits.softmax(1)
        if self.min_p > 0.0:  # Nguyen et al. 2024
            likeliest = probabilities.amax(1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < self.min_p * likeliest, 0.0)
            probabilities = probabilities / probabilities.sum(1, keepdim=True)
        return probabilities
