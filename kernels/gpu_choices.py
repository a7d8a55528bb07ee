"""Whether torch's SDPA or heed's flash attention is used on a GPU, where both have a fast path: data, by card.

A row is measured by `python -m benchmarks gpu --only attention`, which prints it. On a card without a row, SDPA is used
where it needs no (T, S) mask: heed's kernels have not been timed on any GPU. In all other cases (windows, documents,
slopes, softcap, sinks, the KV cache) heed's kernels are used, which need no such mask.
"""

from typing import NamedTuple

import torch


class Choices(NamedTuple):
    """The faster backend of a card, "flash" or "sdpa", by the largest head size for which it is."""

    measured: str  # date
    train: dict[int, str]  # forward and backward
    inference: dict[int, str]  # forward alone


GPU_CHOICES: dict[str, Choices] = {}  # torch.cuda.get_device_name() -> its choices
NOT_MEASURED = Choices("never", {256: "sdpa"}, {256: "sdpa"})


def faster_backend(device: torch.device, head_dim: int, train: bool) -> str:
    """The backend of a call for which SDPA has a fast path; flash attention supports head sizes up to 256."""
    choices = GPU_CHOICES.get(gpu_name(device), NOT_MEASURED)
    by_size = choices.train if train else choices.inference
    return next((backend for size, backend in sorted(by_size.items()) if head_dim <= size), "sdpa")


def gpu_name(device: torch.device) -> str:
    """Name of the card."""
    return torch.cuda.get_device_name(device)


def gpu_capability(device: torch.device) -> tuple[int, int]:
    """Major and minor compute capability."""
    return torch.cuda.get_device_capability(device)


# torch.compile cannot trace them, and takes their results as constants. This is all that
# torch.compiler.assume_constant_result does, but importing that takes a second.
for function in (gpu_name, gpu_capability):
    function._dynamo_marked_constant = True  # type: ignore[union-attr]
