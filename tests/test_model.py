"""The model compared with transformers' Qwen3, and with and without the KV cache."""

import dataclasses
import math

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, KVCache, ModelConfig, apply_rotary_emb, precompute_rope, rope_frequencies
from tests.conftest import TINY, randomized
from training.flops import count_parameters, flops_per_token


def qwen3(config: ModelConfig) -> transformers.PreTrainedModel:
    """transformers' model with the same configuration."""
    kinds = {"L": "full_attention", "S": "sliding_attention"}
    theirs = transformers.Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.n_ffn,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head,
        head_dim=config.head_dim,
        max_position_embeddings=config.context,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        use_sliding_window=config.window > 0,
        sliding_window=config.window or None,
        layer_types=[kinds[config.layer_pattern[i % len(config.layer_pattern)]] for i in range(config.n_layer)],
    )
    return transformers.Qwen3ForCausalLM(theirs).eval()


def change(**fields) -> ModelConfig:
    return dataclasses.replace(TINY, **fields)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (4, 1), (6, 3), (6, 2)])
def test_logits_equal_qwen3(H, K, tied):
    config = change(n_head=H, n_kv_head=K, tie_embeddings=tied, rope_theta=5000.0, norm_eps=1e-5)
    ours, theirs = randomized(config), qwen3(config)
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if tied else [])
    theirs.tie_weights()
    tokens = torch.randint(0, 97, (3, 32))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


def test_sliding_window_equals_qwen3():
    config = change(n_layer=4, layer_pattern="SSSL", window=5)
    ours, theirs = randomized(config), qwen3(config)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    theirs.tie_weights()
    tokens = torch.randint(0, 97, (2, 32))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


def test_gate_equals_qwen3_next():
    config = change(gate=True)
    ours = randomized(config)
    theirs = transformers.Qwen3NextForCausalLM(
        transformers.Qwen3NextConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, partial_rotary_factor=1.0, tie_word_embeddings=True,
            layer_types=["full_attention"] * 2, mlp_only_layers=[0, 1], max_position_embeddings=32,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        )
    ).eval()  # fmt: skip
    weights = {k: v - 1 if v.ndim == 1 else v for k, v in ours.state_dict().items()}  # Qwen3-Next stores gain - 1
    _, unexpected = theirs.load_state_dict(weights, strict=False)
    assert unexpected == []
    theirs.tie_weights()
    tokens = torch.randint(0, 97, (2, 32))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    ("factor", "original", "D", "theta"),
    [(4.0, 256, 64, 1e4), (2.5, 4096, 128, 1e6), (8.0, 64, 16, 1e4), (4.0, 7, 6, 1e4), (4.0, 7, 64, 1e4)],
)
def test_yarn_equals_transformers(factor, original, D, theta):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = change(
        context=int(factor * original), head_dim=D, rope_theta=theta, yarn_factor=factor, yarn_original_context=original
    )
    theirs = transformers.Qwen3Config(
        hidden_size=D, num_attention_heads=1, head_dim=D, max_position_embeddings=config.context,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": theta, "factor": factor, "original_max_position_embeddings": original,
        },
    )  # fmt: skip
    expected, scaling = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    ours, factor_on_tables = rope_frequencies(config)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert factor_on_tables == pytest.approx(scaling)


def test_yarn_keeps_high_frequencies_and_scales_low_ones():
    plain, _ = rope_frequencies(change(head_dim=64))
    stretched, _ = rope_frequencies(change(head_dim=64, context=1024, yarn_factor=4.0, yarn_original_context=256))
    ratio = plain / stretched
    assert ratio[0] == 1.0
    assert ratio[-1] == pytest.approx(4.0)
    assert (ratio.diff() >= -1e-6).all()
    turns = 256 * plain / (2 * math.pi)  # within the original context
    assert (ratio[turns > 33] == 1.0).all()
    assert ratio[turns < 0.9].numpy() == pytest.approx(4.0)


def test_rope_depends_on_relative_position_only():
    config = change(head_dim=16, context=64)
    cos, sin = (table[:, None] for table in precompute_rope(config))  # (T, 1, D)
    q, k = torch.randn(2, 1, 1, 16)

    def score(i: int, j: int) -> float:
        return (apply_rotary_emb(q, cos[i], sin[i]) * apply_rotary_emb(k, cos[j], sin[j])).sum().item()

    assert score(5, 2) == pytest.approx(score(60, 57), abs=1e-5)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-3)


FLAGS = {
    "plain": {},
    "untied": {"tie_embeddings": False},
    "multi-query": {"n_kv_head": 1},
    "window": {"layer_pattern": "SL", "window": 7},
    "all window": {"layer_pattern": "S", "window": 1},
    "no qk-norm": {"qk_norm": False},
    "gate": {"gate": True},
    "yarn": {"yarn_factor": 4.0, "yarn_original_context": 80},
    "dropout": {"dropout": 0.5, "attention_dropout": 0.5},
    "no positions, unscaled": {"positions": "none", "scale_scores": False},
    "sinusoidal": {"positions": "sinusoidal"},
    "learned positions": {"positions": "learned"},
    "alibi": {"positions": "alibi", "layer_pattern": "SL", "window": 7},
    "experts": {"n_expert": 5, "n_expert_active": 2},
    "everything": {"layer_pattern": "SL", "window": 9, "gate": True, "yarn_factor": 4.0, "yarn_original_context": 80},
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_logits_with_and_without_cache_agree(flags, monkeypatch):
    monkeypatch.setattr(KVCache, "CHUNK", 16)  # the ring buffer of a window is much smaller than the context
    config = change(context=320, **flags)
    model = randomized(config)
    tokens = torch.randint(0, 97, (2, 320))
    cache = KVCache(config, 2)
    parts = (1, 16, 3, 1, 1, 16, 16, 7) + (1,) * 40 + (16,) * 13 + (11,)
    with torch.no_grad():
        expected = model(tokens)
        got = []
        for piece in tokens.split(parts, dim=1):
            got.append(model(piece, cache))
            cache.advance(piece.shape[1])
    torch.testing.assert_close(torch.cat(got, 1), expected, atol=1e-4, rtol=1e-4)


def test_window_cache_is_a_ring_buffer_and_steps_do_not_allocate(monkeypatch):
    monkeypatch.setattr(KVCache, "CHUNK", 16)
    config = change(context=320, layer_pattern="SL", window=7)
    cache = KVCache(config, 1)
    assert [keys.shape[1] for keys, _ in cache.layers] == [7 + 16 - 1, 320]
    before = [x.data_ptr() for pair in cache.layers for x in pair] + [cache.lengths.data_ptr()]
    model = randomized(config)
    with torch.no_grad():
        for _ in range(40):
            model(torch.zeros(1, 1, dtype=torch.long), cache)
            cache.advance(1)
    assert before == [x.data_ptr() for pair in cache.layers for x in pair] + [cache.lengths.data_ptr()]
    assert cache.lengths.tolist() == [40]


def test_repeat_and_reset_of_the_cache():
    model = randomized(TINY)
    tokens = torch.randint(0, 97, (1, 12))
    cache = KVCache(TINY, 1)
    with torch.no_grad():
        first = model(tokens, cache)
        cache.advance(12)
        three = cache.repeat(3)
        following = torch.tensor([[5], [6], [5]])
        logits = model(following, three)
        torch.testing.assert_close(
            logits[1:2], model(torch.cat([tokens, following[1:2]], 1))[:, -1:], atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(logits[0], logits[2])
        cache.reset()
        torch.testing.assert_close(model(tokens, cache), first)


def test_causality():
    model = randomized(TINY)
    tokens = torch.randint(0, 97, (1, 32))
    changed = tokens.clone()
    changed[0, 20:] = torch.randint(0, 97, (12,))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, :20], model(changed)[:, :20])


def test_loss_is_the_sum_of_cross_entropy_without_ignored_targets():
    model = randomized(TINY)
    tokens, targets = torch.randint(0, 97, (2, 2, 9))
    targets[1, 4:] = -100
    with torch.no_grad():
        logs = model(tokens).double().log_softmax(-1)
        expected = -sum(logs[b, t, targets[b, t]] for b in range(2) for t in range(9) if targets[b, t] >= 0)
        assert model.loss(tokens, targets).item() == pytest.approx(expected.item(), rel=1e-5)


def test_initial_loss_is_uniform_and_every_weight_is_initialized():
    torch.manual_seed(0)
    config = change(vocab_size=1000, n_layer=6, n_embd=128, tie_embeddings=False)
    model = GPT(config)
    tokens = torch.randint(0, 1000, (4, 32))
    with torch.no_grad():
        assert model.loss(tokens, tokens.roll(-1, 1)).item() / 128 == pytest.approx(math.log(1000), abs=0.1)
    for name, p in model.named_parameters():
        assert (p == 1).all() if p.ndim == 1 else p.std() > 0, name
        with torch.no_grad():
            p.fill_(math.nan)
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("field", ["dropout", "attention_dropout"])
def test_dropout_applies_in_training_only(field):
    config = change(n_layer=1, **{field: 0.4})
    model = randomized(config)
    tokens = torch.randint(0, 97, (1, 32))
    with torch.no_grad():
        exact = model(tokens)
        torch.testing.assert_close(model(tokens), exact)
        model.train()
        assert not torch.allclose(model(tokens), exact)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"tie_embeddings": False, "gate": True, "n_kv_head": 1},
        {"layer_pattern": "SL", "window": 5},
        {"n_expert": 5, "n_expert_active": 2, "positions": "learned"},
    ],
)
def test_parameters_and_flops_equal_the_counted_ones(flags):
    config = change(**flags)
    model = GPT(config)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, config.context, dtype=torch.long))
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    matmuls = sum(n for op, n in counted.items() if "attention" not in op and "bmm" not in op)
    seen = 0  # query-key pairs, counted one by one
    for layer in range(config.n_layer):
        window = config.mask_spec(layer).window or config.context
        seen += sum(1 for t in range(config.context) for s in range(t + 1) if t - s < window)
    expected = 3 * (matmuls + 2 * 2 * seen * config.n_head * config.head_dim) / config.context
    assert flops_per_token(config) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_kv_head": 3}, "model.n_kv_head = 3: must divide model.n_head = 4"),
        ({"context": 0}, "model.context = 0: must be at least 1"),
        ({"head_dim": 15}, "model.head_dim = 15: must be even"),
        ({"dropout": 1.0}, "model.dropout = 1.0: must be at least 0 and below 1"),
        ({"attention_dropout": -0.1}, "model.attention_dropout = -0.1: must be at least 0 and below 1"),
        (
            {"layer_pattern": "LB", "attention_dropout": 0.1},
            "model.attention_dropout = 0.1: goes with the layers L and S",
        ),
        (
            {"layer_pattern": "D", "attention_dropout": 0.1},
            "model.attention_dropout = 0.1: goes with the layers L and S",
        ),
        ({"layer_pattern": "SXL"}, "model.layer_pattern = 'SXL': must consist of L, S, A, B, C, D"),
        ({"layer_pattern": "SL"}, "model.window = 0: must be at least 1"),
        ({"window": 4}, "model.window = 4: has no effect"),
        ({"positions": "relative"}, "model.positions = 'relative': must be rope, none, sinusoidal, learned or alibi"),
        ({"positions": "alibi", "yarn_factor": 2.0}, "model.yarn_factor = 2.0: goes with positions = 'rope'"),
        ({"layer_pattern": "BL", "positions": "alibi"}, "model.positions = 'alibi': BigBird, B in layer_pattern, does"),
        ({"layer_pattern": "LA", "scale_scores": False}, "model.scale_scores = False: AdditiveAttention, A in layer"),
        ({"layer_pattern": "SQ", "window": 4, "gate": True}, "model.gate = True: TopKMemory, Q in layer_pattern"),
        ({"n_expert": 4}, "model.n_expert = 4: needs model.n_expert_active, at least 1"),
        ({"n_expert": 4, "n_expert_active": 5}, "model.n_expert_active = 5: must be from 1 to model.n_expert"),
        ({"n_expert_active": 2}, "model.n_expert_active = 2: must be from 1 to model.n_expert"),
        ({"n_expert": -1}, "model.n_expert = -1: must be from 0"),
        ({"router_aux_loss_coef": -1.0}, "model.router_aux_loss_coef = -1.0: must be at least 0"),
        ({"yarn_factor": 2.0}, "model.yarn_original_context = 0: at least 7 with yarn_factor, else 0"),
        ({"yarn_factor": 2.0, "yarn_original_context": 6}, "model.yarn_original_context = 6: at least 7"),
        ({"yarn_original_context": 64}, "model.yarn_original_context = 64: at least 7 with yarn_factor, else 0"),
        ({"vocab_size": -1}, "model.vocab_size = -1"),
    ],
)
def test_invalid_config_raises(fields, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        change(**fields)


def test_too_many_tokens_and_missing_vocabulary_raise():
    model = randomized(TINY)
    with pytest.raises(ValueError, match="33 tokens at once, but at most 32 fit"):
        model(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(ValueError, match="vocab_size = 0"):
        GPT(change(vocab_size=0))


def test_standard_deviation_of_initial_weights():
    config = ModelConfig(vocab_size=500, n_layer=3, n_head=4, n_kv_head=2, n_embd=96, head_dim=32, n_ffn=200)
    model = GPT(config)
    expected = {"embed_tokens": 0.02, "q_proj": 96**-0.5, "k_proj": 96**-0.5, "v_proj": 96**-0.5, "gate_proj": 96**-0.5,
                "up_proj": 96**-0.5, "o_proj": (128 * 6) ** -0.5, "down_proj": (200 * 6) ** -0.5}  # fmt: skip
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert p.eq(1).all()
        else:
            assert p.std().item() == pytest.approx(expected[name.split(".")[-2]], rel=0.05), name
