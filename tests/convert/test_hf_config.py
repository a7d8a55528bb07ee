"""config.json converted to ModelConfig: formats of older versions of transformers, and unsupported values."""

import dataclasses
import re

import pytest

from convert.hf_config import DELTANET, from_hf, to_hf
from model import ModelConfig
from tests.conftest import TINY
from tests.convert.test_to_hf import YARN


def test_config_of_transformers_4():
    """config.json as written by transformers 4: TinyLlama's and Qwen3-0.6B's, with the YaRN of its model card."""
    old = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 2048, "num_attention_heads": 32,
        "num_hidden_layers": 22, "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
    }  # fmt: skip
    tiny = ModelConfig(32000, 2048, 22, 32, 4, 2048, 64, 5632, tie_embeddings=False, qk_norm=False, norm_eps=1e-5)
    assert from_hf(old) == tiny
    assert from_hf(old | {"num_key_value_heads": None}) == dataclasses.replace(tiny, n_kv_head=32)
    qwen = old | {"model_type": "qwen3", "head_dim": 128, "rope_theta": 1000000, "max_position_embeddings": 40960,
                  "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28}  # fmt: skip
    config = from_hf(qwen)
    assert (config.rope_theta, config.head_dim, config.qk_norm, config.layer_pattern) == (1e6, 128, True, "L")
    slides = from_hf(qwen | {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 20})
    assert (slides.window, slides.layer_pattern) == (512, "L" * 20 + "SS")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    stretched = from_hf(qwen | {"rope_scaling": yarn, "max_position_embeddings": 131072})
    assert (stretched.yarn_factor, stretched.yarn_original_context, stretched.rope_theta) == (4.0, 32768, 1e6)


def test_dropout_of_attention_weights():
    config = dataclasses.replace(TINY, attention_dropout=0.25)
    assert to_hf(config)["attention_dropout"] == 0.25
    assert from_hf(to_hf(config)) == config
    assert from_hf(to_hf(config) | {"attention_dropout": 0}).attention_dropout == 0.0


CONFIG = to_hf(dataclasses.replace(TINY, **YARN)) | {"rope_scaling": None}


HYBRID = dataclasses.replace(TINY, layer_pattern="DL", gate=True)


EXPERTS = to_hf(dataclasses.replace(TINY, n_expert=4, n_expert_active=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_topk_prob": None}, "norm_topk_prob = False: heed's model has True"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2: heed's model has 1"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers = [0]: heed's model has []"),
        ({"use_sliding_window": True}, "use_sliding_window = True: heed's model has False"),
        ({"num_experts": None}, "num_experts = None: must be of type int"),
        ({"num_experts_per_tok": 9}, "model.n_expert_active = 9: must be from 1 to model.n_expert"),
    ],
)
def test_experts_of_another_kind_raise(change, message):
    assert from_hf(EXPERTS).n_ffn == TINY.n_ffn
    old = {key: value for key, value in EXPERTS.items() if key not in change}
    changed = old | {key: value for key, value in change.items() if value is not None}
    with pytest.raises(ValueError, match=rf"^config\.json: {re.escape(message)}"):
        from_hf(changed)


@pytest.mark.parametrize("key", DELTANET)
def test_gated_deltanet_of_another_shape_raises(key):
    assert from_hf(to_hf(HYBRID)) == HYBRID
    with pytest.raises(ValueError, match=rf"^config\.json: {key} = 3: heed's model has {to_hf(HYBRID)[key]}$"):
        from_hf(to_hf(HYBRID) | {key: 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2': heed reads qwen3, qwen3_moe, qwen3_next, llama, ministral"),
        ({"attention_bias": True}, "attention_bias = True: heed's model has False"),
        ({"mlp_bias": True}, "mlp_bias = True: heed's model has False"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': heed's model has 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = "),
        ({"hidden_size": None}, "hidden_size = None: must be of type int"),
        ({"hidden_size": "32"}, "hidden_size = '32': must be of type int"),
        ({"num_key_value_heads": 3}, "model.n_kv_head = 3: must divide"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type = 'llama3': heed has default and"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear': heed has default and yarn"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": CONFIG["rope_parameters"] | {"beta_fast": 16}}, "rope_parameters.beta_fast = 16: heed's"),
        ({"rope_parameters": CONFIG["rope_parameters"] | {"mscale": 0.7}}, "rope_parameters.mscale = 0.7: not supp"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types: must have 2 entries of"),
        ({"model_type": "qwen3_next"}, "mlp_only_layers: must list every layer"),
    ],
)
def test_unsupported_value_raises(change, message):
    with pytest.raises(ValueError, match=r"^config\.json: ") as error:
        from_hf(CONFIG | change)
    assert message in str(error.value) and "\n" not in str(error.value)
