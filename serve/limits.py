"""The limits of the server and of a request, as arguments of the command."""

from dataclasses import dataclass, field, fields
from typing import Any


def limit(default: float, least: float, about: str) -> Any:
    """A field of Limits with its smallest value and its help."""
    return field(default=default, metadata={"least": least, "help": f"{about}; default: {default}"})


@dataclass(frozen=True)
class Limits:
    """Raises ValueError for a value that is too small."""

    max_sequences: int = limit(32, 1, "sequences that are generated together, each with a row of the KV cache")
    max_queue: int = limit(256, 0, "sequences that may wait for a row; beyond that, requests get status 429")
    max_tokens: int = limit(1024, 1, "tokens that a request may ask for")
    max_body_bytes: int = limit(1 << 20, 1, "size of a request's body")
    timeout: float = limit(600.0, 0.001, "seconds from a request to the end of its response")
    grace: int = limit(30, 0, "seconds after Ctrl-C or SIGTERM for requests to finish; a second one ends at once")

    def __post_init__(self) -> None:
        for each in fields(self):
            name, value, least = each.name.replace("_", "-"), getattr(self, each.name), each.metadata["least"]
            if not value >= least:
                raise ValueError(f"--{name} {value}: must be at least {least}")
