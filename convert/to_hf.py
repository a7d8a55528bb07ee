"""Export a run to a folder that Hugging Face's AutoModelForCausalLM and AutoTokenizer load without heed."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from convert.hf_config import to_hf, to_hf_weight
from data.chat_format import SPECIAL_TOKENS, chat_template
from data.download import PUBLIC_TEXTS
from data.tokenizer import Tokenizer
from model import ModelConfig
from training.checkpoint import WEIGHTS, find, model_config, read_state
from training.flops import count_parameters
from training.metrics import read


def export(run: Path, folder: Path, checkpoint: str = "best", dtype: str = "float32") -> str:
    """Write the weights, configuration, tokenizer and model card of a checkpoint. Returns a one-line summary.

    dtype: float32 (exact) or bfloat16 (rounded, half the size). Raises ValueError: no such run or checkpoint, a flag
    that no class of transformers supports, or a folder that is not empty. Raises OSError: a full disk.
    """
    source = find(run, checkpoint)
    state = read_state(source, verify=WEIGHTS)
    config = model_config(source, state)
    hf = to_hf(config)
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    begin = (tokenizer.bos_tokens or [tokenizer.eot])[0]
    token_ids = {"bos_token_id": begin, "eos_token_id": tokenizer.eot}
    new_folder(folder)

    weights = [to_hf_weight(config, name, w) for name, w in load_file(source / "model.safetensors").items()]
    stored = {name: w.to(getattr(torch, dtype)) for name, w in weights}
    try:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # what safetensors makes of an OSError
        raise OSError(f"{folder / 'model.safetensors'}: cannot be written ({error})") from None
    tokenizer.save(folder / "tokenizer.json")
    shutil.copymode(folder / "tokenizer.json", folder / "model.safetensors")  # safetensors ignores the umask
    write_json(folder / "config.json", hf | token_ids | {"dtype": dtype})
    # The defaults of sample.py. The pad token has no effect, but without one `generate` prints a warning.
    generation: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 0, "pad_token_id": tokenizer.eot}
    if turns := sorted(tokenizer.end_tokens - {tokenizer.eot}):  # the end of an answer ends generation as well
        generation["eos_token_id"] = [tokenizer.eot, *turns]
    write_json(folder / "generation_config.json", token_ids | generation)
    chat = all(tokenizer.inner.token_to_id(token) is not None for token in SPECIAL_TOKENS)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.inner.id_to_token(begin),
        "eos_token": tokenizer.inner.id_to_token(tokenizer.eot),
        "model_max_length": config.context,
        "split_special_tokens": not chat,  # text contains no special tokens, except a rendered chat template
        "clean_up_tokenization_spaces": False,
    }
    template = {"chat_template": chat_template()} if chat else {}
    write_json(folder / "tokenizer_config.json", tokenizer_config | template)
    (folder / "README.md").write_text(model_card(run, state, hf["architectures"][0], dtype), encoding="utf-8")
    size = count_parameters(config)
    return f"{folder}: {hf['architectures'][0]}, {size:,} parameters in {dtype}, from {source}"


def model_card(run: Path, state: dict[str, Any], architecture: str, dtype: str) -> str:
    """The model card: shape, training text, validation loss, how to load the model, and its configuration."""
    config, step = state["config"], state["step"]
    model, source = ModelConfig(**config["model"]), config["data"]["source"]
    tokens = step * config["train"]["batch_tokens"]
    rows = {
        "parameters": f"{count_parameters(model):,}, in {dtype}",
        "shape": f"{architecture}: {model.n_layer} layers of width {model.n_embd}, {model.n_head} query and "
        f"{model.n_kv_head} key/value heads of {model.head_dim}, context {model.context:,}, vocabulary "
        f"{model.vocab_size:,}",
        "trained on": source,
        "licence of that text": PUBLIC_TEXTS[source].licence if source in PUBLIC_TEXTS else "see the source",
        "training": f"{step:,} steps of {config['train']['batch_tokens']:,} tokens: {tokens:,} tokens",
        "held-out text": "not evaluated",
    }
    if origin := state.get("imported") or config.get("init_from"):
        rows["initialized from"] = f"{origin}, whose licence applies as well"
    if state.get("imported"):
        for row in ("trained on", "licence of that text", "training"):
            del rows[row]
    for record in read(run / "metrics.jsonl"):
        if record["step"] == step and "val_bpb" in record:
            bpb, nats = record["val_bpb"], record["val_loss"]
            rows["held-out text"] = f"{bpb:.4f} bits per byte, {nats:.4f} nats/token"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    recipe = (run / "config.toml").read_text(encoding="utf-8")
    return CARD.format(name=run.resolve().name, table=table, recipe=recipe.strip())


CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A small language model, made with heed.

| | |
|---|---|
{table}

## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")  # this folder
tokenizer = AutoTokenizer.from_pretrained("{name}")
prompt = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100)[0], skip_special_tokens=True))
```

## Recipe

```toml
{recipe}
```
"""


def new_folder(folder: Path) -> None:
    """Create a folder. Raises ValueError if it exists and is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
