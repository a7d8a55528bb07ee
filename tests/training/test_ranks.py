"""Several processes: rank 0 decides for all, and a killed one ends the run with a checkpoint that loads."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.conftest import ROOT, SMALL, UNTRACED_ENV
from training import checkpoint, device, distributed
from training.config import ConfigError, TrainConfig
from training.distributed import DistributedError, World

HANGS = 300  # seconds, after which a test gives up; nothing is measured by it


class Follower(World):
    """Process 1 of two, without the other one: what rank 0 chose is given."""

    def share(self, value):
        return self.patient


@pytest.mark.parametrize("gain", [0.1, 9.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_of_rank_0_holds_whatever_a_process_measures(monkeypatch, gain, dtype):
    monkeypatch.setattr(device, "_bf16_gain", lambda: gain)
    follower = Follower(1, 2, 1, (dtype, "eager"))
    machine = device.choose_together(TrainConfig(steps=1, device="cpu"), follower)
    assert (machine.dtype, machine.layer_impl) == (dtype, "eager")


def test_a_process_that_cannot_follow_says_so(monkeypatch):
    monkeypatch.setattr(device, "_layer_impl", lambda *_: ("eager", "eager (no C++ compiler)"))
    with pytest.raises(ConfigError, match=r"process 0 has fused layers, process 1 cannot: .*no C\+\+ compiler"):
        device.choose_together(TrainConfig(steps=1, device="cpu"), Follower(1, 2, 1, (torch.float32, "fused")))


def test_each_kind_of_device_has_its_backend():
    """On a machine with a GPU, too, `--train.device cpu` needs gloo."""
    assert distributed.backends(cuda=True) == "cpu:gloo,cuda:nccl"
    assert distributed.backends(cuda=False) == "gloo"
    assert distributed.STEP_TIMEOUT.total_seconds() <= 60


def test_a_failed_collective_is_one_line():
    with (
        pytest.raises(DistributedError, match="another process of this run has ended") as told,
        distributed._together(),
    ):
        raise RuntimeError("[gloo]\n Connection closed by peer\n" * 20)
    assert "\n" not in str(told.value) and len(str(told.value)) < 400


def start(tmp_path, text, name, *words, script=str(ROOT / "train.py")):
    flags = [*SMALL, f"--data.source={text}", "--train.micro_batch_size=2", f"--name={name}", *words]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        script,
    ]
    environment = {"HEED_RUNS": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*launch, "shakespeare", *flags], cwd=ROOT, env=UNTRACED_ENV | environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_and_its_checkpoint_loads(tmp_path, text, rank):
    """The processes measure different gains of bf16; the run has one dtype, and is killed after some saves. One process
    verifies the text."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, train\nfrom data import shards\nfrom training import device\n"
        "map = shards._map\n"
        "def logged(path, dtype, tokens, sha256):\n"
        "    if sha256: os.write(1, f'verified by {os.environ[\"RANK\"]}\\n'.encode())\n"
        "    return map(path, dtype, tokens, sha256)\n"
        "shards._map = logged\n"
        "os.write(1, f'pid {os.environ[\"RANK\"]} {os.getpid()}\\n'.encode())\n"
        "device._bf16_gain = lambda: [0.1, 9.0][int(os.environ['RANK'])]\ntrain.main()\n"
    )
    words = ("--train.steps=1000000", "--train.num_evals=1", "--train.save_minutes=1e-9", "--train.dtype=auto")
    process = start(tmp_path, text, "lost", *words, script=str(script))
    said, pids = "", {}
    for line in process.stdout:
        said += line
        if found := re.match(r"pid (\d) (\d+)", line):
            pids[int(found[1])] = int(found[2])
        if line.startswith("step 1/"):
            break
    assert len(pids) == 2, said
    run = tmp_path / "lost"
    while not (run / "latest").exists() and process.poll() is None:
        time.sleep(0.01)
    os.kill(pids[rank], signal.SIGKILL)
    rest, _ = process.communicate(timeout=HANGS)
    assert process.returncode != 0
    assert set(re.findall(r"verified by (\d)", said)) == {"0"}
    assert "dtype float32 (bfloat16 matmul 0.1x fp32, measured)" in said
    if rank == 1:
        assert "train.py: another process of this run has ended or does not answer" in rest
    state = checkpoint.read_state(checkpoint.find(run, "latest"))
    assert state["step"] >= 1 and state["dtype"] == "float32"
    with pytest.raises(ProcessLookupError):
        os.kill(pids[1 - rank], 0)
