"""Retention compared with its definition, in parallel and recurrent form, and with a module of transformers."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from model import ModelConfig, precompute_rope
from tests.conftest import TINY, randomized
from tests.zoo.test_linear_attention import compare, heads
from zoo.retention import Retention

CONFIG = dataclasses.replace(TINY, context=80, n_kv_head=2, layer_pattern="T")


def parallel(q: Tensor, k: Tensor, v: Tensor, gamma: float) -> Tensor:
    """Equation 5: (Q K^T with a decay for each pair) V. (T, D) each -> (T, D)."""
    n = torch.arange(len(q))
    decay = torch.where(n[:, None] >= n, gamma ** (n[:, None] - n).double(), 0.0)
    return (q @ k.T * decay) @ v


def recurrent(q: Tensor, k: Tensor, v: Tensor, gamma: float) -> Tensor:
    """Equation 6: a state per head, token by token. (T, D) each -> (T, D)."""
    S, out = q.new_zeros(q.shape[1], v.shape[1]), []
    for t in range(len(q)):
        S = gamma * S + torch.outer(k[t], v[t])
        out.append(q[t] @ S)
    return torch.stack(out)


def definition(retention):
    """The layer, equation 8, with one of the two forms: x (T, C) -> (T, C)."""

    def layer(weights: dict[str, Tensor], x: Tensor, config: ModelConfig) -> Tensor:
        out, G = [], config.n_head // config.n_kv_head
        for h in range(config.n_head):
            q, k, v = heads(weights, x, config, h)
            y = retention(q / config.head_dim**0.5, k, v, 1 - 2.0 ** (-5 - h // G))
            out.append(y / (y.square().mean(1, keepdim=True) + config.norm_eps).sqrt())
        gate = x @ weights["g_proj.weight"].T
        return (torch.cat(out, 1) * gate * gate.sigmoid()) @ weights["o_proj.weight"].T

    return layer


def check(cls) -> None:
    """AssertionError unless it equals the definition, with groups of query heads and QK-norm as the parallel form, and
    without them, as in the paper, as the recurrent form."""
    compare(cls, dataclasses.replace(CONFIG, norm_eps=1e-3), definition(parallel))
    compare(cls, dataclasses.replace(CONFIG, qk_norm=False, n_kv_head=4), definition(recurrent))


def test_outputs_equal_the_definition():
    check(Retention)


@torch.no_grad()
def test_equals_a_module_of_transformers():
    """MiniMax's lightning attention has the same recurrence, from blocks, with other decays, another norm and gate, no
    RoPE and an activation, which are replaced here."""
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = dataclasses.replace(CONFIG, n_kv_head=4, positions="none", qk_norm=False)
    ours, x = randomized(config).model.layers[0].self_attn, torch.randn(2, 150, 32)
    theirs = MiniMaxLightningAttention(
        MiniMaxConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, head_dim=16,
            block_size=32, layer_types=["linear_attention"],
        ), 0,
    )  # fmt: skip
    theirs.slope_rate = -torch.log1p(-(2.0 ** -torch.arange(5, 9.0)))[:, None, None]
    theirs.query_decay, theirs.key_decay, theirs.diagonal_decay = theirs.decay_factors(theirs.slope_rate)
    theirs.act_fn = theirs.norm = theirs.out_proj = torch.nn.Identity()
    torch.nn.init.zeros_(theirs.output_gate.weight)  # a gate of 1/2 everywhere
    qkv = [getattr(ours, f"{name}_proj").weight.unflatten(0, (4, 16)) for name in "qkv"]  # (H, D, C)
    theirs.qkv_proj.weight.copy_(torch.cat(qkv, 1).flatten(0, 1))  # a head's q, k and v
    core = 2 * theirs(x, None, None)[0] / 4  # / sqrt(D)
    expected = F.rms_norm(core.unflatten(2, (4, 16)), (16,), eps=config.norm_eps).flatten(2)
    expected = ours.o_proj(expected * F.silu(ours.g_proj(x)))
    cos, sin = (table[None, :1, None] for table in precompute_rope(config))
    torch.testing.assert_close(ours(x, cos, sin, None), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_outputs_depend_on_distances_alone():
    """The same tokens, 40 positions later: RoPE and decay are relative."""
    mixer, x = randomized(CONFIG).model.layers[0].self_attn.double(), torch.randn(1, 30, 32, dtype=torch.float64)
    cos, sin = (table[None, :, None].double() for table in precompute_rope(CONFIG))
    outs = [mixer(x, cos[:, at : at + 30], sin[:, at : at + 30], None) for at in (0, 40)]
    torch.testing.assert_close(*outs, atol=1e-5, rtol=0)  # the tables are fp32
