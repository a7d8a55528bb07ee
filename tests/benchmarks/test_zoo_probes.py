"""python -m benchmarks zoo: the experiments without a task, against closed forms and known facts, and on tiny sizes."""

import csv
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks import __main__ as bench
from benchmarks.zoo import (
    characters,
    decoding,
    entropy_collapse,
    pictures,
    rank_collapse,
    run,
    saturation,
    training_time,
)
from kernels import attention
from model import GPT, KVCache
from tests.conftest import TINY, randomized


def test_variance_of_scores_is_head_dim_or_1():
    """Of a product of D pairs of independent normal numbers, to a few percent with this many."""
    for head_dim in (16, 64):
        for name, expected in (("unscaled", head_dim), ("scaled", 1), ("unscaled, small q_proj", 1)):
            found = saturation.statistics(saturation.VARIANTS[name], head_dim, seed=0)
            assert found["score variance"] == pytest.approx(expected, rel=0.05)
    scaled, unscaled, normed = (
        saturation.statistics(saturation.VARIANTS[name], 1024, seed=0)
        for name in ("scaled", "unscaled", "unscaled, QK-norm")
    )
    assert unscaled["median Jacobian"] < 0.02 * scaled["median Jacobian"]
    assert normed["largest weight"] == pytest.approx(unscaled["largest weight"], rel=0.02)  # QK-norm is no scale


def test_norm_of_the_jacobian():
    torch.manual_seed(0)
    scores = torch.randn(5, 7, dtype=torch.float64) * torch.tensor([0.0, 0.1, 1.0, 5.0, 30.0])[:, None]
    jacobians = torch.stack([torch.func.jacrev(lambda s: s.softmax(0))(row) for row in scores])
    found = saturation.jacobian_norm(scores.softmax(1))
    torch.testing.assert_close(found, jacobians.flatten(1).norm(dim=1), atol=1e-9, rtol=1e-6)
    assert found[0] == pytest.approx(math.sqrt(6) / 7)  # of 7 equal weights


def test_small_queries_begin_as_a_scale(text, monkeypatch):
    monkeypatch.setattr(characters, "SOURCE", str(text))
    monkeypatch.setattr(saturation, "WIDTH", 128)
    scaled, small, unscaled = (
        saturation.training(saturation.VARIANTS[name], 64, seed=0, steps=20)
        for name in ("scaled", "unscaled, small q_proj", "unscaled")
    )
    for measure in ("loss at 5%", "largest weight before"):  # the loss of the first step
        assert small[measure] == pytest.approx(scaled[measure], rel=1e-4)
        assert abs(unscaled[measure] - scaled[measure]) > 0.01


def test_similarity_is_the_mean_over_pairs():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8) + 1
    pairs = [
        F.cosine_similarity(row[i], row[j], dim=0).item() for row in x for i in range(5) for j in range(5) if i != j
    ]
    assert rank_collapse.similarity(x) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_rank_collapse():
    """Attention alone makes all tokens equal, post-norm nearly so; pre-norm does not (Dong et al. 2021)."""
    alone, post, pre = (
        list(rank_collapse.measure(blocks, "plain", 0).values())
        for blocks in ("attention alone", "post-norm", "pre-norm")
    )
    assert alone == sorted(alone) and alone[-1] > 0.99999
    assert post == sorted(post) and post[-1] > 0.95
    assert pre[-1] < 0.8
    assert rank_collapse.measure("pre-norm", "scaled", 0)["similarity at 48"] < 0.1


def test_entropy():
    equal = torch.ones(8, 8).tril()
    weights = torch.stack((equal / equal.sum(1, keepdim=True), torch.eye(8)))[None]  # two heads
    assert entropy_collapse.entropy(weights[:, :1]) == pytest.approx(1)
    assert entropy_collapse.entropy(weights[:, 1:]) == 0
    assert entropy_collapse.entropy(weights) == pytest.approx(0.5)
    rows = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    assert entropy_collapse.entropy(rows[None, None]) == pytest.approx(expected)


def test_a_diverged_model(text, monkeypatch):
    monkeypatch.setattr(characters, "SOURCE", str(text))
    loss, calls = GPT.loss, []

    def diverges(model, x, y):
        calls.append(0)
        return loss(model, x, y) * (math.nan if len(calls) == 8 else 1)

    monkeypatch.setattr(GPT, "loss", diverges)
    found = entropy_collapse.measure("pre-norm", "plain", layers=2, lr=1e-2, seed=0, steps=20)
    assert found["loss at 25%"] < found["loss at 0%"]
    assert math.isnan(found["loss at 50%"]) and math.isnan(found["loss at 100%"])


@torch.no_grad()
def test_recorded_weights_are_those_of_the_model():
    """The weights times the values are attention's output, and the model computes what it does otherwise."""
    config = dataclasses.replace(TINY, n_kv_head=4, positions="alibi")
    model, tokens = randomized(config), torch.randint(0, 97, (2, 20))
    with entropy_collapse.recorded(model, lambda weights: weights) as found:
        logits = model(tokens)
    torch.testing.assert_close(logits, model(tokens), atol=1e-4, rtol=1e-4)
    assert len(found) == config.n_layer
    layer = model.model.layers[0]
    x = layer.input_layernorm(model.model.embed_tokens(tokens))
    values = layer.self_attn.v_proj(x).unflatten(2, (4, 16)).transpose(1, 2)  # (B, H, T, D)
    out = layer.self_attn.o_proj((found[0] @ values).transpose(1, 2).flatten(2))
    cos, sin = (table[None, :20, None] for table in (model.model.cos, model.model.sin))
    torch.testing.assert_close(out, layer.self_attn(x, cos, sin, None), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_blocks():
    """Each of BLOCKS, written out."""
    x, cos, sin = torch.randn(2, 10, 32), *(torch.zeros(1, 10, 1, 16) for _ in range(2))
    cos += 1
    found = {}
    for name in rank_collapse.BLOCKS:
        model = randomized(TINY)
        rank_collapse.use_blocks(model, name)
        block = model.model.layers[0]
        found[name] = block(x, cos, sin)
    first, second = block.input_layernorm, block.post_attention_layernorm

    def attend(y):
        return block.self_attn(y, cos, sin, None)

    torch.testing.assert_close(found["attention alone"], attend(first(x)))
    y = x + attend(first(x))
    torch.testing.assert_close(found["pre-norm"], y + block.mlp(second(y)))
    y = first(x + attend(x))
    torch.testing.assert_close(found["post-norm"], second(y + block.mlp(y)))


def test_bytes_that_are_kept():
    """Of 4 layers of 128 numbers of 4 bytes: keys and values of the context, of a window, and a state."""
    attention = decoding.measure("softmax attention", 512, batch=2)
    assert attention["state bytes"] == attention["cache bytes"] == 4 * 2 * 512 * 128 * 4
    assert decoding.measure("multi-query attention", 512, 1)["state bytes"] == attention["state bytes"] / 4
    window = decoding.measure("sliding window", 512, 1)  # of 32 tokens; the cache has room for a chunk of new ones
    assert window["state bytes"] == 4 * 2 * 32 * 128 * 4
    assert window["cache bytes"] == 4 * 2 * (32 + KVCache.CHUNK - 1) * 128 * 4
    state = decoding.measure("Gated DeltaNet", 512, 1)
    assert state["state bytes"] == state["cache bytes"] == 4 * (4 * 32 * 32 + 3 * 3 * 128) * 4
    assert state["ms per step"] > 0


def test_steps_are_at_the_end_of_the_context(monkeypatch):
    lengths = []

    def step(engine, tokens, cache):
        lengths.append(cache.lengths[0].item())
        cache.advance(tokens.shape[1])

    monkeypatch.setattr(decoding.EagerEngine, "__call__", step)
    decoding.measure("softmax attention", 256, 1)
    assert lengths == list(range(256 - decoding.WARMUP - decoding.STEPS, 256))


def test_a_pass_that_would_take_too_long_is_left_out(monkeypatch):
    took = {128: 14.0, 256: 50.0}
    monkeypatch.setattr(training_time, "seconds", lambda model, sequences, length: took[length])
    found = training_time.measure("softmax attention", training_time.TORCH, 256, 2048)
    assert found["us per token"] == pytest.approx(50 / 2048 * 1e6)
    took[128] = 16.0
    slow = training_time.measure("softmax attention", training_time.TORCH, 256, 2048)
    assert math.isnan(slow["us per token"])
    rows = [
        {"member": "a", "implementation": "b", "length": length, "us per token": value}
        for length, value in ((256, 1.0), (512, 2.0), (1024, math.nan))
    ]
    assert training_time.table(rows).splitlines()[-1] == "| a | b | 1 | 2 |  | 2.00 |"


def test_training_time_without_heeds_attention(monkeypatch):
    """In PyTorch, no attention is computed in C++."""
    used = []

    def spy(*args, backend=None, **others):
        used.append(backend)
        return attention(*args, backend=backend, **others)

    monkeypatch.setattr(training_time, "attention", spy)
    training_time.measure("softmax attention", training_time.TORCH, 32, 64)
    assert set(used) == {"blocks"}


def test_curves():
    rows = [{"a": a, "x": x, "y": x * seed, "seed": seed} for seed in (1, 3) for a in "pq" for x in (4, 2)]
    assert pictures.curves(rows, ["a"], "x", "y") == {"p": ([2, 4], [4, 8]), "q": ([2, 4], [4, 8])}


@pytest.mark.parametrize("name", ["saturation", "rank_collapse", "entropy_collapse", "decoding", "training_time"])
def test_the_whole_path(name, tmp_path, text, monkeypatch):
    monkeypatch.setattr(characters, "SOURCE", str(text))
    monkeypatch.setattr(saturation, "WIDTH", 256)
    members = [] if name not in ("decoding", "training_time") else ["--only", "L", "D", "S"]
    assert bench.main(bench.arguments(["zoo", name, "--quick", *members, "--out", str(tmp_path)])) == 0
    rows = list(csv.DictReader((tmp_path / "quick" / f"{name}.csv").open()))
    lines = (tmp_path / "quick" / f"{name}.md").read_text().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + len(rows) // (2 if members else 1)  # a line for both contexts or lengths
    for measure in run.load(name).MEASURES:
        assert all(math.isfinite(float(row[measure])) for row in rows)
    assert (tmp_path / "quick" / f"{name}.png").stat().st_size > 1000
