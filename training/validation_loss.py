"""The validation loss."""

import itertools

import torch

from data.loader import validation
from data.mixture import AnyShards
from kernels.reference_attention import IGNORE_INDEX
from model import GPT
from training.config import Config
from training.device import Machine
from training.distributed import World
from training.graceful_exit import GracefulExit

CHECK_EVERY = 8  # batches of a process between two checks for a signal, with several processes


@torch.no_grad()  # what fully_shard gathers first in inference mode could not be trained
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
    together. Those with the same sequences (context parallelism) have the same batches, each for some of the targets.
    """
    model.eval()
    total, check_every = 0.0, 1 if world.size == 1 else CHECK_EVERY
    batches = (
        (weight * text.num_targets / part.num_targets, inputs, targets)
        for part, weight in text.parts
        for inputs, targets in validation(part, config.model.context, config.train.micro_batch_size, eot)
    )
    try:
        for number, group in enumerate(iter(lambda: list(itertools.islice(batches, world.data_size)), [])):
            if stop and number % check_every == 0 and sum(world.all_reduce_sum([stop.requested], machine.device)):
                return None
            factor, inputs, targets = group[min(world.data_rank, len(group) - 1)]
            if world.data_rank >= len(group):  # none is left for this process, but all make as many forward passes
                targets = torch.full_like(targets, IGNORE_INDEX)
            with machine.autocast():
                total += factor * float(model.loss(inputs.to(machine.device), targets.to(machine.device)))
        return world.all_reduce_sum([total], machine.device)[0] / text.num_targets
    finally:
        model.train()
