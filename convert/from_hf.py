"""Import a Hugging Face checkpoint as a run: Qwen3, Qwen3-MoE, Llama, Ministral, and everything heed exports."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from convert.hf_config import from_hf, from_hf_weight
from convert.to_hf import new_folder
from data.tokenizer import Tokenizer
from model import GPT
from training import checkpoint
from training.config import Config, DataConfig, OptimConfig, TrainConfig
from training.config_files import dump
from training.flops import count_parameters


def import_checkpoint(source: str, run: Path, context: int | None = None) -> str:
    """Import `source`, a folder or a name on the hub, as a run at step 0. Returns a summary.

    context: context length; default: the checkpoint's. The run's config.toml is a recipe for fine-tuning. Raises
    ValueError, one line, for anything that heed's model or tokenizer does not support.
    """
    folder = Path(source).expanduser() if Path(source).expanduser().is_dir() else download(source)
    hf = read_json(folder / "config.json")
    model = from_hf(hf)
    if context is not None:
        if not 1 <= context <= model.context:
            raise ValueError(f"--context {context}: must be from 1 to {model.context}, what config.json allows")
        model = dataclasses.replace(model, context=context)
    tokenizer = read_tokenizer(folder, hf)
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size:,} tokens, but config.json's vocab_size is "
            f"{model.vocab_size:,}: the embedding has too few rows"
        )
    config = Config(
        run.resolve().name,
        model=model,
        data=DataConfig(tokenizer=str(run / "tokenizer.json")),
        optim=OptimConfig(optimizer="adamw", lr=2e-5),  # fine-tuning: small updates
        train=TrainConfig(steps=1000, batch_tokens=model.context * max(1, 16384 // model.context), micro_batch_size=1),
    )
    with torch.device("meta"):
        net = GPT(model)
    net.load_state_dict(read_weights(folder, net), assign=True)

    new_folder(run)
    (run / "config.toml").write_text(dump(config), encoding="utf-8")
    (run / "metrics.jsonl").touch()
    tokenizer.save(run / "tokenizer.json")
    identity = {"model": dataclasses.asdict(model), "tokenizer": tokenizer.sha256, "text": ""}
    state = {"steps": 0, "dtype": "float32", "identity": identity, "config": dataclasses.asdict(config)}
    checkpoint.save(run, 0, net, [], state | {"imported": source})
    end = tokenizer.inner.id_to_token(tokenizer.eot)
    return (
        f"{run}: {count_parameters(model):,} parameters of {source}, context {model.context:,}, end of text {end!r}\n"
        f"try it: python sample.py --run {run}"
    )


def read_tokenizer(folder: Path, hf: dict[str, Any]) -> Tokenizer:
    """Load tokenizer.json. The end-of-text token is eos_token_id (the first one of a list) of config.json or else of
    generation_config.json, or else the name in tokenizer_config.json."""
    found = Tokenizer.load(folder / "tokenizer.json")
    asked = hf.get("eos_token_id")
    if asked is None and (folder / "generation_config.json").is_file():
        asked = read_json(folder / "generation_config.json").get("eos_token_id")
    first = asked[0] if isinstance(asked, list) and asked else asked
    if not isinstance(first, int):
        return found
    if (end := found.inner.id_to_token(first)) is None:
        raise ValueError(f"{folder}: eos_token_id = {first}: not in the vocabulary of tokenizer.json")
    return Tokenizer(found.inner, str(folder), end)


def read_weights(folder: Path, model: GPT) -> dict[str, Tensor]:
    """Every tensor of the model in fp32, from one safetensors file or from those listed in an index.

    Raises ValueError if a tensor is missing, unknown, or has another shape.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not single.is_file() and not index.is_file():
        raise ValueError(f"{folder}: has no model.safetensors and no index file; save the model with save_pretrained")
    names = [single.name] if single.is_file() else sorted(set(read_json(index).get("weight_map", {}).values()))
    wanted = {name: p.shape for name, p in model.named_parameters()}
    # A tied head is the embedding. Old files contain the RoPE frequencies, which heed computes.
    ignored = ("rotary_emb.inv_freq", "lm_head.weight" if model.config.tie_embeddings else "rotary_emb.inv_freq")
    weights: dict[str, Tensor] = {}
    for path in (folder / name for name in names):
        try:
            shard = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from None
        for stored in [stored for stored in shard if not stored.endswith(ignored)]:
            name, weight = from_hf_weight(model.config, stored, shard.pop(stored))
            if name not in wanted or weight.shape != wanted[name]:
                right = f"config.json gives {tuple(wanted[name])}" if name in wanted else "heed has no such weight"
                raise ValueError(f"{path}: {stored} has shape {tuple(weight.shape)}: {right}")
            weights[name] = weight
    if missing := sorted(wanted.keys() - weights.keys()):
        raise ValueError(f"{folder}: {missing[0]} is missing from the weight files")
    return weights


def download(name: str) -> Path:
    """Download the checkpoint's files from the hub, or find them in its cache. Raises ValueError, one line."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], ignore_patterns=["*/*"]))
    except Exception as error:  # many types: no network, no such name, no access
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name}: neither a folder nor a model on the hub ({reason})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError, one line."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{path}: no such file; save the model with save_pretrained") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must contain a JSON object")
    return content
