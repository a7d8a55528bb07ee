"""Export a run to one GGUF file for llama.cpp and the tools built on it.

    python -m convert to-gguf runs/shakespeare shakespeare.gguf                  16-bit floats
    python -m convert to-gguf runs/shakespeare shakespeare.gguf --type q8_0      8 bits per weight, one scale per 32

heed's models map to llama.cpp's `qwen3`, and its tokenizers to llama.cpp's byte-level BPE (see `vocabulary`). A flag or
tokenizer that llama.cpp does not support is an error.
"""

import json
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import pre_tokenizers

from data.download import PUBLIC_TEXTS
from data.shards import sync
from data.tokenizer import Tokenizer
from model import GPT, ModelConfig
from sample import load

TYPES = ("f32", "f16", "bf16", "q8_0")
BLOCK = 32  # weights of a row that share a scale in Q8_0

# 1. The vocabulary --------------------------------------------------------------------------------------------------

# llama.cpp's name of a pre-tokenizer: its definition in tokenizer.json
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [BYTE_LEVEL],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
    "qwen2": [
        {"type": "Split", "pattern": {"Regex": QWEN}, "behavior": "Isolated", "invert": False},
        BYTE_LEVEL | {"use_regex": False},
    ],
}


class Vocabulary(NamedTuple):
    """A tokenizer in llama.cpp's format: pre-tokenizer name, token and token type of each id, and merges, each two
    tokens separated by a space."""

    split: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]


def vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The vocabulary of a model with `size` ids. Every text that heed can encode gets the same ids.

    byte is a BPE without merges. char is a BPE that merges only the bytes of each character; the intermediate parts
    have no ids. llama.cpp drops unseen characters, for which heed raises an error. Raises ValueError for a tokenizer
    that llama.cpp does not support.
    """
    from gguf import TokenType

    content = json.loads(tokenizer.inner.to_str())
    special = {token["id"]: token["special"] for token in content["added_tokens"]}
    ids = dict(sorted((n, token) for token, n in tokenizer.inner.get_vocab(with_added_tokens=True).items()))
    if tokenizer.kind == "char":
        split = "gpt-2"
        spelled = {number: spell(token) for number, token in ids.items() if number not in special}
        ids |= spelled
        steps = [[text[:n], text[n]] for text in spelled.values() for n in range(1, len(text))]
    else:
        split = splitting(content)
        steps = content["model"]["merges"]
    # llama.cpp needs at least one merge. This one never applies, since its parts do not occur in any text.
    merges = list(dict.fromkeys(map(" ".join, steps))) or [f"{ids[tokenizer.eot]} {ids[tokenizer.eot]}"]
    kinds = {number: TokenType.CONTROL if control else TokenType.USER_DEFINED for number, control in special.items()}
    return Vocabulary(
        split,
        [ids.get(number, f"[PAD{number}]") for number in range(size)],
        [int(kinds.get(n, TokenType.NORMAL if n in ids else TokenType.UNUSED)) for n in range(size)],
        merges,
    )


def spell(text: str) -> str:
    """A text's bytes as the printable characters that represent them in a byte-level BPE."""
    return "".join(part for part, _ in pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text))


def splitting(content: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json. Raises ValueError if it has none."""
    model, before = content["model"], content["pre_tokenizer"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("ignore_merges"):
        raise ValueError(f"tokenizer.json: {model['type']}, not a plain byte-level BPE; train a tokenizer with bpe")
    if (content["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        raise ValueError(f"tokenizer.json: normalizer {content['normalizer']['type']}: llama.cpp does not change text")
    steps = before["pretokenizers"] if before and before["type"] == "Sequence" else [before or {"type": "none"}]
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    for name, known in SPLITS.items():
        if steps == known:
            return name
    kinds = " and ".join(step["type"] for step in steps)
    raise ValueError(
        f"tokenizer.json: llama.cpp does not support this pre-tokenizer ({kinds}), only those of {', '.join(SPLITS)}"
    )


# 2. The weights -----------------------------------------------------------------------------------------------------


def check(config: ModelConfig) -> None:
    """Raise ValueError for a flag that llama.cpp's qwen3 does not support."""
    if others := set(config.layer_pattern) - set("LS"):
        raise ValueError(f"model.layer_pattern = {config.layer_pattern!r}: llama.cpp's qwen3 has no {min(others)}")
    if "S" in config.layer_pattern:
        raise ValueError(f"model.layer_pattern = {config.layer_pattern!r}: llama.cpp's qwen3 has no sliding window")
    if not config.qk_norm:
        raise ValueError("model.qk_norm = False: llama.cpp's qwen3 normalizes queries and keys")
    if not config.scale_scores:
        raise ValueError("model.scale_scores = False: llama.cpp's qwen3 divides scores by sqrt(head_dim)")
    if config.positions != "rope":
        raise ValueError(f"model.positions = {config.positions!r}: llama.cpp's qwen3 has RoPE alone")
    if config.n_expert:
        raise ValueError(f"model.n_expert = {config.n_expert}: llama.cpp's qwen3 has no experts")
    if config.gate:
        raise ValueError("model.gate = True: llama.cpp's qwen3 has no gate on attention's output")


def stored_as(shape: tuple[int, ...], dtype: str) -> str:
    """The type of a stored tensor: f32 for gains; f16 instead of q8_0 if rows are not a multiple of BLOCK."""
    if len(shape) == 1:
        return "f32"
    return "f16" if dtype == "q8_0" and shape[-1] % BLOCK else dtype


# 3. The file --------------------------------------------------------------------------------------------------------


def write(path: Path, model: GPT, tokenizer: Tokenizer, dtype: str, name: str, source: str) -> list[str]:
    """Write `model` to a GGUF file, atomically. Returns the names of the tensors stored in f16 instead of q8_0.

    `name` is the model's name, `source` its training text. Raises ValueError for what llama.cpp does not support.
    """
    import gguf

    config = model.config
    check(config)
    vocab = vocabulary(tokenizer, config.vocab_size)
    file_types = {"f32": "ALL_F32"} | {kind: f"MOSTLY_{kind.upper()}" for kind in TYPES[1:]}
    licence = PUBLIC_TEXTS[source].licence if source in PUBLIC_TEXTS else "not stated"
    draft = path.with_name(f".draft-{path.name}")
    out = gguf.GGUFWriter(draft, "qwen3")

    out.add_name(name)
    out.add_description(f"a heed model, trained on {source}; licence of that text: {licence}")
    out.add_dataset_count(1)
    out.add_dataset_name(0, source)
    out.add_file_type(gguf.LlamaFileType[file_types[dtype]])
    out.add_quantization_version(gguf.GGML_QUANT_VERSION)
    out.add_vocab_size(config.vocab_size)
    out.add_context_length(config.context)
    out.add_block_count(config.n_layer)
    out.add_embedding_length(config.n_embd)
    out.add_feed_forward_length(config.n_ffn)
    out.add_head_count(config.n_head)
    out.add_head_count_kv(config.n_kv_head)
    out.add_key_length(config.head_dim)
    out.add_value_length(config.head_dim)
    out.add_layer_norm_rms_eps(config.norm_eps)
    out.add_rope_freq_base(config.rope_theta)
    if config.yarn_factor > 1.0:
        out.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        out.add_rope_scaling_factor(config.yarn_factor)
        out.add_rope_scaling_orig_ctx_len(config.yarn_original_context)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(vocab.split)
    out.add_token_list(vocab.tokens)
    out.add_token_types(vocab.kinds)
    out.add_token_merges(vocab.merges)
    bos = tokenizer.bos_tokens or [tokenizer.eot]  # a document starts after the end of the previous one
    out.add_bos_token_id(bos[0])
    out.add_eos_token_id(tokenizer.eot)
    out.add_add_bos_token(bool(tokenizer.bos_tokens))

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.n_layer)
    left = []
    for ours, weight in model.state_dict().items():
        theirs = names.get_name(ours, (".weight",))
        if theirs is None:
            raise ValueError(f"{ours}: llama.cpp's qwen3 has no such tensor")
        kind = stored_as(tuple(weight.shape), dtype)
        if kind != dtype and weight.ndim > 1:
            left.append(ours)
        stored = gguf.GGMLQuantizationType[kind.upper()]
        values = gguf.quants.quantize(weight.float().cpu().numpy().astype(np.float32, copy=False), stored)
        out.add_tensor(theirs, values, raw_dtype=stored)
    try:
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
        sync(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return left


# 4. The export ------------------------------------------------------------------------------------------------------


def export_gguf(run: Path, file: Path, checkpoint: str = "best", type: str = "f16") -> str:
    """Export the run's checkpoint to a GGUF file and return a summary.

    Raises ValueError: no such run or checkpoint, or a model or tokenizer that llama.cpp does not support.
    """
    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(f"{file}: must be a file in an existing folder, such as {run.name}.gguf")
    model, tokenizer = load(run, checkpoint)
    source = tomllib.loads((run / "config.toml").read_text())["data"]["source"]
    source = source if source.startswith("hf:") else Path(source).name  # without the local path
    left = write(file, model, tokenizer, type, run.resolve().name, source)
    done = f"{file}: {type}, {file.stat().st_size:,} bytes, {tokenizer.kind} tokenizer of {tokenizer.vocab_size:,}"
    if left:
        done += f"\n{len(left)} tensors are f16, since their rows are not a multiple of {BLOCK}; the first: {left[0]}"
    return done
