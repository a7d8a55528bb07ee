"""`--init-from RUN`: start a run from another run's weights. `--resume` keeps what the run was started from.

From RUN come the weights, the tokenizer (the text is tokenized with it) and the shape of the model. The new run keeps
its own context and dropouts, which fit any weights except learned positions, and starts at step 0 with new optimizers.
"""

import dataclasses
from pathlib import Path

from model import ModelConfig
from training import checkpoint, run_folder
from training.checkpoint import CheckpointError
from training.config import Config, ConfigError

FREE = ("context", "dropout", "attention_dropout")  # fields of [model] that the new run decides


def config_for_init(config: Config, run: Path, given: dict[str, str]) -> Config:
    """The configuration with the model and the tokenizer of `config.init_from`.

    given: overrides of the command line, {"model.n_layer": "8"}. A shape or tokenizer that differs from the other
    run's is an error there; in the recipe it is ignored. Raises ConfigError and CheckpointError.
    """
    folder = resolve_checkpoint(config.init_from)
    if folder.parent.resolve() == run.resolve():
        raise ConfigError(f"--init-from {config.init_from}: is the run itself; choose another --name")
    state = checkpoint.read_state(folder, verify=checkpoint.WEIGHTS)
    taken = _take(config, checkpoint.model_config(folder, state), folder.parent)
    for section, _, name in (dotted.partition(".") for dotted in given):
        if section == "model" or (section, name) == ("data", "tokenizer"):
            asked, has = (getattr(getattr(c, section), name) for c in (config, taken))
            if asked != has:
                free = ", ".join(f"model.{f}" for f in FREE)
                raise ConfigError(f"--{section}.{name} {asked}: {config.init_from} has {has}; only {free} may differ")
    return taken


def config_for_resume(config: Config, run: Path, given: dict[str, str]) -> Config:
    """The configuration of a resumed run, with what was decided when it started.

    That is the dtype, which a measurement may have chosen: resuming is exact. And the run that its weights came from,
    which may no longer exist. A run that was killed before its first checkpoint begins again.
    """
    if run_folder.unstarted(run):
        return config_for_init(config, run, given) if config.init_from else config
    latest, state = checkpoint.open_checkpoint(run, "latest", warn=lambda _: None, verify=())  # train.py verifies
    try:
        then, dtype = state["config"], state["dtype"]
        init_from = then.get("init_from", "")
    except (KeyError, AttributeError) as error:
        raise CheckpointError(f"{latest / 'state.json'}: is incomplete: {error} is missing") from None
    if config.train.dtype == "auto":
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype=dtype))
    if config.init_from not in ("", init_from):
        began = f"from {init_from}" if init_from else "from random weights"
        raise CheckpointError(f"runs/{run.name} cannot resume from {config.init_from}: it started {began}")
    if not init_from:
        return config
    return _take(dataclasses.replace(config, init_from=init_from), checkpoint.model_config(latest, state), run)


def _take(config: Config, shape: ModelConfig, run: Path) -> Config:
    """The configuration with a run's tokenizer and model, FREE fields excepted."""
    free = {name: getattr(config.model, name) for name in FREE}
    if shape.positions == "learned" and config.model.context != shape.context:
        why = f"{run} has learned positions, of a context of {shape.context}"
        raise ConfigError(f"model.context = {config.model.context}: {why}")
    model = dataclasses.replace(shape, **free)
    data = dataclasses.replace(config.data, tokenizer=str(run / "tokenizer.json"))
    return dataclasses.replace(config, model=model, data=data)


def resolve_checkpoint(init_from: str) -> Path:
    """The checkpoint folder of `RUN` (its best), `RUN@latest` or `RUN@step-000500`. Raises CheckpointError."""
    run, _, which = init_from.partition("@")
    try:
        return checkpoint.find(Path(run), which or "best")
    except CheckpointError as error:
        raise CheckpointError(f"--init-from {init_from}: {error}") from None
