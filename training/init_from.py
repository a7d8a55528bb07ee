"""Where a run begins: `--init-from RUN` takes another run's weights, and `--resume` remembers where that was.

Taken from RUN: its weights, its tokenizer (the text is prepared with it) and the shape of its model. The run's own:
context and dropout, which are how it trains and fit any weights; the optimizers, which begin anew; and step 0.
"""

import dataclasses
from pathlib import Path
from typing import Any

from model import ModelConfig
from training import checkpoint
from training.checkpoint import CheckpointError
from training.config import Config, ConfigError

FREE = ("context", "dropout")  # what --init-from leaves of the model section to the recipe and the flags


def inherited(config: Config, run: Path, given: dict[str, str]) -> Config:
    """The configuration with the model and the tokenizer of config.init_from.

    given: what the command line says, {"model.n_layer": "8"}; a shape or a tokenizer that is not the other run's is
    refused there, while a recipe's is passed over. Raises ConfigError, CheckpointError.
    """
    folder = source(config.init_from)
    if folder.parent.resolve() == run.resolve():
        raise ConfigError(f"--init-from {config.init_from}: is this run itself; another --name keeps both")
    taken = _take(config, checkpoint.read_state(folder)["config"]["model"], folder.parent)
    for section, _, name in (dotted.partition(".") for dotted in given):
        if section == "model" or (section, name) == ("data", "tokenizer"):
            asked, has = (getattr(getattr(c, section), name) for c in (config, taken))
            if asked != has:
                free = " and ".join(f"model.{f}" for f in FREE)
                raise ConfigError(f"--{section}.{name} {asked}: {config.init_from} has {has}; only {free} may differ")
    return taken


def remembered(config: Config, run: Path) -> Config:
    """The configuration of a run that goes on, with what was decided when it began: the precision that a measurement
    chose, since resuming is exact, and where its weights came from, which need not be there any more."""
    then = (state := checkpoint.read_state(checkpoint.find(run, "latest")))["config"]
    if config.train.dtype == "auto":
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype=state["dtype"]))
    init_from = then.get("init_from", "")
    if config.init_from not in ("", init_from):
        began = f"from {init_from}" if init_from else "with random weights"
        raise CheckpointError(f"runs/{run.name} cannot go on from {config.init_from}: it began {began}")
    return _take(dataclasses.replace(config, init_from=init_from), then["model"], run) if init_from else config


def _take(config: Config, shape: dict[str, Any], run: Path) -> Config:
    """The configuration with a run's model, all but what is FREE, and with its tokenizer."""
    free = {name: getattr(config.model, name) for name in FREE}
    model = dataclasses.replace(ModelConfig(**shape), **free)
    data = dataclasses.replace(config.data, tokenizer=str(run / "tokenizer.json"))
    return dataclasses.replace(config, model=model, data=data)


def source(init_from: str) -> Path:
    """The checkpoint that `RUN` (its best) or `RUN@latest`, `RUN@step-000500` means. Raises CheckpointError."""
    run, _, which = init_from.partition("@")
    try:
        return checkpoint.find(Path(run), which or "best")
    except CheckpointError as error:
        raise CheckpointError(f"--init-from {init_from}: {error}") from None
