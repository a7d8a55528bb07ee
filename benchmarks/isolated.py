"""A measurement in a process of its own, so that its peak of memory is its own, too.

The other process runs a module as `python -m MODULE WORDS` and prints what it found as one line of JSON.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STATUS = Path("/proc/self/status")


def measure(name: str, module: str, *words: str) -> dict[str, float]:
    """What the module found. Raises ValueError with its last words when it fails; a `name` says what it was to do."""
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{name}: {(done.stderr.strip() or f'killed, status {done.returncode}').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak() -> int:
    """The most resident memory that this process has had, in bytes; 0 where the system does not tell.

    From Linux itself where it can be: there getrusage() begins with the peak of the process that started this one.
    """
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return _used("RUSAGE_SELF")


def peak_of_children() -> int:
    """The same of the largest process that this one has started and seen end; 0 if there was none."""
    return _used("RUSAGE_CHILDREN")


def _used(whose: str) -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    used = resource.getrusage(getattr(resource, whose)).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
