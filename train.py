"""heed's training, one loop to read from top to bottom: `python train.py shakespeare`.

    python train.py                                  list the configs
    python train.py CONFIG --model.n_layer 8         CONFIG is a name in configs/ or a path; any field can be overridden
    python train.py CONFIG --resume                  continue an interrupted run
    torchrun --nproc-per-node 8 train.py CONFIG      the same run on several devices

A run is a folder, runs/NAME/: config.toml, tokenizer.json, metrics.jsonl, loss.png and checkpoints. A step is a
function of (seed, step) and the saved state alone. So a run with a number of steps that was killed and resumed equals
one that was not, bit for bit on the same CPU with the same number of threads.
"""

import argparse
import dataclasses
import difflib
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

# Read when torch is imported: a thread that waits for another spins for about a millisecond, then sleeps. By default it
# spins much longer, and takes the time of the thread that it waits for if other processes use the CPU, too.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from data import chat_format
from data.loader import Conversations, Loader, validation
from data.prepare import prepare
from data.shards import ShardError, Shards
from data.sources import CorpusError
from data.tokenizer import Tokenizer, TokenizerError
from kernels.reference import IGNORE_INDEX
from model import GPT
from sample import RUNS, stream_generate
from training import checkpoint, device, distributed, init_from, metrics
from training.budget import StepBudget, evaluation_due
from training.checkpoint import CheckpointError
from training.config import SECTIONS, Config, ConfigError
from training.flops import count_parameters, flops_per_token, peak_flops
from training.fused import optimize_layers
from training.memory import peak_memory
from training.optimizers import build_optimizers, lr_factor, set_learning_rate
from training.recipes import documentation, dump, fields, load, recipes
from training.renamed import RENAMED


def train(config: Config, resume: bool, overwrite: bool) -> None:
    """Train one run, from its configuration to its last checkpoint."""

    # 1. Machine: device, dtype, layer implementation ----------------------------------------------------------------

    world = distributed.init_distributed()
    log = metrics.log if world.main else lambda _: None
    run = RUNS / config.name
    if world.main and not resume:
        check_overwrite(run, overwrite)
    machine = device.choose(config.train, world.local_rank)
    for line in machine.reasons:
        log(line)

    # 2. Data: tokenized shards --------------------------------------------------------------------------------------

    folder = prepare(**dataclasses.asdict(config.data)) if world.main else None
    world.barrier()  # the other processes find in the cache what the main process prepared
    folder = folder or prepare(**dataclasses.asdict(config.data))
    train_text, val_text = Shards(folder, "train"), Shards(folder, "val")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    answers = f", {train_text.num_targets:,} and {val_text.num_targets:,} of them in answers" if train_text.chat else ""
    log(
        f"data {config.data.source}: {train_text.tokens:,} train tokens, {val_text.tokens:,} val tokens"
        f"{answers} ({val_text.bytes:,} bytes), {tokenizer.kind} tokenizer of {tokenizer.vocab_size:,}"
    )

    # 3. Model, optimizers, batch ------------------------------------------------------------------------------------

    config = with_vocab_size(config, tokenizer)
    context, micro_batch, share = config.model.context, *split_batch(config, world.size)  # share: sequences per process
    torch.manual_seed(config.train.seed)
    model = GPT(config.model).to(machine.device)
    model.model.activation_checkpointing = config.train.activation_checkpointing
    if note := optimize_layers(model, machine):
        log(note)
    optimizers = build_optimizers(model, config.optim, machine.dtype)
    loader = (Conversations if train_text.chat else Loader)(train_text, context=context, seed=config.train.seed)
    num_params, token_flops = count_parameters(config.model), flops_per_token(config.model)
    peak = peak_flops(machine.device)
    log(f"model {num_params:,} parameters, {token_flops / 1e6:,.1f} MFLOPs/token")
    if config.init_from and not resume:
        checkpoint.load_weights(origin := init_from.resolve_checkpoint(config.init_from), model, grow=True)
        log(f"init {origin}")
    log(
        f"batch {config.train.batch_tokens:,} tokens = {world.size} devices x {share // micro_batch} micro-batches "
        f"x {micro_batch} sequences x {context} tokens"
    )

    # 4. Run folder: new, or resumed ---------------------------------------------------------------------------------

    identity = {"model": dataclasses.asdict(config.model), "tokenizer": tokenizer.sha256, "text": folder.name}
    step, num_steps = 0, config.train.steps
    if resume:
        latest = checkpoint.find(run, "latest")
        state = checkpoint.read_state(latest)
        check_unchanged(run, state["identity"], identity)
        checkpoint.load_weights(latest, model)
        checkpoint.load_optimizers(latest, optimizers)
        step, num_steps = state["step"], config.train.steps or state["steps"]
        log(f"resume {latest}, {num_steps - step if num_steps else 'an unknown number of'} steps left")
    elif world.main:
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        (run / "config.toml").write_text(dump(config))
        tokenizer.save(run / "tokenizer.json")
    record = metrics.Metrics(run, step, config.train.wandb, dataclasses.asdict(config)) if world.main else None
    world.barrier()  # all processes read the same records
    val_losses = {r["step"]: r["val_loss"] for r in metrics.read(run / "metrics.jsonl") if "val_loss" in r}
    saved = step if resume else -1

    def save() -> None:
        nonlocal saved
        if world.main and saved != step:
            dtype = str(machine.dtype).removeprefix("torch.")
            about = {"steps": budget.num_steps, "dtype": dtype, "identity": identity}
            checkpoint.save(run, step, model, optimizers, about | {"config": dataclasses.asdict(config)})
            saved = step

    def bits_per_byte(loss: float) -> float:
        return loss * val_text.num_targets / val_text.bytes / math.log(2)

    # 5. Training loop -----------------------------------------------------------------------------------------------

    graceful_exit, leaving = GracefulExit(), False
    budget = StepBudget(config, num_steps, resume, val_text.tokens)
    model.train()
    while True:
        # Evaluate: save first, then the validation loss and a sample.
        if evaluation_due(step, budget.num_steps, config.train.num_evals, val_losses):
            save()
            with machine.uncompiled():
                val_losses[step] = validate(model, val_text, config, world, machine, tokenizer.eot)
                sample = sample_text(model, tokenizer, config) if world.main else ""
            if record:
                val_loss, val_bpb = val_losses[step], bits_per_byte(val_losses[step])
                record.log(step, val_loss=val_loss, val_bpb=val_bpb, seconds=budget.elapsed)
                log(f"step {step} | val_loss {val_loss:.4f} | val_bpb {val_bpb:.4f}\n{sample}")
                if val_loss == min(val_losses.values()):
                    checkpoint.point(run, "best", run / f"step-{step:06d}")
                checkpoint.prune(run, config.train.keep_checkpoints)
                metrics.plot(run, f"{config.name}: {val_bpb:.3f} bits per byte on held-out text")
        if leaving or step == budget.num_steps > 0:
            break

        # Batch. Dropout depends on (seed, step, rank) alone, so no generator state needs to be saved.
        started = time.perf_counter()
        factor = lr_factor(step, budget.num_steps, config.optim)
        set_learning_rate(optimizers, factor)
        torch.manual_seed((config.train.seed * 1_000_003 + step) * 1_009 + world.rank)
        x, y = loader.batch(step, share * world.size, world.rank, world.size)  # (share, context) each
        # The loss is the mean over the targets of all processes: conversations differ in how many they have.
        num_targets = world.all_reduce_sum([float((y != IGNORE_INDEX).sum())], machine.device)[0] / world.size

        # Forward and backward, micro-batch by micro-batch.
        loss = torch.zeros((), device=machine.device)
        for inputs, targets in zip(x.split(micro_batch), y.split(micro_batch), strict=True):
            with machine.autocast():
                part = model.loss(inputs.to(machine.device), targets.to(machine.device)) / max(num_targets, 1)
            part.backward()
            loss += part.detach()
        world.average_gradients(model)
        grad_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip))
        mean_loss, exits = world.all_reduce_sum([float(loss) / world.size, graceful_exit.requested], machine.device)
        leaving = exits > 0  # a signal to one process stops all of them together
        check_finite(step + 1, mean_loss, grad_norm)

        # Update the weights.
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1

        # With a budget in minutes, set the number of steps; then log.
        budget.add_step(time.perf_counter() - started)
        if budget.is_due(step):
            first = budget.num_steps == 0
            fit = budget.steps_in_time(step, config.train.num_evals - len(val_losses))
            budget.num_steps = world.broadcast(fit, machine.device)
            if first:
                log(f"budget {config.train.minutes:g} min = {budget.num_steps:,} steps of {budget.step_seconds:.3g} s")
        if record:
            lr, tok_per_s = factor * config.optim.lr, config.train.batch_tokens / budget.step_seconds
            mfu = {"mfu": tok_per_s * token_flops / (peak * world.size)} if peak else {}
            record.log(step, loss=mean_loss, grad_norm=grad_norm, lr=lr, tok_per_s=round(tok_per_s), **mfu)
            record.progress(
                progress_line(step, budget, mean_loss, grad_norm, lr, tok_per_s), now=step in (1, budget.num_steps)
            )

    # 6. End: the last checkpoint and a summary ----------------------------------------------------------------------

    save()
    if record:
        record.close()
    distributed.cleanup()
    if step != budget.num_steps:
        log(f"stopped and saved at step {step}; --resume continues")
        sys.exit(128 + graceful_exit.signal)
    best = min(val_losses.values())
    log(
        f"val_loss: {best:.4f}\nval_bpb: {bits_per_byte(best):.4f}\ntraining_seconds: {budget.elapsed:.1f}\n"
        f"peak_memory_mb: {peak_memory(machine.device) / 2**20:.1f}\nnum_steps: {step}\nnum_params: {num_params}"
    )


# 7. What the loop calls ---------------------------------------------------------------------------------------------


class Diverged(ValueError):
    """The loss or the gradient norm is not a finite number."""


class GracefulExit:
    """The first Ctrl-C or SIGTERM asks the loop to save and exit after the current step; a second one kills it."""

    def __init__(self) -> None:
        self.requested, self.signal = False, 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number: int, _: Any) -> None:
        self.requested, self.signal = True, number
        print("\nsaving after this step; repeat to exit at once", flush=True)
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.SIG_DFL)


@torch.inference_mode()
def validate(
    model: GPT, text: Shards, config: Config, world: distributed.World, machine: device.Machine, eot: int
) -> float:
    """Mean loss over all targets of a text, in nats/token. The processes share the batches."""
    model.eval()
    total = 0.0
    batches = validation(text, config.model.context, config.train.micro_batch_size, eot)
    for number, (inputs, targets) in enumerate(batches):
        if number % world.size == world.rank:
            with machine.autocast():
                total += float(model.loss(inputs.to(machine.device), targets.to(machine.device)))
    model.train()
    return world.all_reduce_sum([total], machine.device)[0] / text.num_targets


def sample_text(model: GPT, tokenizer: Tokenizer, config: Config) -> str:
    """A short sample, indented: complete lines, from `train.prompt` (in a chat, the user's message)."""
    prompt, chat = config.train.prompt, config.data.format == "chat"
    rendered = chat_format.render_prompt(tokenizer, [("user", prompt)], config.model.context) if chat else prompt
    model.eval()
    stream = stream_generate(model, tokenizer, rendered, max_new_tokens=100, whole_lines=True)
    text = prompt + "\n" * chat + "".join(part for _, part in stream)
    model.train()
    return "\n".join(f"    | {line}" for line in text.strip().splitlines())


def check_finite(step: int, loss: float, grad_norm: float) -> None:
    """Raise Diverged if the loss or the gradient norm is not finite, before the weights are updated."""
    if not math.isfinite(loss + grad_norm):
        raise Diverged(
            f"step {step}: the loss is {loss}, the gradient norm {grad_norm}. The weights were not updated and the "
            "last checkpoint is good. Lower learning rates or more optim.warmup_steps may help"
        )


def progress_line(step: int, budget: StepBudget, loss: float, grad_norm: float, lr: float, tok_per_s: float) -> str:
    """What is logged after a step."""
    of = f"/{budget.num_steps}" if budget.num_steps else ""
    eta = f"{(budget.num_steps - step) * budget.step_seconds / 60:.1f} min" if budget.num_steps else "unknown"
    numbers = f"loss {loss:.3f} | grad_norm {grad_norm:.2f} | lr {lr:.2g} | tok/s {tok_per_s:,.0f}"
    return f"step {step}{of} | {numbers} | eta {eta}"


def with_vocab_size(config: Config, tokenizer: Tokenizer) -> Config:
    """The configuration with the vocabulary size that the tokenizer needs."""
    size = config.model.vocab_size or tokenizer.vocab_size
    if config.init_from:
        size = max(size, tokenizer.vocab_size)  # special tokens may have been added
    if size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {size}: must be at least the tokenizer's {tokenizer.vocab_size}, or 0 for that"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def split_batch(config: Config, devices: int) -> tuple[int, int]:
    """Sequences per micro-batch and per device in one step."""
    sequences = config.train.batch_tokens // config.model.context
    micro_batch = min(config.train.micro_batch_size, sequences // devices)
    if micro_batch == 0 or sequences % (micro_batch * devices):
        raise ConfigError(
            f"train.batch_tokens = {config.train.batch_tokens}: {sequences} sequences of {config.model.context} tokens "
            f"are not divisible into {devices} devices x micro-batches of {config.train.micro_batch_size} sequences "
            "(train.micro_batch_size)"
        )
    return micro_batch, sequences // devices


def check_overwrite(run: Path, overwrite: bool) -> None:
    """Raise CheckpointError if the folder holds a checkpoint and `overwrite` is false."""
    if (run / "latest").exists() and not overwrite:
        raise CheckpointError(
            f"runs/{run.name} exists: --resume continues it, --overwrite replaces it, --name starts another"
        )


def check_unchanged(run: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise CheckpointError if the model, the tokenizer or the text differs from what the run was started with."""
    changed = [f"model.{k} was {v!r}, is {now['model'][k]!r}" for k, v in then["model"].items() if now["model"][k] != v]
    for part in ("tokenizer", "text"):
        if then[part] != now[part]:
            changed.append(f"the {part}'s hash was {then[part][:12]}, is {now[part][:12]}")
    if changed:
        raise CheckpointError(f"runs/{run.name} cannot be resumed: {'; '.join(changed)}")


# 8. The command line ------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the command. A user's mistake is one line on stderr and exit status 2, never a traceback."""
    try:
        if parsed := parse_args(sys.argv[1:]):
            train(*parsed)
    except (ConfigError, CorpusError, TokenizerError, ShardError, CheckpointError, Diverged) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


def parse_args(argv: list[str]) -> tuple[Config, bool, bool] | None:
    """The configuration, resume, and overwrite; None if the command only prints something.

    The configuration includes what another run decides (--init-from, --resume).
    """
    recipe = argv[0] if argv and not argv[0].startswith("-") else None
    defaults = load(recipe) if recipe else Config("CONFIG")
    parser = argparse.ArgumentParser(
        usage="python train.py CONFIG [options]", description=recipes().get(recipe or "", ""), allow_abbrev=False
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing run")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--name", metavar="STR", help=f"folder under runs/; default: {defaults.name}")
    parser.add_argument("--init-from", metavar="RUN", help="start from the weights, tokenizer and model of this run: "
        "its folder, or folder@step-000500; only model.context and model.dropout may differ")  # fmt: skip
    for section in SECTIONS:
        group = parser.add_argument_group(section)
        documents = documentation(section)
        for name, kind in fields(section).items():
            default = getattr(getattr(defaults, section), name)
            text = f"{documents[name]}; default: {default!r}".replace("%", "%%")
            group.add_argument(f"--{section}.{name}", metavar=kind.__name__.upper(), help=text)
    known, unknown = parser.parse_known_args(argv[1:] if recipe else argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        if new := RENAMED.get(flag.removeprefix("--")):
            raise ConfigError(f"{flag}: renamed to --{new}")
        flags = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(flag, flags, 1)
        raise ConfigError(f"{unknown[0]}: no such option{f'; did you mean {near[0]}?' if near else ''}")
    if recipe is None:
        print("python train.py CONFIG [--help], where CONFIG is a path to a TOML file or one of\n")
        for name, line in recipes().items():
            print(f"  {name:24s} {line}")
        return None
    flags_only = ("resume", "overwrite", "print_config")
    overrides = {k: v for k, v in vars(known).items() if v is not None and k not in flags_only}
    config = load(recipe, overrides)
    if known.resume and known.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    if known.resume:
        config = init_from.config_for_resume(config, RUNS / config.name)
    elif config.init_from:
        config = init_from.config_for_init(config, RUNS / config.name, overrides)
    if known.print_config:
        print(dump(config), end="")
        return None
    return config, known.resume, known.overwrite


if __name__ == "__main__":
    main()
