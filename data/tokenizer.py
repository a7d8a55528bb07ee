"""Tokenizers: text to token ids and back, with the `tokenizers` library, saved as a standard tokenizer.json.

Three kinds can be trained here, and any existing tokenizer.json can be used instead.

    char  one id per character of the corpus: the smallest vocabulary, the longest sequences. An unseen character raises
          an error.
    byte  one id per byte of UTF-8: 256 ids, and no character is unseen.
    bpe   byte-level BPE: starts from bytes and merges the most frequent adjacent pair of the training sample until the
          vocabulary is full. Text is first split into words, numbers and punctuation by GPT-2's pattern, and merges do
          not cross these boundaries. About 3.2 bytes per token with 4,096 entries.

Every vocabulary has one more entry, the special token `<|endoftext|>` between documents. Text never produces it: if a
text contains those 13 characters, they are encoded as 13 characters.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

EOT = "<|endoftext|>"
# Names of EOT in other vocabularies
END_TOKENS = ("</s>", "<eos>", "<|im_end|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>")
KINDS = ("char", "byte", "bpe")


class TokenizerError(ValueError):
    """A tokenizer that cannot be trained, found or used, or a text that it cannot encode. The message is one line."""


class Tokenizer:
    """A tokenizer.

    vocab_size: number of ids. eot: id of the end-of-text token. end_tokens: all ids that end generation, `eot` and for
    chat `<|im_end|>`. bos_tokens: ids before every text, none in heed's own vocabularies. sha256: hash of the canonical
    JSON and of `end`, if given.
    """

    def __init__(self, inner: tokenizers.Tokenizer, where: str = "tokenizer", end: str | None = None):
        """end: the end-of-text token, if the vocabulary does not determine it. Raises TokenizerError."""
        inner.encode_special_tokens = True  # text never produces special tokens; not stored in tokenizer.json
        inner.no_truncation()
        inner.no_padding()
        self.inner = inner
        vocab = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.end = None if end == EOT else end
        self.eot = vocab[self.end or end_of_text(vocab, where)]
        self.end_tokens = {self.eot, *(vocab[token] for token in (EOT, *END_TOKENS) if token in vocab)}
        self.bos_tokens: list[int] = []
        if inner.post_processor is not None:  # it adds special tokens around a text; keep those before it
            plain, full = (inner.encode("a", add_special_tokens=special).ids for special in (False, True))
            self.bos_tokens = full[: full.index(plain[0])]
        content = json.loads(inner.to_str())
        # Ids whose text does not depend on the next id; None if the library handles this. Excludes single-byte entries,
        # and special tokens, which are skipped and may be between two such entries.
        self.complete: set[int] | None = None
        if content["model"].get("byte_fallback"):
            special = {i for i, token in inner.get_added_tokens_decoder().items() if token.special}
            self.complete = {i for token, i in vocab.items() if not re.fullmatch("<0x[0-9A-F]{2}>", token)} - special
        self.sha256 = hashlib.sha256((json.dumps(content, sort_keys=True) + (self.end or "")).encode()).hexdigest()
        self._chars = None
        special = {token["content"] for token in content["added_tokens"]}
        if content["model"]["type"] == "WordLevel" and all(len(token) == 1 or token in special for token in vocab):
            self.kind, self._chars = "char", {token: i for token, i in vocab.items() if len(token) == 1}
        elif content["model"]["type"] == "BPE":
            self.kind = "bpe" if content["model"]["merges"] else "byte"
        else:
            self.kind = content["model"]["type"].lower()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Raises TokenizerError for lone surrogates, and (char) for an unseen character."""
        return self.encode_batch([text])[0]

    def encode_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """The ids of a text to be continued, which may be given as ids; an empty one begins a new document. Raises like
        `encode`."""
        ids = self.bos_tokens + self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return ids or [self.eot]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, on all cores. Raises like `encode`."""
        try:
            if self._chars is not None:
                return [[self._chars[char] for char in text] for text in texts]
            return [done.ids for done in self.inner.encode_batch_fast(texts, add_special_tokens=False)]
        except (KeyError, TypeError, UnicodeEncodeError):
            for text in texts:
                self._raise_for(text)
            raise

    def _raise_for(self, text: str) -> None:
        """Raise TokenizerError with the character of `text` that cannot be encoded and its position."""
        for at, char in enumerate(text):
            if "\ud800" <= char <= "\udfff":
                raise TokenizerError(f"character {at} is {char!a}, half of a surrogate pair: remove or decode it")
            if self._chars is not None and char not in self._chars:
                unseen = "".join(sorted({c for c in text if c not in self._chars}))
                raise TokenizerError(
                    f"character {at} is {char!r}, not one of the {len(self._chars)} characters of this char tokenizer "
                    f"(all such here: {unseen!r}); remove it, or train with tokenizer byte or bpe"
                )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, the exact inverse of `encode`. Special tokens such as end-of-text are skipped. Bytes that
        are not UTF-8, which a model may generate, become U+FFFD."""
        return self.inner.decode(list(ids), skip_special_tokens=True)

    def save(self, path: Path) -> None:
        """Write tokenizer.json; transformers loads it with `PreTrainedTokenizerFast(tokenizer_file=...)`. A named
        end-of-text token is stored in tokenizer_config.json, as in transformers."""
        path.write_text(self.inner.to_str(pretty=True), encoding="utf-8")
        if self.end:
            path.with_name("tokenizer_config.json").write_text(json.dumps({"eos_token": self.end}) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Load a tokenizer.json, or one from a folder. Raises TokenizerError if it is missing or invalid."""
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.exists():
            raise TokenizerError(
                f"data.tokenizer = {str(path)!r}: no such file; name a tokenizer.json or one of {KINDS}"
            )
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(
                f"data.tokenizer = {str(path)!r}: not a tokenizer.json ({' '.join(str(error).split())})"
            ) from None
        return cls(inner, str(path), named_end(path.with_name("tokenizer_config.json"), inner))

    @classmethod
    def train(cls, kind: str, texts: Iterable[str], vocab_size: int = 4096) -> "Tokenizer":
        """Train a vocabulary on `texts`, which are read once. `vocab_size` counts all ids and applies to bpe only; the
        result has fewer if the text is too small. Raises TokenizerError for a size below 257."""
        if kind == "char":
            seen = set[str]()
            for text in texts:
                seen.update(text)
            inner = tokenizers.Tokenizer(models.WordLevel({t: i for i, t in enumerate([EOT, *sorted(seen)])}))
            inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
            inner.decoder = decoders.Fuse()
            inner.add_special_tokens([EOT])
        elif kind in ("byte", "bpe"):
            size = 257 if kind == "byte" else vocab_size
            if size < 257:
                raise TokenizerError(f"data.vocab_size = {size}: bpe needs at least 257, every byte and {EOT}")
            inner = tokenizers.Tokenizer(models.BPE())
            inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
            inner.decoder = decoders.ByteLevel()
            alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # the 256 bytes, as printable characters
            trainer = trainers.BpeTrainer(
                vocab_size=size, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False
            )
            inner.train_from_iterator(texts if kind == "bpe" else [], trainer)
        else:
            raise TokenizerError(f"data.tokenizer = {kind!r}: not a kind that can be trained; use one of {KINDS}")
        return cls(inner)


def end_of_text(vocab: dict[str, int], where: str) -> str:
    """The end-of-text token: EOT, or the only other name for it in the vocabulary."""
    if EOT in vocab:
        return EOT
    found = [token for token in END_TOKENS if token in vocab]
    if len(found) > 1:
        found = [token for token in found if token != "<|im_end|>"]  # next to another, it ends a turn of a chat
    if len(found) == 1:
        return found[0]
    others = f"but several candidates: {found}" if found else f"nor any of {list(END_TOKENS)}"
    raise TokenizerError(f"data.tokenizer = {where!r}: has no {EOT}, {others}; add {EOT} to its added_tokens")


def named_end(path: Path, inner: tokenizers.Tokenizer) -> str | None:
    """The end-of-text token named by a tokenizer_config.json, if any. Raises TokenizerError."""
    try:
        named = json.loads(path.read_text(encoding="utf-8")).get("eos_token") if path.is_file() else None
    except (ValueError, AttributeError) as error:
        raise TokenizerError(f"{path}: not a tokenizer_config.json ({error})") from None
    end = named.get("content") if isinstance(named, dict) else named
    if end is not None and (not isinstance(end, str) or inner.token_to_id(end) is None):
        raise TokenizerError(f"{path}: eos_token = {end!r}: not in the vocabulary of tokenizer.json")
    return end


def get_tokenizer(spec: str, texts: Callable[[], Iterator[str]] | None = None, vocab_size: int = 4096) -> Tokenizer:
    """Get a tokenizer: `char`, `byte`, `bpe` (trained on `texts()`), a tokenizer.json or its folder, or a hub name.

    Raises TokenizerError, one line, if it is not available.
    """
    if spec in KINDS:
        return Tokenizer.train(spec, texts() if texts else iter(()), vocab_size)
    if Path(spec).exists() or spec.endswith(".json") or spec.startswith((".", "/", "~")):
        return Tokenizer.load(Path(spec).expanduser())
    try:
        return Tokenizer(tokenizers.Tokenizer.from_pretrained(spec), spec)
    except TokenizerError:
        raise
    except Exception as error:  # the library raises bare Exception: no network, no such name, no access
        reason = " ".join(str(error).split())[:200]
        raise TokenizerError(
            f"data.tokenizer = {spec!r}: neither one of {KINDS}, nor a file, nor available from the hub ({reason})"
        ) from None
