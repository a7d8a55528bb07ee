"""A run's configuration: one frozen dataclass a section, each of which refuses what cannot be.

The docstring under a field is its documentation, here and in `--help`. From a recipe to a Config: training/recipes.py.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from model import ModelConfig


class ConfigError(ValueError):
    """A mistake in a recipe or on the command line; the message is one line for its author."""


def _require(config: Any, section: str, **rules: tuple[bool, str]) -> None:
    for name, (holds, why) in rules.items():
        if not holds:
            raise ValueError(f"{section}.{name} = {getattr(config, name)!r}: {why}")


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes tokens."""

    source: str = "shakespeare"
    """shakespeare | kjv | wiki, a .txt/.jsonl/.parquet file, a folder, a glob, or hf:NAME for a hub dataset"""
    format: str = "text"
    """text, of which every token is learnt | chat: conversations in .jsonl, of which only answers are"""
    split: str = "train"
    """split of a hub dataset"""
    text_column: str = "text"
    """column that holds the text, in .jsonl, .parquet and hub datasets"""
    limit: int = 0
    """read at most so many documents; 0 reads all"""
    val_source: str = ""
    """a separate source to validate on; empty holds out val_fraction of the source"""
    val_fraction: float = 0.05
    """share of the source's text that is held out for validation"""
    tokenizer: str = "bpe"
    """bpe | byte | char, trained on the source; or a tokenizer.json, or a hub name"""
    vocab_size: int = 4096
    """tokens in a bpe vocabulary; the other tokenizers know their own size"""

    def __post_init__(self) -> None:
        _require(
            self,
            "data",
            source=(bool(self.source), "must name a text"),
            format=(self.format in ("text", "chat"), "must be text or chat"),
            limit=(self.limit >= 0, "must be at least 0"),
            val_fraction=(0.0 < self.val_fraction <= 0.5, "must be above 0 and at most 0.5"),
            vocab_size=(
                self.vocab_size >= (259 if self.format == "chat" else 257),
                "must be at least 257: 256 bytes and the end-of-text token; 259 with a chat's two marks",
            ),
        )


@dataclass(frozen=True)
class OptimConfig:
    """How the weights move."""

    optimizer: str = "muon"
    """muon (for the blocks' matrices, with AdamW for the rest) | adamw (for all)"""
    lr: float = 3e-3
    """AdamW's peak learning rate"""
    muon_lr: float = 0.02
    """Muon's peak learning rate: its updates are scaled to AdamW's usual size (root mean square 0.2)"""
    weight_decay: float = 0.1
    """decoupled decay of matrices, times the learning rate, each step"""
    beta1: float = 0.9
    """AdamW's memory of the gradient"""
    beta2: float = 0.95
    """AdamW's memory of the squared gradient"""
    muon_momentum: float = 0.95
    """Muon's memory of the gradient"""
    warmup_steps: int = 20
    """steps over which the learning rates rise from 0"""
    lr_decay_frac: float = 0.6
    """share of all steps, at the end, over which the learning rates fall linearly to 0"""
    grad_clip: float = 1.0
    """gradients are scaled down to at most this norm"""

    def __post_init__(self) -> None:
        _require(
            self,
            "optim",
            optimizer=(self.optimizer in ("muon", "adamw"), "must be muon or adamw"),
            lr=(self.lr > 0, "must be above 0"),
            muon_lr=(self.muon_lr > 0, "must be above 0"),
            weight_decay=(self.weight_decay >= 0, "must be at least 0"),
            beta1=(0 <= self.beta1 < 1, "must be at least 0 and below 1"),
            beta2=(0 <= self.beta2 < 1, "must be at least 0 and below 1"),
            muon_momentum=(0 <= self.muon_momentum < 1, "must be at least 0 and below 1"),
            warmup_steps=(self.warmup_steps >= 0, "must be at least 0"),
            lr_decay_frac=(0 <= self.lr_decay_frac <= 1, "must be from 0 to 1"),
            grad_clip=(self.grad_clip > 0, "must be above 0"),
        )


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at once, on what, and what is kept."""

    seed: int = 0
    """decides the weights' first values, the order of the batches and what dropout drops"""
    steps: int = 0
    """optimizer steps; exactly one of steps and minutes is above 0"""
    minutes: float = 0.0
    """wall-clock budget: the first steps are timed, then the number of steps is fixed to end in time"""
    batch_tokens: int = 16384
    """tokens in one optimizer step, over all devices; a multiple of model.context"""
    micro_batch_size: int = 16
    """sequences at once on one device: lower it when memory runs out, the result stays the same"""
    activation_checkpointing: bool = False
    """keep only what goes into each layer and compute the rest again backward: more time, much less memory"""
    num_evals: int = 4
    """times to save, validate and show a sample, evenly spaced, the last one at the end"""
    keep_checkpoints: int = 2
    """newest checkpoints to keep, beside the best"""
    prompt: str = ""
    """how the sample at every evaluation begins, in a chat what the user says; empty begins a new document"""
    device: str = "auto"
    """auto | cpu | cuda | mps"""
    dtype: str = "auto"
    """auto (bfloat16 where this machine multiplies it faster) | float32 | bfloat16"""
    compile: str = "auto"
    """auto (on a GPU torch's compiler, on a CPU heed's own C++, which needs g++ or clang++) | on (torch's) | off"""
    wandb: str = "off"
    """off | offline | online; metrics.jsonl is always written"""

    def __post_init__(self) -> None:
        _require(
            self,
            "train",
            seed=(0 <= self.seed < 2**31, "must be from 0 to 2147483647"),
            steps=(
                self.steps >= 0 and (self.steps > 0) != (self.minutes > 0),
                "one of steps and minutes must be above 0",
            ),
            minutes=(self.minutes >= 0, "must be at least 0"),
            batch_tokens=(self.batch_tokens >= 1, "must be at least 1"),
            micro_batch_size=(self.micro_batch_size >= 1, "must be at least 1"),
            num_evals=(self.num_evals >= 1, "must be at least 1: the last one is the result"),
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
    init_from: str = ""  # the run whose weights, tokenizer and model it begins with, see training/init_from.py
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1000))

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"name = {self.name!r}: must be a folder name of letters, digits, '.', '_' and '-'")
        if self.train.batch_tokens % self.model.context:
            why = f"must be a multiple of model.context = {self.model.context}"
            raise ValueError(f"train.batch_tokens = {self.train.batch_tokens}: {why}")


SECTIONS: dict[str, type] = {"model": ModelConfig, "data": DataConfig, "optim": OptimConfig, "train": TrainConfig}
