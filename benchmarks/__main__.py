"""Benchmarks of heed against other implementations and against the limits of the hardware.

python -m benchmarks training --nanogpt DIR --text FILE [--setting cpu|gpu|gpu-full] [--out DIR]
                                             CPU or GPU: training time to a validation loss, against nanoGPT
python -m benchmarks inference [--out DIR]   CPU: tokens per second against transformers, llama.cpp and nanoGPT
python -m benchmarks serving [--out DIR]     CPU: tokens per second and latency of the server, against llama.cpp's
python -m benchmarks kernels [--out DIR]     GPU: check the kernels, then time them and other implementations
python -m benchmarks kernels --bound         no GPU needed: compute the roofline of each GPU
python -m benchmarks kernels --dry-run       no GPU needed: the same code on tiny shapes, interpreted, not timed
python -m benchmarks gpu [--out DIR] [--nanogpt DIR --text FILE]
                                             GPU: kernels, a training step, generation, nanoGPT's setting and a tile
                                             search, of one card, in nine minutes
python -m benchmarks gpu --dry-run           no GPU needed: the same code on tiny shapes, not a measurement
python -m benchmarks tiles [KERNEL]          GPU: search tile sizes, print rows for kernels/triton/tiles.py
python -m benchmarks data [--megabytes N]    CPU: text to tokens to batches, against datasets.map and nanoGPT
python -m benchmarks step RECIPE             CPU or GPU: tokens per second and MFU of a training step
python -m benchmarks scaling [--out DIR]     CPU or GPU: time and memory of a training step against model sizes
python -m benchmarks scale --paper            no GPU needed: count memory and time of a step on 8, 64 and 512 GPUs
python -m benchmarks zoo [EXPERIMENT ...]    CPU: attention and its alternatives: recall, copying, text, decoding, ...
"""

import argparse
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.zoo import EXPERIMENTS
from training.command_line import Parser


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser("python -m benchmarks", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    kernels = commands.add_parser("kernels", help="heed's kernels against other implementations and the roofline")
    kernels.add_argument("--only", nargs="+", default=[], metavar="KERNEL", help="only these kernels")
    kernels.add_argument("--out", type=Path, metavar="DIR", help="folder for a CSV and a plot")
    kernels.add_argument("--bound", action="store_true", help="print the roofline, without timing")
    parser.set_defaults(bound=False)
    scaling = commands.add_parser("scaling", help="time and memory against context, width, batch, vocabulary")
    scaling.add_argument("--quick", action="store_true", help="tiny sizes, to test the code")
    scaling.add_argument("--out", type=Path, metavar="DIR", help="folder for a CSV and a plot")
    scale = commands.add_parser("scale", help="memory and time of a step on 8, 64 and 512 GPUs")
    scale.add_argument("--paper", action="store_true", required=True, help="counted, not measured")
    step = commands.add_parser("step", help="tokens per second and MFU of a training step")
    step.add_argument("recipe", help="a name in configs/, or a TOML file")
    step.add_argument("settings", nargs="*", metavar="SECTION.FIELD=VALUE", help="changes to it: model.n_embd=256")
    step.add_argument("--pairs", type=int, default=20, help="steps to time; default: 20")
    train = commands.add_parser("training", help="training time to a validation loss, against nanoGPT")
    train.add_argument("--nanogpt", type=Path, required=True, metavar="DIR", help="folder of a clone of nanoGPT")
    train.add_argument("--text", type=Path, required=True, metavar="FILE", help="tiny Shakespeare, nanoGPT's input.txt")
    train.add_argument("--setting", choices=["cpu", "gpu", "gpu-full"], default="cpu", help="of nanoGPT; default: "
        "cpu; gpu times ten steps of its GPU setting, gpu-full trains it")  # fmt: skip
    train.add_argument("--seeds", type=int, default=3, help="runs of each, alternating; default: 3")
    train.add_argument("--out", type=Path, metavar="DIR", help="folder for a CSV and a plot")
    train.add_argument("options", nargs="*", help="after --: further options for heed's train.py")
    data = commands.add_parser("data", help="text to tokens to batches")
    data.add_argument("--megabytes", type=int, default=1000, help="size of the text; default: 1000")
    data.add_argument("--turns", type=int, default=1, help="default: 1")
    data.add_argument("--quick", action="store_true", help="a short text and a small model, to test the code")
    tiles = commands.add_parser("tiles", help="search the tile sizes of a kernel")
    tiles.add_argument("kernel", nargs="?", help="a key of kernels/triton/tiles.py; default: all")
    gpu = commands.add_parser("gpu", help="check and measure one GPU in several parts, within a fixed time")
    gpu.add_argument("--out", type=Path, default=Path("gpu-results"), metavar="DIR", help="default: gpu-results")
    gpu.add_argument("--only", nargs="+", default=[], metavar="PART", help="only these parts")
    gpu.add_argument("--minutes", type=float, default=9.0, help="of all parts together; default: 9")
    gpu.add_argument("--nanogpt", type=Path, metavar="DIR", help="folder of nanoGPT's files, to include it")
    gpu.add_argument("--text", type=Path, metavar="FILE", help="tiny Shakespeare, nanoGPT's input.txt")
    for command in (kernels, tiles, gpu):
        command.add_argument("--dry-run", action="store_true", help="without a GPU: tiny shapes, no timing")
    zoo = commands.add_parser("zoo", help="attention against the other token mixers, with equal parameters")
    zoo.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=f"of {', '.join(EXPERIMENTS)}; default: all")
    zoo.add_argument("--only", nargs="+", default=[], metavar="MEMBER", help="names or letters of layer_pattern")
    zoo.add_argument("--seeds", type=int, default=1, help="of each point; default: 1")
    zoo.add_argument("--jobs", type=int, help="processes of one thread each; default: one per core")
    zoo.add_argument("--minutes", type=float, default=math.inf, help="start nothing more after; default: no limit")
    zoo.add_argument("--out", type=Path, default=Path("zoo-results"), metavar="DIR", help="for CSV, table and plot of "
        "each experiment; a run continues with the points that are missing there; default: zoo-results")  # fmt: skip
    size = zoo.add_mutually_exclusive_group()
    size.add_argument("--short", action="store_true", help="fewer points and steps: a first look")
    size.add_argument("--quick", action="store_true", help="tiny sizes, to test the code")
    sample = commands.add_parser("inference", help="tokens per second against other engines and the roofline")
    sample.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these engines; default: all")
    sample.add_argument("--sizes", nargs="+", default=[], metavar="SIZE", help="model sizes; default: all")
    sample.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64], metavar="N", help="default: 1 8 64")
    sample.add_argument("--prompts", nargs="+", type=int, default=[16, 512], metavar="N", help="default: 16 512 tokens")
    sample.add_argument("--max-new-tokens", type=int, default=32, help="per engine and repetition; default: 32")
    sample.add_argument("--repetitions", type=int, default=5, help="default: 5")
    sample.add_argument("--nanogpt", type=Path, metavar="DIR", help="folder of a clone of nanoGPT, to include it")
    sample.add_argument("--out", type=Path, metavar="DIR", help="folder for inference.csv")
    sample.add_argument("--quick", action="store_true", help="a tiny model, once, to test the code")
    serving = commands.add_parser("serving", help="tokens per second and latency of the server with several clients")
    serving.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32], metavar="N", help="default: 1 8 32")
    serving.add_argument("--requests", type=int, default=4, help="per client and repetition; default: 4")
    serving.add_argument("--max-new-tokens", type=int, default=64, help="per request; default: 64")
    serving.add_argument("--repetitions", type=int, default=3, help="default: 3")
    serving.add_argument("--out", type=Path, metavar="DIR", help="folder for serving.csv")
    serving.add_argument("--quick", action="store_true", help="a tiny model, few requests, to test the code")
    return parser.parse_args(words)


def check_device() -> None:
    """Raise ValueError if there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            "no GPU found. `python -m benchmarks kernels --bound` computes the roofline, "
            "--dry-run runs the code without one"
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 is set: the kernels would run on the CPU. Unset it, or pass --dry-run")


def inference_benchmark(a: argparse.Namespace) -> int:
    """Run `python -m benchmarks inference`. Raises ValueError for invalid arguments."""
    import torch

    from benchmarks import inference
    from benchmarks.inference import SIZES
    from benchmarks.inference_engines import ENGINES

    check_names("--only", a.only, ENGINES)
    check_names("--sizes", a.sizes, SIZES)
    if a.nanogpt and not (a.nanogpt / "model.py").exists():
        raise ValueError(f"--nanogpt {a.nanogpt}: no model.py; must be the folder of a clone of nanoGPT")
    if (
        min([*a.batches, *a.prompts, a.max_new_tokens - 1, a.repetitions]) < 1
        or max(a.prompts) + a.max_new_tokens > 1024
    ):
        raise ValueError("batches, prompts, repetitions: at least 1; tokens: at least 2; both: at most 1,024")
    if a.quick:
        a.sizes, a.batches, a.prompts, a.max_new_tokens, a.repetitions = ["tiny"], [1, 3], [5], 4, 1
    threads = torch.get_num_threads()
    return inference.run(
        a.only or list(ENGINES), a.sizes or list(SIZES), a.batches, a.prompts, a.max_new_tokens, a.repetitions,
        a.nanogpt, a.out, threads,
    )  # fmt: skip


def serving_benchmark(a: argparse.Namespace) -> int:
    """Run `python -m benchmarks serving`. Raises ValueError for invalid arguments."""
    from benchmarks import serving

    if a.quick:
        a.clients, a.requests, a.max_new_tokens, a.repetitions = [1, 3], 2, 4, 1
    if min([*a.clients, a.requests - 1, a.max_new_tokens - 1, a.repetitions]) < 1 or a.max_new_tokens > 768:
        raise ValueError("clients, repetitions: at least 1; requests: at least 2; tokens: from 2 to 768")
    return serving.run(a.clients, a.requests, a.max_new_tokens, a.repetitions, a.out, a.quick)


def gpu_benchmark(a: argparse.Namespace) -> int:
    """Run `python -m benchmarks gpu`. Raises ValueError for invalid arguments."""
    from benchmarks.gpu import run

    check_names("--only", a.only, run.PARTS)
    if a.nanogpt and not (a.nanogpt / "train.py").is_file():
        raise ValueError(f"--nanogpt {a.nanogpt}: no train.py; must be the folder of a clone of nanoGPT")
    if a.text and not a.text.is_file():
        raise ValueError(f"--text {a.text}: no such file; must be nanoGPT's input.txt, tiny Shakespeare")
    if not a.minutes > 0:
        raise ValueError(f"--minutes {a.minutes:g}: must be above 0")
    if not a.dry_run:
        check_device()
    nanogpt, text = (path.resolve() if path else None for path in (a.nanogpt, a.text))
    return run.run(a.out.resolve(), a.only, a.minutes, nanogpt, text, a.dry_run)


def zoo_benchmark(a: argparse.Namespace) -> int:
    """Run `python -m benchmarks zoo`. Raises ValueError for invalid arguments."""
    import torch

    from benchmarks.zoo import members, run

    check_names("zoo", a.experiments, EXPERIMENTS)
    check_names("--only", a.only, [*members.MEMBERS, *{m["layer_pattern"]: 0 for m in members.MEMBERS.values()}])
    jobs = torch.get_num_threads() if a.jobs is None else a.jobs
    for option, value in (("--seeds", a.seeds), ("--jobs", jobs)):
        if value < 1:
            raise ValueError(f"{option} {value}: must be at least 1")
    if not a.minutes > 0:
        raise ValueError(f"--minutes {a.minutes:g}: must be above 0")
    scale = "quick" if a.quick else "short" if a.short else "full"
    return run.run(a.experiments, a.out, scale, a.only, a.seeds, jobs, a.minutes)


def check_names(option: str, asked: list[str], names: Iterable[str]) -> None:
    """Raise ValueError for an unknown name."""
    for name in asked:
        if name not in names:
            raise ValueError(f"{option} {name}: must be one of {', '.join(names)}")


def main(a: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    if a.command == "scaling":
        from benchmarks import scaling

        return scaling.run(a.quick, a.out)
    if a.command == "scale":
        from benchmarks import paper

        return paper.run()
    if a.command == "step":
        from benchmarks import training_step

        return training_step.run(a.recipe, a.settings, a.pairs)
    if a.command == "training":
        from benchmarks import training

        return training.run(a.nanogpt, a.text, a.setting, a.seeds, a.out, a.options)
    if a.command == "inference":
        return inference_benchmark(a)
    if a.command == "serving":
        return serving_benchmark(a)
    if a.command == "data":
        from benchmarks import data

        return data.run(a.megabytes, a.turns, a.quick)
    if a.command == "gpu":
        return gpu_benchmark(a)
    if a.command == "zoo":
        return zoo_benchmark(a)
    if a.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    elif not a.bound:
        check_device()
    if a.command == "tiles":
        from benchmarks import tiles

        return tiles.run(a.kernel, a.dry_run)
    from benchmarks.shapes import KERNELS

    check_names("--only", a.only, KERNELS)
    if a.bound:
        from benchmarks import roofline

        print(roofline.report())
        return 0
    from benchmarks import kernels

    return kernels.run(a.only, a.dry_run, a.out)


if __name__ == "__main__":
    try:
        sys.exit(main(arguments()))
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"benchmarks: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except ImportError as error:
        print(f"benchmarks: {error}: see pyproject.toml; triton is available on Linux only", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
