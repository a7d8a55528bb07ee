"""The experiments of `python -m benchmarks zoo` that train: their sequences, and their whole path on tiny sizes."""

import csv
import dataclasses
import math

import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks.zoo import copying, length, members, recall, text
from benchmarks.zoo.fit import accuracy, fit, task_optim
from kernels.reference_attention import IGNORE_INDEX
from model import GPT, ModelConfig


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("n", recall.PAIRS)
def test_recall_asks_for_the_value_of_each_key_once(n):
    x, y = recall.sequences(generator(), 50, n)
    assert x.shape == y.shape == (50, recall.LENGTH)
    for tokens, targets in zip(x.tolist(), y.tolist(), strict=True):
        pairs = dict(zip(tokens[0 : 2 * n : 2], tokens[1 : 2 * n : 2], strict=True))
        assert len(pairs) == n and max(pairs) < recall.VOCAB // 2 <= min(pairs.values())
        asked = [(token, target) for token, target in zip(tokens, targets, strict=True) if target != IGNORE_INDEX]
        assert len(asked) == n and dict(asked) == pairs
        assert not any(target != IGNORE_INDEX for target in targets[: 2 * n])
        others = [t for t, target in zip(tokens[2 * n :], targets[2 * n :], strict=True) if target == IGNORE_INDEX]
        assert all(recall.VOCAB // 2 <= token < recall.VOCAB for token in others)


def test_recall_asks_near_and_far():
    """Places are drawn without replacement, the one at distance d with a weight of 1 / d, as torch.multinomial does."""
    n, count = 4, 4000
    x, y = recall.sequences(generator(), count, n)
    asked = (y[:, 2 * n :] != IGNORE_INDEX).float().mean(0)
    weights = 1 / torch.arange(1, recall.LENGTH - 2 * n + 1)
    drawn = torch.multinomial(weights.expand(count, -1), n, generator=generator())
    expected = torch.zeros(count, len(weights)).scatter_(1, drawn, 1.0).mean(0)
    torch.testing.assert_close(asked, expected, atol=0.04, rtol=0)
    assert asked[0] > 5 * asked[-1] > 0
    first, last = (float((x[:, 2 * n :] == x[:, key, None]).float().argmax(1).float().mean()) for key in (0, 2 * n - 2))
    assert first == pytest.approx(last, rel=0.1)  # of the pairs


def test_copying_repeats_the_symbols_after_the_separator():
    sizes = torch.tensor([1, 2, 7, 9])
    x, y = copying.sequences(generator(), sizes, 9)
    assert x.shape == y.shape == (4, 18)
    for n, tokens, targets in zip(sizes.tolist(), x.tolist(), y.tolist(), strict=True):
        symbols = tokens[:n]
        assert max(symbols) < copying.SYMBOLS == tokens[n]
        assert tokens[n + 1 : 2 * n] == symbols[:-1]
        assert targets == [IGNORE_INDEX] * n + symbols + [IGNORE_INDEX] * (18 - 2 * n)


def test_training_learns_and_a_diverged_model_is_returned():
    config = ModelConfig(vocab_size=8, context=8, n_layer=1, n_head=1, n_kv_head=1, n_embd=16, head_dim=16, n_ffn=16)
    x = torch.arange(8).repeat(4, 1)
    y = x.roll(-1, 1)
    y[:, 4:] = IGNORE_INDEX
    assert accuracy(fit(config, lambda step: (x, y), 60, task_optim(1.0, 60), 0), x, y) == 1.0
    steps = []

    def loss_of(model, step, x, y):
        steps.append(step)
        return model.loss(x, y) * (math.nan if step == 2 else 1)

    model = fit(config, lambda step: (x, y), 5, task_optim(1.0, 5), 0, loss_of)
    assert steps == [0, 1, 2] and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("member", members.chosen(length.RECURRENT))
def test_passed_states_continue_the_text(member):
    """Windows with passed states give the hidden states of one pass over all of them; gradients stay in a window."""
    base = ModelConfig(vocab_size=50, context=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, head_dim=16, n_ffn=88)
    config = members.config(member, base)
    torch.manual_seed(0)
    model, tokens = GPT(config), torch.randint(50, (2, 64))
    cache = length.PassedStates(config, 2)
    for at in range(0, 64, 16):
        hidden = model.model(tokens[:, at : at + 16], cache)
        cache.advance(16)
        torch.testing.assert_close(hidden, model.model(tokens)[:, at : at + 16], atol=1e-5, rtol=1e-4)
        hidden.sum().backward()  # fails if the graph reaches into the window before, whose part is freed
    assert not any(state.requires_grad for states in cache.layers for state in states)


def test_an_untrained_model_has_the_bits_per_byte_of_equal_probabilities():
    found = text.measure("softmax attention", 1.0, 0, 0, "README.md")
    recipe, _, val_text = text.corpus("README.md")
    nats = val_text.tokens * math.log(recipe.model.vocab_size)
    assert found["bits per byte"] == pytest.approx(nats / math.log(2) / val_text.bytes, rel=0.03)


def test_learning_rates_are_factors_on_the_recipe():
    recipe, _, _ = text.corpus("README.md")
    scaled = text.optim(recipe, 1 / 3)
    assert (scaled.lr, scaled.muon_lr) == pytest.approx((recipe.optim.lr / 3, recipe.optim.muon_lr / 3))
    assert dataclasses.replace(scaled, lr=recipe.optim.lr, muon_lr=recipe.optim.muon_lr) == recipe.optim


@pytest.mark.parametrize("experiment", ["recall", "copying", "text", "length"])
def test_the_whole_path(experiment, tmp_path, capsys):
    assert bench.main(bench.arguments(["zoo", experiment, "--quick", "--out", str(tmp_path)])) == 0
    rows = list(csv.DictReader((tmp_path / "quick" / f"{experiment}.csv").open()))
    module = {"recall": recall, "copying": copying, "text": text, "length": length}[experiment]
    assert len(rows) == len(module.points("quick", 1)) > 1
    assert all(math.isfinite(float(row[measure])) for row in rows for measure in module.MEASURES)
    table = (tmp_path / "quick" / f"{experiment}.md").read_text()
    assert table in capsys.readouterr().out and all(row["member"] in table for row in rows)
    assert (tmp_path / "quick" / f"{experiment}.png").stat().st_size > 1000


@pytest.mark.parametrize("module", [recall, copying, text, length])
def test_points_begin_with_all_members_at_the_middle_rate(module):
    points = module.points("full", 3)
    assert len({tuple(point.items()) for point in points}) == len(points)
    names = list(dict.fromkeys(point["member"] for point in points))
    first = points[: next(i for i, point in enumerate(points) if point["lr"] != 1.0)]
    assert [n for n in names if n in {p["member"] for p in first}] == names and not any(p["seed"] for p in first)
    assert {point["lr"] for point in points} == {1.0, 1 / 3, 3.0} and {point["seed"] for point in points} == {0, 1, 2}
