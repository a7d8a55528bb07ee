"""Checkpoints as the hub has them, small and random: with the shapes and tokenizers of SmolLM2, Qwen3, TinyLlama."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Inner
from transformers import PreTrainedTokenizerFast

from data.tokenizer import EOT, Tokenizer
from tests.convert.test_to_hf import TEXTS, lively


def bytes_bpe(split, special: list[str], normalizer=None) -> Inner:
    """A byte-level BPE as in SmolLM2 or Qwen: `special` first or last decides nothing here."""
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
    words = Regex(r"(?i:'s|'t|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    inner = bytes_bpe(pre_tokenizers.Split(words, "isolated"), [EOT, "<|im_start|>", "<|im_end|>"], normalizers.NFC())
    inner.add_tokens([AddedToken("<think>", normalized=False)])
    return inner


def sentencepiece_tokenizer() -> Inner:
    """As TinyLlama's: spaces are a character of the words, unseen characters are bytes, <s> opens every text."""
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
    content["added_tokens"] = content["added_tokens"][:3]  # the bytes are plain entries there
    inner = Inner.from_str(json.dumps(content))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return inner


SENTENCEPIECE = Tokenizer(sentencepiece_tokenizer(), "here", "</s>")


def llama(**words) -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**words))


def qwen3(**words) -> transformers.PreTrainedModel:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**words))


# class, its configuration, the tokenizer and its end of text, the files' type
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
    """A checkpoint as save_pretrained leaves it; a shard's largest size as "20KB"."""
    make, words, tokenizer, end, dtype = HUB[name]
    torch.manual_seed(0)
    model = make(**words)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0, 0.3) if p.ndim == 1 else p.normal_(0.0, 0.2)
    lively(model).to(dtype).save_pretrained(folder, max_shard_size=shard)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer(), eos_token=end).save_pretrained(folder)
    return folder
