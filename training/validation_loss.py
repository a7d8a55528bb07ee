"""The validation loss."""

import torch

from data.loader import validation
from data.mixture import AnyShards
from model import GPT
from training.config import Config
from training.device import Machine
from training.distributed import World
from training.graceful_exit import GracefulExit

CHECK_EVERY = 8  # batches of a process between two checks for a signal, with several processes


@torch.inference_mode()
def validate(
    model: GPT,
    text: AnyShards,
    config: Config,
    world: World,
    machine: Machine,
    eot: int,
    stop: GracefulExit | None = None,
) -> float | None:
    """Mean loss over all targets of a text, in nats/token; None if `stop` was requested meanwhile.

    For a mixture, the mean of its sources' losses with their weights. The processes share the batches, and stop
    together. Raises DistributedError.
    """
    model.eval()
    total, check_every = 0.0, 1 if world.size == 1 else CHECK_EVERY * world.size
    batches = (
        (weight * text.num_targets / part.num_targets, inputs, targets)
        for part, weight in text.parts
        for inputs, targets in validation(part, config.model.context, config.train.micro_batch_size, eot)
    )
    try:
        for number, (factor, inputs, targets) in enumerate(batches):
            if stop and number % check_every == 0 and sum(world.all_reduce_sum([stop.requested], machine.device)):
                return None
            if number % world.size == world.rank:
                with machine.autocast():
                    total += factor * float(model.loss(inputs.to(machine.device), targets.to(machine.device)))
        return world.all_reduce_sum([total], machine.device)[0] / text.num_targets
    finally:
        model.train()
