"""Number of parameters of a model and floating-point operations per training token."""

import torch

from model import GPT, ModelConfig


def count_parameters(config: ModelConfig) -> int:
    """Learned numbers, without building the model."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


def flops_per_token(config: ModelConfig) -> float:
    """Floating-point operations to train on one token at full context: forward, and twice that backward.

    Counts the matrix products alone, 2 a multiply-add (Kaplan et al. 2020, section 2.1): with attention's own two
    over the keys that each query really sees and the output head, without the embedding, which is a look-up.
    """
    C, H, K, D, T = config.n_embd, config.n_head, config.n_kv_head, config.head_dim, config.context
    matrices = C * D * (H * (3 if config.gate else 2) + 2 * K) + 3 * C * config.n_ffn
    products = float(config.n_layer * matrices + C * config.vocab_size)
    for layer in range(config.n_layer):
        W = min(config.mask_spec(layer).window or T, T)
        keys = (W * (W + 1) / 2 + (T - W) * W) / T  # the average over the context of min(position, W)
        products += 2 * H * D * keys
    return 3 * 2 * products
