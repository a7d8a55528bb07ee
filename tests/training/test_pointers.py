"""Pointers, the order of checkpoints, and what may be deleted."""

import os
import shutil
from pathlib import Path

import pytest

from model import GPT
from sample import load
from tests.conftest import TINY
from training import checkpoint
from training.checkpoint import CheckpointError


def save(run: Path, step: int) -> Path:
    return checkpoint.save(run, step, GPT(TINY), [], {})


def test_steps_are_sorted_as_numbers(tmp_path):
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, 2)
    assert [p.name for p in checkpoint.folders(tmp_path)] == ["step-1000000", "step-1000001"]


def test_a_checkpoint_that_best_names_keeps_its_name_until_its_successor_is_on_the_disk(tmp_path, monkeypatch):
    checkpoint.point(tmp_path, "best", save(tmp_path, 2))
    best = tmp_path / "step-000002"
    save(tmp_path, 1)  # an earlier latest: the run is continued from here
    calls, rename = [], Path.rename

    def watched(self, target):
        calls.append(best.exists() or (tmp_path / ".aside-step-000002").exists())
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    removed = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: removed.append((Path(path), best.exists())))
    save(tmp_path, 2)
    assert all(calls) and len(calls) == 2
    assert all(there for path, there in removed if path != best) and best not in [path for path, _ in removed]


def test_a_folder_set_aside_by_a_killed_process_gets_its_name_back(tmp_path):
    checkpoint.point(tmp_path, "best", save(tmp_path, 2))
    save(tmp_path, 1)
    (tmp_path / "step-000002").rename(tmp_path / ".aside-step-000002")
    assert checkpoint.find(tmp_path, "best").name == "step-000001"
    save(tmp_path, 3)
    assert checkpoint.find(tmp_path, "best").name == "step-000002"
    assert checkpoint.read_state(checkpoint.find(tmp_path, "best"))["step"] == 2


@pytest.fixture
def songs(runs, tmp_path):
    return shutil.copytree(runs / "songs", tmp_path / "songs")


@pytest.mark.parametrize("how", ["cut", "flipped", "gone", "pointer to nowhere", "pointer of noise", "pointer outside"])
def test_generation_falls_back_when_the_best_is_damaged_or_missing(songs, how, capsys):
    checkpoint.point(songs, "best", songs / "step-000015")
    weights = songs / "step-000015" / "model.safetensors"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif how == "flipped":
        weights.write_bytes(weights.read_bytes()[:-9] + b"\0\1\2\3\4\5\6\7\10")
    elif how == "gone":
        shutil.rmtree(songs / "step-000015")
    else:
        names = {"nowhere": b"step-999999", "noise": os.urandom(64) + b"\xff", "outside": b"../songs/step-000015"}
        (songs / "best").write_bytes(names[how.split()[-1]])
    load(songs)
    said = capsys.readouterr().err
    if how in ("cut", "flipped"):
        assert said.count("\n") == 1 and "damaged" in said and "using step-000030" in said
    with pytest.raises(CheckpointError):
        load(songs, "step-000007")


def test_a_damaged_step_that_was_asked_for_is_an_error(songs):
    (songs / "step-000015" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        load(songs, "step-000015")


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(tmp_path, monkeypatch):
    first = save(tmp_path, 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"step-000002: cannot be saved \(.*No space left .* are kept"):
        save(tmp_path, 2)
    assert {p.name for p in tmp_path.iterdir()} == {"step-000001", "latest"}
    assert checkpoint.read_state(checkpoint.find(tmp_path, "latest")) and first.exists()
