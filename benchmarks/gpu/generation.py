"""Part `generation`: tokens per second at 124M, heed beside transformers on the GPU, batch 1, 8 and 64.

The engines of benchmarks/inference_engines.py with the same random weights, in processes that take turns.
"""

import tempfile
from pathlib import Path

import torch

from benchmarks import inference, inference_engines, kernel_costs
from benchmarks.gpu.part import Task
from benchmarks.inference import SIZES, TINY, EngineProcess, bytes_per_step

ENGINES = ("heed bf16", "transformers bf16", "heed fp32")
SETTINGS = [(1, 128), (8, 128), (64, 128), (1, 512), (8, 512), (64, 512)]  # sequences, tokens of the prompt
TOKENS, REPETITIONS = 128, 3


def run(task: Task) -> None:
    """Setting after setting, until the time is over."""
    where, config = "cpu" if task.dry else "cuda", TINY if task.dry else SIZES["124M"]
    gpu = None if task.dry else kernel_costs.gpu_of(torch.cuda.get_device_name())
    names = []
    for name in ENGINES[::2] if task.dry else ENGINES:
        if lacks := inference_engines.missing(name):
            task.emit(engine=name, fault=f"skipped: needs {lacks}")
        else:
            names.append(name)
    with tempfile.TemporaryDirectory() as folder:
        inference_engines.write(Path(folder), config, names)
        there = []
        for name in names:
            try:
                there.append(EngineProcess(name, Path(folder), None, torch.get_num_threads(), where))
            except ValueError as fault:
                task.emit(engine=name, fault=str(fault))
        for batch, length in [(2, 5)] if task.dry else SETTINGS:
            if task.left() < 5:
                task.emit(batch=batch, prompt=length, fault="skipped: out of time")
                continue
            tokens, repetitions = (4, 1) if task.dry else (TOKENS, REPETITIONS)
            rows, _ = inference.setting(there, config, batch, length, tokens, repetitions)
            for row in rows:
                read = bytes_per_step(config, row["precision"], batch, length + tokens / 2)
                share = gpu and row["tokens/s"] and read * row["tokens/s"] / batch / gpu.memory
                task.emit(batch=batch, prompt=length, **row, MBU=share)
        for engine in there:
            engine.close()
