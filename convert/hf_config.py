"""Convert ModelConfig to Hugging Face's config.json and back.

Five classes of transformers implement heed's model, depending on its flags:

    qwen3        QK-norm, sliding windows per layer
    qwen3_moe    QK-norm and experts in every layer
    qwen3_next   QK-norm and the gate: layers of full attention or Gated DeltaNet (D), every feed-forward dense
    llama        neither QK-norm nor gate
    ministral    the same with windows, or with a width that is not a multiple of n_head, which llama does not allow
"""

import re
from typing import Any

from torch import Tensor

from model import ModelConfig
from zoo import gated_deltanet

CLASSES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "llama": "LlamaForCausalLM",
    "ministral": "MinistralForCausalLM",
}
SAME = {  # heed's name of a field: name in config.json
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "head_dim": "head_dim",
    "n_ffn": "intermediate_size",
    "tie_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
    "attention_dropout": "attention_dropout",
}
LAYER_TYPES = {"L": "full_attention", "S": "sliding_attention", "D": "linear_attention"}
NEEDED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}
YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None, "partial_rotary_factor": 1}


EXPERTS = SAME | {  # of qwen3_moe
    "n_ffn": "moe_intermediate_size",
    "n_expert": "num_experts",
    "n_expert_active": "num_experts_per_tok",
    "router_aux_loss_coef": "router_aux_loss_coef",
}
EVERY_LAYER = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False}
DELTANET: dict[str, Any] = {  # fields of config.json that describe Gated DeltaNet: heed's field, or its value
    "linear_num_key_heads": "n_head",
    "linear_num_value_heads": "n_head",
    "linear_key_head_dim": "head_dim",
    "linear_value_head_dim": "head_dim",
    "linear_conv_kernel_dim": gated_deltanet.CONV,
}


def model_type(config: ModelConfig) -> str:
    """The key in CLASSES of the equivalent class. Raises ValueError if there is none."""
    if others := set(config.layer_pattern) - LAYER_TYPES.keys():
        raise ValueError(f"model.layer_pattern = {config.layer_pattern!r}: heed does not export {min(others)}")
    if "D" in config.layer_pattern and not config.gate:
        why = "transformers has Gated DeltaNet (D) only beside gated attention, model.gate = True"
        raise ValueError(f"model.layer_pattern = {config.layer_pattern!r}: {why}")
    if "L" not in config.layer_pattern and "D" in config.layer_pattern:
        raise ValueError(f"model.layer_pattern = {config.layer_pattern!r}: transformers generates only with a layer L")
    if config.positions != "rope":
        raise ValueError(f"model.positions = {config.positions!r}: heed exports RoPE alone")
    if not config.scale_scores:
        raise ValueError("model.scale_scores = False: no class of transformers has that")
    for flag, has in {"gate": config.gate, "window": config.window, "qk_norm": not config.qk_norm}.items():
        if config.n_expert and has:
            why = f"heed does not export experts with model.{flag} = {getattr(config, flag)}"
            raise ValueError(f"model.n_expert = {config.n_expert}: {why}")
    if config.gate and config.window:
        raise ValueError(f"model.gate with model.window = {config.window}: no class of transformers has both")
    if config.gate and not config.qk_norm:
        raise ValueError("model.gate with model.qk_norm = False: no class of transformers has that")
    if config.gate:
        return "qwen3_next"
    if config.qk_norm:
        return "qwen3_moe" if config.n_expert else "qwen3"
    return "ministral" if config.window or config.n_embd % config.n_head else "llama"


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a model without its dtype and token ids. Raises ValueError if no class supports the model."""
    kind = model_type(config)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.yarn_factor > 1:
        rope |= {"rope_type": "yarn", "factor": config.yarn_factor}
        rope["original_max_position_embeddings"] = config.yarn_original_context
    hf: dict[str, Any] = {"architectures": [CLASSES[kind]], "model_type": kind, "hidden_act": "silu"}
    hf |= {theirs: getattr(config, ours) for ours, theirs in SAME.items()}
    hf |= {"attention_bias": False, "rope_parameters": rope}
    hf |= {"rope_theta": config.rope_theta, "rope_scaling": rope if config.yarn_factor > 1 else None}  # transformers 4
    pattern = (config.layer_pattern * config.n_layer)[: config.n_layer]
    if kind not in ("llama", "qwen3_moe"):
        hf["layer_types"] = [LAYER_TYPES[layer] for layer in pattern]
    if kind == "ministral":
        hf["sliding_window"] = config.window or config.context  # required even without sliding layers
    if kind == "qwen3":
        hf |= {"use_sliding_window": config.window > 0, "sliding_window": config.window or None}
    if kind == "qwen3_moe":
        hf |= {theirs: getattr(config, ours) for ours, theirs in EXPERTS.items()} | EVERY_LAYER
    if kind == "qwen3_next":
        hf["mlp_only_layers"] = list(range(config.n_layer))
        hf["partial_rotary_factor"] = rope["partial_rotary_factor"] = 1.0  # the default is 0.25
        hf |= _deltanet(config)
    return hf


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """The model described by a config.json of transformers 5 or older. Raises ValueError, one line, for what heed's
    model does not support."""
    kind = hf.get("model_type")
    if kind not in CLASSES:
        raise ValueError(f"config.json: model_type = {kind!r}: heed reads {', '.join(CLASSES)}")
    _check("", hf, NEEDED)
    if kind == "qwen3_moe":
        _check("", {"norm_topk_prob": False} | hf, EVERY_LAYER)
    layers = hf.get("num_hidden_layers")
    if kind == "qwen3_next" and hf.get("mlp_only_layers") != list(range(layers or 0)):
        raise ValueError("config.json: mlp_only_layers: must list every layer, heed does not support experts")

    defaults = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "num_key_value_heads": hf.get(SAME["n_head"])}
    defaults["attention_dropout"] = 0.0
    defaults |= {"num_experts": hf.get("num_local_experts"), "router_aux_loss_coef": 0.001}  # as transformers 5 saves
    if kind == "llama" and hf.get("hidden_size") and hf.get(SAME["n_head"]):
        defaults["head_dim"] = hf["hidden_size"] // hf[SAME["n_head"]]
    fields: dict[str, Any] = {}
    for ours, theirs in (EXPERTS if kind == "qwen3_moe" else SAME).items():
        value = hf.get(theirs) if hf.get(theirs) is not None else defaults.get(theirs)
        expected = type(getattr(ModelConfig(), ours))
        value = float(value) if expected is float and type(value) is int else value  # as 0
        if type(value) is not expected:
            raise ValueError(f"config.json: {theirs} = {value!r}: must be of type {expected.__name__}")
        fields[ours] = value
    try:
        flags = {"qk_norm": kind.startswith("qwen3"), "gate": kind == "qwen3_next"}
        config = ModelConfig(**fields, **flags, **_layers(hf), **_rope(hf))
        if "D" in config.layer_pattern:
            _check("", hf, _deltanet(config))
        return config
    except ValueError as error:
        raise ValueError(f"config.json: {str(error).removeprefix('config.json: ')}") from None


def _deltanet(config: ModelConfig) -> dict[str, int]:
    """The fields of config.json that describe Gated DeltaNet."""
    return {key: getattr(config, ours) if isinstance(ours, str) else ours for key, ours in DELTANET.items()}


def to_hf_weight(config: ModelConfig, name: str, weight: Tensor) -> tuple[str, Tensor]:
    """Name and values of a weight in a checkpoint of `model_type(config)`."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and config.letter(int(layer[1])) == "D":
        name = name.replace(".self_attn.", ".linear_attn.")
    return name, weight - 1 if _is_centered(config, name) else weight


def from_hf_weight(config: ModelConfig, name: str, weight: Tensor) -> tuple[str, Tensor]:
    """The inverse of `to_hf_weight`, in fp32."""
    weight = weight.float()
    return name.replace(".linear_attn.", ".self_attn."), weight + 1 if _is_centered(config, name) else weight


def _is_centered(config: ModelConfig, name: str) -> bool:
    """Whether the file has a gain minus 1: Qwen3-Next's do, except those in Gated DeltaNet."""
    return config.gate and name.endswith("norm.weight") and ".linear_attn." not in name


def _layers(hf: dict[str, Any]) -> dict[str, Any]:
    """window and the shortest layer_pattern that repeats to layer_types."""
    count, window = hf["num_hidden_layers"], hf.get("sliding_window")
    slides = hf["model_type"] == "ministral" or (hf["model_type"] == "qwen3" and hf.get("use_sliding_window"))
    first = hf.get("max_window_layers", 28) if hf["model_type"] == "qwen3" else 0  # first layer with a sliding window
    kinds = hf.get("layer_types")
    if not kinds:
        kinds = [LAYER_TYPES["S" if window and slides and i >= first else "L"] for i in range(count)]
    known = {LAYER_TYPES[letter]: letter for letter in ("LD" if hf["model_type"] == "qwen3_next" else "LS")}
    pattern = "".join(known.get(kind, "?") for kind in kinds)
    if "?" in pattern or len(pattern) != count:
        raise ValueError(f"layer_types: must have {count} entries of {', '.join(known)}")
    period = next(n for n in range(1, count + 1) if (pattern[:n] * count)[:count] == pattern)
    return {"layer_pattern": pattern[:period], "window": window or 0 if "S" in pattern else 0}


def _rope(hf: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and YaRN's fields."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ValueError(f"rope_type = {kind!r}: heed has default and yarn")
    default = 0.25 if hf["model_type"] == "qwen3_next" else 1
    _check("rope_parameters.", {"partial_rotary_factor": hf.get("partial_rotary_factor", default)} | rope, YARN)
    fields = {"rope_theta": float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))}
    if kind == "yarn":
        known = {*YARN, "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
        if unknown := sorted(key for key in rope.keys() - known if rope[key] is not None):
            raise ValueError(f"rope_parameters.{unknown[0]} = {rope[unknown[0]]!r}: not supported by heed's YaRN")
        fields["yarn_factor"] = float(rope.get("factor", 1.0))
        original = rope.get("original_max_position_embeddings", hf["max_position_embeddings"])
        fields["yarn_original_context"] = int(original)
    return fields


def _check(prefix: str, hf: dict[str, Any], needed: dict[str, Any]) -> None:
    """Raise ValueError for a field that is present with an unsupported value."""
    for key, supported in needed.items():
        if (value := hf.get(key)) is not None and value != supported:
            raise ValueError(f"config.json: {prefix}{key} = {value!r}: heed's model has {supported!r}")
