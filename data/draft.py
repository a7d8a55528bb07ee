"""Drafts: a folder of the cache is filled under a temporary name, and renamed when it is complete.

A process killed at any time leaves no folder that looks complete. It leaves its draft, `.tmp-<name>-<random>`, and the
next process that needs the folder continues there. A draft is locked by its process, and the lock ends with it.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.shards import is_complete, sync
from data.sources import CorpusError
from data.tokenizer import TokenizerError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

KEPT = 7 * 86_400  # seconds that a draft is kept which nobody continues
PROGRESS = "progress.json"


def cached(folder: Path, fill: Callable[[Path], None]) -> Path:
    """The folder itself; if it is not complete, `fill` fills a draft, which becomes the folder.

    If `fill` fails, its draft is removed, unless it saved progress in the text or was interrupted.
    """
    if is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft, lock = claim(folder)
    try:
        if not is_complete(folder):  # another process may have been faster
            fill(draft)
            (draft / PROGRESS).unlink(missing_ok=True)
            publish(draft, folder)
        shutil.rmtree(draft, ignore_errors=True)
    except (CorpusError, TokenizerError, OSError):
        if "pieces" not in load_progress(draft):
            shutil.rmtree(draft, ignore_errors=True)
        raise
    finally:
        _unlock(lock)
    return folder


def claim(folder: Path) -> tuple[Path, int | None]:
    """A draft of `folder` that no other process uses, and its lock, to be closed: a left draft, else a new one."""
    for draft in sorted(folder.parent.glob(".tmp-*")):
        try:
            age, lock = time.time() - draft.stat().st_mtime, _lock(draft)
        except (BlockingIOError, FileNotFoundError):
            continue
        if lock is not None and draft.name.startswith(f".tmp-{folder.name}-"):
            return draft, lock
        if age > KEPT:
            shutil.rmtree(draft, ignore_errors=True)
        _unlock(lock)
    while True:
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".tmp-{folder.name}-"))
        with contextlib.suppress(BlockingIOError):  # another process was faster
            return draft, _lock(draft)


def _lock(draft: Path) -> int | None:
    """Lock a draft; None where files cannot be locked: there, no draft is continued.

    Raises BlockingIOError if another process has it, FileNotFoundError if it was renamed.
    """
    if fcntl is None:
        return None
    lock = os.open(draft, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        draft.stat()
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError | FileNotFoundError):
            raise
        return None
    return lock


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def publish(draft: Path, folder: Path) -> None:
    """Rename the complete draft atomically. If another process was faster, its folder stays."""
    draft.chmod(0o755)
    for path in (*draft.iterdir(), draft):
        sync(path)
    if folder.exists() and not is_complete(folder):
        broken = draft.with_suffix(".broken")
        folder.rename(broken)
        shutil.rmtree(broken, ignore_errors=True)
    try:
        draft.rename(folder)
    except OSError:
        if not is_complete(folder):
            raise
    sync(folder.parent)


def empty(draft: Path) -> None:
    """Delete everything in a draft."""
    for path in draft.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def load_progress(draft: Path) -> dict[str, Any]:
    """What was saved last in a draft; {} if nothing, or if it is damaged."""
    try:
        sha256, _, content = (draft / PROGRESS).read_text().partition("\n")
    except (OSError, ValueError):
        return {}
    return json.loads(content) if sha256 == hashlib.sha256(content.encode()).hexdigest() else {}


def save_progress(draft: Path, progress: dict[str, Any]) -> None:
    """Replace the progress of a draft atomically."""
    new = draft / f"{PROGRESS}.new"
    content = json.dumps(progress)
    new.write_text(f"{hashlib.sha256(content.encode()).hexdigest()}\n{content}")
    sync(new)
    new.replace(draft / PROGRESS)
    sync(draft)
