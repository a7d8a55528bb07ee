"""What every mixer of zoo/ must hold: the cache, causality, training, fused layers around it, and short files."""

import copy
import dataclasses

import pytest
import torch

from convert import hf_config, to_gguf
from inference import engine
from inference.quantize import quantize
from kernels import cpu
from model import GPT, KVCache
from tests.conftest import ROOT, TINY, randomized
from tests.training.test_apply_fused_layers import relative_errors, results
from training.apply_fused_layers import apply_fused_layers
from training.config import OptimConfig
from training.flops import count_parameters, flops_per_token
from training.optimizers import build_optimizers
from zoo import MIXERS

LETTERS = pytest.mark.parametrize("letter", MIXERS)
KEYS = "ABQ"  # of mixers that keep keys and values
ALL_PAIRS = "AQ"  # of mixers that compare each token with all before it
PARTS = ((70,), (1,) * 70, (1, 16, 3, 40, 10), (69, 1))


def change(letter: str, **fields):
    if letter == "experts":
        return dataclasses.replace(TINY, context=80, n_expert=6, n_expert_active=2, **fields)
    return dataclasses.replace(TINY, context=80, layer_pattern=letter, window=20 * (letter == "S"), **fields)


@LETTERS
@torch.no_grad()
def test_cached_equals_uncached_however_the_calls_are_split(letter):
    config = change(letter + "L")
    model, tokens = randomized(config).double(), torch.randint(0, 97, (2, 70))
    expected = model(tokens)
    for parts in PARTS:
        cache, got = KVCache(config, 2, dtype=torch.float64), []
        for part in tokens.split(parts, 1):
            got.append(model(part, cache))
            cache.advance(part.shape[1])
        torch.testing.assert_close(torch.cat(got, 1), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("letter", ["L", "S", *MIXERS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_causality_bit_for_bit(letter, dtype):
    model, tokens = randomized(change(letter)), torch.randint(0, 97, (1, 70))
    model = model.double() if dtype == torch.float64 else model
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with autocast:
        before = model(tokens)
    for t in (1, 30, 69):
        changed = tokens.clone()
        changed[0, t] = (tokens[0, t] + 1) % 97
        with autocast:
            after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


@LETTERS
@torch.no_grad()
def test_repeat_and_reset(letter):
    config = change(letter)
    model, tokens = randomized(config), torch.randint(0, 97, (2, 12))
    cache = KVCache(config, 2)
    states = [state.data_ptr() for states in cache.layers for state in states]
    first = model(tokens, cache)
    cache.advance(12)
    copies, following = cache.repeat(3), torch.tensor([[5], [6], [5], [5], [6], [5]])  # three of each sequence
    logits = model(following, copies)
    whole = model(torch.cat((tokens.repeat_interleave(3, 0), following), 1))[:, -1:]
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-4)
    # Not bit for bit: torch may round the last elements of a tensor in another way.
    torch.testing.assert_close(logits[[0, 3]], logits[[2, 5]], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        model(following[:2], cache), whole[[0, 4]], atol=1e-4, rtol=1e-4
    )  # not changed by copies
    cache.reset()
    assert torch.equal(model(tokens, cache), first)
    assert states == [state.data_ptr() for states in cache.layers for state in states]


@LETTERS
@torch.no_grad()
def test_a_row_begins_with_a_prefix_of_another(letter):
    """Of keys and values with any prefix, of a state with all of its tokens or none."""
    config, first = change(letter), torch.tensor([0])
    model, tokens, other = randomized(config), torch.randint(0, 97, (1, 40)), torch.randint(0, 97, (1, 9))
    cache = KVCache(config, 2)
    model(torch.randint(0, 97, (2, 70)), cache)  # what rows held before
    cache.copy_row(1, 0, 0)
    model(tokens, cache.select(first, first))
    kept = [length for length in range(41) if cache.keeps(length, 40)]
    assert kept == (list(range(41)) if letter in KEYS else [0, 40])
    for length in {0, 19, 40} & set(kept):
        cache.copy_row(0, 1, length)
        expected = model(torch.cat((tokens[:, :length], other), 1))[:, length:]
        logits = model(other, cache.select(first + 1, first + length))
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@LETTERS
def test_states_have_fp32_beside_bf16_keys_and_values(letter):
    kept = torch.bfloat16 if letter in KEYS else torch.float32
    config = change(letter + "L")
    model, tokens = quantize(randomized(config), "bf16"), torch.randint(0, 97, (1, 20))
    cache = KVCache(config, 1, dtype=torch.bfloat16)
    assert [{state.dtype for state in states} for states in cache.layers] == [{kept}, {torch.bfloat16}]
    with torch.no_grad():
        expected = randomized(config)(tokens)
        got = []
        for part in tokens.split(5, 1):
            got.append(model(part, cache))
            cache.advance(5)
    assert (torch.cat(got, 1) - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("letter", ["L", "S", *MIXERS, "experts"])
def test_thirty_steps_lower_the_loss(letter):
    torch.manual_seed(0)
    model = GPT(change(letter))
    for p in model.model.layers[1:].parameters():
        p.requires_grad_(False)  # it is the first layer that has to learn
    tokens = torch.randint(0, 97, (4, 8)).repeat(1, 4)
    optimizers = build_optimizers(model, OptimConfig(lr=1e-2), torch.float32)
    losses = []
    for _ in range(30):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@LETTERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_layers_around_it(letter, dtype):
    """Of the output and all gradients: the error relative to fp64 is at most twice that of torch in the same dtype, or
    one and a half times torch's largest."""
    model, tokens = randomized(change(letter + "L")), torch.randint(0, 97, (2, 70))
    exact = results(copy.deepcopy(model).double(), tokens)
    torchs = relative_errors(results(model, tokens, dtype), exact)
    apply_fused_layers(model)
    for name, error in relative_errors(results(model, tokens, dtype), exact).items():
        assert error <= max(2 * torchs[name], 1.5 * max(torchs.values())) + 1e-6, (name, error, torchs[name])


@LETTERS
def test_engine_for_cpu_refuses_it_by_name(letter, capfd):
    engine._warn_once.cache_clear()
    model = randomized(change("L" + letter))
    with pytest.raises(cpu.Unavailable, match=f"the layers {letter} of model.layer_pattern"):
        engine.CppEngine(model)
    assert isinstance(engine.make_engine(model), engine.EagerEngine)
    assert f"the layers {letter} of model.layer_pattern" in capfd.readouterr().err


@LETTERS
def test_converters_refuse_it_by_name(letter):
    config = change("L" + letter)
    with pytest.raises(ValueError, match=f"layer_pattern = 'L{letter}': llama.cpp's qwen3 has no {letter}$"):
        to_gguf.check(config)
    if letter != "D":  # beside a gate, transformers has it
        with pytest.raises(ValueError, match=f"layer_pattern = 'L{letter}': heed does not export {letter}$"):
            hf_config.to_hf(config)


@LETTERS
def test_counts(letter):
    """Parameters, and FLOPs, which depend on the context for some letters alone."""
    config = change(letter)
    assert count_parameters(config) == sum(p.numel() for p in GPT(config).parameters())
    longer = flops_per_token(dataclasses.replace(config, context=800))
    assert flops_per_token(config) < longer if letter in ALL_PAIRS else flops_per_token(config) == longer
    weights = sum(p.numel() for p in GPT(config).model.parameters() if p.ndim > 1)  # the embedding is the head, too
    assert flops_per_token(config) >= 6 * weights


@LETTERS
def test_every_parameter_has_its_own_initial_values(letter):
    model = GPT(change(letter))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())


def test_files_are_short():
    for file in (ROOT / "zoo").glob("*.py"):
        assert len(file.read_text().splitlines()) <= 100, file
