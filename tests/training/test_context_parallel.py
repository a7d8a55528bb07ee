"""Training with context parallelism: the losses, samples and checkpoints of one process; what is refused, and how."""

import dataclasses

import pytest
import torch

from kernels import context_parallel
from model import ModelConfig
from tests.training import test_parallel
from tests.training.ranks import call
from tests.training.test_parallel import CONTEXT_PARALLEL, PLAIN, SAVED, alone, check_mesh, joined, resumes, saves
from training import distributed
from training.config import Config, ConfigError, TrainConfig
from training.config_files import load
from zoo import MIXERS

FEW = ["full and window layers"]
MANY = [*CONTEXT_PARALLEL, "fused", SAVED]


@pytest.mark.parametrize(
    ("copies", "shard", "context", "method", "names"),
    [
        (2, 1, 2, "gather", MANY),
        (1, 2, 2, "ring", [*FEW, "documents, a window", "fused", "compiled", "documents, compiled", SAVED]),
        (1, 2, 2, "ulysses", [*FEW, "documents, a window", "ALiBi, a gate", SAVED]),
        (2, 2, 2, "ring", FEW),
        (1, 4, 4, "gather", FEW),
        (4, 1, 4, "ring", FEW),
    ],
)
def test_every_mesh_computes_what_one_process_does(copies, shard, context, method, names):
    check_mesh(copies, shard, names, context, method)


def test_a_run_goes_on_with_another_number_of_devices_per_sequence(tmp_path):
    """From four to one and two, from one to four; the copies of the model are independent of it."""
    expected = call(4, saves, 2, tmp_path, 4)[0]
    assert expected == pytest.approx(alone(SAVED)[0][2:], abs=1e-5)
    for context, shard in ((1, 1), (2, 4)):
        for found in call(4, resumes, shard, tmp_path, None, context):
            assert found == pytest.approx(expected, abs=1e-5), context


def chosen(rank: int, of_a_machine: int):
    distributed.os.environ["LOCAL_WORLD_SIZE"] = str(of_a_machine)
    model = test_parallel.GPT(PLAIN)
    return distributed.parallelize(model, joined(2), 1, torch.device("cpu"))


def test_the_method_depends_on_whether_messages_leave_the_machine():
    mesh = "mesh 2 devices = 2 copies of the model x 1 devices (train.shard)\n"
    context = f"{mesh}context 1 groups of 2 devices share sequences: "
    assert call(2, chosen, 2) == [f"{context}gather (within a machine)"] * 2
    assert call(2, chosen, 1) == [f"{context}ring (across machines)"] * 2


@pytest.mark.parametrize(
    ("changes", "start", "note"),
    [
        ({}, None, ""),
        ({"layer_pattern": "SL", "window": 5}, None, "; gather for window layers"),
        ({"layer_pattern": "LLS", "window": 5}, None, ""),  # two layers, neither has the window
        ({"positions": "alibi"}, None, "; gather for all layers (model.positions = alibi)"),
        ({}, 3, "; gather for all layers (data.document_mask)"),
    ],
)
def test_a_ring_that_gathers_says_so(changes, start, note, monkeypatch):
    """What is logged is what is computed: the layers that the note names, and no other, are gathered."""
    model = test_parallel.GPT(dataclasses.replace(PLAIN, **changes))
    model.model.document_start = start
    monkeypatch.setattr(distributed.dist, "new_group", lambda *_, **__: None)
    world = distributed.World(size=2, context=2)
    assert ";" not in distributed.share_sequences(model, world, "gather")
    line = distributed.share_sequences(model, world, "ring")
    assert line == f"context 1 groups of 2 devices share sequences: ring (train.context_method){note}"
    gathered = []
    monkeypatch.setattr(
        context_parallel.ContextParallel, "_gather", lambda self, q, *_, **__: (gathered.append(1), q)[1]
    )
    monkeypatch.setattr(context_parallel.Ring, "apply", lambda q, *_: q)
    model.model(torch.zeros(1, 8, dtype=torch.long), positions=torch.arange(8)[None])
    assert len(gathered) == {"": 0, "; gather for window layers": 1}.get(note, 2)


# Configuration ------------------------------------------------------------------------------------------------------

WIDE = ModelConfig(context=32)


def config(model: ModelConfig = WIDE, **train) -> Config:
    return Config("x", model=model, train=TrainConfig(steps=1, batch_tokens=96 * 32, **train))


@pytest.mark.parametrize("letter", MIXERS)
def test_layers_that_need_whole_sequences_are_refused_by_name(letter):
    model = dataclasses.replace(WIDE, layer_pattern=f"L{letter}", n_embd=384)
    config(model)
    with pytest.raises(ValueError) as error:
        config(model, context_parallel=2)
    assert str(error.value) == (
        f"model.layer_pattern = 'L{letter}': must consist of L and S: {MIXERS[letter].__name__}, {letter}, needs whole "
        "sequences (train.context_parallel = 2)"
    )


@pytest.mark.parametrize(
    ("changes", "train", "message"),
    [
        ({"context": 24}, {"context_parallel": 8}, "context = 24: must be a multiple of 16, two chunks per device"),
        ({"attention_dropout": 0.1}, {"context_parallel": 2}, "attention_dropout = 0.1: must be 0"),
        (
            {"n_expert": 4, "n_expert_active": 2},
            {"context_parallel": 2},
            "router_aux_loss_coef = 0.01: must be 0, the load-balancing loss needs whole sequences",
        ),
        (
            {"n_head": 6, "n_kv_head": 3},
            {"context_parallel": 2, "context_method": "ulysses"},
            "n_kv_head = 3: must be divisible by 2 for ulysses",
        ),
    ],
)
def test_what_cannot_be_shared_is_one_line(changes, train, message):
    model = dataclasses.replace(WIDE, **changes)
    config(model)
    with pytest.raises(ValueError) as error:
        config(model, **train)
    assert str(error.value) == f"model.{message} (train.context_parallel = {train['context_parallel']})"


def test_the_command_line_says_where(monkeypatch):
    with pytest.raises(ConfigError, match=r"^--train.context_parallel: train.context_parallel = 0: must be at least 1"):
        load("shakespeare", {"train.context_parallel": "0"})
    with pytest.raises(ConfigError, match=r"train.context_method = 'rings': must be auto, gather, ring or ulysses"):
        load("shakespeare", {"train.context_method": "rings"})
    with pytest.raises(ConfigError, match=r"^train.context_parallel = 2: must divide the number of devices, 1$"):
        distributed.init_distributed(context=2)
