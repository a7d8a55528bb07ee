"""Recipes and overrides: valid ones are applied, invalid ones raise a one-line error with the location."""

import dataclasses
import tomllib
from pathlib import Path

import pytest

from model import ModelConfig
from training.config import SECTIONS, Config, ConfigError, TrainConfig
from training.config_files import RECIPES, documentation, dump, fields, load, recipes
from training.deprecated_names import RENAMED
from training.flops import count_parameters, flops_per_token


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return str(path)

    return write


def test_load_recipe_by_name_or_path():
    for name in recipes():
        assert load(name) == load(str(RECIPES / f"{name}.toml"))
        assert load(name).name == name


def test_every_field_can_be_overridden():
    for section in SECTIONS:
        for name, kind in fields(section).items():
            now = getattr(getattr(load("shakespeare"), section), name)
            other = {bool: not now, int: 1024, float: 0.25, str: now}[kind]
            overrides = {f"{section}.{name}": str(other).lower() if kind is bool else str(other)}
            if name in (
                "n_head",
                "n_kv_head",
                "window",
                "yarn_factor",
                "yarn_original_context",
                "batch_tokens",
                "context",
                "context_parallel",
                "rope_theta",
                "n_expert",
                "n_expert_active",
            ):
                continue  # fields that must change together: see the next test
            changed = getattr(getattr(load("shakespeare", overrides), section), name)
            assert (changed, type(changed)) == (other, kind), name


def test_override_fields_that_change_together():
    pairs = {
        "model.n_head": "8", "model.n_kv_head": "8", "model.layer_pattern": "SL", "model.window": "5",
        "model.yarn_factor": "2", "model.yarn_original_context": "64", "model.context": "128",
        "model.rope_theta": "500", "model.n_expert": "4", "model.n_expert_active": "2",
        "train.batch_tokens": "1280", "name": "other", "model.router_aux_loss_coef": "0", "train.context_parallel": "4",
    }  # fmt: skip
    changed = load("shakespeare", pairs)
    assert changed.train.context_parallel == 4
    assert (changed.model.n_kv_head, changed.model.window, changed.model.yarn_factor) == (8, 5, 2.0)
    assert (changed.train.batch_tokens, changed.name) == (1280, "other")


def test_budget_override_replaces_the_recipes_budget():
    assert load("shakespeare").train.minutes > 0
    assert (
        load("shakespeare", {"train.steps": "7"}).train.steps,
        load("shakespeare", {"train.steps": "7"}).train.minutes,
    ) == (7, 0)
    with pytest.raises(ConfigError, match="exactly one of steps and minutes"):
        load("shakespeare", {"train.steps": "7", "train.minutes": "1"})


def test_dumped_config_loads_equal(recipe):
    strange = load("shakespeare", {"data.source": 'a "b" \\c é.txt', "model.dropout": "1e-7", "train.steps": "3"})
    assert load(recipe(dump(strange))) == strange
    assert set(tomllib.loads(dump(strange))) == {"name", "init_from", *SECTIONS}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nn_layr = 3", ":2: model.n_layr: no such field; did you mean model.n_layer?"),
        ("[modell]\nn_layer = 3", ":2: modell: no such section; did you mean model?"),
        ('[model]\n\nn_layer = "six"', ":3: model.n_layer = 'six': must be a whole number, is a string"),
        ("[model]\nn_layer = 1.5", ":2: model.n_layer = 1.5: must be a whole number, is a number"),
        ("[model]\nn_layer = true", ":2: model.n_layer = True: must be a whole number, is true or false"),
        ("[train]\nminutes = 1\nsteps = 2", ":3: train.steps = 2: exactly one of steps and minutes must be above 0"),
        ("[model]\nn_head = 4\nn_kv_head = 3", ":3: model.n_kv_head = 3: must divide model.n_head = 4"),
        ("[model]\ncontext = 0", ":2: model.context = 0: must be at least 1"),
        ("[data]\nval_fraction = 0.9", ":2: data.val_fraction = 0.9: must be above 0 and at most 0.5"),
        ("[optim]\noptimizer = 'sgd'", ":2: optim.optimizer = 'sgd': must be muon or adamw"),
        ("[train]\nbatch_tokens = 1000", ":2: train.batch_tokens = 1000: must be a multiple of model.context = 256"),
        ("name = 'a/b'", ":1: name = 'a/b': must be a folder name"),
        ("steps = 3", ":1: steps: no such section"),
        ("[model]\nn_layer = 3 4", ": not TOML"),
        ("[optim]\ndecay = 0.5", ":2: optim.decay: renamed to optim.lr_decay_frac"),
        ("[train]\nsteps = 1\nevals = 3", ":3: train.evals: renamed to train.num_evals"),
        ("model = 3", ":1: model = 3: must be a section, [model]"),
    ],
)
def test_error_in_a_recipe_has_the_line_number(recipe, text, message):
    path = recipe(text)
    with pytest.raises(ConfigError) as error:
        load(path)
    assert str(error.value).startswith(path + message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("model.n_layer", "six"), "--model.n_layer: model.n_layer = 'six': must be a whole number, is a string"),
        (
            ("model.tie_embeddings", "yes"),
            "--model.tie_embeddings: model.tie_embeddings = 'yes': must be true or false",
        ),
        (("model.n_kv_head", "3"), "--model.n_kv_head: model.n_kv_head = 3: must divide model.n_head"),
        (("train.dtype", "int8"), "--train.dtype: train.dtype = 'int8': must be auto, float32 or bfloat16"),
    ],
)
def test_error_in_an_override_has_the_flag(override, message):
    with pytest.raises(ConfigError) as error:
        load("shakespeare", dict([override]))
    assert str(error.value).startswith(message)


def test_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"no such recipe, only chat, .*; did you mean shakespeare\?"):
        load("shakespear")
    with pytest.raises(ConfigError, match=r"nowhere/x.toml: no such file"):
        load("nowhere/x.toml")


def test_every_field_has_documentation_and_a_simple_type():
    for section, kind in SECTIONS.items():
        names = {f.name for f in dataclasses.fields(kind)} - {"sources"}  # tables, see test_mixture_config.py
        assert set(documentation(section)) - {"sources"} == set(fields(section)) == names
        assert set(fields(section).values()) <= {int, float, str, bool}


def test_renamed_fields():
    for old, new in RENAMED.items():
        if "." in old:
            (section, name), (_, now) = old.split("."), new.split(".")
            assert name not in fields(section) and now in fields(section)


def test_defaults_are_valid():
    assert Config("x").train == TrainConfig(steps=1000)
    assert load("shakespeare").model.vocab_size == 0


@pytest.mark.parametrize("name", recipes())
def test_recipe_header_figures(name):
    """The figures in a recipe's header equal the computed ones."""
    header = [line[2:] for line in (RECIPES / f"{name}.toml").read_text().splitlines() if line.startswith("# ")]
    stated = dict(line.split(":", 1) for line in header if ":" in line)
    config = load(name)
    size = (
        config.data.vocab_size
        if config.data.tokenizer == "bpe"
        else int(stated["vocabulary"].split()[0].replace(",", ""))
    )
    model = dataclasses.replace(config.model, vocab_size=size)
    assert isinstance(model, ModelConfig)
    assert stated["parameters"].split()[0] == f"{count_parameters(model):,}"
    assert stated["FLOPs"].split()[0] == f"{flops_per_token(model) / 1e6:,.1f}"
    assert stated["tokens per step"].split()[0] == f"{config.train.batch_tokens:,}"
    if config.train.steps:
        assert stated["total tokens"].split()[0] == f"{config.train.batch_tokens * config.train.steps:,}"
    assert {"memory", "reaches"} <= stated.keys()
