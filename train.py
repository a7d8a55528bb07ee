"""heed's training, one loop read from top to bottom: `python train.py shakespeare`.

    python train.py                                  lists the recipes
    python train.py RECIPE --model.n_layer 8         RECIPE is a name in configs/ or a path; every field can be changed
    python train.py RECIPE --resume                  goes on where the run stopped
    torchrun --nproc-per-node 8 train.py RECIPE      the same run on several devices

A run is a folder, runs/NAME/: config.toml, tokenizer.json, metrics.jsonl, loss.png and checkpoints. Every step is a
function of (seed, step) and the saved state alone: a run that was killed and resumed equals one that was not, on a CPU
bit for bit.
"""

import argparse
import dataclasses
import difflib
import math
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from data import chat_format
from data.loader import IGNORE, Conversations, Loader, validation
from data.prepare import prepare
from data.shards import ShardError, Shards
from data.sources import CorpusError
from data.tokenizer import Tokenizer, TokenizerError
from model import GPT
from sample import RUNS, speak
from training import checkpoint, device, distributed, fused, init_from, metrics
from training.checkpoint import CheckpointError
from training.config import SECTIONS, Config, ConfigError
from training.flops import count_parameters, flops_per_token
from training.optimizers import build_optimizers, schedule, set_learning_rate
from training.recipes import documentation, dump, fields, load, recipes

# Steps of a run with a budget in minutes before their number is settled, the first few not counted, and then between
# one settling and the next.
TIMED_STEPS, SETTLED_EVERY = 12, 50


def train(config: Config, resume: bool, overwrite: bool) -> None:
    """One run, from the configuration to the last checkpoint."""

    # 1. The machine: who computes, how exactly, and why -------------------------------------------------------------

    world = distributed.join()
    say = metrics.say if world.main else lambda _: None
    run = RUNS / config.name
    if world.main and not resume:
        refuse_overwriting(run, overwrite)
    machine = device.choose(config.train, world.local_rank)
    for line in machine.why:
        say(line)

    # 2. The text, as batches of tokens ------------------------------------------------------------------------------

    text = prepare(**dataclasses.asdict(config.data)) if world.main else None
    world.barrier()  # the others find in the cache what the main process made
    text = text or prepare(**dataclasses.asdict(config.data))
    train_text, val_text = Shards(text, "train"), Shards(text, "val")
    tokenizer = Tokenizer.load(text / "tokenizer.json")
    answers = f", {train_text.counted:,} and {val_text.counted:,} of them in answers" if train_text.chat else ""
    say(
        f"text {config.data.source}: {train_text.tokens:,} tokens to train on, {val_text.tokens:,} to validate on"
        f"{answers} ({val_text.bytes:,} bytes); {tokenizer.kind} tokenizer of {tokenizer.vocab_size:,}"
    )

    # 3. The model and its batch: stated in tokens, whatever the devices ---------------------------------------------

    config = with_vocabulary(config, tokenizer)
    context, micro, share = config.model.context, *split_batch(config, world.size)
    torch.manual_seed(config.train.seed)
    model = GPT(config.model).to(machine.device)
    model.model.recompute = config.train.recompute
    if note := fused.hasten(model, machine):
        say(note)
    optimizers = build_optimizers(model, config.optim, machine.dtype)
    loader = (Conversations if train_text.chat else Loader)(train_text, context=context, seed=config.train.seed)
    sequences = share * world.size
    say(
        f"model {count_parameters(config.model):,} parameters, {flops_per_token(config.model) / 1e6:,.1f} MFLOP a token"
    )
    if config.init_from and not resume:
        checkpoint.load_weights(origin := init_from.source(config.init_from), model, grow=True)
        say(f"weights {origin}, to be trained further")
    say(
        f"batch {config.train.batch_tokens:,} tokens = {world.size} devices x {share // micro} micro-batches "
        f"x {micro} sequences x {context} tokens"
    )

    # 4. The run's folder: new, or where it stopped ------------------------------------------------------------------

    identity = {"model": dataclasses.asdict(config.model), "tokenizer": tokenizer.sha256, "text": text.name}
    step, steps = 0, config.train.steps
    if resume:
        folder = checkpoint.find(run, "latest")
        state = checkpoint.read_state(folder)
        refuse_changes(run, state["identity"], identity)
        checkpoint.load_weights(folder, model)
        checkpoint.load_optimizers(folder, optimizers)
        step, steps = state["step"], config.train.steps or state["steps"]
        say(f"resumed {folder}, {steps - step if steps else 'an unknown number of'} steps to go")
    elif world.main:
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        (run / "config.toml").write_text(dump(config))
        tokenizer.save(run / "tokenizer.json")
    record = metrics.Metrics(run, step, config.train.wandb, dataclasses.asdict(config)) if world.main else None
    world.barrier()  # all read the same records
    validated = {r["step"]: r["val_loss"] for r in metrics.read(run / "metrics.jsonl") if "val_loss" in r}

    # 5. The loop ----------------------------------------------------------------------------------------------------

    saved = step if resume else -1

    def save() -> None:
        nonlocal saved
        if world.main and saved != step:
            dtype = str(machine.dtype).removeprefix("torch.")
            state = {"steps": steps, "dtype": dtype, "identity": identity, "config": dataclasses.asdict(config)}
            checkpoint.save(run, step, model, optimizers, state)
            saved = step

    stop, leaving = Stop(), False
    budgeted = config.train.steps == 0 and not resume
    clock, durations = time.perf_counter(), list[float]()
    model.train()
    while True:
        # Save before anything that takes long; then validate, and let the model speak.
        if evaluation_due(step, steps, config.train.evals, validated):
            save()
            with machine.uncompiled():
                validated[step] = validate(model, val_text, config, world, machine, tokenizer.eot)
            if record:
                bits = validated[step] * val_text.counted / val_text.bytes / math.log(2)
                record.log(step, val_loss=validated[step], bits_per_byte=bits, seconds=time.perf_counter() - clock)
                say(f"step {step:,}: validation {validated[step]:.4f} nats a token, {bits:.4f} bits a byte")
                with machine.uncompiled():
                    say(excerpt(model, tokenizer, config))
                if validated[step] == min(validated.values()):
                    checkpoint.point(run, "best", run / f"step-{step:06d}")
                checkpoint.prune(run, config.train.keep)
                metrics.plot(run, f"{config.name}: {bits:.3f} bits per byte on held-out text")
        if leaving or step == steps > 0:
            break

        # One step: gradients of the whole batch, micro-batch by micro-batch.
        began = time.perf_counter()
        factor = schedule(step, steps, config.optim)
        set_learning_rate(optimizers, factor)
        # Dropout's mask is a function of seed, step and process, so that no generator's state needs to be saved.
        torch.manual_seed((config.train.seed * 1_000_003 + step) * 1_009 + world.rank)
        x, y = loader.batch(step, sequences, world.rank, world.size)  # (share, context) each
        # The mean is over the targets that count, in all processes: conversations differ in how much of them is answer.
        counted = world.sum([float((y != IGNORE).sum())], machine.device)[0] / world.size  # on average, a process
        loss = torch.zeros((), device=machine.device)
        for inputs, targets in zip(x.split(micro), y.split(micro), strict=True):
            with machine.autocast():
                part = model.loss(inputs.to(machine.device), targets.to(machine.device)) / max(counted, 1)
            part.backward()
            loss += part.detach()
        world.average_gradients(model)
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip))
        mean, asked = world.sum([float(loss) / world.size, stop.asked], machine.device)
        leaving = asked > 0  # a signal came to some process: all leave together
        if not math.isfinite(mean + norm):
            raise Diverged(
                f"step {step + 1}: the loss is {mean}, the gradient's norm {norm}: stopped before it reached the "
                "weights. The last good checkpoint stays. Lower learning rates or more optim.warmup_steps may help"
            )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1

        # What is known now: the loss, the speed, and with a budget in minutes how many steps fit. That is settled after
        # the first steps and then again and again, since a machine's speed changes; all but the last few may move.
        durations.append(time.perf_counter() - began)
        pace = statistics.median(durations[-20:])
        first = steps == 0 and len(durations) == TIMED_STEPS
        if first or (budgeted and step % SETTLED_EVERY == 0 and step + SETTLED_EVERY < steps):
            each = statistics.mean(durations[4:][-2 * SETTLED_EVERY :])  # what is left is a sum: slow steps count in it
            evals = config.train.evals - len(validated)
            fit = steps_in_time(config, val_text, each, step, evals, time.perf_counter() - clock)
            steps = world.same(fit, machine.device)
            if first:
                say(f"a step takes {each:.2f} s: {steps:,} steps end in {config.train.minutes:g} minutes at this speed")
        if record:
            speed = config.train.batch_tokens / pace
            record.log(step, loss=mean, norm=norm, lr=factor * config.optim.lr, tokens_per_second=round(speed))
            left = f"{(steps - step) * pace / 60:.1f} min left" if steps else "timing"
            of = f"/{steps:,}" if steps else ""
            line = (
                f"step {step:,}{of}  loss {mean:.3f}  lr {factor * config.optim.lr:.2g}  {speed:,.0f} tokens/s  {left}"
            )
            record.progress(line, now=step == 1 or step == steps)

    # 6. The end: keep what was done, say what came of it ------------------------------------------------------------

    save()
    if record:
        record.close()
    distributed.leave()
    minutes = (time.perf_counter() - clock) / 60
    if step == steps:
        best = min(validated, key=validated.__getitem__)
        say(f"done after {minutes:.1f} min: best validation {validated[best]:.4f} nats a token, at step {best:,}")
    else:
        say(f"stopped and saved at step {step:,}; go on with --resume")
        sys.exit(128 + stop.signal)


# 7. What the loop calls ---------------------------------------------------------------------------------------------


class Diverged(ValueError):
    """The loss or its gradient is not a finite number."""


class Stop:
    """The first Ctrl-C or SIGTERM asks the loop to save and leave after the step in hand; the second one kills."""

    def __init__(self) -> None:
        self.asked, self.signal = False, 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number: int, _: Any) -> None:
        self.asked, self.signal = True, number
        print("\nsaving after this step; once more ends at once", flush=True)
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.SIG_DFL)


def evaluation_due(step: int, steps: int, evals: int, validated: Iterable[int]) -> bool:
    """Whether one of `evals` evaluations, spread evenly over `steps`, is to be made now, the last one at the end. One
    that was passed when the number of steps changed is made up for; one that comes again then is not made again."""
    last = max(validated, default=0)
    if steps == 0 or step <= last:
        return False
    return step == steps or step * evals // steps > round(last * evals / steps)


@torch.inference_mode()
def validate(
    model: GPT, text: Shards, config: Config, world: distributed.World, machine: device.Machine, eot: int
) -> float:
    """Mean loss over every token that counts, in nats; the batches are shared out over the processes."""
    model.eval()
    total = 0.0
    batches = validation(text, config.model.context, config.train.micro_batch, eot)
    for number, (inputs, targets) in enumerate(batches):
        if number % world.size == world.rank:
            with machine.autocast():
                total += float(model.loss(inputs.to(machine.device), targets.to(machine.device)))
    model.train()
    return world.sum([total], machine.device)[0] / text.counted


def excerpt(model: GPT, tokenizer: Tokenizer, config: Config) -> str:
    """A short sample, indented."""
    prompt, chatting = config.train.prompt, config.data.format == "chat"  # there the prompt is what the user says
    begin = chat_format.opening(tokenizer, [("user", prompt)], config.model.context) if chatting else prompt
    model.eval()
    text = prompt + "\n" * chatting + "".join(t for _, t in speak(model, tokenizer, begin, tokens=100))
    model.train()
    return "\n".join(f"    | {line}" for line in text.strip().splitlines())


def steps_in_time(config: Config, val_text: Shards, pace: float, step: int, evals: int, elapsed: float) -> int:
    """Steps, those done included, that end when the budget does, with `evals` evaluations still to come. A validation
    token costs a third of a training token, forward without backward; 2% of the budget are kept back."""
    an_evaluation = pace * val_text.tokens / config.train.batch_tokens / 3 + 2  # and to save, speak and draw
    left = 0.98 * config.train.minutes * 60 - elapsed - evals * an_evaluation
    return step + max(evals, int(left / pace))


def with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """The configuration with the vocabulary that the tokenizer needs."""
    size = config.model.vocab_size or tokenizer.vocab_size
    if config.init_from:
        size = max(size, tokenizer.vocab_size)  # which has grown if marks were added to it
    if size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {size}: smaller than the tokenizer's {tokenizer.vocab_size}; 0 takes that"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def split_batch(config: Config, devices: int) -> tuple[int, int]:
    """Sequences in a micro-batch and on a device, in one step."""
    sequences = config.train.batch_tokens // config.model.context
    micro = min(config.train.micro_batch, sequences // devices)
    if micro == 0 or sequences % (micro * devices):
        raise ConfigError(
            f"train.batch_tokens = {config.train.batch_tokens}: {sequences} sequences of {config.model.context} tokens "
            f"do not divide into {devices} devices x micro-batches of train.micro_batch = {config.train.micro_batch}"
        )
    return micro, sequences // devices


def refuse_overwriting(run: Path, overwrite: bool) -> None:
    """A folder that holds a checkpoint goes only when that was asked for."""
    if (run / "latest").exists() and not overwrite:
        raise CheckpointError(
            f"runs/{run.name} is there: --resume goes on with it, --overwrite begins again, --name keeps both"
        )


def refuse_changes(run: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """A run goes on only with the model, the tokenizer and the text that it began with."""
    changed = [f"model.{k} was {v!r}, is {now['model'][k]!r}" for k, v in then["model"].items() if now["model"][k] != v]
    for part in ("tokenizer", "text"):
        if then[part] != now[part]:
            changed.append(f"the {part}'s hash was {then[part][:12]}, is {now[part][:12]}")
    if changed:
        raise CheckpointError(f"runs/{run.name} cannot go on: {'; '.join(changed)}")


# 8. The command line ------------------------------------------------------------------------------------------------


def main() -> None:
    """Read the command line; a user's mistake is one line and exit status 2, never a traceback."""
    try:
        asked = read_arguments(sys.argv[1:])
        if asked:
            train(*asked)
    except (ConfigError, CorpusError, TokenizerError, ShardError, CheckpointError, Diverged) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


def read_arguments(words: list[str]) -> tuple[Config, bool, bool] | None:
    """The configuration, resume and overwrite; or None when the question was answered by printing.

    What another run decides (--init-from, --resume) is in the configuration already.
    """
    recipe = words[0] if words and not words[0].startswith("-") else None
    defaults = load(recipe) if recipe else Config("RECIPE")
    parser = argparse.ArgumentParser(
        usage="python train.py RECIPE [options]", description=recipes().get(recipe or "", ""), allow_abbrev=False
    )
    parser.add_argument("--resume", action="store_true", help="go on where the run stopped")
    parser.add_argument("--overwrite", action="store_true", help="begin again, in place of an existing run")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--name", metavar="STR", help=f"folder under runs/; default: {defaults.name}")
    parser.add_argument("--init-from", metavar="RUN", help="begin with the weights, tokenizer and model of this run: "
        "its folder, or folder@step-000500; of the model only context and dropout are this run's own")  # fmt: skip
    for section in SECTIONS:
        group = parser.add_argument_group(section)
        documents = documentation(section)
        for name, kind in fields(section).items():
            now = getattr(getattr(defaults, section), name)
            text = f"{documents[name]}; default: {now!r}".replace("%", "%%")
            group.add_argument(f"--{section}.{name}", metavar=kind.__name__.upper(), help=text)
    known, unknown = parser.parse_known_args(words[1:] if recipe else words)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, 1)
        raise ConfigError(f"{unknown[0]}: no such option{f'; did you mean {near[0]}?' if near else ''}")
    if recipe is None:
        print("python train.py RECIPE [--help], where RECIPE is a path to a TOML file or one of\n")
        for name, line in recipes().items():
            print(f"  {name:24s} {line}")
        return None
    flags_only = ("resume", "overwrite", "print_config")
    overrides = {k: v for k, v in vars(known).items() if v is not None and k not in flags_only}
    config = load(recipe, overrides)
    if known.resume and known.overwrite:
        raise ConfigError("--resume and --overwrite: one or the other")
    if known.resume:
        config = init_from.remembered(config, RUNS / config.name)
    elif config.init_from:
        config = init_from.inherited(config, RUNS / config.name, overrides)
    if known.print_config:
        print(dump(config), end="")
        return None
    return config, known.resume, known.overwrite


if __name__ == "__main__":
    main()
