"""Measurements in a separate process, for a separate peak of memory.

The process runs a module as `python -m MODULE WORDS` and prints its results as one line of JSON.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def measure(name: str, module: str, *words: str) -> dict[str, float]:
    """Run the module and return its results. Raises ValueError with `name` and the last line of stderr if it fails."""
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{name}: {(done.stderr.strip() or f'killed, status {done.returncode}').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_of_children() -> int:
    """The peak resident memory of the largest finished child process in bytes, 0 if there is none."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
