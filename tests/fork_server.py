"""Runs heed's commands in forked processes: a process needs three seconds to import torch, its fork none.

`ForkServer` starts `python -m tests.fork_server`, which reads one JSON object per line: {"argv", "log", "runs"}, with
"program" (train, sample or a module such as convert), "kill" [signal, call] and "limit" (bytes) as options. It answers
with the exit status, as one line: -9 after SIGKILL.

`kill` sends a signal to the process itself at the start of that many function calls, of Python and C functions: every
moment of a run can be named, and is the same on every machine. `limit` is the size that no file may exceed, as on a
full disk.
"""

import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401  # what the commands import later takes seconds, too
import torch
import torch._dynamo

import sample
import train

ROOT = Path(__file__).resolve().parent.parent
HANGS = 120  # seconds after which a command is ended: every case takes a few


class ForkServer:
    """The other end: a server that runs one command after another."""

    def __init__(self, where: Path, environment: dict[str, str]) -> None:
        self.where = where
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"], cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout and self.process.stdout.readline() == "ready\n"

    def run(self, *argv: str, runs: Path | None = None, **options: Any) -> tuple[int, str]:
        """Exit status and output of a command, with the folder `runs` as runs/."""
        assert self.process.stdin and self.process.stdout
        log = self.where / "log"
        request = {"argv": argv, "log": str(log), "runs": str(runs or self.where / "runs"), **options}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), log.read_text(errors="replace")

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    """Answer requests until the input ends."""
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if (pid := os.fork()) == 0:
            run(request)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run(request: dict[str, Any]) -> None:
    """The forked process: run the command and exit as the interpreter would."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(HANGS)
    if limit := request.get("limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os.environ["HEED_RUNS"] = request["runs"]  # for sample.py, which is run from its file
    train.RUNS = sample.RUNS = Path(request["runs"])
    code, program = 1, request.get("program", "train")
    try:
        sys.argv = [f"{program}.py", *request["argv"]]
        count = Calls(*request.get("kill") or (0, 0))
        sys.setprofile(count if "kill" in request else None)
        if program == "train":
            train.main()
        elif program == "sample":
            runpy.run_path("sample.py", run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__")
        sys.setprofile(None)
        if "kill" in request:
            print(f"calls: {count.made}")
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.setprofile(None)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Calls:
    """A profiler that counts calls and sends this process a signal at number `at`."""

    def __init__(self, number: int, at: int) -> None:
        self.number, self.at, self.made = number, at, 0

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        if event == "call" or event == "c_call":
            self.made += 1
            if self.made == self.at:
                os.kill(os.getpid(), self.number)


if __name__ == "__main__":
    main()
