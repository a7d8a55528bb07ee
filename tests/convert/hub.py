"""Small random checkpoints like those on the hub: with the configs and tokenizers of SmolLM2, Qwen3 and TinyLlama."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Inner
from transformers import PreTrainedTokenizerFast

from data.tokenizer import EOT, Tokenizer
from tests.convert.test_to_hf import TEXTS, enlarge_blocks


def bytes_bpe(split, special: list[str], normalizer=None) -> Inner:
    """A byte-level BPE as in SmolLM2 or Qwen; here the position of `special` in the vocabulary does not matter."""
    inner = Inner(models.BPE())
    inner.normalizer = normalizer
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(TEXTS, trainer)
    return inner


def smollm2_tokenizer() -> Inner:
    return bytes_bpe(pre_tokenizers.Digits(True), [EOT, "<|im_start|>", "<|im_end|>", "<repo_name>"])


def qwen3_tokenizer() -> Inner:
    pattern = Regex(r"(?i:'s|'t|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    inner = bytes_bpe(pre_tokenizers.Split(pattern, "isolated"), [EOT, "<|im_start|>", "<|im_end|>"], normalizers.NFC())
    inner.add_tokens([AddedToken("<think>", normalized=False)])
    return inner


def sentencepiece_tokenizer() -> Inner:
    """As TinyLlama's: a space is a character of a word, unseen characters become bytes, <s> starts every text."""
    inner = Inner(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=[*special, *(f"<0x{n:02X}>" for n in range(256))], show_progress=False
    )
    inner.train_from_iterator(TEXTS[:1], trainer)
    content = json.loads(inner.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # there, bytes are ordinary entries
    inner = Inner.from_str(json.dumps(content))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return inner


SENTENCEPIECE = Tokenizer(sentencepiece_tokenizer(), "here", "</s>")


def llama(**options) -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))


def qwen3(**options) -> transformers.PreTrainedModel:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**options))


# class, its configuration, tokenizer, end-of-text token, dtype of the files
HUB = {
    "SmolLM2": (
        llama,
        {"hidden_size": 36, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 9,
         "num_key_value_heads": 3, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "vocab_size": 320,
         "max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
         "bos_token_id": 1, "eos_token_id": 2},
        smollm2_tokenizer, "<|im_end|>", torch.bfloat16,
    ),
    "Qwen3": (
        qwen3,
        {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True, "vocab_size": 400,
         "max_position_embeddings": 40960, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
         "eos_token_id": [2, 0]},
        qwen3_tokenizer, "<|im_end|>", torch.bfloat16,
    ),
    "TinyLlama": (
        llama,
        {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 8,
         "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": 330, "max_position_embeddings": 2048,
         "eos_token_id": 2},
        sentencepiece_tokenizer, "</s>", torch.float16,
    ),
}  # fmt: skip


def saved(name: str, folder: Path, shard: str = "5GB") -> Path:
    """Write a checkpoint with save_pretrained; `shard` is the maximum size of a file, such as "20KB"."""
    make, options, tokenizer, end, dtype = HUB[name]
    torch.manual_seed(0)
    model = make(**options)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0, 0.3) if p.ndim == 1 else p.normal_(0.0, 0.2)
    enlarge_blocks(model).to(dtype).save_pretrained(folder, max_shard_size=shard)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer(), eos_token=end).save_pretrained(folder)
    return folder
