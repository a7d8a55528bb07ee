"""The benchmarked shapes: those of the FlashAttention papers, decoding over a KV cache, the head with the loss.

The papers (arXiv 2307.08691, section 4.1; 2407.08608, section 4.1) use 16,384 tokens per batch, width 2,048 and head
sizes 64 and 128, causal or not. Here also with four query heads per key/value head.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks import kernel_costs
from benchmarks.kernel_costs import Work

TOKENS, WIDTH = 16384, 2048
PAGE = 256  # flash-attn supports multiples of 256
KERNELS = ("forward", "backward", "decode", "paged", "cross-entropy")


@dataclass(frozen=True)
class Case:
    """One shape of one kernel. Attention: B, T, S, H, K, D, causal; cross-entropy: T tokens, D width, V vocabulary."""

    kernel: str
    B: int
    T: int
    S: int
    H: int
    K: int
    D: int
    causal: bool = True
    V: int = 0

    @property
    def unit(self) -> str:
        """Decoding is memory-bound, the others are compute-bound."""
        return "GB/s" if self.kernel in ("decode", "paged") else "TFLOP/s"

    @property
    def series(self) -> str:
        """The name shared by cases that differ in length only: the title of their panel in the plot."""
        if self.kernel == "cross-entropy":
            return f"cross-entropy, width {self.D}"
        heads = f"D {self.D}, H {self.H}, K {self.K}"
        if self.unit == "GB/s":
            return f"{self.kernel}, B {self.B}, {heads}"
        return f"{self.kernel}, {'causal' if self.causal else 'full'}, {heads}"

    @property
    def length(self) -> int:
        """The size that varies within a series."""
        return self.V or self.S

    def work(self) -> list[Work]:
        """The work of the kernel, see benchmarks/kernel_costs.py."""
        if self.kernel == "cross-entropy":
            return kernel_costs.cross_entropy(self.T, self.D, self.V)
        shape = self.B, self.T, self.S, self.H, self.K, self.D
        if self.unit == "GB/s":
            return kernel_costs.decode(*shape)
        return (kernel_costs.forward if self.kernel == "forward" else kernel_costs.backward)(*shape, self.causal)

    def small(self, length: int) -> "Case":
        """The same kernel at a size for the fp64 definition. An odd length does not align with blocks."""
        if self.kernel == "cross-entropy":
            return replace(self, T=length, D=64, V=3 * length)
        S = PAGE if self.kernel == "paged" else length
        return replace(self, B=2, T=min(self.T, length), S=S, H=2 * self.H // self.K, K=2)


def cases() -> Iterator[Case]:
    """All cases for a GPU."""
    for kernel in ("forward", "backward"):
        for D in (64, 128):
            for causal in (False, True):
                for G in (1, 4):
                    for T in (512, 1024, 2048, 4096, 8192, 16384):
                        yield Case(kernel, TOKENS // T, T, T, WIDTH // D, WIDTH // D // G, D, causal)
    for kernel in ("decode", "paged"):
        for B in (1, 16, 64):
            for S in (1024, 4096, 16384, 65536):
                if B * S <= 1 << 20:  # 4 GiB of keys and values
                    yield Case(kernel, B, 1, S, 32, 8, 128)
    for V in (32768, 65536, 131072, 151936):
        yield Case("cross-entropy", 1, 8192, 8192, 1, 1, WIDTH, V=V)


def gpu_cases() -> Iterator[Case]:
    """The cases of `python -m benchmarks gpu`, the most important first: it may run out of time."""
    for T in (4096, 1024, 16384, 8192, 2048, 512):
        for kernel, D, causal, G in itertools.product(("forward", "backward"), (64, 128), (True, False), (1, 4, 8)):
            yield Case(kernel, TOKENS // T, T, T, WIDTH // D, WIDTH // D // G, D, causal)
        if T == 4096:
            yield from (case for case in cases() if case.unit == "GB/s" or case.kernel == "cross-entropy")


def dry_cases() -> Iterator[Case]:
    """Small cases for Triton's interpreter: one per kernel, two for lines in the plot."""
    yield Case("forward", 1, 32, 32, 2, 1, 16, causal=False)
    yield Case("forward", 1, 48, 48, 2, 1, 16)
    yield Case("backward", 1, 32, 32, 2, 1, 16)
    yield Case("decode", 2, 1, 64, 4, 2, 16)
    yield Case("decode", 2, 1, 128, 4, 2, 16)
    yield Case("paged", 2, 1, PAGE, 4, 2, 16)
    yield Case("cross-entropy", 1, 32, 32, 1, 1, 32, V=97)
