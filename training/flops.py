"""Number of parameters of a model, its FLOPs per training token, and the peak FLOP/s of GPUs."""

import re

import torch

from model import GPT, ModelConfig
from zoo import MIXERS

# Dense bf16 peaks of the vendors' data sheets, by a regular expression for torch.cuda.get_device_name.
PEAK_FLOPS = {
    r"A100": 312e12,
    r"H100 (80GB HBM3|SXM)": 989e12,
    r"H200": 989e12,
    r" B200": 2250e12,
    r"MI300X": 1307e12,
}


def count_parameters(config: ModelConfig) -> int:
    """Number of trainable parameters, without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


def flops_per_token(config: ModelConfig) -> float:
    """FLOPs to train on one token at full context: the forward pass, and twice that for the backward pass.

    Counts matmuls alone, 2 FLOPs per multiply-add (Kaplan et al. 2020, section 2.1): the weights', the output head's
    and attention's own two, over the keys that each query attends to. The embedding is a look-up and costs nothing. Of
    a mixer of zoo/, the products of its definition count, not those that its implementation adds; of experts, those
    that a token is sent to. With data.document_mask a query attends to fewer keys, how many depends on the text: all
    count here, as without it.
    """
    H, D, T = config.n_head, config.head_dim, config.context
    multiply_adds = float(config.n_embd * config.vocab_size)
    with torch.device("meta"):
        for name, p in GPT(config).model.layers.named_parameters():
            used = config.n_expert_active / config.n_expert if ".experts." in name else 1
            multiply_adds += p.numel() * used if p.ndim > 1 else 0
    for layer in range(config.n_layer):
        if (letter := config.letter(layer)) in MIXERS:
            multiply_adds += MIXERS[letter].multiply_adds(config)
            continue
        W = min(config.mask_spec(layer).window or T, T)
        keys = (W * (W + 1) / 2 + (T - W) * W) / T  # mean over the context of min(position, W)
        multiply_adds += 2 * H * D * keys
    return 3 * 2 * multiply_adds


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of a device, to compute MFU; None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.search(pattern, name)), None)
