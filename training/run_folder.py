"""The folder of a run, runs/NAME/: what may be deleted for a new run, and what a resumed run may change.

heed deletes only what it wrote. A folder with anything else in it is refused.
"""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

from data.tokenizer import Tokenizer
from model import ModelConfig
from training import checkpoint
from training.checkpoint import CheckpointError
from training.config import Config
from training.config_files import dump

OWN = re.compile(
    r"config\.toml|tokenizer\.json|tokenizer_config\.json|metrics\.jsonl|metrics\.damaged\.jsonl|loss\.png|latest|best"
    r"|wandb|tensorboard|attention\.(png|html)|step-\d+|\.(draft|aside)-(step-\d+|config\.toml|metrics\.jsonl|loss\.png|latest|best|pointer-\w+)"
)
# what a batch, its loss or the saved state depends on
FIXED = ("train.seed", "train.batch_tokens", "optim.optimizer", "data.document_mask")


def has_checkpoint(run: Path) -> bool:
    """Whether there is a checkpoint to continue from, intact or not."""
    return (run / "latest").exists() or bool(checkpoint.folders(run))


def unstarted(run: Path) -> bool:
    """Whether the folder is that of a run that was killed before its first checkpoint."""
    return run.is_dir() and not has_checkpoint(run) and not _foreign(run)


def check_overwrite(run: Path, overwrite: bool) -> None:
    """Raise CheckpointError if the folder holds what heed did not write, or a checkpoint and `overwrite` is false."""
    if run.exists() and not run.is_dir():
        raise CheckpointError(f"{run}: is not a folder; --name starts another run")
    if has_checkpoint(run) and not overwrite:
        raise CheckpointError(
            f"runs/{run.name} exists: --resume continues it, --overwrite replaces it, --name starts another"
        )
    if foreign := _foreign(run):
        raise CheckpointError(
            f"runs/{run.name} holds {foreign[0]!r}, which is not of a run of heed: nothing is deleted; --name starts "
            "another run"
        )


def _foreign(run: Path) -> list[str]:
    """What heed did not write, in a folder; everything, if the folder is not of a run."""
    names = sorted(path.name for path in run.iterdir()) if run.is_dir() else []
    own = [name for name in names if OWN.fullmatch(name)]
    if has_checkpoint(run) or all(name.startswith(".") for name in own) or _is_config(run / "config.toml"):
        return [name for name in names if name not in own]
    return names


def _is_config(path: Path) -> bool:
    """Whether a file is the config.toml of a run: the first file that a run writes, and the last that is deleted."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return text.startswith("name = ") and all(f"\n[{section}]\n" in text for section in ("model", "data", "train"))


def start(run: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Make the folder, in place of an older run's files. Call `check_overwrite` first."""
    run.mkdir(parents=True, exist_ok=True)
    names = [path.name for path in run.iterdir() if OWN.fullmatch(path.name)]
    for name in sorted(names, key=lambda name: (name not in checkpoint.POINTERS, name == "config.toml")):
        if (run / name).is_dir() and not (run / name).is_symlink():
            shutil.rmtree(run / name)
        else:
            (run / name).unlink()
    checkpoint.replace_file(run / "config.toml", dump(config))
    tokenizer.save(run / "tokenizer.json")


def check_resume(run: Path, state: dict[str, Any], identity: dict[str, Any], config: Config) -> str:
    """One line about what the configuration changes in a resumed run, "" if nothing.

    state: of the checkpoint; identity: model, tokenizer and text, which must be those of the checkpoint, as must be the
    fields FIXED. Raises CheckpointError.
    """
    try:
        then = state["identity"]
        refused = [
            f"model.{k} was {v!r}, is {identity['model'].get(k)!r}"
            for k, v in (vars(ModelConfig()) | then["model"]).items()  # a new field had its default
            if identity["model"].get(k) != v
        ]
        for part in ("tokenizer", "text"):
            if then[part] != identity[part]:
                refused.append(f"the {part}'s hash was {then[part][:12]}, is {identity[part][:12]}")
        if then["text"] != identity["text"]:
            data = {k: v for k, v in dataclasses.asdict(config.data).items() if k != "sources"}
            saved = state["config"]["data"]
            refused += [f"data.{k} was {saved[k]!r}, is {v!r}" for k, v in data.items() if saved.get(k, v) != v]
        changed = {
            f"{section}.{name}": (was, now)
            for section in ("optim", "train")
            for name, now in dataclasses.asdict(getattr(config, section)).items()
            if (was := state["config"][section].get(name, now)) != now
        }
        masked = state["config"]["data"].get("document_mask", False)  # of data the rest is in the text's hash
        if masked != config.data.document_mask:
            changed["data.document_mask"] = (masked, config.data.document_mask)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"runs/{run.name}: state.json is incomplete: {checkpoint.one_line(error)}") from None
    refused += [f"{name} was {changed[name][0]!r}, is {changed[name][1]!r}" for name in FIXED if name in changed]
    if refused:
        raise CheckpointError(f"runs/{run.name} cannot be resumed: {'; '.join(refused)}")
    if 0 < config.train.steps < state["step"]:
        raise CheckpointError(
            f"train.steps = {config.train.steps}: runs/{run.name} has made {state['step']} steps already"
        )
    if changed.get("train.dtype") == ("auto", state["dtype"]):
        del changed["train.dtype"]  # what was measured when the run started, see init_from.py
    return ", ".join(f"{name} {was} -> {now}" for name, (was, now) in changed.items())
