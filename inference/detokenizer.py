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
