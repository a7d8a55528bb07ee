"""Checkpoints, written atomically: a process killed at any moment leaves no damaged checkpoint behind.

    runs/NAME/step-000500/model.safetensors   weights, under Hugging Face's names
                          optimizer.pt        the state of the optimizers, by the name of a parameter (tensors, no code)
                          state.json          format version, step, counters, configuration, and the SHA-256 of the
                                              two files above
    runs/NAME/latest, runs/NAME/best          the name of a step folder, as text

A folder is written under another name, flushed to the disk and renamed; a pointer is replaced atomically. So a folder
is complete before a pointer names it.
"""

import contextlib
import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.shards import sync
from model import ModelConfig
from training.distributed import World, divided, whole

# Of a checkpoint. In 2, optimizer.pt had the state of a parameter under its number; 1 had no version and no training
# seconds, too. Both are still read.
FORMAT_VERSION = 3

WEIGHTS = ("model.safetensors",)
FILES = (*WEIGHTS, "optimizer.pt")
POINTERS = ("latest", "best")
STEP = re.compile(r"step-\d{6,12}")
Gathered = tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]  # weights, states of the optimizers


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another run. The message is one line."""


class Saver:
    """Saves the checkpoints of a run, and deletes old ones.

    Of several processes, the main one writes what all have gathered, in a thread: meanwhile training goes on. It writes
    one checkpoint at a time. `save` and `wait` wait for the one before, and raise its error.
    """

    def __init__(self, run: Path, keep: int, world: World) -> None:
        """keep: as of `prune`."""
        self.run, self.keep, self.main = run, keep, world.main
        self.thread = ThreadPoolExecutor(1) if world.size > 1 else None
        self.writing: Future[None] | None = None

    def save(self, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict[str, Any]) -> None:
        """Save as `save` does. All processes have to call it."""
        self.wait()  # before there is another copy of everything
        tensors = _gather(model, optimizers, keep=self.main, copy=self.thread is not None)
        if not self.main:
            return
        if self.thread:
            self.writing = self.thread.submit(self._write_and_prune, step, tensors, state)
        else:
            self._write_and_prune(step, tensors, state)

    def wait(self) -> None:
        """Wait until what was saved is on the disk. Raises CheckpointError: it could not be written."""
        if self.writing:
            writing, self.writing = self.writing, None
            writing.result()

    def _write_and_prune(self, step: int, tensors: Gathered, state: dict[str, Any]) -> None:
        _write(self.run, step, tensors, state)
        prune(self.run, self.keep)


def save(
    run: Path, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict[str, Any]
) -> Path:
    """Write run/step-NNNNNN and point `latest` at it; returns the folder. `state` must be JSON.

    Raises CheckpointError if the checkpoint cannot be written: the disk is full.
    """
    return _write(run, step, _gather(model, optimizers), state)


def _write(run: Path, step: int, tensors: Gathered, state: dict[str, Any]) -> Path:
    """A folder of that name, which `best` may name, keeps it until the new one is on the disk."""
    folder, (weights, states) = run / f"step-{step:06d}", tensors
    draft, aside = run / f".draft-{folder.name}", run / f".aside-{folder.name}"
    _tidy(run)
    try:
        draft.mkdir(parents=True)
        save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
        torch.save(states, draft / "optimizer.pt")
        shutil.copymode(draft / "optimizer.pt", draft / "model.safetensors")  # safetensors ignores the umask
        hashes = {name: _sha256(draft / name) for name in FILES}
        about = {"format_version": FORMAT_VERSION, "step": step, **state}
        (draft / "state.json").write_text(json.dumps(about | {"sha256": hashes}, indent=1))
        for path in (*draft.iterdir(), draft):
            sync(path)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(f"{folder}: cannot be saved ({one_line(error)}); earlier checkpoints are kept") from None
    if folder.exists():
        folder.rename(aside)
    draft.rename(folder)
    sync(run)
    point(run, "latest", folder)
    shutil.rmtree(aside, ignore_errors=True)
    return folder


def _gather(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], keep: bool = True, copy: bool = False
) -> Gathered:
    """The weights, and the states of the optimizers by the name of a parameter: whole, on the CPU.

    One tensor after the other, since a device may have no room for all. Empty if not `keep`; copies if `copy`.
    """
    weights, states = dict[str, Tensor](), dict[str, dict[str, Tensor]]()
    for name, tensor in model.state_dict().items():
        gathered = whole(tensor)
        if keep:
            weights[name] = gathered.to("cpu", copy=copy)
    for optimizer, name, p in _named(optimizers):
        states[name] = {}
        for key, value in optimizer.state.get(p, {}).items():
            gathered = whole(value)
            if keep:
                states[name][key] = gathered.to("cpu", copy=copy)
    return weights, states


def _tidy(run: Path) -> None:
    """Remove what a killed process left. A folder that was set aside and has no successor gets its name back."""
    for draft in run.glob(".draft-step-*"):
        shutil.rmtree(draft, ignore_errors=True)
    for aside in run.glob(".aside-step-*"):
        folder = run / aside.name.removeprefix(".aside-")
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(folder)


def point(run: Path, pointer: str, folder: Path) -> None:
    """Make run/pointer name the folder, atomically."""
    replace_file(run / pointer, folder.name + "\n")


def replace_file(path: Path, content: str) -> None:
    """Write a file, atomically: after a kill or a power cut it has its old content or the new one.

    Raises OSError with the name of the file, and then leaves nothing.
    """
    draft = path.with_name(f".draft-{path.name}")
    try:
        draft.write_text(content, encoding="utf-8")
        sync(draft)
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    sync(path.parent)


def find(run: Path, which: str) -> Path:
    """The folder of a checkpoint: "latest", "best" or "step-000500". Without a best, "best" is the latest.

    Raises CheckpointError.
    """
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such run")
    folder = _pointed(run, which) if which in POINTERS else run / which if STEP.fullmatch(which) else None
    if which == "best" and folder is None:
        folder = _pointed(run, "latest")
    if folder is None or not (folder / "state.json").is_file():
        there = ", ".join(path.name for path in folders(run)) or "none"
        raise CheckpointError(f"{run}: no checkpoint {which!r}; there are: {there}")
    return folder


def open_checkpoint(
    run: Path, which: str, warn: Callable[[str], None], verify: Sequence[str] = FILES
) -> tuple[Path, dict[str, Any]]:
    """The folder and the state of a checkpoint. Raises CheckpointError.

    If "best" or "latest" is damaged or missing, it is the newest one that is intact, and `warn` is called with one line
    that says so. verify: as of `read_state`.
    """
    try:
        folder = find(run, which)
        return folder, read_state(folder, verify)
    except CheckpointError as error:
        for folder in reversed(folders(run)) if which in POINTERS else ():
            with contextlib.suppress(CheckpointError):
                state = read_state(folder, verify)
                warn(f"{str(error).removesuffix('; use another checkpoint')}; using {folder.name}")
                return folder, state
        raise


def folders(run: Path) -> list[Path]:
    """The checkpoint folders of a run, by step."""
    return sorted((p for p in run.glob("step-*") if STEP.fullmatch(p.name)), key=lambda p: int(p.name[5:]))


def _pointed(run: Path, pointer: str) -> Path | None:
    """The folder that a pointer names; None if there is no pointer, or it is damaged, or names a missing folder."""
    try:
        name = (run / pointer).read_text().strip()
    except (OSError, ValueError):
        return None
    return run / name if STEP.fullmatch(name) and (run / name).is_dir() else None


def read_state(folder: Path, verify: Sequence[str] = FILES) -> dict[str, Any]:
    """state.json, after verifying its format, and the hashes of the files `verify`, which the caller is going to read.

    Raises CheckpointError.
    """
    path = folder / "state.json"
    try:
        state = json.loads(path.read_bytes())
        version = state.get("format_version", 1)
        if version not in range(1, FORMAT_VERSION + 1):
            newer = isinstance(version, int) and version > FORMAT_VERSION
            raise CheckpointError(
                f"{path}: format_version = {version!r}: this heed reads 1 to {FORMAT_VERSION}; "
                + ("use a newer heed" if newer else "use another checkpoint")
            )
        if type(state["step"]) is not int or not isinstance(state.get("config", {}), dict):
            raise TypeError("step must be a whole number and config an object")
        for name in verify:
            if _sha256(folder / name) != state["sha256"][name]:
                raise CheckpointError(
                    f"{folder / name}: damaged, its SHA-256 differs from state.json; use another checkpoint"
                )
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(f"{folder}: damaged checkpoint ({reason}); use another checkpoint") from None
    return state


def model_config(folder: Path, state: dict[str, Any]) -> ModelConfig:
    """The model's configuration in the `state` of the checkpoint `folder`. Raises CheckpointError."""
    try:
        return ModelConfig(**state["config"]["model"])
    except (KeyError, TypeError, ValueError) as error:  # a field that this heed does not have, or a value of its own
        raise CheckpointError(f"{folder / 'state.json'}: config.model does not fit this heed: {error}") from None


def load_weights(folder: Path, model: nn.Module, *, grow: bool = False) -> None:
    """Load the weights into the model; names and shapes must match. Raises CheckpointError.

    grow: the model's vocabulary may be larger. New rows of the embedding and the head are the mean of the old ones, so
    a new token starts as likely as an average one (Hewitt 2021, "Initializing New Word Embeddings").
    """
    try:
        weights = load_file(folder / "model.safetensors")
        for name in ("model.embed_tokens.weight", "lm_head.weight") if grow else ():
            if name in weights:
                old = weights[name]  # (V, C)
                more = max(0, model.get_parameter(name).shape[0] - len(old))
                weights[name] = torch.cat((old, old.mean(0, keepdim=True).expand(more, -1)))
        own = model.state_dict()
        model.load_state_dict({name: divided(w, own[name]) if name in own else w for name, w in weights.items()})
    except (SafetensorError, RuntimeError) as error:
        path = folder / "model.safetensors"
        raise CheckpointError(f"{path}: does not fit this model: {one_line(error)}") from None


def load_optimizers(folder: Path, optimizers: list[torch.optim.Optimizer]) -> None:
    """Load the state of the optimizers; their settings stay those of the configuration. Raises CheckpointError."""
    try:
        saved = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu", mmap=True)
        if isinstance(saved, list):
            saved = _by_name(saved, optimizers)
        if saved.keys() != {name for _, name, _ in _named(optimizers)}:
            raise ValueError("other parameters")
        for optimizer in optimizers:
            state: dict[int, dict[str, Tensor]] = {}
            for number, (_, name, p) in enumerate(_named([optimizer])):
                for key, value in saved[name].items():  # in a file that is mapped: a process reads its own rows
                    if value.ndim and value.shape != p.shape:
                        raise ValueError(f"{key} of {name} is {tuple(value.shape)}, not {tuple(p.shape)}")
                    part = divided(value, p) if value.ndim else value
                    state.setdefault(number, {})[key] = part.clone()
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    except (ValueError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        path = folder / "optimizer.pt"
        raise CheckpointError(f"{path}: does not fit the optimizers of this run: {one_line(error)}") from None


def _named(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[tuple[torch.optim.Optimizer, str, nn.Parameter]]:
    """Every parameter of the optimizers, with its name."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                yield optimizer, name, p


def _by_name(saved: list[dict[str, Any]], optimizers: list[torch.optim.Optimizer]) -> dict[str, dict[str, Any]]:
    """optimizer.pt of format 2 as one of today: the n-th state is that of the n-th parameter."""
    states = {}
    for optimizer, old in zip(optimizers, saved, strict=True):
        numbers = [number for group in old["param_groups"] for number in group["params"]]
        for number, (_, name, _) in zip(numbers, _named([optimizer]), strict=True):
            states[name] = old["state"].get(number, {})
    return states


def prune(run: Path, keep: int) -> None:
    """Delete all checkpoints but the latest `keep` and those that a pointer names."""
    named = {_pointed(run, pointer) for pointer in POINTERS}
    for folder in folders(run)[:-keep]:
        if folder not in named:
            shutil.rmtree(folder)


def one_line(error: BaseException) -> str:
    """The message of an error, or its type, in one line of at most 200 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
