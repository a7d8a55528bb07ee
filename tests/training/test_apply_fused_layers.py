"""Fused layers: heed's C++ compared with model.py in fp64, outputs and all gradients, for every flag."""

import copy
import dataclasses
import functools

import pytest
import torch

from inference import engine
from inference.quantize import quantize
from kernels.cpu import bindings, fused_layers
from model import GPT, Block, KVCache, ModelConfig
from tests.conftest import TINY, losses, randomized, weights
from training.apply_fused_layers import FusedLayersError, apply_fused_layers, optimize_layers
from training.device import Machine

FLAGS = {
    "plain": {},
    "MQA": {"n_kv_head": 1},
    "MHA": {"n_kv_head": 4},
    "no QK-norm": {"qk_norm": False},
    "gate": {"gate": True},
    "a window": {"window": 5, "layer_pattern": "SL"},
    "a window longer than a block": {"window": 100, "layer_pattern": "S"},
    "yarn": {"yarn_factor": 4.0, "yarn_original_context": 8},
    "no positions, unscaled": {"positions": "none", "scale_scores": False},
    "learned positions": {"positions": "learned"},
    "odd sizes": {"n_embd": 37, "n_ffn": 51, "head_dim": 6},
    "wide": {"n_embd": 160, "n_ffn": 320, "head_dim": 64, "norm_eps": 1e-3},
}


def fused(model: GPT) -> GPT:
    apply_fused_layers(model)
    return model


def results(model: GPT, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The input of the head, and the gradient of every weight for a random gradient of that input."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = model.model(tokens)
    asked = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(out, list(model.model.parameters()), asked.to(out.dtype))
    names = [name for name, _ in model.model.named_parameters()]
    return {"out": out.detach()} | dict(zip(names, gradients, strict=True))


def relative_errors(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """The maximum error of each result relative to its largest element."""
    return {name: float((got[name] - e).abs().max() / e.abs().max().clamp(min=1e-6)) for name, e in exact.items()}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_for_every_flag(flags, dtype):
    """The error relative to fp64 is at most twice that of torch in the same dtype."""
    config = dataclasses.replace(TINY, context=300, **flags)
    model = randomized(config)
    for T in (2, 33, 64, 150, 300) if not flags else (130,):  # blocks are 64 queries
        tokens = torch.randint(0, 97, (2, T), generator=torch.Generator().manual_seed(T))
        exact = results(copy.deepcopy(model).double(), tokens)
        torchs = relative_errors(results(model, tokens, dtype), exact)
        worst = max(torchs.values())
        for name, error in relative_errors(results(fused(copy.deepcopy(model)), tokens, dtype), exact).items():
            assert error <= 2 * max(torchs[name], 0.5 * worst) + 1e-6, (T, name, error, torchs[name])


def test_every_operation_is_fused(monkeypatch):
    """The test above would also pass if no layer was replaced. Attention is not if its weights are dropped."""
    called = []
    for module, name in ((bindings, "RMSNorm"), (fused_layers, "Attention"), (fused_layers, "FeedForward")):
        part = getattr(module, name)
        real = part.forward
        monkeypatch.setattr(part, "forward", staticmethod(lambda *a, n=name, f=real: (called.append(n), f(*a))[1]))
    model = fused(randomized(dataclasses.replace(TINY, attention_dropout=0.1)))
    model(torch.zeros(1, 4, dtype=torch.long))
    assert called == ["Attention", "FeedForward"] * TINY.n_layer + ["RMSNorm"]
    called.clear()
    model.train()(torch.zeros(1, 4, dtype=torch.long))
    assert called == ["RMSNorm", "FeedForward"] * TINY.n_layer + ["RMSNorm"]


def test_unknown_flag_uses_eager_layers(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Later(ModelConfig):
        """A configuration of a later version of heed."""

        softcap: float = 0.0

    monkeypatch.setattr(engine, "ModelConfig", Later)
    machine = Machine(torch.device("cpu"), torch.float32, "fused", ())
    for softcap, reason in ((0.0, ""), (1.0, "layers eager (heed's C++ does not support model.softcap)")):
        model = randomized(Later(**vars(TINY), softcap=softcap))
        assert optimize_layers(model, machine) == reason
        assert isinstance(model.model.norm.forward, functools.partial) == (not reason)


@pytest.mark.parametrize("layer_impl", ["eager", "fused"])
def test_a_log_line_names_the_backend_with_dropout(layer_impl):
    machine = Machine(torch.device("cpu"), torch.float32, layer_impl, ())
    line = "attention blocks in training (cpp does not support model.attention_dropout)"
    for p, expected in ((0.0, ""), (0.1, line)):
        assert optimize_layers(randomized(dataclasses.replace(TINY, attention_dropout=p)), machine) == expected


def test_deterministic_for_a_number_of_threads():
    model, tokens = fused(randomized(TINY)), torch.randint(0, 97, (3, 30))
    before = torch.get_num_threads()
    first = results(model, tokens)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            one, other = results(model, tokens), results(model, tokens)
            assert all(torch.equal(one[name], other[name]) for name in one)
            assert max(relative_errors(one, first).values()) < 1e-5
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dropout", [{"dropout": 0.3}, {"dropout": 0.3, "attention_dropout": 0.3}])
def test_dropout_checkpointing_and_loss(dropout):
    tokens = torch.randint(0, 97, (2, 32))
    found = []
    for change, recompute in ((fused, False), (fused, True), (lambda model: model, False)):
        model = change(randomized(dataclasses.replace(TINY, **dropout))).train()
        model.model.activation_checkpointing = recompute
        torch.manual_seed(5)
        model.loss(tokens, tokens).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))
    assert max(relative_errors(found[0], found[2]).values()) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@torch.inference_mode()
def test_fused_model_with_kv_cache(dtype, bound):
    model, tokens = randomized(TINY), torch.randint(0, 97, (2, 20))
    expected = model(tokens)
    fused(model)
    cache = KVCache(TINY, 2, dtype=dtype)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        first = model(tokens[:, :15], cache)
        cache.advance(15)
        got = torch.cat((first, model(tokens[:, 15:], cache)), 1).float()
    assert (got - expected).abs().max() < bound * expected.abs().max()


def test_run_equals_eager_layers_and_resume_is_bitwise_equal(run_training):
    words = ("--train.steps=12", "--train.num_evals=2", "--model.dropout=0.1", "--model.attention_dropout=0.1")
    written = run_training("written", *words)
    whole = run_training("whole", *words, "--train.compile=auto")
    assert losses(whole) == pytest.approx(losses(written), rel=1e-3)
    assert losses(whole, "val_loss") == pytest.approx(losses(written, "val_loss"), rel=1e-3)
    run_training("half", *words, "--train.compile=auto")
    (whole.parent / "half" / "latest").write_text("step-000006\n")
    half = run_training("half", *words, "--train.compile=auto", "--resume")
    assert weights(half) == weights(whole)


def test_sliding_window_mask():
    """The last token's output depends on exactly the tokens within reach of its windows."""
    config = ModelConfig(vocab_size=97, context=200, n_layer=1, n_embd=32, n_head=2, n_kv_head=1, head_dim=16, n_ffn=48)
    for window, reached in ((0, 150), (70, 70), (1, 1)):
        pattern = {"window": window, "layer_pattern": "S"} if window else {}
        model = fused(randomized(dataclasses.replace(config, **pattern)))
        x = model.model.embed_tokens(torch.randint(0, 97, (1, 150))).detach().requires_grad_()
        cos, sin = model.model.cos[None, :150, None], model.model.sin[None, :150, None]
        model.model.layers[0](x, cos, sin, None)[0, -1].sum().backward()
        assert x.grad[0].abs().sum(1).nonzero().min() == 150 - reached


def test_gathered_weights_are_packed_anew():
    """fully_shard writes them to the memory of the last ones, and keeps the version."""
    model, written, tokens = fused(randomized(TINY)), randomized(TINY), torch.randint(0, 97, (2, 30))
    for block in model.model.layers:
        block.unshard = None  # a method that fully_shard adds
    results(model, tokens)
    weights = tuple(model.parameters())
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weights):
        for p, other in zip(weights, written.parameters(), strict=True):
            p.copy_(other.mul_(0.7))
    assert max(relative_errors(results(model, tokens), results(written, tokens)).values()) < 1e-4


# Modified models and subclasses -------------------------------------------------------------------------------------


class LoRA(torch.nn.Linear):
    """A linear layer of another kind, whose output does not depend on the weight alone."""


def replaced(parent: torch.nn.Module, name: str) -> None:
    old = getattr(parent, name)
    setattr(parent, name, LoRA(old.in_features, old.out_features, bias=False))


CHANGES = {
    "a projection replaced": lambda model: replaced(model.model.layers[1].self_attn, "q_proj"),
    "a feed-forward layer replaced": lambda model: setattr(model.model.layers[0], "mlp", torch.nn.Identity()),
    "a layer appended": lambda model: model.model.layers.append(Block(TINY, 0)),
    "quantized": lambda model: quantize(model, "int8"),
    "parametrized": lambda model: torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj),
    "cast": lambda model: model.double(),
    "bf16": lambda model: quantize(model, "bf16"),
    "moved": lambda model: model.to("meta"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_model_changed_after_fusing_raises(change):
    model = fused(randomized(TINY))
    tokens = torch.zeros(1, 4, dtype=torch.long)
    model(tokens)
    change(model)
    with pytest.raises(FusedLayersError, match=r"call it again|fused layers need float32 on a CPU"):
        model(tokens)


@pytest.mark.parametrize("part", ["self_attn", "mlp", "input_layernorm"])
def test_subclass_raises(part):
    model = randomized(TINY)
    module = getattr(model.model.layers[1], part)
    module.__class__ = type("Mine", (type(module),), {})
    with pytest.raises(FusedLayersError, match=rf"model.layers.1.{part} is Mine, fused layers need exactly"):
        apply_fused_layers(model)


def test_model_is_unchanged_if_it_cannot_be_fused():
    model = randomized(TINY).double()
    with pytest.raises(FusedLayersError, match=r"model.embed_tokens.weight is float64 on cpu"):
        apply_fused_layers(model)
    model(torch.zeros(1, 4, dtype=torch.long))


def test_fuse_again_after_a_change():
    model, tokens = fused(randomized(TINY)), torch.randint(0, 97, (2, 30))
    model.model.layers[0] = randomized(TINY, seed=1).model.layers[0]
    written = randomized(TINY)
    written.model.layers[0] = randomized(TINY, seed=1).model.layers[0]
    assert max(relative_errors(results(fused(model), tokens), results(written, tokens)).values()) < 1e-4


def test_copy_is_fused_and_independent():
    model, tokens = fused(randomized(TINY)), torch.randint(0, 97, (2, 30))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert max(relative_errors(results(twin, tokens), results(randomized(TINY), tokens)).values()) < 1e-4
    twin.model.layers[0].mlp = torch.nn.Identity()
    with pytest.raises(FusedLayersError):
        twin(tokens)
    model(tokens)
