"""Streaming detokenization: generated tokens to text that is final. Handles incomplete characters and stop strings."""

from collections.abc import Sequence

from tokenizers import decoders

from data.tokenizer import Tokenizer


class StreamingDetokenizer:
    """Converts tokens to text one at a time. An incomplete character, such as part of an emoji, is held back.

    Args:
        tokenizer: the vocabulary.
        prompt: tokens before the first one; they determine whether the text begins with a space.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        known = list(prompt)
        while known and tokenizer.complete is not None and known[-1] not in tokenizer.complete:
            known.pop()
        self._decoder = decoders.DecodeStream(known, skip_special_tokens=True)
        self._emitted = known  # tokens whose text was returned
        self._held: list[int] = []  # tokens whose text is held back
        self._new: list[int] = []  # held tokens not yet passed to the decoder

    def add_token(self, token: int) -> str:
        """Return the text that this token completes; often `""`."""
        self._held.append(token)
        self._new.append(token)
        if self._tokenizer.complete is not None and token not in self._tokenizer.complete:
            return ""
        text, self._new = self._decoder.step(self._tokenizer.inner, self._new), []
        if text is None:
            return ""
        self._emitted += self._held
        self._held = []
        return text

    def finalize(self) -> str:
        """Return the text still held back after the last token. Incomplete characters become U+FFFD."""
        before = self._tokenizer.decode(self._emitted)  # decoded separately, a text may lose its leading space
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
        """Return the text that is final after `token`. `last`: the text is cut off after this token."""
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
