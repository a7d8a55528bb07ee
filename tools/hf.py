"""From a heed run to a Hugging Face folder, and back.

python tools/hf.py export RUN DIR          a folder that AutoModelForCausalLM and AutoTokenizer load
python tools/hf.py import DIR RUN          a Qwen3- or Llama-shaped checkpoint becomes a run that speaks and trains on
python tools/hf.py import HUB/NAME RUN     the same, downloaded from the hub

Neither needs transformers: the format is JSON and safetensors.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="a run as a Hugging Face folder", allow_abbrev=False)
    out.add_argument("run", type=Path, metavar="RUN", help="folder of the run, such as runs/shakespeare")
    out.add_argument("folder", type=Path, metavar="DIR", help="folder to write: new, or empty")
    out.add_argument("--checkpoint", default="best", help="best, latest or a step such as step-000500; default: best")
    out.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights; default: float32, exact"
    )
    into = commands.add_parser("import", help="a Hugging Face checkpoint as a run", allow_abbrev=False)
    into.add_argument("source", metavar="DIR", help="folder with config.json, or the name of a model on the hub")
    into.add_argument("run", type=Path, metavar="RUN", help="folder to write: new, or empty; such as runs/smol")
    into.add_argument("--context", type=int, metavar="N", help="see N tokens at once; default: as many as it can")
    return parser.parse_args(words)


def main(a: argparse.Namespace) -> None:
    """Do what was asked, and say what was done."""
    if a.command == "export":
        from tools.hf_export import export

        print(export(a.run, a.folder, a.checkpoint, a.dtype))
    else:
        from tools.hf_import import take_in

        print(take_in(a.source, a.run, a.context))


if __name__ == "__main__":
    try:
        main(arguments())
    except (ValueError, OSError) as error:  # a wrong run, folder, name or configuration: each names itself
        print(f"hf.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
