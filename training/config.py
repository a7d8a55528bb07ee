"""Configuration of a run: one frozen dataclass per section; each validates its own fields.

The docstring under a field documents it, here and in `--help`. training/config_files.py reads TOML files.
"""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from data.chat_format import SPECIAL_TOKENS
from data.mixture import BLOCK, apportion
from data.tokenizer import Tokenizer
from kernels.context_parallel import METHODS
from model import ModelConfig, check_numbers
from zoo import MIXERS

MAX_NAME = 200  # characters of a run's name: file systems allow 255 bytes
MAX_VOCAB = 1_000_000
FORMATS = ("text", "chat")


class ConfigError(ValueError):
    """A mistake in a recipe or on the command line. The message is one line."""


def _require(config: Any, section: str, **rules: tuple[bool, str]) -> None:
    check_numbers(config, section)
    for name, (holds, why) in rules.items():
        if not holds:
            raise ValueError(f"{section}.{name} = {getattr(config, name)!r}: {why}")


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture: a table [[data.sources]]. The fields but `weight` are those of `DataConfig`."""

    source: str
    weight: float
    format: str = "text"
    text_column: str = "text"
    limit: int = 0

    def __post_init__(self) -> None:
        _require(
            self,
            "data.sources",
            source=(bool(self.source), "must name a text"),
            weight=(0 < self.weight <= 1e6, "must be above 0 and at most 1000000"),
            format=(self.format in FORMATS, f"must be {' or '.join(FORMATS)}"),
            limit=(self.limit >= 0, "must be at least 0"),
        )


@dataclass(frozen=True)
class DataConfig:
    """The text, and how it is tokenized."""

    source: str = "shakespeare"
    """shakespeare | kjv | wiki, a .txt/.jsonl/.parquet/.bin file, a folder, a glob, or hf:NAME for a hub dataset"""
    sources: tuple[SourceConfig, ...] = ()
    """instead of source: a mixture of several, each with a weight, its share of the training tokens"""
    format: str = "text"
    """text: the loss is over every token | chat: conversations in .jsonl, the loss is over the answers"""
    split: str = "train"
    """split of a hub dataset"""
    text_column: str = "text"
    """column with the text, in .jsonl, .parquet and hub datasets"""
    limit: int = 0
    """maximum number of documents; 0 reads all"""
    val_source: str = ""
    """separate source for validation; empty holds out val_fraction of the source"""
    val_fraction: float = 0.05
    """fraction of the source that is held out for validation"""
    tokenizer: str = "bpe"
    """bpe | byte | char, trained on the source; or a tokenizer.json, or a hub name"""
    vocab_size: int = 4096
    """size of a bpe vocabulary; the other tokenizers have a fixed size"""
    document_mask: bool = False
    """tokens attend within their own document only, in training and validation"""

    @property
    def preparation(self) -> dict[str, Any]:
        """The arguments of `data.prepare.prepare`: all fields but `document_mask`, which changes no token."""
        return {name: value for name, value in asdict(self).items() if name != "document_mask"}

    @property
    def chat(self) -> bool:
        """Whether the text has conversations."""
        return "chat" in (self.format, *(source.format for source in self.sources))

    @property
    def name(self) -> str:
        """The source, or the sources with their shares."""
        total = sum(source.weight for source in self.sources)
        return " + ".join(f"{source.weight / total:.4g} {source.source}" for source in self.sources) or self.source

    def document_start(self, tokenizer: Tokenizer) -> int | None:
        """The token with which a document begins, for `Decoder.document_start`; None without `document_mask`.

        Raises ConfigError for a chat whose turns end with that token.
        """
        end = SPECIAL_TOKENS[1]
        if self.document_mask and self.chat and tokenizer.eot == tokenizer.inner.token_to_id(end):
            raise ConfigError(
                f"data.document_mask = true: each turn of a chat would be a document, since {end} is this tokenizer's "
                "end-of-text token, too; must be false with it"
            )
        return tokenizer.eot if self.document_mask else None

    def __post_init__(self) -> None:
        if self.sources:
            for name in ("source", "format", "split", "text_column", "limit", "val_source"):
                if getattr(self, name) != ("" if name == "source" else getattr(DataConfig, name)):
                    raise ValueError(f"data.{name} = {getattr(self, name)!r}: must be left out with [[data.sources]]")
            weights = [source.weight for source in self.sources]
            if 0 in apportion(weights):
                raise ValueError(f"data.sources: weights {weights}: each must be at least 1/{BLOCK} of their sum")
        _require(
            self,
            "data",
            source=(bool(self.source or self.sources), "must name a text"),
            format=(self.format in FORMATS, f"must be {' or '.join(FORMATS)}"),
            limit=(self.limit >= 0, "must be at least 0"),
            val_fraction=(0.0 < self.val_fraction <= 0.5, "must be above 0 and at most 0.5"),
            vocab_size=(
                (259 if self.chat else 257) <= self.vocab_size <= MAX_VOCAB,
                "must be at least 257: 256 bytes and the end-of-text token; 259 with the two special tokens of a chat; "
                f"and at most {MAX_VOCAB}",
            ),
        )


@dataclass(frozen=True)
class OptimConfig:
    """The optimizers and their learning rate schedule."""

    optimizer: str = "muon"
    """muon (for the blocks' matrices, with AdamW for the rest) | adamw (for all)"""
    lr: float = 3e-3
    """AdamW's peak learning rate"""
    muon_lr: float = 0.02
    """Muon's peak learning rate: its updates are scaled to AdamW's usual size (root mean square 0.2)"""
    weight_decay: float = 0.1
    """decoupled weight decay of matrices, times the learning rate"""
    beta1: float = 0.9
    """AdamW's decay rate of the first moment"""
    beta2: float = 0.95
    """AdamW's decay rate of the second moment"""
    muon_momentum: float = 0.95
    """Muon's momentum"""
    warmup_steps: int = 20
    """steps of linear warmup of the learning rates"""
    lr_decay_frac: float = 0.6
    """fraction of all steps, at the end, over which the learning rates decay linearly to 0"""
    grad_clip: float = 1.0
    """maximum norm of the gradient; a larger gradient is scaled down to it"""

    def __post_init__(self) -> None:
        _require(
            self,
            "optim",
            optimizer=(self.optimizer in ("muon", "adamw"), "must be muon or adamw"),
            lr=(0 < self.lr <= 1000, "must be above 0 and at most 1000"),
            muon_lr=(0 < self.muon_lr <= 1000, "must be above 0 and at most 1000"),
            weight_decay=(0 <= self.weight_decay <= 1000, "must be from 0 to 1000"),
            beta1=(0 <= self.beta1 < 1, "must be at least 0 and below 1"),
            beta2=(0 <= self.beta2 < 1, "must be at least 0 and below 1"),
            muon_momentum=(0 <= self.muon_momentum < 1, "must be at least 0 and below 1"),
            warmup_steps=(self.warmup_steps >= 0, "must be at least 0"),
            lr_decay_frac=(0 <= self.lr_decay_frac <= 1, "must be from 0 to 1"),
            grad_clip=(self.grad_clip > 0, "must be above 0"),
        )


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run, batch size, evaluations, device and precision."""

    seed: int = 0
    """random seed of the weights, the order of batches and dropout"""
    steps: int = 0
    """number of optimizer steps; exactly one of steps and minutes is above 0"""
    minutes: float = 0.0
    """wall-clock budget: the first steps are timed, then the number of steps is set to end in time"""
    batch_tokens: int = 16384
    """tokens per optimizer step, over all devices; a multiple of model.context"""
    micro_batch_size: int = 16
    """sequences per forward pass on one device: lower it if memory runs out; up to rounding, the result without
    dropout stays the same"""
    shard: int = 1
    """devices that hold one copy of the model together: 1 gives each device its own, 0 takes all of a machine"""
    context_parallel: int = 1
    """devices that share each sequence, for long contexts; 1 gives each device whole sequences"""
    context_method: str = "auto"
    """how they compute attention: auto (gather within a machine, ring across machines) | gather | ring | ulysses;
    sliding windows, ALiBi and data.document_mask gather with ring, too"""
    activation_checkpointing: bool = False
    """store only the inputs of each layer and recompute its activations in the backward pass: slower, less memory"""
    num_evals: int = 4
    """number of evaluations (checkpoint, validation loss, sample), evenly spaced, the last one at the end"""
    eval_tokens: int = 0
    """evaluate on the first documents of the validation text, with this many tokens, and on all of it at the end;
    0 always evaluates on all of it"""
    keep_checkpoints: int = 2
    """number of latest checkpoints to keep, besides the best"""
    save_minutes: float = 5.0
    """minutes between checkpoints, besides those at evaluations; the first one after half a minute; 0 is off"""
    prompt: str = ""
    """prompt of the sample at every evaluation, in a chat the user's message; empty begins a new document"""
    device: str = "auto"
    """auto | cpu | cuda | mps"""
    dtype: str = "auto"
    """auto (bfloat16 where its matmuls are faster) | float32 | bfloat16"""
    compile: str = "auto"
    """auto (torch.compile on a GPU, heed's fused C++ layers on a CPU with g++ or clang++) | on (torch.compile) | off"""
    wandb: str = "off"
    """Weights & Biases: off | offline | online; metrics.jsonl is always written"""
    tensorboard: bool = False
    """also write the metrics for TensorBoard, into the run's folder"""

    def __post_init__(self) -> None:
        _require(
            self,
            "train",
            seed=(0 <= self.seed < 2**31, "must be from 0 to 2147483647"),
            steps=(
                self.steps >= 0 and (self.steps > 0) != (self.minutes > 0),
                "exactly one of steps and minutes must be above 0",
            ),
            minutes=(self.minutes >= 0, "must be at least 0"),
            batch_tokens=(self.batch_tokens >= 1, "must be at least 1"),
            micro_batch_size=(self.micro_batch_size >= 1, "must be at least 1"),
            shard=(self.shard >= 0, "must be at least 0"),
            context_parallel=(self.context_parallel >= 1, "must be at least 1"),
            context_method=(
                self.context_method in ("auto", *METHODS),
                f"must be auto, {', '.join(METHODS[:-1])} or {METHODS[-1]}",
            ),
            num_evals=(self.num_evals >= 1, "must be at least 1: the last evaluation is the result"),
            eval_tokens=(self.eval_tokens >= 0, "must be at least 0"),
            save_minutes=(self.save_minutes >= 0, "must be at least 0"),
            keep_checkpoints=(self.keep_checkpoints >= 1, "must be at least 1"),
            device=(self.device in ("auto", "cpu", "cuda", "mps"), "must be auto, cpu, cuda or mps"),
            dtype=(self.dtype in ("auto", "float32", "bfloat16"), "must be auto, float32 or bfloat16"),
            compile=(self.compile in ("auto", "on", "off"), "must be auto, on or off"),
            wandb=(self.wandb in ("off", "offline", "online"), "must be off, offline or online"),
        )


@dataclass(frozen=True)
class Config:
    """One run. `name` is its folder under runs/."""

    name: str
    init_from: str = ""  # the run whose weights and tokenizer it starts from, see training/init_from.py
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1000))

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) or len(self.name) > MAX_NAME:
            why = f"must be a folder name of A-Z, a-z, 0-9, '.', '_' and '-', at most {MAX_NAME} characters"
            raise ValueError(f"name = {self.name[:300]!r}: {why}")
        if self.train.batch_tokens % self.model.context:
            why = f"must be a multiple of model.context = {self.model.context}"
            raise ValueError(f"train.batch_tokens = {self.train.batch_tokens}: {why}")
        if self.data.document_mask and (others := set(self.model.layer_pattern) - {"L", "S"}):
            why = f"{min(others)} in model.layer_pattern reads the documents before; only L and S can leave them out"
            raise ValueError(f"data.document_mask = true: {why}")
        if (n := self.train.context_parallel) > 1:
            check_context_parallel(self.model, n, self.train.context_method)


def check_context_parallel(model: ModelConfig, n: int, method: str) -> None:
    """Raise ValueError if n devices cannot share a sequence: if something but softmax attention needs all of it."""
    others = [f"{MIXERS[letter].__name__}, {letter}," for letter in model.layer_pattern if letter in MIXERS]
    rules = {
        "context": (model.context % (2 * n) == 0, f"must be a multiple of {2 * n}, two chunks per device"),
        "layer_pattern": (not others, f"must consist of L and S: {''.join(others[:1])} needs whole sequences"),
        "attention_dropout": (not model.attention_dropout, "must be 0"),
        "router_aux_loss_coef": (
            not (model.n_expert and model.router_aux_loss_coef),
            "must be 0, the load-balancing loss needs whole sequences",
        ),
        "n_kv_head": (method != "ulysses" or model.n_kv_head % n == 0, f"must be divisible by {n} for ulysses"),
    }
    for name, (holds, why) in rules.items():
        if not holds:
            raise ValueError(f"model.{name} = {getattr(model, name)!r}: {why} (train.context_parallel = {n})")


SECTIONS: dict[str, type] = {"model": ModelConfig, "data": DataConfig, "optim": OptimConfig, "train": TrainConfig}
