"""Convert ModelConfig to Hugging Face's config.json and back.

Four classes of transformers compute heed's model; the flags decide which one:

    qwen3        QK-norm, and windows layer by layer
    qwen3_next   QK-norm and the gate: every layer full attention, every feed-forward dense, gains stored less one
    llama        neither QK-norm nor gate
    ministral    the same with windows, or with a width that is no multiple of n_head, which llama refuses
"""

from typing import Any

from model import ModelConfig

CLASSES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "llama": "LlamaForCausalLM",
    "ministral": "MinistralForCausalLM",
}
SAME = {  # heed's name for a field: theirs
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
}
LAYER_TYPES = {"L": "full_attention", "S": "sliding_attention"}
NEEDED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}
YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None, "partial_rotary_factor": 1}


def model_type(config: ModelConfig) -> str:
    """The key in CLASSES of the class that computes the same. Raises ValueError: there is none."""
    if config.gate and config.window:
        raise ValueError(f"model.gate with model.window = {config.window}: no class of transformers has both")
    if config.gate and not config.qk_norm:
        raise ValueError("model.gate with model.qk_norm = False: no class of transformers has that")
    if config.gate:
        return "qwen3_next"
    if config.qk_norm:
        return "qwen3"
    return "ministral" if config.window or config.n_embd % config.n_head else "llama"


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a model, all but its dtype and tokens. Raises ValueError when no class can hold it."""
    kind = model_type(config)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.yarn_factor > 1:
        rope |= {"rope_type": "yarn", "factor": config.yarn_factor}
        rope["original_max_position_embeddings"] = config.yarn_original_context
    words: dict[str, Any] = {"architectures": [CLASSES[kind]], "model_type": kind, "hidden_act": "silu"}
    words |= {theirs: getattr(config, ours) for ours, theirs in SAME.items()}
    words |= {"attention_bias": False, "rope_parameters": rope}
    words |= {"rope_theta": config.rope_theta, "rope_scaling": rope if config.yarn_factor > 1 else None}  # before 5
    pattern = (config.layer_pattern * config.n_layer)[: config.n_layer]
    if kind != "llama":
        words["layer_types"] = [LAYER_TYPES[layer] for layer in pattern]
    if kind == "ministral":
        words["sliding_window"] = config.window or config.context  # it asks for a number even where no layer slides
    if kind == "qwen3":
        words |= {"use_sliding_window": config.window > 0, "sliding_window": config.window or None}
    if kind == "qwen3_next":
        words["mlp_only_layers"] = list(range(config.n_layer))
        words["partial_rotary_factor"] = rope["partial_rotary_factor"] = 1.0  # theirs is a quarter unless told
    return words


def from_hf(words: dict[str, Any]) -> ModelConfig:
    """The model that a config.json describes, of transformers 5 or older. Raises ValueError, one line, for what heed's
    model cannot compute."""
    kind = words.get("model_type")
    if kind not in CLASSES:
        raise ValueError(f"config.json: model_type = {kind!r}: heed reads {', '.join(CLASSES)}")
    _check("", words, NEEDED)
    layers = words.get("num_hidden_layers")
    if kind == "qwen3_next" and words.get("mlp_only_layers") != list(range(layers or 0)):
        raise ValueError("config.json: mlp_only_layers: must name every layer, heed has no experts")

    defaults = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "num_key_value_heads": words.get(SAME["n_head"])}
    if kind == "llama" and words.get("hidden_size") and words.get(SAME["n_head"]):
        defaults["head_dim"] = words["hidden_size"] // words[SAME["n_head"]]
    fields: dict[str, Any] = {}
    for ours, theirs in SAME.items():
        value = words.get(theirs) if words.get(theirs) is not None else defaults.get(theirs)
        expected = type(getattr(ModelConfig(), ours))
        if type(value) is not expected:
            raise ValueError(f"config.json: {theirs} = {value!r}: must be of type {expected.__name__}")
        fields[ours] = value
    try:
        flags = {"qk_norm": kind.startswith("qwen3"), "gate": kind == "qwen3_next"}
        return ModelConfig(**fields, **flags, **_windows(words), **_rope(words))
    except ValueError as error:
        raise ValueError(f"config.json: {str(error).removeprefix('config.json: ')}") from None


def _windows(words: dict[str, Any]) -> dict[str, Any]:
    """window and layer_pattern, the shortest that repeats to theirs."""
    count, window = words["num_hidden_layers"], words.get("sliding_window")
    slides = words["model_type"] == "ministral" or (words["model_type"] == "qwen3" and words.get("use_sliding_window"))
    first = words.get("max_window_layers", 28) if words["model_type"] == "qwen3" else 0  # the first layer that slides
    kinds = words.get("layer_types")
    if not kinds:
        kinds = [LAYER_TYPES["S" if window and slides and i >= first else "L"] for i in range(count)]
    letter = {kind: key for key, kind in LAYER_TYPES.items()}
    pattern = "".join(letter.get(kind, "?") for kind in kinds)
    if "?" in pattern or len(pattern) != count:
        raise ValueError(f"layer_types: must be {count} times one of {', '.join(LAYER_TYPES.values())}")
    period = next(n for n in range(1, count + 1) if (pattern[:n] * count)[:count] == pattern)
    return {"layer_pattern": pattern[:period], "window": window or 0 if "S" in pattern else 0}


def _rope(words: dict[str, Any]) -> dict[str, Any]:
    """rope_theta, and YaRN's fields."""
    rope = words.get("rope_scaling") or words.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ValueError(f"rope_type = {kind!r}: heed has default and yarn")
    usual = 0.25 if words["model_type"] == "qwen3_next" else 1
    turned = {"partial_rotary_factor": words.get("partial_rotary_factor", usual)} | rope
    _check("rope_parameters.", turned, YARN)
    fields = {"rope_theta": float(rope.get("rope_theta", words.get("rope_theta", 10000.0)))}
    if kind == "yarn":
        known = {*YARN, "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
        if unknown := sorted(key for key in rope.keys() - known if rope[key] is not None):
            raise ValueError(f"rope_parameters.{unknown[0]} = {rope[unknown[0]]!r}: heed's yarn does not have it")
        fields["yarn_factor"] = float(rope.get("factor", 1.0))
        original = rope.get("original_max_position_embeddings", words["max_position_embeddings"])
        fields["yarn_original_context"] = int(original)
    return fields


def _check(prefix: str, words: dict[str, Any], needed: dict[str, Any]) -> None:
    """Raise ValueError for a field that is there and is not what heed computes."""
    for key, wanted in needed.items():
        if (value := words.get(key)) is not None and value != wanted:
            raise ValueError(f"config.json: {prefix}{key} = {value!r}: heed's model has {wanted!r}")
