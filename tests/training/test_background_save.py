"""Several processes train on while the main one writes a checkpoint, which appears whole or not at all."""

import errno
import itertools
import os
import signal
import threading

import pytest

from tests.conftest import SMALL, losses, weights
from tests.training.ranks import HANGS, Ranks
from tests.training.test_ranks import trained
from training import checkpoint
from training.time_budget import StepBudget

WORDS = ("--train.steps=4", "--train.num_evals=1", "--train.save_minutes=1e-9", "--train.keep_checkpoints=9",
         "--train.micro_batch_size=2")  # fmt: skip


def disturbed(rank, runs, words, what):
    """train.py, in which something happens to the second checkpoint while it is written."""
    save_file, number, later = checkpoint.save_file, itertools.count(1), threading.Event()
    add_step = StepBudget.add_step

    def watched(*a, **k):
        if next(number) == 2:
            if what == "training goes on":
                assert later.wait(HANGS / 2)
            elif what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif what == "the disk is full":
                raise OSError(errno.ENOSPC, "No space left on device")
        save_file(*a, **k)

    def updated(self, *a):
        add_step(self, *a)
        if len(self.durations) == 3:  # the weights are those of step 3
            later.set()

    checkpoint.save_file, StepBudget.add_step = watched, updated
    trained(rank, runs, words, lost=-1, how=0)


def run(where, text, what):
    flags = ["shakespeare", "--name=run", *SMALL, f"--data.source={text}", *WORDS]
    return Ranks(2, disturbed, where, flags, what).ends()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """A run in which nothing happens."""
    where = tmp_path_factory.mktemp("whole")
    assert run(where, text, "") == [0, 0]
    return where / "run"


def test_a_step_is_made_while_a_checkpoint_is_written(whole, text, tmp_path):
    """And the checkpoint is that of the step before."""
    assert run(tmp_path, text, "training goes on") == [0, 0]
    assert weights(tmp_path / "run") == weights(whole) and losses(tmp_path / "run") == losses(whole)
    for step in (1, 2, 3, 4):
        one, other = (r / f"step-00000{step}" for r in (tmp_path / "run", whole))
        assert all((one / file).read_bytes() == (other / file).read_bytes() for file in checkpoint.FILES)


@pytest.mark.parametrize("what", ["killed", "the disk is full"])
def test_a_checkpoint_appears_whole_or_not_at_all(whole, text, tmp_path, what):
    assert run(tmp_path, text, what) == [-signal.SIGKILL if what == "killed" else 2, 2]
    if what == "the disk is full":
        error = "step-000002: cannot be saved ([Errno 28] No space left on device); earlier checkpoints are kept\n"
        assert (tmp_path / "log-0").read_text().endswith(error)
    folder = checkpoint.find(tmp_path / "run", "latest")
    assert folder.name == "step-000001" and checkpoint.read_state(folder)["step"] == 1
    flags = ["shakespeare", "--name=run", *SMALL, f"--data.source={text}", *WORDS, "--resume"]
    assert Ranks(2, disturbed, tmp_path, flags, "").ends() == [0, 0]
    assert weights(tmp_path / "run") == weights(whole) and losses(tmp_path / "run") == losses(whole)
