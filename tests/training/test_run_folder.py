"""heed deletes only what heed made."""

import pytest

from tests.conftest import weights
from training.checkpoint import CheckpointError

WORDS = ("--train.steps=1", "--train.num_evals=1")


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "files",
    [
        ("thesis.txt",),
        ("config.toml",),  # a user's own: not of a run
        ("tokenizer.json", "metrics.jsonl"),
        ("thesis.txt", "config.toml"),
        (".hidden",),
        (".draft-thesis",),
        ("step-notes/a.txt",),
        ("latest", "thesis.txt"),
    ],
)
@pytest.mark.parametrize("flag", [(), ("--overwrite",)])
def test_a_folder_that_is_not_of_a_run_is_refused(run_training, tmp_path, files, flag):
    for name in files:
        (tmp_path / "mydata" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mydata" / name).write_text("years of work\n")
    before = content(tmp_path / "mydata")
    with pytest.raises(CheckpointError, match=r"runs/mydata (holds '.*', which is not of a run of heed|exists)"):
        run_training("mydata", *WORDS, *flag)
    assert content(tmp_path / "mydata") == before


def test_a_note_in_a_runs_folder_is_not_deleted_with_it(run_training):
    run = run_training("mine", *WORDS)
    (run / "notes.txt").write_text("what I saw")
    before = content(run)
    with pytest.raises(CheckpointError, match=r"runs/mine holds 'notes.txt', which is not of a run"):
        run_training("mine", *WORDS, "--overwrite")
    assert content(run) == before
    (run / "notes.txt").unlink()
    run_training("mine", "--train.steps=2", "--train.num_evals=1", "--overwrite")
    assert [path.name for path in run.glob("step-*")] == ["step-000002"] and weights(run)


def test_a_file_in_the_place_of_the_folder_is_refused(run_training, tmp_path):
    (tmp_path / "mine").write_text("not a folder")
    with pytest.raises(CheckpointError, match="is not a folder"):
        run_training("mine", *WORDS)
    assert (tmp_path / "mine").read_text() == "not a folder"


def test_an_empty_folder_and_an_unstarted_run_may_be_used(run_training, tmp_path):
    (tmp_path / "mine").mkdir()
    run = run_training("mine", *WORDS)
    for name in ("latest", "best"):
        (run / name).unlink()
    with pytest.raises(CheckpointError, match="runs/mine exists"):  # its checkpoints are still there
        run_training("mine", *WORDS)
    before = (run / "config.toml").read_text()
    for folder in run.glob("step-*"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    run_training("mine", *WORDS)
    assert (run / "config.toml").read_text() == before


def test_a_run_deleted_halfway_is_still_heeds(run_training, monkeypatch, tmp_path):
    """Pointers go first and config.toml last, so that a kill leaves neither half a run nor a foreign folder."""
    from pathlib import Path

    run, unlinked, unlink = run_training("mine", *WORDS), [], Path.unlink

    def watched(self, *a, **k):
        if self.parent == run:
            unlinked.append(self.name)
        unlink(self, *a, **k)

    monkeypatch.setattr(Path, "unlink", watched)
    run_training("mine", *WORDS, "--overwrite")
    assert set(unlinked[:2]) == {"latest", "best"} and unlinked[-1] == "config.toml"
