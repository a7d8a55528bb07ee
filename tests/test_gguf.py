"""The GGUF file: every number of it by gguf's own reader, and llama.cpp's ids, logits and text where it is installed."""

import importlib.util

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import pre_tokenizers

from data.tokenizer import EOT, Tokenizer
from model import GPT, ModelConfig
from sample import Sampling, generate, load
from tests.conftest import ROOT, SMALL, TINY, command, randomized
from tools import gguf as tool

LLAMA = importlib.util.find_spec("llama_cpp") is not None
needs_llama = pytest.mark.skipif(not LLAMA, reason="llama-cpp-python is not installed")

HARD = [
    "", " ", "a", "Hello, world!", "don't we'll they've I'm 'S 'LL", "  two   runs  ", "tabs\t\tand\n\n\nlines\n \n  x",
    "Windows\r\nline\r\n\r\nends\r", "naïve café e\u0301", "语言模型，中文。日本語カナ", "🙂👩‍🚀🇨🇭 flags", "١٢٣ ½ ² Ⅷ 12345 3.14",
    f"a {EOT} b", "<|endoftext|", "<|im_start|>user", "\u00a0\u2003\u3000 wide", "\u200b\u200d\ufeff", "\x00\x01\x7f",
    "x" * 300, "ñandú Ωmega Ж د ह ก 𝔘𝔫𝔦", "def f(x):\n    return x**2  # ok\n", "∑∫≠ €£¥ …—–", "trailing   ",
]  # fmt: skip


# The tokenizers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def some_text() -> list[str]:
    return [*(page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))), *HARD * 3]


def split_like(tokenizer: Tokenizer, how: pre_tokenizers.PreTokenizer, texts: list[str]) -> Tokenizer:
    """A BPE trained with another way to split text."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer, inner.decoder = how, tokenizer.inner.decoder
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900, special_tokens=[EOT], show_progress=False, initial_alphabet=sorted(how.alphabet())
        if hasattr(how, "alphabet") else sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    inner.train_from_iterator(texts, trainer)
    inner.add_tokens(["<think>"])  # an added token that is not special
    return Tokenizer(inner)


@pytest.fixture(scope="module", params=["bpe", "byte", "char", "smollm", "qwen2"])
def tokenizer(request, some_text) -> Tokenizer:
    if request.param in ("bpe", "byte", "char"):
        return Tokenizer.train(request.param, some_text, 900)
    steps = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "qwen2": [
            pre_tokenizers.Split(tokenizers.Regex(tool.QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }[request.param]
    return split_like(Tokenizer.train("byte", []), pre_tokenizers.Sequence(steps), some_text)


def written(tmp_path, model: GPT, tokenizer: Tokenizer, dtype: str = "f32"):
    path = tmp_path / "model.gguf"
    left = tool.write(path, model, tokenizer, dtype, "some name", "shakespeare")
    return path, left


def random_model(tokenizer: Tokenizer, **changes) -> GPT:
    return randomized(ModelConfig(**{**vars(TINY), "vocab_size": tokenizer.vocab_size, **changes}))


@needs_llama
def test_llama_cpp_makes_the_same_ids(tokenizer, tmp_path):
    from llama_cpp import Llama

    path, _ = written(tmp_path, random_model(tokenizer, vocab_size=tokenizer.vocab_size + 3), tokenizer)
    theirs = Llama(str(path), vocab_only=True, verbose=False)
    for text in HARD:
        ids = tokenizer.encode(text)
        assert theirs.tokenize(text.encode(), add_bos=True, special=False) == ids, text
        assert theirs.detokenize(ids).decode() == text
    assert theirs.token_eos() == theirs.token_bos() == tokenizer.eot


def test_the_vocabulary_says_of_each_id_what_it_is(tmp_path):
    tokenizer = Tokenizer.train("char", ["né\n語"])
    words = tool.vocabulary(tokenizer, 7)
    assert words.tokens == [EOT, "Ċ", "n", "Ã©", "èªŀ", "[PAD5]", "[PAD6]"]
    assert words.kinds == [3, 1, 1, 1, 1, 5, 5]  # control, normal, unused
    assert words.merges == ["Ã ©", "è ª", "èª ŀ"]
    assert tool.vocabulary(Tokenizer.train("byte", []), 257).merges == [f"{EOT} {EOT}"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: setattr(t, "normalizer", tokenizers.normalizers.Lowercase()), "normalizer Lowercase"),
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()), r"split text like this \(Whitespace\)"),
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)), r"this \(ByteLevel\)"),
        (lambda t: setattr(t, "model", tokenizers.models.WordPiece({"[UNK]": 1, "a": 2}, unk_token="[UNK]")), "WordPi"),
        (lambda t: setattr(t.model, "byte_fallback", True), "not a plain byte-level BPE"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused_by_name(change, says):
    tokenizer = Tokenizer.train("byte", [])
    change(tokenizer.inner)
    with pytest.raises(ValueError, match=f"^tokenizer.json: .*{says}"):
        tool.vocabulary(Tokenizer(tokenizer.inner), 257)


# The numbers --------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("dtype", tool.DTYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_file_holds_every_weight(tied, dtype, tmp_path):
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
            # half a step, and the step itself rounded to 11 bits
            assert ((got - weight).reshape(-1, 32).abs() <= step * (0.5 + 127 * 2**-11)).all()
            assert not torch.equal(got, weight)
        else:
            same = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
            assert torch.equal(got, weight.to(same).float()), tensor.name


def test_the_file_says_what_the_model_is(tmp_path):
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
        "general.description": "a model of heed, trained on shakespeare; licence of that text: public domain",
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


# llama.cpp's arithmetic ---------------------------------------------------------------------------------------------


def llama_logits(path, ids: list[int], **how) -> torch.Tensor:
    """llama.cpp's logits after each of the ids, (T, V)."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=len(ids), n_batch=512, n_threads=1, logits_all=True, verbose=False, **how)
    model.eval(ids)
    return torch.tensor(np.array(model.scores[: len(ids)]))


EXACT = {"type_k": 0, "type_v": 0, "flash_attn": False}  # keys and values in fp32, too

WIDE = {"context": 256, "n_embd": 64}


@needs_llama
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "n_kv_head": 1, "head_dim": 24, "n_ffn": 72},
        {"yarn_factor": 4.0, "yarn_original_context": 64},
        {"rope_theta": 1e6, "norm_eps": 1e-2},
    ],
)
def test_llama_cpp_computes_the_same_logits(changes, tmp_path):
    tokenizer = Tokenizer.train("byte", [])
    model = random_model(tokenizer, **WIDE, **changes)
    path, _ = written(tmp_path, model, tokenizer)
    ids = torch.randint(0, 257, (200,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = model(ids[None])[0]
    torch.testing.assert_close(llama_logits(path, ids.tolist(), **EXACT), ours, atol=2e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    """A trained run that reads 256 tokens at once."""
    where = tmp_path_factory.mktemp("runs")
    small = [word for word in SMALL if "context" not in word and "batch" not in word]
    done = command(
        "train.py", "shakespeare", "--name=read", f"--data.source={text}", *small, "--model.context=256",
        "--train.batch_tokens=2048", "--train.micro_batch=8", "--train.steps=60", "--train.evals=1", where=where,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return where / "read"


@needs_llama
def test_llama_cpp_says_the_same_in_f32(run, tmp_path):
    from llama_cpp import Llama

    # as a command, from a folder in which this file would be taken for the package gguf
    done = command("tools/gguf.py", str(run), str(tmp_path / "x.gguf"), "--dtype", "f32", where=run.parent)
    assert done.returncode == 0, done.stderr
    model, tokenizer = load(run)
    prompt = tokenizer.encode("Song 7: the")
    ours = [int(t) for t in generate(model.cpu(), prompt, tokens=200, sampling=Sampling(greedy=True))]
    theirs = Llama(str(tmp_path / "x.gguf"), n_ctx=256, n_threads=1, verbose=False, **EXACT)
    made = theirs.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0)
    assert [next(made) for _ in range(200)] == ours
    assert len(set(ours)) > 10


@needs_llama
@pytest.mark.parametrize("dtype", tool.DTYPES)
def test_llama_cpp_finds_the_same_perplexity(dtype, run, text, tmp_path, capsys):
    assert tool.main([str(run), str(tmp_path / "x.gguf"), "--dtype", dtype]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'x.gguf'}: {dtype}, {(tmp_path / 'x.gguf').stat().st_size:,} bytes, bpe")
    model, tokenizer = load(run)
    ids = torch.tensor(tokenizer.encode(text.read_text())[:257])
    with torch.inference_mode():
        ours = torch.nn.functional.cross_entropy(model.cpu()(ids[None, :-1])[0], ids[1:]).exp()
    theirs = torch.nn.functional.cross_entropy(llama_logits(tmp_path / "x.gguf", ids[:-1].tolist()), ids[1:]).exp()
    assert theirs.item() == pytest.approx(ours.item(), rel=0.01)
    assert ours < 20  # of 300: it has learned something that could get lost


# The command --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"window": 8, "layer_pattern": "SL"}, "model.layer_pattern = 'SL': llama.cpp's qwen3 has no sliding window"),
        ({"gate": True}, "model.gate = True: llama.cpp's qwen3 has no gate"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused_by_name(changes, says, tmp_path):
    tokenizer = Tokenizer.train("byte", [])
    with pytest.raises(ValueError, match=f"^{says}"):
        written(tmp_path, random_model(tokenizer, **changes), tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
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


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nothing", "x.gguf"], "gguf.py: nothing: no such run"),
        (["RUN", "no/x.gguf"], "gguf.py: no/x.gguf: name a file in a folder that is there, such as songs.gguf"),
        (["RUN", "x.gguf", "--checkpoint", "step-9"], "no checkpoint 'step-9'"),
        (["RUN", "x.gguf", "--dtype", "q4_0"], "invalid choice: 'q4_0'"),
    ],
)
def test_mistakes_are_one_line(words, says, runs, capsys):
    try:
        status = tool.main([word.replace("RUN", str(runs / "songs")) for word in words])
    except SystemExit as left:
        status = left.code
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert says in printed.err.strip().splitlines()[-1]


def test_without_the_package_there_is_a_hint(runs, tmp_path):
    (tmp_path / "gguf.py").write_text("raise ModuleNotFoundError(\"No module named 'gguf'\")")
    words = (str(runs / "songs"), str(tmp_path / "x.gguf"))
    done = command("tools/gguf.py", *words, where=runs, PYTHONPATH=str(tmp_path))
    assert done.stderr == "gguf.py: No module named 'gguf': pip install -e .[gguf]\n"
    assert done.returncode == 2
