"""Where a generated text ends: at an end token, before a stop string, or at the end of a line."""

from collections.abc import Sequence

from data.tokenizer import Tokenizer
from inference.detokenizer import StreamingDetokenizer


class GeneratedText:
    """The text of one sample. It ends at an end token or before a stop string: `ended`; `finished` also when cut off.

    Args:
        tokenizer: the vocabulary.
        stop: strings before which the text ends.
        prompt: tokens of the prompt.
        whole_lines: leave out an incomplete last line when the text is cut off, unless it is the only line.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], prompt: Sequence[int] = (), whole_lines: bool = False
    ) -> None:
        self.end_tokens, self.stop, self.whole_lines = tokenizer.end_tokens, stop, whole_lines
        self.detokenizer = StreamingDetokenizer(tokenizer, prompt)
        self.held = ""  # text not yet returned: it may belong to a stop string or to an incomplete line
        self.finished = self.ended = self.started = False

    def add_token(self, token: int, last: bool = False) -> str:
        """Return the text that is final after `token`. `last`: the text is cut off after this token."""
        self.ended = token in self.end_tokens
        self.finished = last or self.ended
        self.held += "" if self.ended else self.detokenizer.add_token(token)
        if self.finished:
            self.held += self.detokenizer.finalize()
        stops = [at for text in self.stop if (at := self.held.find(text)) >= 0]
        if stops:
            self.held, self.finished, self.ended = self.held[: min(stops)], True, True
        partial = (n for text in self.stop for n in range(1, len(text)) if self.held.endswith(text[:n]))
        keep = 0 if self.finished else max(partial, default=0)
        if self.whole_lines and not self.ended:
            lines = self.held.rfind("\n")  # the end of the last complete line
            if not self.finished:
                keep = max(keep, len(self.held) - max(lines, 0))
            elif lines >= 0 or self.started:
                self.held = self.held[: max(lines, 0)]
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        self.started = self.started or bool(text)
        return text
