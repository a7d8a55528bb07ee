"""A measurement in a process of its own, so that its peak of memory is its own, too.

The other process runs a module as `python -m MODULE WORDS` and prints what it found as one line of JSON.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def measure(name: str, module: str, *words: str) -> dict[str, float]:
    """What the module found. Raises ValueError with its last words when it fails; a `name` says what it was to do."""
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{name}: {(done.stderr.strip() or f'killed, status {done.returncode}').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_of_children() -> int:
    """The peak resident memory of the largest child process that has ended, in bytes; 0 if there was none."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
