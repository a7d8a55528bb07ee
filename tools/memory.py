"""How much memory a process has taken."""

import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak() -> int:
    """The most resident memory that this process has had, in bytes.

    From Linux itself where it can be: there getrusage() also counts what the process that started this one had.
    """
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return _used("RUSAGE_SELF")


def peak_of_children() -> int:
    """The same of the largest process that this one has started and seen end; 0 if there was none."""
    return _used("RUSAGE_CHILDREN")


def _used(whose: str) -> int:
    import resource  # which Windows does not have

    used = resource.getrusage(getattr(resource, whose)).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
