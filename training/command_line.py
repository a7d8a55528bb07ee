"""The parser of heed's commands: a mistake is one line. Importing it does not import torch."""

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from training.deprecated_names import OTHERS, RENAMED


class Parser(argparse.ArgumentParser):
    """An error is `PROGRAM: message` on stderr and exit status 2, without the usage. Flags cannot be abbreviated; for a
    misspelled one, the closest is named."""

    def __init__(self, prog: str, description: str | None = None, **options: Any) -> None:
        super().__init__(
            prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
            **options,
        )  # fmt: skip
        self._negative_number_matcher = re.compile(r"-\.?\d")  # -1e-3 is a value, not a flag

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse, also for the parser of a subcommand, whose own flags are then those that may be meant."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            if (new := f"--{RENAMED.get(flag.removeprefix('--'))}") in self._option_string_actions:
                self.error(f"{flag}: renamed to {new}")
            near = closest(flag, self._option_string_actions) if flag.startswith("-") else None
            self.error(f"{flag}: no such option; {f'did you mean {near}?' if near else 'see --help'}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.removeprefix('python -m ').split()[0]}: {' '.join(message.split())}\n")


def closest(flag: str, options: Iterable[str]) -> str | None:
    """The option that an unknown flag is most like: its last part (`--lr` is --optim.lr), a name that other projects
    have, or the whole of it."""
    full = {option: option for option in options}
    last = {option.lstrip("-").rpartition(".")[2]: option for option in full}
    last |= {other: f"--{name}" for other, name in OTHERS.items() if f"--{name}" in full}
    name = flag.lstrip("-").rpartition(".")[2]
    known, word = (full, flag) if "." in flag and name not in last else (last, name)
    near = difflib.get_close_matches(word, known, 1)
    return known[near[0]] if near else None


def whole(least: int, most: int) -> Callable[[str], int]:
    """The type of a flag: a whole number from `least` to `most`."""

    def number(word: str) -> int:
        if not least <= (value := int(word)) <= most:
            raise argparse.ArgumentTypeError(f"{word}: must be from {least:,} to {most:,}")
        return value

    number.__name__ = "int"  # in the message for what is no number
    return number
