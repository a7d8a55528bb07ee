"""A model divided among processes: on every mesh the losses, samples and checkpoints of one process."""

import dataclasses
import datetime
import functools
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from model import GPT, ModelConfig
from sample import generate
from tests.training.ranks import call
from training import checkpoint, distributed, optimizers
from training.apply_fused_layers import apply_fused_layers
from training.config import ConfigError, OptimConfig
from training.device import Machine
from training.distributed import World

# Sizes that four processes do not divide evenly.
PLAIN = ModelConfig(vocab_size=37, context=16, n_layer=2, n_head=4, n_kv_head=2, n_embd=20, head_dim=6, n_ffn=26)
CONFIGS = {
    "tied": PLAIN,
    "fused": PLAIN,
    "compiled": PLAIN,
    "untied, a window, recomputed": dataclasses.replace(PLAIN, tie_embeddings=False, layer_pattern="SL", window=5),
    "Gated DeltaNet": dataclasses.replace(PLAIN, layer_pattern="DL"),
    "RWKV-7": dataclasses.replace(PLAIN, layer_pattern="WL"),
    "experts, learned positions": dataclasses.replace(PLAIN, n_expert=4, n_expert_active=2, positions="learned"),
    "documents": PLAIN,
    "documents, fused": PLAIN,
    "documents, compiled": PLAIN,
}
CONTEXT_PARALLEL = {  # for test_context_parallel.py
    "documents, a window": dataclasses.replace(PLAIN, layer_pattern="SL", window=9),
    "full and window layers": dataclasses.replace(PLAIN, layer_pattern="SLL", n_layer=3, window=5),
    "ALiBi, a gate": dataclasses.replace(PLAIN, positions="alibi", gate=True),
    "experts without their loss, learned positions": dataclasses.replace(
        PLAIN, n_expert=4, n_expert_active=2, router_aux_loss_coef=0.0, positions="learned", tie_embeddings=False
    ),
}
STEPS, BATCH, SAMPLE = 3, 12, 6  # sequences, tokens


def build(name: str, world: World, shard: int, method: str = "auto"):
    """The model and its optimizers, on a mesh if there are several processes."""
    torch.manual_seed(0)
    model = GPT((CONFIGS | CONTEXT_PARALLEL)[name])
    if world.size > 1:
        distributed.parallelize(model, world, shard, torch.device("cpu"), method)
    model.model.activation_checkpointing = name.endswith("recomputed")
    if name.startswith("documents"):
        model.model.document_start = 3
    if name.endswith("fused"):
        apply_fused_layers(model)
    if name.endswith("compiled") and world.size > 1:
        for layer in model.model.layers:
            layer.compile(backend="eager")
    return model, optimizers.build_optimizers(model, OptimConfig(warmup_steps=0), torch.float32)


def train(model, os_, world: World, steps) -> list[float]:
    """Train on two micro-batches a step, with clipping. Returns the gradient norm and the loss of each step."""
    found, share = [], BATCH // world.data_size
    for step in steps:
        random = torch.Generator().manual_seed(step)
        tokens = torch.randint(37, (BATCH, 17), generator=random)[world.data_rank * share :][:share]
        total = 0.0
        for number, rows in enumerate(tokens.chunk(2)):
            distributed.reduce_gradients(model, last=number == 1)
            loss = model.loss(rows[:, :-1], rows[:, 1:].contiguous()) / (16 * share / world.context)
            loss.backward()
            total += float(loss.detach())
        found.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        for optimizer in os_:
            optimizer.step()
            optimizer.zero_grad()
        found.append(world.all_reduce_sum([total / world.size], torch.device("cpu"))[0])
    return found


def joined(context: int = 1) -> World:
    return distributed.init_distributed(datetime.timedelta(seconds=30), context)


@functools.cache
def alone(name: str):
    """Losses and gradient norms, the number of matrices, and a sample of one process."""
    model, os_ = build(name, World(), 1)
    found = train(model, os_, World(), range(STEPS))
    matrices = sum(len(group["params"]) for group in os_[1].param_groups)
    return found, matrices, [int(token) for token in generate(model.eval(), [1, 2, 3], max_new_tokens=SAMPLE)]


def on_a_mesh(rank: int, shard: int, names, context: int, method: str):
    """For each configuration: losses and norms, matrices that this process orthogonalized, bytes that it holds, a
    sample. It evaluates before the first step, as a resumed run may."""
    world, found, real = joined(context), {}, optimizers.orthogonalize
    for name in names:
        counts: list[int] = []
        optimizers.orthogonalize = lambda x, dtype, counts=counts: (counts.append(len(x)), real(x, dtype))[1]
        model, os_ = build(name, world, shard, method)
        kind = "compiled" if name.endswith("compiled") else "eager"
        machine = Machine(torch.device("cpu"), torch.float32, kind, ())
        with machine.uncompiled(), torch.no_grad():
            model.eval().loss(torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, 16, dtype=torch.long))
            list(generate(model, [1], max_new_tokens=2))
        losses = train(model.train(), os_, world, range(STEPS))
        held = sum(distributed.local(p).nbytes for p in model.parameters())
        held += sum(distributed.local(s["momentum"]).nbytes for s in os_[1].state.values())
        with machine.uncompiled():
            sample = [int(token) for token in generate(model.eval(), [1, 2, 3], max_new_tokens=SAMPLE)]
        found[name] = losses, sum(counts), held, sample
    return found


def check_mesh(copies: int, shard: int, names, context: int = 1, method: str = "auto", call=call) -> None:
    """AssertionError unless everything is as on one process."""
    results = call(copies * shard, on_a_mesh, shard, names, context, method)
    for name in names:
        losses, matrices, sample = alone(name)
        per_process = [result[name] for result in results]
        for mine, _, _, my_sample in per_process:
            assert mine[1::2] == pytest.approx(losses[1::2], abs=1e-5), name
            assert mine[0::2] == pytest.approx(losses[0::2], rel=1e-2 if name == "Gated DeltaNet" else 1e-5), name
            assert my_sample == sample, name
        assert sum(counted for _, counted, _, _ in per_process) == matrices * STEPS, name  # each matrix once
        if copies * shard <= matrices:
            assert min(counted for _, counted, _, _ in per_process) > 0, name
        whole = GPT((CONFIGS | CONTEXT_PARALLEL)[name])
        size = sum(p.nbytes for p in whole.parameters())
        size += sum(p.nbytes for key, p in whole.named_parameters() if p.ndim == 2 and ".layers." in key)
        assert sum(held for _, _, held, _ in per_process) == copies * size, name


@pytest.mark.parametrize(("copies", "shard"), [(2, 1), (1, 2), (2, 2), (1, 4)])
def test_every_mesh_computes_what_one_process_does(copies, shard):
    names = [name for name in CONFIGS if not name.endswith("compiled")]
    check_mesh(copies, shard, names if copies * shard == 4 else names[:3])


def test_compiled_layers():
    check_mesh(1, 2, ["compiled", "documents, compiled"])


# Checkpoints --------------------------------------------------------------------------------------------------------

SAVED = "untied, a window, recomputed"


def saves(rank: int, shard: int, run, context: int = 1):
    """Save after a step, and go on."""
    world = joined(context)
    model, os_ = build(SAVED, world, shard)
    train(model, os_, world, range(1))
    saver = checkpoint.Saver(run, 2, world)
    saver.save(1, model, os_, {})
    found = train(model, os_, world, range(1, STEPS))  # meanwhile it is written
    saver.wait()
    return found


def resumes(rank: int, shard: int, run, world=None, context: int = 1):
    world = world or joined(context)
    model, os_ = build(SAVED, world, shard)
    folder = checkpoint.find(run, "latest")
    checkpoint.load_weights(folder, model)
    checkpoint.load_optimizers(folder, os_)
    return train(model, os_, world, range(1, STEPS))


def check_resume(call=call) -> None:
    """AssertionError unless a run that was saved on three processes goes on as it did there, on any other mesh."""
    with tempfile.TemporaryDirectory() as folder:
        resume_everywhere(Path(folder), call)


def resume_everywhere(run: Path, call) -> None:
    expected = call(3, saves, 3, run)[0]
    assert expected == pytest.approx(alone(SAVED)[0][2:], abs=1e-5)
    checkpoint.read_state(folder := checkpoint.find(run, "latest"))
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(GPT(CONFIGS[SAVED]).state_dict())
    assert resumes(0, 1, run, World()) == pytest.approx(expected, abs=1e-5)
    for size, shard in ((2, 1), (4, 2), (4, 4)):
        for found in call(size, resumes, shard, run):
            assert found == pytest.approx(expected, abs=1e-5), (size, shard)


def test_a_run_goes_on_on_another_mesh():
    check_resume()


def test_a_run_of_one_process_goes_on_on_several(tmp_path):
    model, os_ = build(SAVED, World(), 1)
    train(model, os_, World(), range(1))
    checkpoint.save(tmp_path, 1, model, os_, {})
    assert call(4, resumes, 2, tmp_path)[3] == pytest.approx(alone(SAVED)[0][2:], abs=1e-5)


# The mesh -----------------------------------------------------------------------------------------------------------


def test_the_number_of_devices_that_hold_a_copy(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert distributed.devices_per_copy(0, World()) == distributed.devices_per_copy(1, World()) == 1
    with pytest.raises(ConfigError, match=r"^train.shard = 2: must divide the number of devices, 1$"):
        distributed.devices_per_copy(2, World())
    monkeypatch.setattr(World, "share", lambda self, value: value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [distributed.devices_per_copy(shard, World(0, 8)) for shard in (0, 1, 2, 8)] == [4, 1, 2, 8]
    with pytest.raises(ConfigError, match=r"train.shard = 3: must divide the number of devices, 8$"):
        distributed.devices_per_copy(3, World(0, 8))
    with pytest.raises(ConfigError, match=r"train.shard = 0: the 4 devices of a machine must divide .* devices, 6$"):
        distributed.devices_per_copy(0, World(0, 6))
