"""TensorBoard: `train.tensorboard = true` writes the records of metrics.jsonl to runs/NAME/tensorboard, too.

tensorboard --logdir runs
"""

import importlib.util
from pathlib import Path

from training.config import ConfigError, TrainConfig

FOLDER = "tensorboard"


def check_installed(config: TrainConfig) -> None:
    """Raise ConfigError if TensorBoard is asked for and missing: before training, not after an hour."""
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "train.tensorboard = True: needs the package tensorboard, which is not installed: pip install -c "
            "requirements.txt -e '.[tensorboard]'"
        )


class TensorBoard:
    """Writes scalars under the names that they have in metrics.jsonl."""

    def __init__(self, run: Path, step: int) -> None:
        """Scalars after `step`, which a resumed run computes again, are no longer shown."""
        from torch.utils.tensorboard import SummaryWriter  # imports tensorboard

        self.writer = SummaryWriter(run / FOLDER, purge_step=step + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Wait until what was logged is in the files. A kill takes the writer's queue, and where TensorFlow is
        installed all of the last two minutes."""
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()
