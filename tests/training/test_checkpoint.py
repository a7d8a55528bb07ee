"""Checkpoints: atomic writes, round trips, detection of damage."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import sample
from convert import to_hf
from model import GPT
from tests.conftest import TINY
from training import checkpoint, init_from
from training.checkpoint import CheckpointError
from training.config import OptimConfig
from training.optimizers import build_optimizers


class Killed(BaseException):
    """Simulates a kill: no code after it runs."""


def trained(steps: int, seed: int = 0) -> tuple[GPT, list[torch.optim.Optimizer]]:
    torch.manual_seed(seed)
    model = GPT(TINY)
    optimizers = build_optimizers(model, OptimConfig(), torch.float32)
    for _ in range(steps):
        model.loss(torch.randint(0, 97, (2, 8)), torch.randint(0, 97, (2, 8))).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizers


def test_save_and_load(tmp_path):
    model, optimizers = trained(3)
    folder = checkpoint.save(tmp_path, 3, model, optimizers, {"steps": 9})
    assert checkpoint.find(tmp_path, "latest") == folder == tmp_path / "step-000003"
    assert checkpoint.read_state(folder)["steps"] == 9
    other, others = trained(1, seed=5)
    checkpoint.load_weights(folder, other)
    checkpoint.load_optimizers(folder, others)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    torch.manual_seed(7)
    x = torch.randint(0, 97, (2, 8))
    for m, os_ in ((model, optimizers), (other, others)):  # and the optimizers' states are equal
        m.loss(x, x).backward()
        [o.step() for o in os_]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_tensor_names_are_hugging_faces_even_when_compiled(tmp_path):
    model, optimizers = trained(0)
    for layer in model.model.layers:
        layer.compile()
    from safetensors import safe_open

    folder = checkpoint.save(tmp_path, 1, model, optimizers, {})
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.1.self_attn.q_norm.weight" in names
    assert not any("_orig_mod" in name for name in names)


def test_kill_at_any_time_leaves_a_loadable_run(tmp_path, monkeypatch):
    """The process is killed at each call that changes the disk."""
    first, first_optimizers = trained(1)
    second, second_optimizers = trained(2)
    calls = {"rename": Path.rename, "replace": Path.replace, "write_text": Path.write_text, "mkdir": Path.mkdir}
    functions = [(Path, n) for n in calls] + [
        (os, "fsync"),
        (torch, "save"),
        (checkpoint, "save_file"),
        (shutil, "rmtree"),
    ]

    def kill_at(deadly: int, patch: pytest.MonkeyPatch) -> None:
        done = itertools.count(1)

        def watch(original):
            def call(*a, **k):
                if next(done) == deadly:
                    raise Killed
                return original(*a, **k)

            return call

        for owner, name in functions:
            patch.setattr(owner, name, watch(getattr(owner, name)))

    survived = 0
    for deadly in range(1, 100):
        run = tmp_path / f"run-{deadly}"
        checkpoint.save(run, 1, first, first_optimizers, {})
        checkpoint.point(run, "best", run / "step-000001")
        with monkeypatch.context() as patch:
            kill_at(deadly, patch)
            try:
                checkpoint.save(run, 2, second, second_optimizers, {})
                checkpoint.point(run, "best", run / "step-000002")
                checkpoint.prune(run, 1)
                done = True
            except Killed:
                done = False
        for which in ("latest", "best"):
            folder = checkpoint.find(run, which)
            step = checkpoint.read_state(folder)["step"]
            model, optimizers = trained(0, seed=9)
            checkpoint.load_weights(folder, model)
            checkpoint.load_optimizers(folder, optimizers)
            expected = {1: first, 2: second}[step]
            assert torch.equal(model.model.norm.weight, expected.model.norm.weight)
        checkpoint.save(run, 2, second, second_optimizers, {})  # and the run continues
        assert checkpoint.read_state(checkpoint.find(run, "latest"))["step"] == 2
        assert not list(run.glob(".draft-step*"))
        if done:
            break
        survived += 1
    assert survived > 15


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_flipped_bit_is_detected(tmp_path, name):
    folder = checkpoint.save(tmp_path, 1, *trained(1), {})
    raw = bytearray((folder / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / name).write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"{name}: damaged"):
        checkpoint.read_state(folder)


def test_damaged_and_missing_checkpoints_are_reported(tmp_path):
    folder = checkpoint.save(tmp_path, 1, *trained(1), {})
    (folder / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        checkpoint.read_state(folder)
    (folder / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        checkpoint.read_state(folder)
    with pytest.raises(CheckpointError, match="no checkpoint 'step-000007'; there are: step-000001"):
        checkpoint.find(tmp_path, "step-000007")


def test_only_files_that_are_read_are_verified(runs, tmp_path, monkeypatch):
    """optimizer.pt has twice the size of the weights. Nothing is hashed before state.json says that it can be read."""
    run, hashed, sha256 = tmp_path / "run", [], checkpoint._sha256
    monkeypatch.setattr(checkpoint, "_sha256", lambda path: (hashed.append(path.name), sha256(path))[1])
    shutil.copytree(runs / "songs", run)
    for damaged in (False, True):
        sample.load(run)
        to_hf.export(run, tmp_path / f"hf {damaged}")
        checkpoint.read_state(init_from.resolve_checkpoint(str(run)), verify=())
        assert set(hashed) == {"model.safetensors"}
        (checkpoint.find(run, "best") / "optimizer.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.read_state(checkpoint.find(run, "best"))
    hashed.clear()
    state = checkpoint.find(run, "best") / "state.json"
    state.write_text(state.read_text().replace('"format_version": 3', '"format_version": 4'))
    with pytest.raises(CheckpointError, match="use a newer heed"):
        checkpoint.read_state(state.parent)
    assert hashed == []


def test_resuming_verifies_each_file_once(run_training, monkeypatch):
    run_training("whole", "--train.steps=2", "--train.num_evals=1")
    hashed, sha256 = [], checkpoint._sha256
    monkeypatch.setattr(checkpoint, "_sha256", lambda path: (hashed.append(path.name), sha256(path))[1])
    run_training("whole", "--train.steps=2", "--train.num_evals=1", "--resume")
    assert sorted(hashed) == ["model.safetensors", "optimizer.pt"]


def test_weights_of_another_model_raise(tmp_path):
    folder = checkpoint.save(tmp_path, 1, *trained(1), {})
    other = GPT(type(TINY)(**{**vars(TINY), "n_ffn": 64}))
    with pytest.raises(CheckpointError, match="does not fit this model"):
        checkpoint.load_weights(folder, other)


def test_loading_does_not_execute_code(tmp_path):
    folder = checkpoint.save(tmp_path, 1, *trained(1), {})

    class Bomb:
        def __reduce__(self):
            return os.system, ("true",)

    torch.save([Bomb()], folder / "optimizer.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        checkpoint.load_optimizers(folder, trained(0)[1])


def test_prune_keeps_the_newest_checkpoints_and_pointers(tmp_path):
    for step in (1, 2, 3, 4, 5):
        checkpoint.save(tmp_path, step, *trained(0), {})
    checkpoint.point(tmp_path, "best", tmp_path / "step-000002")
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000002", "step-000004", "step-000005"]
    assert json.loads((tmp_path / "step-000002" / "state.json").read_text())["step"] == 2
