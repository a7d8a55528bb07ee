"""The parser of heed's commands: a mistake is one line. Importing it does not import torch."""

import argparse
import difflib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from training.deprecated_names import RENAMED


class Parser(argparse.ArgumentParser):
    """An error is `PROGRAM: message` on stderr and exit status 2, without the usage. Flags cannot be abbreviated; for a
    misspelled one, the closest is named."""

    def __init__(self, prog: str, description: str | None = None, **options: Any) -> None:
        super().__init__(
            prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
            **options,
        )  # fmt: skip

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse, also for the parser of a subcommand, whose own flags are then those that may be meant."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            if (new := f"--{RENAMED.get(flag.removeprefix('--'))}") in self._option_string_actions:
                self.error(f"{flag}: renamed to {new}")
            near = difflib.get_close_matches(flag, self._option_string_actions, 1)
            self.error(f"{unknown[0]}: no such option; {f'did you mean {near[0]}?' if near else 'see --help'}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.removeprefix('python -m ').split()[0]}: {' '.join(message.split())}\n")


def whole(least: int, most: int) -> Callable[[str], int]:
    """The type of a flag: a whole number from `least` to `most`."""

    def number(word: str) -> int:
        if not least <= (value := int(word)) <= most:
            raise argparse.ArgumentTypeError(f"{word}: must be from {least:,} to {most:,}")
        return value

    number.__name__ = "int"  # in the message for what is no number
    return number
