"""Prepares a text in processes that are killed: `python -m tests.data.kills TEXT CACHE CALL ...`.

Each process is a fork that sends itself SIGKILL at the start of that many function calls, of Python and C functions in
its main thread; 0 is no kill. So the moments are the same on every machine. Prints a line for each, until one ends:
the exit status and what the process said, at the end its number of calls.
"""

import os
import signal
import sys
from pathlib import Path

import data.prepare as module
from data import encoding

module.BATCH, module.SAVE_EVERY, encoding.SMALL = 20_000, 2, 1


def run(text: str, cache: str, kill: int, out: int) -> None:
    """The forked process."""
    made = 0

    def count(*_: object) -> None:
        nonlocal made
        made += 1
        if made == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def log(line: str) -> None:
        os.write(out, f"{line.rstrip()}; ".encode())

    sys.setprofile(count)
    module.prepare(text, vocab_size=400, val_fraction=0.2, cache=Path(cache), processes=2, log=log)
    sys.setprofile(None)
    log(f"calls: {made}")
    os._exit(0)


def main(text: str, cache: str, *kills: str) -> None:
    """Run one process after the other."""
    for kill in map(int, kills):
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            run(text, cache, kill, write)
        os.close(write)
        _, status = os.waitpid(pid, 0)
        with open(read) as said:
            print(os.waitstatus_to_exitcode(status), said.read(), flush=True)
        if status == 0:
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
