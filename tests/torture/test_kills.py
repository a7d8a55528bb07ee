"""A run that is killed again and again ends as one that was not: the same weights, losses and records, bit for bit.

The moments are numbers of function calls, drawn from a seed: start-up, steps, saves, evaluations, pictures. They are
the same on every machine and do not depend on its speed. When checkpoints are written by time, the clock decides how
much work a kill loses, and must not decide anything else.
"""

import random
import re
import shutil
import signal

import pytest

from tests.conftest import SMALL
from training import checkpoint, metrics

EXACT = ("step", "loss", "grad_norm", "lr", "val_loss", "val_bpb", "full_val_loss", "full_val_bpb")
WORDS = (
    "--train.device=cpu", "--train.num_evals=3", "--train.eval_tokens=500", "--model.dropout=0.1",
    "--data.tokenizer=byte", "--model.n_layer=1",
)  # fmt: skip
LOST = 0.2  # of the kills are SIGTERM; the others are SIGKILL


def outcome(run):
    """What must be equal: weights, optimizer state, and the records without rates and seconds."""
    folder = checkpoint.find(run, "latest")
    records = [{k: r[k] for k in EXACT if k in r} for r in metrics.read(run / "metrics.jsonl")]
    best = checkpoint.find(run, "best").name
    return (folder / "model.safetensors").read_bytes(), (folder / "optimizer.pt").read_bytes(), records, best


def flags(text, steps, save_minutes):
    small = [word for word in SMALL if not word.startswith(("--train.save_minutes", "--data.vocab", "--model.n_layer"))]
    own = (f"--data.source={text}", f"--train.steps={steps}", f"--train.save_minutes={save_minutes}")
    return ["shakespeare", "--name=run", *small, *WORDS, *own]


def survive(server, text, runs, steps, save_minutes, kills, seed):
    """Kill a run `kills` times while it is resumed; compare it with an undisturbed one."""
    words, number = flags(text, steps, save_minutes), random.Random(seed)
    status, said = server.run(*words, runs=runs / "whole", kill=[0, 0])
    assert status == 0, said
    calls = int(re.findall(r"calls: (\d+)", said)[-1])
    made, run = {signal.SIGKILL: 0, signal.SIGTERM: 0}, runs / "killed" / "run"
    while True:
        resume = ["--resume"] if run.exists() else []
        if sum(made.values()) == kills:
            status, said = server.run(*words, *resume, runs=runs / "killed")
            assert status == 0, said
            break
        how = signal.SIGTERM if number.random() < LOST else signal.SIGKILL
        at = number.randrange(1, max(2, 3 * calls // kills) if number.random() < 0.7 else calls // 3)
        status, said = server.run(*words, *resume, runs=runs / "killed", kill=[how, at])
        assert status in (0, -how, 128 + how), f"killed by {how} at call {at}, {made}: {status}\n{said}"
        assert "Traceback" not in said, said
        if status:
            made[how] += 1
        else:  # it ended before it was killed: begin another one
            assert outcome(run) == outcome(runs / "whole" / "run")
            shutil.rmtree(run)
    assert outcome(run) == outcome(runs / "whole" / "run")
    print(f"{sum(made.values())} kills survived ({made[signal.SIGKILL]} SIGKILL, {made[signal.SIGTERM]} SIGTERM)")


@pytest.mark.parametrize(("save_minutes", "kills"), [(0, 8), (1e-9, 8)])
def test_kills(server, text, tmp_path, save_minutes, kills):
    survive(server, text, tmp_path, 60, save_minutes, kills, seed=kills)


@pytest.mark.full
@pytest.mark.parametrize(("save_minutes", "kills"), [(0, 50), (0.001, 100), (1e-9, 100)])
def test_many_kills(server, text, tmp_path, save_minutes, kills):
    survive(server, text, tmp_path, 300, save_minutes, kills, seed=kills + int(1e3 * save_minutes))


def test_a_kill_at_every_stage_of_a_save(server, text, tmp_path):
    """A fixed grid over the calls of a short run, start-up and end included."""
    words = flags(text, 4, 1e-9)
    status, said = server.run(*words, runs=tmp_path / "whole", kill=[0, 0])
    assert status == 0, said
    calls = int(re.findall(r"calls: (\d+)", said)[-1])
    for number in range(1, 7):
        runs = tmp_path / f"killed-{number}"
        status, said = server.run(*words, runs=runs, kill=[signal.SIGKILL, calls * number // 7])
        assert status == -signal.SIGKILL, said
        resume = ["--resume"] if (runs / "run").exists() else []
        status, said = server.run(*words, *resume, runs=runs)
        assert status == 0, said
        assert outcome(runs / "run") == outcome(tmp_path / "whole" / "run")
