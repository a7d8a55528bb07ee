"""Convert between heed's runs, Hugging Face folders and GGUF files.

python -m convert to-hf RUN DIR          export a run to a folder for AutoModelForCausalLM and AutoTokenizer
python -m convert from-hf DIR RUN        import a Qwen3 or Llama checkpoint as a run for generation or fine-tuning
python -m convert from-hf HUB/NAME RUN   the same, downloaded from the hub
python -m convert to-gguf RUN FILE       export a run to one GGUF file for llama.cpp, ollama and others

to-hf and from-hf do not need transformers: the format is JSON and safetensors. to-gguf needs gguf.
"""

import argparse
import sys
from pathlib import Path

from training.command_line import Parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser("python -m convert", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    which = "best, latest or a step such as step-000500; default: best"

    to_hf = commands.add_parser("to-hf", help="export a run to a Hugging Face folder")
    to_hf.add_argument("run", type=Path, metavar="RUN", help="folder of the run, such as runs/shakespeare")
    to_hf.add_argument("folder", type=Path, metavar="DIR", help="folder to write: new or empty")
    to_hf.add_argument("--checkpoint", default="best", help=which)
    dtypes = ("float32", "bfloat16")
    to_hf.add_argument("--dtype", default="float32", choices=dtypes, help="dtype of the weights; default: float32")

    from_hf = commands.add_parser("from-hf", help="import a Hugging Face checkpoint as a run")
    from_hf.add_argument("source", metavar="DIR_OR_NAME", help="folder with config.json, or name of a model on the hub")
    from_hf.add_argument("run", type=Path, metavar="RUN", help="folder to write: new or empty, such as runs/smol")
    from_hf.add_argument("--context", type=int, metavar="N", help="context length; default: the checkpoint's")

    to_gguf = commands.add_parser("to-gguf", help="export a run to a GGUF file")
    to_gguf.add_argument("run", type=Path, metavar="RUN", help="folder of the run, such as runs/shakespeare")
    to_gguf.add_argument("file", type=Path, metavar="FILE", help="GGUF file to write; an existing file is replaced")
    to_gguf.add_argument("--checkpoint", default="best", help=which)
    types = ("f32", "f16", "bf16", "q8_0")
    to_gguf.add_argument("--type", default="f16", choices=types, help="type of the matrices; default: f16")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> str:
    """Convert and return the line to print. Raises ValueError and OSError."""
    if args.command == "to-hf":
        from convert.to_hf import export

        return export(args.run, args.folder, args.checkpoint, args.dtype)
    if args.command == "from-hf":
        from convert.from_hf import import_checkpoint

        return import_checkpoint(args.source, args.run, args.context)
    from convert.to_gguf import export_gguf

    return export_gguf(args.run, args.file, args.checkpoint, args.type)


def main(argv: list[str] | None = None) -> int:
    """Run the command. A user error is one line on stderr and exit status 2, without a traceback."""
    args = parse_args(argv)
    try:
        print(run(args))
    except ModuleNotFoundError as error:
        extra = "gguf" if args.command == "to-gguf" else "hf"
        print(f"convert: {error}: pip install -e .[{extra}]", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"convert: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
