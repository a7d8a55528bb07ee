"""torchrun: a killed process ends the others, --max-restarts continues the run, SIGTERM saves it."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, SMALL, UNTRACED_ENV, losses
from tests.training.ranks import HANGS
from training import checkpoint

SCRIPT = """
import os, train
os.write(1, f'pid {os.environ["RANK"]} {os.getpid()}\\n'.encode())
train.main()
"""
FOREVER = ("--train.steps=1000000", "--train.num_evals=1", "--train.save_minutes=1e-9", "--train.micro_batch_size=2")


def follow(process, pattern):
    """Read the output up to a line that starts with the pattern; the pid of each process that has started."""
    pids, said = {}, ""
    for line in process.stdout:
        said += line
        if found := re.match(r"pid (\d) (\d+)", line):
            pids[int(found[1])] = int(found[2])
        if re.match(pattern, line):
            return pids
    pytest.fail(said)


def test_a_killed_process_is_restarted_and_sigterm_saves(tmp_path, text):
    script, run = tmp_path / "ranks.py", tmp_path / "lost"
    script.write_text(SCRIPT)
    words = " ".join((*SMALL, f"--data.source={text}", "--name=lost", *FOREVER))
    resume = f"$(test -f {run}/latest && echo --resume)"
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1", "--no-python"]
    environment = {
        "HEED_RUNS": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", *launch, "bash", "-c", f"exec {sys.executable} {script} shakespeare {words} {resume}"],
        cwd=ROOT, env=UNTRACED_ENV | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    first = follow(process, "step 1/")
    while not (run / "latest").exists() and process.poll() is None:
        time.sleep(0.01)
    os.kill(first[0], signal.SIGKILL)
    second = follow(process, "resume ")
    assert first.keys() == second.keys() == {0, 1} and not set(first.values()) & set(second.values())
    with pytest.raises(ProcessLookupError):  # torchrun has ended it
        os.kill(first[1], 0)
    follow(process, "step ")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=HANGS)
    assert process.returncode != 0
    step = checkpoint.read_state(checkpoint.find(run, "latest"))["step"]
    assert f"stopped and saved at step {step}; --resume continues" in said
    assert list(losses(run)) == list(range(1, step + 1))
