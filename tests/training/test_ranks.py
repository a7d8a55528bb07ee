"""Several processes: rank 0 decides for all, they wait for each other, a lost one ends the run with a checkpoint."""

import datetime
import functools
import itertools
import os
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import train
from data import shards
from data.loader import Loader
from kernels.reference_attention import IGNORE_INDEX
from model import GPT
from tests.conftest import SMALL, TINY, losses
from tests.training import ranks
from tests.training.ranks import HANGS, Ranks, call
from training import checkpoint, device, distributed
from training.config import Config, ConfigError, TrainConfig
from training.device import Machine
from training.distributed import DistributedError, World
from training.validation_loss import validate


class Follower(World):
    """Process 1 of two, without the other one: what rank 0 chose is given."""

    def share(self, value):
        return self.store


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
    assert distributed.TIMEOUT.total_seconds() == 600


def test_a_failed_collective_is_one_line():
    with (
        pytest.raises(DistributedError, match="another process of this run has ended") as told,
        distributed.together(),
    ):
        raise RuntimeError("[third_party/gloo]\n Connection closed by peer\n" * 20)
    assert "\n" not in str(told.value) and len(str(told.value)) < 400
    with pytest.raises(torch.OutOfMemoryError), distributed.together():
        raise torch.OutOfMemoryError("another error keeps its traceback")


def enter(rank):
    """Two machines of two processes; the main process is late."""
    world = distributed.init_distributed()
    time.sleep(0.5 * (rank == 0))
    logged = []
    with World(rank, 4, rank % 2, world.store).in_turn("text", logged.append):
        order = world.store.add("order", 1)
    return order, logged


def test_the_main_process_is_first_then_the_first_of_each_machine():
    results = call(4, enter)
    order = [place for place, _ in results]
    assert order[0] == 1 and order[2] < order[3] and sorted(order) == [1, 2, 3, 4]
    assert [logged for _, logged in results] == [["text: 3 other processes wait for it"], [], [], []]


def impatient(rank):
    world = distributed.init_distributed()
    distributed.PATIENCE = datetime.timedelta(seconds=0.2)
    if rank == 0:
        return ""
    try:
        with distributed.together(), world.in_turn("text", print):
            return "entered"
    except DistributedError as error:
        return str(error)


def test_a_process_that_waited_too_long_says_so():
    assert "another process of this run has ended or does not answer" in call(2, impatient)[1]


class Text:
    """A text of some targets for `validate`, which reads it through `validation`."""

    chat, tokens, num_targets = False, 5 * 32 - 3, 5 * 32 - 3

    @property
    def parts(self):
        return [(self, 1.0)]

    def read(self, start, count):
        return torch.arange(start, start + count).remainder(90).numpy()


def validated(rank, sequences, context=1):
    """The validation loss, and the number of forward passes."""
    world = distributed.init_distributed(context=context)
    torch.manual_seed(0)
    model, count, loss = GPT(TINY), itertools.count(), GPT.loss
    GPT.loss = lambda *a, **k: (next(count), loss(*a, **k))[1]
    model = GPT(TINY)
    if context > 1:
        distributed.parallelize(model, world, 1, torch.device("cpu"), "ring")
    config = Config("x", model=TINY, train=TrainConfig(steps=1, batch_tokens=32, micro_batch_size=sequences))
    machine = Machine(torch.device("cpu"), torch.float32, "eager", ())
    return validate(model, Text(), config, world, machine, 0), next(count)


def check_validation(size, sequences, context=1, call=call):
    """AssertionError unless the loss is that of one process, and all processes make as many forward passes."""
    ((alone, batches),) = ranks.call(1, validated, sequences)
    assert batches == -(-5 // sequences)
    results = call(size, validated, sequences, context)
    assert all(loss == pytest.approx(alone, rel=1e-6) for loss, _ in results)
    assert {passes for _, passes in results} == {-(-batches // (size // context))}


@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize(("size", "context"), [(2, 1), (4, 1), (4, 2)])
def test_validation_on_any_number_of_processes_is_that_on_one(size, sequences, context):
    check_validation(size, sequences, context)


FOREVER = ("--train.steps=1000000", "--train.num_evals=1", "--train.save_minutes=1e-9")


def trained(rank, runs, words, lost, how, at=3):
    """train.py; the process `lost` sends itself the signal `how` in step `at`. A collective may take six seconds. The
    processes measure different gains of bf16."""
    os.dup2(os.open(runs / f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    batch, mapped = Loader.batch, shards._map

    def watched(self, step, *a):
        if rank == lost and step == at:
            os.kill(os.getpid(), how)
        return batch(self, step, *a)

    def verified(path, dtype, tokens, sha256):
        if sha256:
            print(f"verified by {rank}")
        return mapped(path, dtype, tokens, sha256)

    Loader.batch, shards._map, train.RUNS = watched, verified, runs
    device._bf16_gain = lambda: [0.1, 9.0][rank > 0]
    distributed.init_distributed = functools.partial(
        distributed.init_distributed, timeout=datetime.timedelta(seconds=6)
    )
    sys.argv = ["train.py", *words]
    train.main()


def started(runs, text, *words, size=2, lost=-1, how=0):
    flags = ["shakespeare", "--name=run", *SMALL, f"--data.source={text}", "--train.micro_batch_size=2", *words]
    return Ranks(size, trained, runs, flags, lost, how)


def test_a_run_on_several_meshes_is_that_of_one_process(run_training, text, tmp_path):
    """Stopped on two processes that hold one copy of the model, resumed on two copies of two, which share sequences."""
    words = ("--train.steps=6", "--train.num_evals=2")
    whole = run_training("whole", *words)
    run = started(tmp_path, text, *words, "--train.shard=0", lost=1, how=signal.SIGTERM)
    assert run.ends() == [128, 128 + signal.SIGTERM]
    said = (tmp_path / "log-0").read_text()
    assert "mesh 2 devices = 1 copies of the model x 2 devices (train.shard)\n" in said
    assert "= 2 devices x 2 micro-batches x 2 sequences x 32 tokens\n" in said
    words += ("--train.shard=2", "--train.context_parallel=2", "--train.context_method=ring")
    assert started(tmp_path, text, *words, "--resume", size=4).ends() == [0] * 4
    said = (tmp_path / "log-0").read_text()
    assert "mesh 4 devices = 2 copies of the model x 2 devices (train.shard)\n" in said
    assert "context 2 groups of 2 devices share sequences: ring (train.context_method)\n" in said
    assert "= 4 devices x 2 micro-batches x 2 sequences x 16 tokens\n" in said
    assert "changed train.shard 0 -> 2, train.context_parallel 1 -> 2, train.context_method auto -> ring\n" in said
    assert said.count("step 6 | val_loss") == 1 and (tmp_path / "log-1").read_text() == ""
    for key in ("loss", "grad_norm", "val_loss"):
        assert losses(tmp_path / "run", key) == pytest.approx(losses(whole, key), rel=1e-5)
    theirs, ours = (
        load_file(checkpoint.find(run, "latest") / "model.safetensors") for run in (whole, tmp_path / "run")
    )
    assert theirs.keys() == ours.keys()
    assert all(torch.allclose(ours[name], weight, atol=1e-5) for name, weight in theirs.items())


def with_one_target(batch):
    """Loader.batch, but of all targets of a step only the first is left."""

    def sparse(self, step, sequences, rank=0, ranks=1):
        x, y = batch(self, step, sequences, rank, ranks)
        kept = torch.full_like(y, IGNORE_INDEX)
        kept[0, 0] = y[0, 0] if rank == 0 else IGNORE_INDEX
        return x, kept

    return sparse


def trained_on_one_target(rank, *args):
    Loader.batch = with_one_target(Loader.batch)
    trained(rank, *args)


def test_fewer_targets_than_processes_have_the_gradient_of_one_process(run_training, text, tmp_path, monkeypatch):
    words = ("--train.steps=2", "--train.num_evals=1", "--train.micro_batch_size=2")
    flags = ["shakespeare", "--name=run", *SMALL, f"--data.source={text}", *words]
    assert Ranks(2, trained_on_one_target, tmp_path, flags, -1, 0).ends() == [0, 0]
    monkeypatch.setattr(Loader, "batch", with_one_target(Loader.batch))
    alone = run_training("alone", *words)
    for key in ("loss", "grad_norm"):
        assert losses(tmp_path / "run", key) == pytest.approx(losses(alone, key), rel=1e-5)


@pytest.mark.parametrize("flag", ["train.shard", "train.context_parallel"])
def test_a_number_of_devices_that_cannot_share_is_one_line(tmp_path, text, flag):
    context = "--model.context=30", "--train.batch_tokens=240"
    assert started(tmp_path, text, "--train.steps=1", *context, f"--{flag}=3").ends() == [2, 2]
    error = f"train.py: {flag} = 3: must divide the number of devices, 2\n"
    assert [(tmp_path / f"log-{rank}").read_text().endswith(error) for rank in (0, 1)] == [True, True]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_ends_the_run_and_its_checkpoint_loads(tmp_path, text, how):
    """Killed or asleep. One process verifies the text, and the run has one dtype."""
    run = started(tmp_path, text, *FOREVER, "--train.dtype=auto", "--train.shard=2", lost=1, how=how)
    run.processes[0].join(HANGS)
    assert run.processes[0].exitcode == 2
    run.processes[1].kill()
    assert run.ends() == [2, -signal.SIGKILL]
    said = [(tmp_path / f"log-{rank}").read_text() for rank in (0, 1)]
    assert "train.py: another process of this run has ended or does not answer" in said[0]
    assert "Traceback" not in said[0]
    assert "verified by 0" in said[0] and "verified" not in said[1]
    assert "dtype float32 (bfloat16 matmul 0.1x fp32, measured)" in said[0]
    state = checkpoint.read_state(checkpoint.find(tmp_path / "run", "latest"))
    assert state["step"] == 3 and state["dtype"] == "float32"


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "x", "RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE is 'x', must be a whole number"),
    ],
)
def test_variables_of_another_launcher_are_one_line(monkeypatch, variables, says):
    for name in distributed.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as told:
        distributed.init_distributed()
    assert str(told.value) == f"environment variable {says}: start with torchrun, or unset WORLD_SIZE"
