"""The GGUF file, read by gguf's reader. For llama.cpp itself, see tests/convert/test_llama_cpp.py."""

import sys

import gguf
import pytest
import tokenizers
import torch
from tokenizers import pre_tokenizers

from convert import to_gguf
from convert.__main__ import main as convert
from data.tokenizer import EOT, Tokenizer
from model import GPT, ModelConfig
from tests.conftest import TINY, randomized

# The tokenizers -----------------------------------------------------------------------------------------------------


def written(tmp_path, model: GPT, tokenizer: Tokenizer, dtype: str = "f32"):
    path = tmp_path / "model.gguf"
    left = to_gguf.write(path, model, tokenizer, dtype, "some name", "shakespeare")
    return path, left


def random_model(tokenizer: Tokenizer, **changes) -> GPT:
    return randomized(ModelConfig(**{**vars(TINY), "vocab_size": tokenizer.vocab_size, **changes}))


def test_token_types_of_the_vocabulary(tmp_path):
    tokenizer = Tokenizer.train("char", ["né\nü語à"])
    vocab = to_gguf.vocabulary(tokenizer, 9)
    assert vocab.tokens == [EOT, "Ċ", "n", "Ãł", "Ã©", "Ã¼", "èªŀ", "[PAD7]", "[PAD8]"]
    assert vocab.kinds == [3, 1, 1, 1, 1, 1, 1, 5, 5]  # control, normal, unused
    assert vocab.merges == ["Ã ł", "Ã ©", "Ã ¼", "è ª", "èª ŀ"]
    assert to_gguf.vocabulary(Tokenizer.train("byte", []), 257).merges == [f"{EOT} {EOT}"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: setattr(t, "normalizer", tokenizers.normalizers.Lowercase()), "normalizer Lowercase"),
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()), r"this pre-tokenizer \(Whitespace\)"),
        (
            lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
            r"tokenizer \(ByteLevel\)",
        ),
        (lambda t: setattr(t, "model", tokenizers.models.WordPiece({"[UNK]": 1, "a": 2}, unk_token="[UNK]")), "WordPi"),
        (lambda t: setattr(t.model, "byte_fallback", True), "not a plain byte-level BPE"),
    ],
)
def test_unsupported_tokenizer_raises(change, message):
    tokenizer = Tokenizer.train("byte", [])
    change(tokenizer.inner)
    with pytest.raises(ValueError, match=f"^tokenizer.json: .*{message}"):
        to_gguf.vocabulary(Tokenizer(tokenizer.inner), 257)


# The weights --------------------------------------------------------------------------------------------------------

NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def heeds(name: str) -> str:
    part = name.split(".")
    return f"model.layers.{part[1]}.{NAMES[part[2]]}.weight" if part[0] == "blk" else f"{NAMES[part[0]]}.weight"


@pytest.mark.parametrize("dtype", to_gguf.TYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_file_contains_every_weight(tied, dtype, tmp_path):
    tokenizer = Tokenizer.train("byte", [])
    model = random_model(tokenizer, tie_embeddings=tied)  # rows of 32, 64 and, into down_proj, 48
    path, left = written(tmp_path, model, tokenizer, dtype)
    weights, tensors = model.state_dict(), gguf.GGUFReader(path).tensors
    assert sorted(heeds(t.name) for t in tensors) == sorted(weights)
    assert ("output.weight" in {t.name for t in tensors}) is not tied
    assert left == ([f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 1)] if dtype == "q8_0" else [])
    for tensor in tensors:
        weight = weights[heeds(tensor.name)]
        got = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).view_as(weight)
        kind = "f32" if weight.ndim == 1 else "f16" if heeds(tensor.name) in left else dtype
        assert tensor.tensor_type.name == kind.upper()
        if kind == "q8_0":
            step = weight.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
            # half a step, with the scale rounded to 11 bits
            assert ((got - weight).reshape(-1, 32).abs() <= step * (0.5 + 127 * 2**-11)).all()
            assert not torch.equal(got, weight)
        else:
            same = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
            assert torch.equal(got, weight.to(same).float()), tensor.name


def test_metadata(tmp_path):
    tokenizer = Tokenizer.train("bpe", ["the thing in the"], 262)
    model = random_model(tokenizer, yarn_factor=4.0, yarn_original_context=8, rope_theta=5e5, norm_eps=1e-5)
    path, _ = written(tmp_path, model, tokenizer, "bf16")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert fields.pop("qwen3.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    tokens = fields.pop("tokenizer.ggml.tokens")
    assert [tokens.index(t) for t in (EOT, "!", "Ġ")] == [tokenizer.inner.token_to_id(t) for t in (EOT, "!", "Ġ")]
    assert fields.pop("tokenizer.ggml.token_type") == [3] + [1] * (tokenizer.vocab_size - 1)
    assert fields.pop("tokenizer.ggml.merges")[0] == "t h"
    assert {name: value for name, value in fields.items() if not name.startswith("GGUF.")} == {
        "general.architecture": "qwen3",
        "general.name": "some name",
        "general.description": "a heed model, trained on shakespeare; licence of that text: public domain",
        "general.dataset.count": 1,
        "general.dataset.0.name": "shakespeare",
        "general.file_type": 32,
        "general.quantization_version": 2,
        "qwen3.vocab_size": tokenizer.vocab_size,
        "qwen3.context_length": 32,
        "qwen3.block_count": 2,
        "qwen3.embedding_length": 32,
        "qwen3.feed_forward_length": 48,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 16,
        "qwen3.attention.value_length": 16,
        "qwen3.rope.freq_base": 5e5,
        "qwen3.rope.scaling.type": "yarn",
        "qwen3.rope.scaling.factor": 4.0,
        "qwen3.rope.scaling.original_context_length": 8,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": tokenizer.eot,
        "tokenizer.ggml.eos_token_id": tokenizer.eot,
        "tokenizer.ggml.add_bos_token": False,
    }


# The command --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 8, "layer_pattern": "SL"}, "model.layer_pattern = 'SL': llama.cpp's qwen3 has no sliding window"),
        ({"layer_pattern": "DL"}, "model.layer_pattern = 'DL': llama.cpp's qwen3 has no D"),
        ({"qk_norm": False}, "model.qk_norm = False: llama.cpp's qwen3 normalizes"),
        ({"positions": "none"}, "model.positions = 'none': llama.cpp's qwen3 has RoPE"),
        ({"scale_scores": False}, "model.scale_scores = False: llama.cpp's qwen3 divides"),
        ({"n_expert": 4, "n_expert_active": 2}, "model.n_expert = 4: llama.cpp's qwen3 has no experts"),
        ({"gate": True}, "model.gate = True: llama.cpp's qwen3 has no gate"),
    ],
)
def test_unsupported_flag_raises(changes, message, tmp_path):
    tokenizer = Tokenizer.train("byte", [])
    with pytest.raises(ValueError, match=f"^{message}"):
        written(tmp_path, random_model(tokenizer, **changes), tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_unknown_tensor_raises(tmp_path):
    tokenizer = Tokenizer.train("byte", [])
    model = random_model(tokenizer)
    model.extra = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match=r"^extra.weight: llama.cpp's qwen3 has no such tensor"):
        written(tmp_path, model, tokenizer)


def test_file_is_written_atomically(tmp_path, monkeypatch):
    tokenizer = Tokenizer.train("byte", [])
    path, _ = written(tmp_path, random_model(tokenizer), tokenizer)
    before = path.read_bytes()

    def full(self) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path, random_model(tokenizer), tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
    assert path.read_bytes() == before


def test_description_has_no_local_path(runs, tmp_path, capsys):
    path = tmp_path / "x.gguf"
    assert convert(["to-gguf", str(runs / "songs"), str(path), "--type", "q8_0"]) == 0
    output = f"{path}: q8_0, {path.stat().st_size:,} bytes, bpe tokenizer of 300\n"
    assert capsys.readouterr().out == output
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert fields["general.name"] == "songs"
    assert fields["general.dataset.0.name"] == "songs.txt"
    assert fields["general.description"].endswith("trained on songs.txt; licence of that text: not stated")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing", "x.gguf"], "convert: nothing: no such run"),
        (["RUN", "no/x.gguf"], "convert: no/x.gguf: must be a file in an existing folder, such as songs.gguf"),
        (["RUN", "x.gguf", "--checkpoint", "step-9"], "no checkpoint 'step-9'"),
        (["RUN", "x.gguf", "--type", "q4_0"], "invalid choice: 'q4_0'"),
    ],
)
def test_errors_are_one_line(argv, message, runs, capsys):
    try:
        status = convert(["to-gguf", *(word.replace("RUN", str(runs / "songs")) for word in argv)])
    except SystemExit as left:
        status = left.code
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert message in printed.err.strip().splitlines()[-1]


def test_command_has_every_type(capsys):
    with pytest.raises(SystemExit):
        convert(["to-gguf", "--help"])
    assert f"{{{','.join(to_gguf.TYPES)}}}" in capsys.readouterr().out


def test_missing_package_prints_a_hint(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert convert(["to-gguf", str(runs / "songs"), str(tmp_path / "x.gguf")]) == 2
    assert capsys.readouterr().err.endswith(": pip install -e .[gguf]\n")
