"""The commands of chapter 10: the SLURM script on two processes, killed, restarted by torchrun, stopped by SIGTERM."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, SMALL, USER_ENV, losses
from tests.training.ranks import HANGS
from training import checkpoint

BLOCKS = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs" / "10-scaling.md").read_text(), re.M | re.S)
SCRIPT = """
import os, train
os.write(1, f'pid {os.environ["RANK"]} {os.getpid()}\\n'.encode())
train.main()
"""
FOREVER = ("--train.steps=1000000", "--train.num_evals=1", "--train.save_minutes=1e-9", "--train.micro_batch_size=2")


@pytest.mark.parametrize("block", BLOCKS, ids=["several machines", "SLURM"])
def test_bash_can_parse_the_commands(block):
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)


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


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def slurm(tmp_path, text):
    """The script of the chapter on small data, and programs that stand in for those of SLURM. Its environment."""
    run, runs = tmp_path / "run.py", tmp_path / "runs"
    run.write_text(SCRIPT)
    words = " ".join((*SMALL, f"--data.source={text}", "--name=gpt2-124m", *FOREVER))
    changes = {"--nproc-per-node 8": "--nproc-per-node 2", "train.py gpt2-124m": f"{run} shakespeare {words}",
               "runs/": f"{runs}/", ":29500": f":{free_port()}"}  # fmt: skip
    script = BLOCKS[-1]
    for right, changed in changes.items():
        assert right in script, right
        script = script.replace(right, changed)
    (tmp_path / "heed.sbatch").write_text(script)
    for name, command in {"scontrol": "echo localhost", "srun": 'exec "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{command}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"HEED_RUNS": str(runs), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT),
            "PATH": path, "SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost"}  # fmt: skip


def test_a_killed_process_is_restarted_and_sigterm_saves(tmp_path, text):
    environment = slurm(tmp_path, text)
    process = subprocess.Popen(
        ["bash", "heed.sbatch"], cwd=tmp_path, env=USER_ENV | environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    run = tmp_path / "runs" / "gpt2-124m"
    first = follow(process, "step 1/")
    while not (run / "latest").exists() and process.poll() is None:
        time.sleep(0.01)
    os.kill(first[0], signal.SIGKILL)
    second = follow(process, "resume ")
    assert first.keys() == second.keys() == {0, 1} and not set(first.values()) & set(second.values())
    with pytest.raises(ProcessLookupError):  # torchrun has ended it
        os.kill(first[1], 0)
    follow(process, "step ")
    os.killpg(process.pid, signal.SIGTERM)  # as SLURM: to the script, srun and torchrun
    said, _ = process.communicate(timeout=HANGS)
    step = checkpoint.read_state(checkpoint.find(run, "latest"))["step"]
    assert f"stopped and saved at step {step}; --resume continues" in said
    assert list(losses(run)) == list(range(1, step + 1))
