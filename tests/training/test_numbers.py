"""Numbers that are not finite, numbers that are too large, and names that are too long are one line."""

import dataclasses

import pytest
import torch

from model import GPT, ModelConfig
from tests.conftest import TINY
from training.config import SECTIONS, Config, ConfigError, DataConfig, OptimConfig, TrainConfig
from training.config_files import fields, load
from training.device_memory import state_bytes
from training.optimizers import build_optimizers

FLOATS = [f"{section}.{name}" for section in SECTIONS for name, kind in fields(section).items() if kind is float]
INTS = [f"{section}.{name}" for section in SECTIONS for name, kind in fields(section).items() if kind is int]


@pytest.mark.parametrize("field", FLOATS)
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999"])
def test_every_number_must_be_finite(field, value, tmp_path):
    with pytest.raises(ConfigError, match=rf"--{field}: {field} = -?(inf|nan): must be a finite number"):
        load("shakespeare", {field: value})
    section, _, name = field.partition(".")
    path = tmp_path / "mine.toml"
    path.write_text(f"[{section}]\n{name} = {value.replace('1e999', 'inf')}\n")
    with pytest.raises(ConfigError, match=rf"mine.toml:2: {field} = -?(inf|nan): must be a finite number"):
        load(str(path))


@pytest.mark.parametrize("field", INTS)
def test_every_whole_number_has_a_limit(field):
    with pytest.raises(ConfigError, match=f"--{field}: {field} = 1000000000000000000000000000000: must be"):
        load("shakespeare", {field: "1" + "0" * 30})


@pytest.mark.parametrize("kind", [ModelConfig, DataConfig, OptimConfig, TrainConfig])
def test_a_config_made_in_a_program_is_checked_too(kind):
    for field in dataclasses.fields(kind):
        if field.type is float:
            with pytest.raises(ValueError, match=f"{field.name} = nan: must be a finite number"):
                kind(
                    **{"steps": 1} if kind is TrainConfig and field.name != "steps" else {},
                    **{field.name: float("nan")},
                )


def test_a_long_name_is_one_line():
    load("shakespeare", {"name": "a" * 200})
    with pytest.raises(ConfigError, match=r"must be a folder name .* at most 200 characters"):
        load("shakespeare", {"name": "a" * 300})


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_memory_of_a_model_is_that_of_its_weights_gradients_and_moments(optimizer):
    config = Config("x", model=TINY, optim=OptimConfig(optimizer=optimizer))
    model = GPT(TINY)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
    for built in build_optimizers(model, config.optim, torch.float32):
        built.step()
        tensors += [moment for state in built.state.values() for name, moment in state.items() if name != "step"]
    used = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert state_bytes(config) == used


def test_a_model_that_cannot_fit_is_refused_before_it_is_made(run_training):
    with pytest.raises(ConfigError, match=r"model: [\d,]+ parameters need at least [\d,.]+ GiB of memory, cpu has"):
        run_training("vast", "--train.steps=1", "--model.n_ffn=2000000000")
