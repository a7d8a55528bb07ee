"""heed's training, one loop to read from top to bottom: `python train.py shakespeare`.

    python train.py                                  list the configs
    python train.py CONFIG --model.n_layer 8         CONFIG is a name in configs/ or a path; any field can be overridden
    python train.py CONFIG --resume                  continue an interrupted run with its own settings
    torchrun --nproc-per-node 8 train.py CONFIG      the same run on several devices

A run is a folder, runs/NAME/: config.toml, tokenizer.json, metrics.jsonl, loss.png and checkpoints. A step is a
function of (seed, step) and the saved state alone. So a run with a number of steps that was killed and resumed equals
one that was not, bit for bit on the same CPU with the same number of threads.
"""

import dataclasses
import math
import os
import sys
import time

# Read when torch is imported: a thread that waits for another spins for about a millisecond, then sleeps. By default it
# spins much longer, and takes the time of the thread that it waits for if other processes use the CPU, too.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from data import chat_format
from data.loader import open_loader
from data.mixture import AnyShards, open_shards
from data.prepare import prepare
from data.shards import ShardError
from data.sources import CorpusError
from data.tokenizer import Tokenizer, TokenizerError
from inference.stop_strings import GeneratedText
from kernels.reference_attention import IGNORE_INDEX
from model import GPT
from sample import RUNS, generate
from training import checkpoint, collapse, device, distributed, init_from, metrics, run_folder, tensorboard
from training.apply_fused_layers import optimize_layers
from training.checkpoint import CheckpointError
from training.command_line import Parser
from training.config import SECTIONS, Config, ConfigError
from training.config_files import documentation, dump, fields, load, recipes
from training.device_memory import check_fits, peak_memory
from training.distributed import DistributedError
from training.flops import count_parameters, flops_per_token, peak_flops
from training.graceful_exit import GracefulExit
from training.optimizers import build_optimizers, lr_factor, set_learning_rate
from training.time_budget import SaveTimer, StepBudget, evaluation_due, resumed
from training.validation_loss import validate

SAMPLE_TOKENS = 100  # of an evaluation


def train(config: Config, resume: bool, overwrite: bool) -> None:
    """Train one run, from its configuration to its last checkpoint."""

    # 1. Machine: device, dtype, layer implementation ----------------------------------------------------------------

    world = distributed.init_distributed(context=config.train.context_parallel)
    log = metrics.log if world.main else lambda _: None
    tensorboard.check_installed(config.train)
    run = RUNS / config.name
    if resume and run_folder.unstarted(run):
        log(f"resume {run}: it was stopped before its first checkpoint and begins again at step 0")
        resume = False
    if world.main and not resume:
        run_folder.check_overwrite(run, overwrite)
    machine = device.choose_together(config.train, world)
    for line in machine.reasons:
        log(line)

    # 2. Data: tokenized shards --------------------------------------------------------------------------------------

    with world.in_turn("text", log):  # the other processes find in the cache what the main process prepared
        folder = prepare(**config.data.preparation)
    train_text, val_text = (open_shards(folder, split, verify=world.local_rank == 0) for split in ("train", "val"))
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    answers = f", {train_text.num_targets:,} and {val_text.num_targets:,} of them in answers" if train_text.chat else ""
    log(
        f"data {config.data.name}: {train_text.tokens:,} train tokens, {val_text.tokens:,} val tokens"
        f"{answers} ({val_text.bytes:,} bytes), {tokenizer.kind} tokenizer of {tokenizer.vocab_size:,}"
    )
    eval_text = val_text.prefix(config.train.eval_tokens, tokenizer.decode)
    loader = open_loader(train_text, context=config.model.context, seed=config.train.seed)

    # 3. Model, optimizers, batch ------------------------------------------------------------------------------------

    config = with_vocab_size(config, tokenizer)
    context, micro_batch, share = config.model.context, *split_batch(config, world.data_size)  # share: sequences
    num_params, token_flops = count_parameters(config.model), flops_per_token(config.model)
    shard = distributed.devices_per_copy(config.train.shard, world)
    check_fits(config, num_params, machine.device, shard)
    torch.manual_seed(config.train.seed)
    model = GPT(config.model)
    model.model.document_start = config.data.document_start(tokenizer)
    if world.size == 1:
        model.to(machine.device)
    else:
        log(distributed.parallelize(model, world, shard, machine.device, config.train.context_method))
    model.model.activation_checkpointing = config.train.activation_checkpointing
    if note := optimize_layers(model, machine):
        log(note)
    optimizers = build_optimizers(model, config.optim, machine.dtype)
    peak = peak_flops(machine.device)
    log(f"model {num_params:,} parameters, {token_flops / 1e6:,.1f} MFLOPs/token")
    if config.init_from and not resume:
        checkpoint.load_weights(origin := init_from.resolve_checkpoint(config.init_from), model, grow=True)
        log(f"init {origin}")
    log(
        f"batch {config.train.batch_tokens:,} tokens = {world.size} devices x {share // micro_batch} micro-batches "
        f"x {micro_batch} sequences x {context // world.context} tokens"
    )

    # 4. Run folder: new, or resumed ---------------------------------------------------------------------------------

    identity = {"model": dataclasses.asdict(config.model), "tokenizer": tokenizer.sha256, "text": folder.name}
    step, num_steps, seconds = 0, config.train.steps, 0.0
    if resume:
        opened = world.share(checkpoint.open_checkpoint(run, "latest", warn=log) if world.main else None)
        assert opened is not None  # it is the main process's
        latest, state = opened
        changes = run_folder.check_resume(run, state, identity, config)
        checkpoint.load_weights(latest, model)
        checkpoint.load_optimizers(latest, optimizers)
        step, (num_steps, seconds) = state["step"], resumed(config, state)
        left = f"{num_steps - step if num_steps else 'an unknown number of'} steps left"
        log(f"resume {latest} with its own settings, {left}")
        log(f"changed {changes or 'nothing'}")
    world.barrier()  # all processes have read what the main process changes now
    if world.main and not resume:
        run_folder.start(run, config, tokenizer)
    record = metrics.Metrics(run, step, config) if world.main else None
    if world.main and resume:  # all checks of --resume have passed
        checkpoint.replace_file(run / "config.toml", dump(config))
    world.barrier()  # all processes read the same records
    val_losses = {r["step"]: r["val_loss"] for r in metrics.read(run / metrics.NAME) if "val_loss" in r}
    saver, saved = checkpoint.Saver(run, config.train.keep_checkpoints, world), step if resume else -1

    def save() -> None:
        nonlocal saved
        if saved == step:
            return
        check_weights(step, model, world, machine.device)
        if record:
            record.sync()
        dtype = str(machine.dtype).removeprefix("torch.")
        about = {"steps": budget.num_steps, "seconds": budget.elapsed, "dtype": dtype, "identity": identity}
        about["config"] = dataclasses.asdict(config)
        saver.save(step, model, optimizers, about)
        saved = step
        save_timer.restart()

    def evaluate() -> bool:
        """Record the validation loss and a sample of the checkpoint just saved. False: stopped by a signal."""
        with machine.uncompiled():
            val_loss = validate(model, eval_text, config, world, machine, tokenizer.eot, graceful_exit)
            if val_loss is None:
                return False
            check_finite(step, val_loss)
            inside = collapse.measure(model, eval_text, machine)
            sample = sample_text(model, tokenizer, config) + collapse.advice(inside, config.model)
        val_losses[step] = val_loss
        if record:
            saver.wait()
            if val_loss == min(val_losses.values()):  # before the record: resuming repeats an evaluation without one
                checkpoint.point(run, "best", run / f"step-{step:06d}")
            val_bpb = bits_per_byte(val_loss, eval_text)
            record.log(step, val_loss=val_loss, val_bpb=val_bpb, seconds=budget.elapsed, **inside)
            log(f"step {step} | val_loss {val_loss:.4f} | val_bpb {val_bpb:.4f}\n{sample}")
            metrics.plot(run, f"{config.name}: {val_bpb:.3f} bits per byte on held-out text")
        return True

    def bits_per_byte(loss: float, text: AnyShards) -> float:
        return loss * text.num_targets / text.bytes / math.log(2)

    # 5. Training loop -----------------------------------------------------------------------------------------------

    graceful_exit, leaving = GracefulExit(), False
    final_tokens = 0 if eval_text is val_text else val_text.tokens
    budget = StepBudget(config, num_steps, eval_text.tokens, seconds, final_tokens)
    save_timer = SaveTimer(config.train.save_minutes)
    model.train()
    while True:
        if not leaving and evaluation_due(step, budget.num_steps, config.train.num_evals, val_losses):
            save()
            leaving = not evaluate()
        if leaving or step == budget.num_steps > 0:
            break

        # Batch. Dropout depends on (seed, step, rank) alone, so no generator state needs to be saved.
        started = time.perf_counter()
        factor = lr_factor(step, budget.num_steps, config.optim)
        set_learning_rate(optimizers, factor)
        torch.manual_seed((config.train.seed * 1_000_003 + step) * 1_009 + world.rank)
        x, y = loader.batch(step, share * world.data_size, world.data_rank, world.data_size)  # (share, context) each
        # The loss is the mean over the targets of all processes: conversations differ in how many they have.
        counted = float((y != IGNORE_INDEX).sum()) / world.context
        num_targets = world.all_reduce_sum([counted], machine.device)[0] / world.size  # per process

        # Forward and backward, micro-batch by micro-batch.
        loss = torch.zeros((), dtype=torch.float32, device=machine.device)
        for first in range(0, share, micro_batch):
            inputs, targets = (batch[first : first + micro_batch] for batch in (x, y))
            distributed.reduce_gradients(model, last=first + micro_batch == share)
            with machine.autocast():
                part = model.loss(inputs.to(machine.device), targets.to(machine.device)) / (num_targets or 1)
            part.backward()
            loss += part.detach()
        grad_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip))
        # Signals to any process and the main process's clock: all of them stop, and save, together.
        sums = [float(loss) / world.size, graceful_exit.requested, world.main and save_timer.due]
        mean_loss, exits, saves = world.all_reduce_sum(sums, machine.device)
        check_finite(step + 1, mean_loss, grad_norm)

        # Update the weights.
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        leaving = exits > 0

        # With a budget in minutes, set the number of steps; then log.
        budget.add_step(time.perf_counter() - started)
        if budget.is_due(step):
            first = budget.num_steps == 0
            fit = budget.steps_in_time(step, config.train.num_evals - len(val_losses))
            budget.num_steps = world.share(fit)
            if first:
                log(f"budget {config.train.minutes:g} min = {budget.num_steps:,} steps of {budget.step_seconds:.3g} s")
        if record:
            lr, tok_per_s = factor * config.optim.lr, config.train.batch_tokens / budget.step_seconds
            mfu = {"mfu": tok_per_s * token_flops / (peak * world.size)} if peak else {}
            record.log(step, loss=mean_loss, grad_norm=grad_norm, lr=lr, tok_per_s=round(tok_per_s), **mfu)
            line = metrics.progress_line(step, budget, mean_loss, grad_norm, lr, tok_per_s)
            record.progress(line, now=step in (1, budget.num_steps))
        if saves:
            save()

    # 6. End: the last checkpoint, the whole validation text, and a summary ------------------------------------------

    if leaving:
        log("signal received: saving; another one after ten seconds exits at once")
    save()
    best, text = min(val_losses.values(), default=math.nan), eval_text
    if final_tokens and not leaving:
        full = validate(model, val_text, config, world, machine, tokenizer.eot, graceful_exit)
        if not (leaving := full is None):
            best, text = full, val_text
            if record and not any("full_val_loss" in r for r in metrics.read(run / metrics.NAME) if r["step"] == step):
                record.log(step, full_val_loss=best, full_val_bpb=bits_per_byte(best, text), seconds=budget.elapsed)
    saver.wait()
    if record:
        checkpoint.prune(run, config.train.keep_checkpoints)  # `best` may have been another one
        record.close()
    distributed.cleanup(world)
    if leaving:
        log(f"stopped and saved at step {step}; --resume continues")
        sys.exit(128 + graceful_exit.signal)
    log(
        f"val_loss: {best:.4f}\nval_bpb: {bits_per_byte(best, text):.4f}\ntraining_seconds: {budget.elapsed:.1f}\n"
        f"peak_memory_mb: {peak_memory(machine.device) / 2**20:.1f}\nnum_steps: {step}\nnum_params: {num_params}"
    )


# 7. What the loop calls ---------------------------------------------------------------------------------------------


class Diverged(ValueError):
    """The loss or the gradient norm is not a finite number."""


def sample_text(model: GPT, tokenizer: Tokenizer, config: Config) -> str:
    """A short sample, indented: complete lines, from `train.prompt` (in a chat, the user's message).

    Every process generates it, and as many tokens whatever they are: a model may be divided among the processes.
    """
    prompt, chat = config.train.prompt, config.data.chat
    rendered = chat_format.render_prompt(tokenizer, [("user", prompt)], config.model.context) if chat else prompt
    ids, text = tokenizer.encode_prompt(rendered), prompt + "\n" * chat
    generated = GeneratedText(tokenizer, stop=(), prompt=ids, whole_lines=True)
    model.eval()
    for number, token in enumerate(generate(model, ids, max_new_tokens=SAMPLE_TOKENS), 1):
        text += "" if generated.finished else generated.add_token(int(token), last=number == SAMPLE_TOKENS)
    model.train()
    return "\n".join(f"    | {line}" for line in text.strip().splitlines())


def check_finite(step: int, loss: float, grad_norm: float = 0.0) -> None:
    """Raise Diverged if the loss or the gradient norm is not finite; in training, before the weights are updated."""
    if not math.isfinite(loss + grad_norm):
        raise Diverged(
            f"step {step}: the loss is {loss}, the gradient norm {grad_norm}. The weights in the last checkpoint are "
            "finite. Lower learning rates or more optim.warmup_steps may help"
        )


def check_weights(step: int, model: GPT, world: distributed.World, device: torch.device) -> None:
    """Raise Diverged, on all processes, if a weight is not finite, before it is saved."""
    bad = [not bool(distributed.local(p).isfinite().all()) for p in model.parameters()]
    if world.all_reduce_sum([sum(bad)], device)[0]:
        raise Diverged(f"step {step}: a weight is not finite, and nothing was saved. Lower learning rates may help")


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
    """Sequences per micro-batch and per device, or group of devices that share them, in one step."""
    what = "devices" if config.train.context_parallel == 1 else "groups of devices (train.context_parallel)"
    sequences = config.train.batch_tokens // config.model.context
    micro_batch = min(config.train.micro_batch_size, sequences // devices)
    if micro_batch == 0 or sequences % (micro_batch * devices):
        raise ConfigError(
            f"train.batch_tokens = {config.train.batch_tokens}: {sequences} sequences of {config.model.context} tokens "
            f"are not divisible into {devices} {what} x micro-batches of {config.train.micro_batch_size} sequences "
            "(train.micro_batch_size)"
        )
    return micro_batch, sequences // devices


# 8. The command line ------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the command. A user's mistake is one line on stderr and exit status 2, never a traceback."""
    try:
        if parsed := parse_args(sys.argv[1:]):
            with distributed.together():
                train(*parsed)
    except (ConfigError, CorpusError, TokenizerError, ShardError, CheckpointError, DistributedError, Diverged) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a file that may not be read
        print(f"train.py: {error.filename or 'writing'}: {error.strerror}; checkpoints are kept", file=sys.stderr)
        sys.exit(2)


def parse_args(argv: list[str]) -> tuple[Config, bool, bool] | None:
    """The configuration, resume, and overwrite; None if the command only prints something.

    The configuration includes what another run decides (--init-from, --resume).
    """
    recipe = argv[0] if argv and argv[0] not in ("-h", "--help") else None
    if recipe and recipe.startswith("-"):
        raise ConfigError("the recipe comes first: python train.py CONFIG [options]")
    defaults = load(recipe) if recipe else Config("CONFIG")
    parser = Parser("train.py", recipes().get(recipe or "", ""), usage="python train.py CONFIG [options]")
    parser.add_argument("--resume", action="store_true", help="continue a run with its own settings; flags change them")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing run")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--name", metavar="STR", help=f"folder under runs/; default: {defaults.name}")
    parser.add_argument("--init-from", metavar="RUN", help="start from the weights, tokenizer and model of this run: "
        "its folder, or folder@step-000500; only model.context and the dropouts may differ")  # fmt: skip
    for section in SECTIONS:
        group = parser.add_argument_group(section)
        documents = documentation(section)
        for name, kind in fields(section).items():
            default = getattr(getattr(defaults, section), name)
            text = f"{documents[name]}; default: {default!r}".replace("%", "%%")
            group.add_argument(f"--{section}.{name}", metavar=kind.__name__.upper(), help=text)
    known = parser.parse_args(argv[1:] if recipe else argv)
    if recipe is None:
        print("python train.py CONFIG [--help], where CONFIG is a path to a TOML file or one of\n")
        for name, line in recipes().items():
            print(f"  {name:24s} {line}")
        return None
    flags_only = ("resume", "overwrite", "print_config")
    overrides = {k: v for k, v in vars(known).items() if v is not None and k not in flags_only}
    if known.resume and known.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    own = RUNS / (name := overrides.get("name", defaults.name)) / "config.toml"
    if known.resume and os.path.isfile(own):  # the run's settings, not the recipe's
        recipe, overrides = str(own), overrides | {"name": name}
    config = load(recipe, overrides)
    if known.resume:
        config = init_from.config_for_resume(config, RUNS / config.name, overrides)
    elif config.init_from:
        config = init_from.config_for_init(config, RUNS / config.name, overrides)
    if known.print_config:
        print(dump(config), end="")
        return None
    return config, known.resume, known.overwrite


if __name__ == "__main__":
    main()
