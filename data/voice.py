"""From tokens to what can be said of them already."""

from collections.abc import Sequence

from data.tokenizer import Tokenizer


class Voice:
    """One sample's text: whole characters only, nothing of a stop text, and no more once it has ended."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.ends, self.stop = tokenizer.ends, stop
        self.stream = tokenizer.stream()
        self.held, self.ended = "", False  # held: it may turn out to be the beginning of a stop text

    def push(self, token: int, last: bool) -> str:
        """What can be said now that `token` is known; `last`: none follows."""
        self.ended = last or token in self.ends
        self.held += "" if token in self.ends else self.stream.push(token)
        if self.ended:
            self.held += self.stream.flush()
        stops = [at for text in self.stop if (at := self.held.find(text)) >= 0]
        if stops:
            self.held, self.ended = self.held[: min(stops)], True
        begun = (n for text in self.stop for n in range(1, len(text)) if self.held.endswith(text[:n]))
        keep = 0 if self.ended else max(begun, default=0)
        sure, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return sure
