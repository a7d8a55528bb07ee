"""Part `shakespeare`: nanoGPT's GPU setting, tiny Shakespeare to 1.4697, heed beside nanoGPT on the same GPU.

Both train in full by benchmarks/training.py: from files, without a network.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import training
from benchmarks.gpu.part import Task
from benchmarks.training import SETTINGS

DRY_HEED = (
    "--model.n_layer=1", "--model.n_embd=32", "--model.n_head=2", "--model.n_kv_head=2", "--model.head_dim=16",
    "--model.n_ffn=32", "--model.context=32", "--train.batch_tokens=128", "--train.micro_batch_size=4",
    "--train.steps=4", "--train.num_evals=2", "--train.prompt=",
)  # fmt: skip
DRY_NANOGPT = (
    "n_layer=1", "n_head=2", "n_embd=32", "block_size=32", "batch_size=4", "max_iters=2", "eval_interval=1",
    "eval_iters=1", "log_interval=1",
)  # fmt: skip

DRY_CHARACTERS = 20_000


def run(task: Task) -> None:
    """heed, then nanoGPT, then heed with another seed, as far as the time allows."""
    setting, where = SETTINGS["gpu-full"], "cuda" if torch.cuda.is_available() else "cpu"
    extra = list(DRY_HEED) if task.dry else []
    if task.dry:
        setting = replace(setting, nanogpt=DRY_NANOGPT)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(task.text)
        if task.dry:
            text = Path(folder) / "input.txt"
            text.write_text(Path(task.text).read_text()[:DRY_CHARACTERS])
        training.prepare(Path(task.nanogpt), text, Path(folder))
        for system, seed in (("heed", 0), ("nanoGPT", 0)) + (() if task.dry else (("heed", 1),)):
            if task.left() < 30:
                task.emit(system=system, seed=seed, error="skipped: out of time")
                continue
            try:
                if system == "heed":
                    run = training.train_heed(setting, Path(folder), seed, extra)
                else:
                    run = training.train_nanogpt(setting, Path(folder), seed, where)
            except ValueError as error:
                task.emit(system=system, seed=seed, error=str(error))
                continue
            task.emit(
                system=system, seed=seed, seconds=run.seconds, loss=run.loss, target=setting.target,
                seconds_to_target=run.reached(setting.target), curve=run.curve,
            )  # fmt: skip
