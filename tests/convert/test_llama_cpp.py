"""llama.cpp itself, if installed: its ids, logits, text and perplexity for heed's GGUF files."""

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import pre_tokenizers

from convert import to_gguf
from convert.__main__ import main as convert
from data.tokenizer import EOT, Tokenizer
from sample import SamplingParams, generate, load
from tests.conftest import ROOT, SMALL, command
from tests.convert.test_to_gguf import random_model, written

Llama = pytest.importorskip("llama_cpp").Llama

# Ids ----------------------------------------------------------------------------------------------------------------

HARD = [
    "", " ", "a", "Hello, world!", "don't we'll they've I'm 'S 'LL", "  two   runs  ", "tabs\t\tand\n\n\nlines\n \n  x",
    "Windows\r\nline\r\n\r\nends\r", "naïve café e\u0301", "语言模型\uff0c中文。日本語カナ", "🙂👩‍🚀🇨🇭 flags",
    "١٢٣ ½ ² Ⅷ 12345 3.14",
    f"a {EOT} b", "<|endoftext|", "<|im_start|>user", "\u00a0\u2003\u3000 wide", "\u200b\u200d\ufeff", "\x00\x01\x7f",
    "x" * 300, "ñandú Ωmega Ж د ह ก \U0001d518", "def f(x):\n    return x**2  # ok\n", "∑∫≠ €£¥ …—\u2013",
    "trailing   ", "I <think> so<think>",
]  # fmt: skip


@pytest.fixture(scope="module")
def some_text() -> list[str]:
    short = [text for text in HARD if len(text) < 100]  # llama-cpp-python returns at most 32 bytes of a token
    return [*(page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))), *short * 3]


def split_like(name: str, texts: list[str]) -> Tokenizer:
    """A BPE with another pre-tokenizer and an added token that is not special."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "smollm")
    first = pre_tokenizers.Digits(individual_digits=True)
    if name == "qwen2":
        first = pre_tokenizers.Split(tokenizers.Regex(to_gguf.QWEN), "isolated")
    inner = Tokenizer.train("byte", []).inner
    inner.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(
        texts, tokenizers.trainers.BpeTrainer(vocab_size=900, special_tokens=[EOT], initial_alphabet=alphabet)
    )
    inner.add_tokens(["<think>"])
    return Tokenizer(inner)


@pytest.fixture(scope="module", params=["bpe", "byte", "char", "smollm", "qwen2"])
def tokenizer(request, some_text) -> Tokenizer:
    if request.param in ("smollm", "qwen2"):
        return split_like(request.param, some_text)
    return Tokenizer.train(request.param, some_text, 900)


def test_llama_cpp_has_the_same_ids(tokenizer, tmp_path):
    path, _ = written(tmp_path, random_model(tokenizer, vocab_size=tokenizer.vocab_size + 3), tokenizer)
    theirs = Llama(str(path), vocab_only=True, verbose=False)
    for text in HARD:
        ids = tokenizer.encode(text)
        assert theirs.tokenize(text.encode(), add_bos=True, special=False) == ids, text
        assert theirs.detokenize(ids).decode() == text
    assert theirs.token_eos() == theirs.token_bos() == tokenizer.eot


# Logits -------------------------------------------------------------------------------------------------------------


def llama_logits(path, ids: list[int], **how) -> torch.Tensor:
    """llama.cpp's logits after each of the ids, (T, V)."""
    model = Llama(str(path), n_ctx=len(ids), n_batch=512, n_threads=1, logits_all=True, verbose=False, **how)
    model.eval(ids)
    return torch.tensor(np.array(model.scores[: len(ids)]))


EXACT = {"type_k": 0, "type_v": 0, "flash_attn": False}  # keys and values in fp32

WIDE = {"context": 256, "n_embd": 64}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "n_kv_head": 1, "head_dim": 24, "n_ffn": 72},
        {"yarn_factor": 4.0, "yarn_original_context": 64},
        {"rope_theta": 1e6, "norm_eps": 1e-2},
    ],
)
def test_llama_cpp_has_the_same_logits(changes, tmp_path):
    tokenizer = Tokenizer.train("byte", [])
    model = random_model(tokenizer, **WIDE, **changes)
    path, _ = written(tmp_path, model, tokenizer)
    ids = torch.randint(0, 257, (200,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = model(ids[None])[0]
    torch.testing.assert_close(llama_logits(path, ids.tolist(), **EXACT), ours, atol=2e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    """A trained run with context 256."""
    where = tmp_path_factory.mktemp("runs")
    small = [word for word in SMALL if "context" not in word and "batch" not in word]
    done = command(
        "train.py", "shakespeare", "--name=read", f"--data.source={text}", *small, "--model.context=256",
        "--train.batch_tokens=2048", "--train.micro_batch_size=8", "--train.steps=60", "--train.num_evals=1",
        where=where,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return where / "read"


def test_llama_cpp_generates_the_same_text_in_f32(run, tmp_path):
    done = command("convert", "to-gguf", str(run), str(tmp_path / "x.gguf"), "--type", "f32", where=run.parent)
    assert done.returncode == 0, done.stderr
    model, tokenizer = load(run)
    prompt = tokenizer.encode("Song 7: the")
    ours = [int(t) for t in generate(model.cpu(), prompt, max_new_tokens=200, sampling=SamplingParams(greedy=True))]
    theirs = Llama(str(tmp_path / "x.gguf"), n_ctx=256, n_threads=1, verbose=False, **EXACT)
    made = theirs.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0)
    assert [next(made) for _ in range(200)] == ours
    assert len(set(ours)) > 10


@pytest.mark.parametrize("dtype", to_gguf.TYPES)
def test_llama_cpp_has_the_same_perplexity(dtype, run, text, tmp_path):
    assert convert(["to-gguf", str(run), str(tmp_path / "x.gguf"), "--type", dtype]) == 0
    model, tokenizer = load(run)
    ids = torch.tensor(tokenizer.encode(text.read_text())[:257])
    with torch.inference_mode():
        ours = torch.nn.functional.cross_entropy(model.cpu()(ids[None, :-1])[0], ids[1:]).exp()
    theirs = torch.nn.functional.cross_entropy(llama_logits(tmp_path / "x.gguf", ids[:-1].tolist()), ids[1:]).exp()
    assert theirs.item() == pytest.approx(ours.item(), rel=0.01)
    assert ours < 20  # of 300: the model is trained, so errors would show
