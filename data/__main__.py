"""Tokenize the text of a recipe into the cache, where train.py finds it: before a GPU is rented, or once for many runs.

python -m data prepare RECIPE [--data.FIELD VALUE ...]     RECIPE and fields as for train.py

The text is tokenized in one process per core. Stopped or killed, the same command continues.
"""

import argparse
import sys

from data.encoding import cores
from data.mixture import open_shards
from data.prepare import prepare
from data.shards import ShardError
from data.sources import CorpusError
from data.tokenizer import TokenizerError
from training.command_line import Parser
from training.config import ConfigError
from training.config_files import documentation, fields, load, recipes


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser("python -m data", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("prepare", help="tokenize the text of a recipe")
    p.add_argument("recipe", metavar="RECIPE", help=f"a path to a TOML file, or one of {', '.join(recipes())}")
    p.add_argument("--processes", type=int, default=cores(), metavar="N", help="default: one per core")
    documents = documentation("data")
    for name, kind in fields("data").items():
        p.add_argument(f"--data.{name}", metavar=kind.__name__.upper(), help=documents[name].replace("%", "%%"))
    known = parser.parse_args(words)
    if known.processes < 1:
        parser.error(f"--processes {known.processes}: must be at least 1")
    return known


def run(known: argparse.Namespace) -> str:
    """Prepare, verify, and return the line to print."""
    given = {name: value for name, value in vars(known).items() if name.startswith("data.") and value is not None}
    data = load(known.recipe, given).data
    folder = prepare(**data.preparation, processes=known.processes)
    train, val = (open_shards(folder, split).tokens for split in ("train", "val"))
    return f"{data.name}: {train:,} train tokens and {val:,} val tokens are in {folder}"


def main(words: list[str] | None = None) -> int:
    """Run the command. A user's mistake is one line on stderr and exit status 2, without a traceback."""
    try:
        print(run(arguments(words)))
    except (ConfigError, CorpusError, TokenizerError, ShardError) as error:
        print(f"data: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a file that may not be read
        print(f"data: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndata: stopped; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
