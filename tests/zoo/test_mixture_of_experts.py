"""Mixture of experts compared with its definition and with Qwen3-MoE of transformers; its loss, gradients and cost."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import transformers
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from convert.from_hf import import_checkpoint
from inference import engine
from inference.quantize import quantize
from kernels import cpu
from kernels.cpu import fused_layers
from model import GPT, FeedForward
from sample import load
from tests.conftest import TINY, randomized
from tests.convert.test_to_hf import BPE, same_greedy_text, same_logits, theirs
from tests.training.test_apply_fused_layers import relative_errors, results
from training.apply_fused_layers import FusedLayersError, apply_fused_layers
from training.config import OptimConfig
from training.flops import count_parameters, flops_per_token
from training.optimizers import build_optimizers
from zoo import mixture_of_experts as module

SPARSE = dataclasses.replace(TINY, n_expert=6, n_expert_active=2)


def definition(weights: dict[str, np.ndarray], x: np.ndarray, k: int) -> np.ndarray:
    """The first formula of zoo/mixture_of_experts.py, token by token. x (T, C) -> (T, C), fp64."""
    out = np.zeros_like(x)
    for t, token in enumerate(x):
        p = np.exp(weights["gate.weight"] @ token)
        p /= p.sum()
        chosen = np.argsort(-p)[:k]
        for e in chosen:
            gate, up, down = (weights[f"experts.{e}.{name}_proj.weight"] for name in ("gate", "up", "down"))
            silu = (gate @ token) / (1 + np.exp(-gate @ token))
            out[t] += p[e] / p[chosen].sum() * (down @ (silu * (up @ token)))
    return out


@torch.no_grad()
def check(module) -> None:
    """AssertionError unless outputs equal the definition's, and the loss that of transformers for every sequence."""
    for k, E, T in ((2, 6, 40), (1, 3, 5), (3, 3, 1)):
        torch.manual_seed(k)
        config = dataclasses.replace(TINY, n_expert=E, n_expert_active=k)
        layer = module.MixtureOfExperts(config, FeedForward).double()
        layer.gate.weight[0] -= 0.3  # an expert that few tokens or none choose
        x = torch.randn(2, T, 32, dtype=torch.float64) + 0.3
        weights = {name: p.numpy() for name, p in layer.named_parameters()}
        expected = torch.tensor(np.stack([definition(weights, row.numpy(), k) for row in x]))
        for training in (True, False):
            torch.testing.assert_close(layer.train(training)(x), expected, atol=1e-13, rtol=0)
        logits = x @ layer.gate.weight.T
        asked = torch.stack([load_balancing_loss_func((row,), E, k) for row in logits])
        torch.testing.assert_close(layer.balance, asked, atol=1e-6, rtol=0, check_dtype=False)


def test_outputs_equal_the_definition_and_balance_that_of_transformers():
    check(module)


@torch.no_grad()
def test_causality():
    """Not bit for bit: an expert's matmul has as many rows as tokens choose it, which changes how it is summed."""
    model, tokens = randomized(SPARSE).double(), torch.randint(0, 97, (1, 30))
    before = model(tokens)
    for t in (1, 15, 29):
        changed = tokens.clone()
        changed[0, t] = (tokens[0, t] + 1) % 97
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-12, rtol=0)
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


def test_checkpoint_of_transformers_is_imported(tmp_path):
    """As transformers 5 saves it, with another width of dense layers. The export is tested in tests/convert/."""
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            vocab_size=BPE.vocab_size, hidden_size=32, intermediate_size=99, moe_intermediate_size=24, num_experts=8,
            num_experts_per_tok=3, norm_topk_prob=True, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=256, initializer_range=0.3,
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path / "hf")
    BPE.save(tmp_path / "hf" / "tokenizer.json")
    import_checkpoint(str(tmp_path / "hf"), tmp_path / "run")
    ours, _ = load(tmp_path / "run")
    assert (ours.config.n_ffn, ours.config.n_expert, ours.config.router_aux_loss_coef) == (24, 8, 0.001)
    same_logits(ours, theirs(tmp_path / "hf"))
    same_greedy_text(ours, theirs(tmp_path / "hf"), BPE.encode("the cat sat on"))


def gradients(model: GPT, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The loss, summed over the batches, and its gradients."""
    model.zero_grad()
    total = sum(model.loss(*batch) for batch in batches)
    total.backward()
    return {"loss": total.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def test_loss_does_not_depend_on_micro_batches_and_counts_targets():
    model = randomized(dataclasses.replace(SPARSE, router_aux_loss_coef=0.7))
    tokens, targets = torch.randint(0, 97, (2, 4, 20))
    targets[1, 3:], targets[3] = -100, -100
    plain = model.loss(tokens, targets)
    model.train()
    whole = gradients(model, [(tokens, targets)])
    for size in (1, 2):
        parts = gradients(model, list(zip(tokens.split(size), targets.split(size), strict=True)))
        for name, expected in whole.items():
            bound = 1e-5 * expected.abs().max().item()
            torch.testing.assert_close(parts[name], expected, atol=bound, rtol=0, msg=name)
    seen, expected = [], 0.0
    for block in model.model.layers:
        block.post_attention_layernorm.register_forward_hook(lambda *args: seen.append(args[2]))
    model.loss(tokens, targets)
    for block, x in zip(model.model.layers, seen, strict=True):
        logits = x @ block.mlp.gate.weight.T
        expected += sum(
            n * load_balancing_loss_func((row,), 6, 2) for n, row in zip((20, 3, 20, 0), logits, strict=True)
        )
    assert (whole["loss"] - plain).item() == pytest.approx(0.7 * expected.item(), rel=1e-5)
    copy.deepcopy(model)  # the loss leaves no graph behind


def test_activation_checkpointing_has_the_same_gradients():
    tokens = torch.randint(0, 97, (2, 20))
    model = randomized(SPARSE).train()
    expected = gradients(model, [(tokens, tokens)])
    model.model.activation_checkpointing = True
    for name, gradient in gradients(model, [(tokens, tokens)]).items():
        assert torch.equal(gradient, expected[name]), name


def test_every_expert_has_a_gradient_in_training_also_without_tokens():
    model = randomized(SPARSE).train()
    model.loss(*torch.randint(0, 97, (2, 1, 1))).backward()  # a token chooses 2 of 6 experts
    assert all(p.grad is not None for p in model.parameters())
    used = [bool(e.up_proj.weight.grad.any()) for e in model.model.layers[0].mlp.experts]
    assert sum(used) == 2


def test_the_loss_balances_experts():
    """A router that prefers one expert for all tokens uses the others again after some steps with the loss, and only
    with it."""
    largest = []
    for coefficient in (1.0, 0.0):
        model = randomized(dataclasses.replace(SPARSE, n_layer=1, router_aux_loss_coef=coefficient)).train()
        mlp, shares = model.model.layers[0].mlp, []
        tokens = torch.randint(0, 97, (4, 32), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            model.model.layers[0].post_attention_layernorm.weight.fill_(1.0)
            mlp.gate.weight.zero_()
            mlp.gate.weight[:2, :4] += 0.5
            model.model.embed_tokens.weight[:, :4] += 1.0
        optimizers = build_optimizers(model, OptimConfig(lr=3e-3), torch.float32)
        mlp.register_forward_hook(lambda m, args, _, to=shares: to.append((args[0] @ m.gate.weight.T).topk(2).indices))
        for _ in range(20):
            (model.loss(tokens, tokens) / tokens.numel()).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert shares[0].flatten().bincount(minlength=6).max() == 128
        largest.append(int(shares[-1].flatten().bincount(minlength=6).max()))
    assert largest[0] < 90 < largest[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_layers_around_it(dtype, monkeypatch):
    """The error relative to fp64 is at most twice that of torch in fp32; attention is fused. In bf16 tokens whose two
    experts are nearly as probable as a third change experts, so only the output is compared."""
    model, tokens = randomized(SPARSE), torch.randint(0, 97, (2, 30))
    exact = results(copy.deepcopy(model).double(), tokens)
    torchs = relative_errors(results(model, tokens, dtype), exact)
    called, real = [], fused_layers.Attention.forward
    monkeypatch.setattr(fused_layers.Attention, "forward", staticmethod(lambda *a: (called.append(1), real(*a))[1]))
    apply_fused_layers(model)
    errors = relative_errors(results(model, tokens, dtype), exact)
    assert len(called) == 2
    for name, error in errors.items():
        if dtype == torch.float32 or name == "out":
            assert error <= 2 * max(torchs[name], 0.5 * max(torchs.values())) + 1e-6, (name, error, torchs[name])
    model.model.layers[0].mlp.experts[2] = FeedForward(TINY)
    with pytest.raises(FusedLayersError, match="call it again"):
        model(tokens)


def test_counts_and_optimizers():
    config = dataclasses.replace(SPARSE, n_layer=1)
    dense = dataclasses.replace(TINY, n_layer=1, n_ffn=2 * TINY.n_ffn)  # as wide as two experts
    router = 6 * TINY.n_embd
    assert flops_per_token(config) == flops_per_token(dense) + 6 * router
    assert count_parameters(config) == count_parameters(dense) + router + 4 * 3 * TINY.n_ffn * TINY.n_embd
    model = GPT(config)
    _, muon = build_optimizers(model, OptimConfig(), torch.float32)
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    assert len(experts) == 18 and {p.ndim for p in experts} == {2}
    assert set(map(id, experts)) <= {id(p) for group in muon.param_groups for p in group["params"]}


@torch.no_grad()
def test_quantized_and_refused_by_the_engine_for_cpus():
    tokens = torch.randint(0, 97, (1, 12))
    expected = randomized(SPARSE)(tokens)
    for kind in ("bf16", "int8"):
        got = quantize(randomized(SPARSE), kind)(tokens)
        assert (got - expected).abs().median() < 0.05 * expected.abs().mean()  # some tokens change experts
    with pytest.raises(cpu.Unavailable, match=r"does not support model.n_expert$"):
        engine.CppEngine(randomized(SPARSE))
