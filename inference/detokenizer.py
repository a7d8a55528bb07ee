"""From generated tokens to text, as soon as it cannot change any more: whole characters, stop strings, end tokens."""

from collections.abc import Sequence

from tokenizers import decoders

from data.tokenizer import Tokenizer


class StreamingDetokenizer:
    """Converts tokens to text one at a time. A character of several tokens, such as an emoji, is held back until whole.

    Args:
        tokenizer: the vocabulary.
        prompt: tokens before the first one; they decide whether the text begins with a space.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        known = list(prompt)
        while known and tokenizer.whole is not None and known[-1] not in tokenizer.whole:
            known.pop()
        self._decoder = decoders.DecodeStream(known, skip_special_tokens=True)
        self._emitted = known  # tokens whose text was returned
        self._held: list[int] = []  # tokens whose text was not
        self._new: list[int] = []  # those of them that the decoder has not seen

    def add_token(self, token: int) -> str:
        """Return the text that this token completes; often `""`."""
        self._held.append(token)
        self._new.append(token)
        if self._tokenizer.whole is not None and token not in self._tokenizer.whole:
            return ""
        text, self._new = self._decoder.step(self._tokenizer.inner, self._new), []
        if text is None:
            return ""
        self._emitted += self._held
        self._held = []
        return text

    def finalize(self) -> str:
        """Return the text held back, after the last token. Incomplete characters become U+FFFD."""
        before = self._tokenizer.decode(self._emitted)  # decoded alone, a text may lose a space at its beginning
        text = self._tokenizer.decode(self._emitted + self._held)[len(before) :]
        self._emitted, self._held, self._new = [], [], []
        self._decoder = decoders.DecodeStream(skip_special_tokens=True)
        return text


class GeneratedText:
    """The text of one sample. It ends at an end token or before a stop string; then `finished` is true.

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
        self.finished = self.started = False

    def add_token(self, token: int, last: bool = False) -> str:
        """Return the text that is certain after `token`. `last`: the text is cut off after this token."""
        ended = token in self.end_tokens
        self.finished = last or ended
        self.held += "" if ended else self.detokenizer.add_token(token)
        if self.finished:
            self.held += self.detokenizer.finalize()
        stops = [at for text in self.stop if (at := self.held.find(text)) >= 0]
        if stops:
            self.held, self.finished, ended = self.held[: min(stops)], True, True
        partial = (n for text in self.stop for n in range(1, len(text)) if self.held.endswith(text[:n]))
        keep = 0 if self.finished else max(partial, default=0)
        if self.whole_lines and not ended:
            lines = self.held.rfind("\n")  # the end of the last complete line
            if not self.finished:
                keep = max(keep, len(self.held) - max(lines, 0))
            elif lines >= 0 or self.started:
                self.held = self.held[: max(lines, 0)]
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        self.started = self.started or bool(text)
        return text
