"""Engines: the C++ engine compared with the model in fp64 without a cache, for every flag; no compiler; int8."""

import dataclasses
import platform
import re

import pytest
import torch

import sample
from inference import engine
from inference.engine import CppEngine, EagerEngine, make_engine
from inference.quantize import Int8, quantize
from kernels import cpu
from kernels.cpu import build, decode_step
from model import GPT, KVCache
from tests.conftest import TINY, randomized

FLAGS = {
    "plain": {},
    "MQA": {"n_kv_head": 1},
    "MHA": {"n_kv_head": 4},
    "sequences": {"window": 5, "layer_pattern": "SL"},
    "gate": {"gate": True},
    "yarn": {"yarn_factor": 4.0, "yarn_original_context": 8},
    "untied": {"tie_embeddings": False},
    "odd sizes": {"n_embd": 37, "n_ffn": 51, "head_dim": 6, "vocab_size": 101},
    "wide": {"n_embd": 192, "n_ffn": 320, "head_dim": 64, "norm_eps": 1e-3, "rope_theta": 500.0},
}
CHUNKS = (7, 1, 1, 10, 1, 1, 1, 5, 1, 4)  # 32 tokens, the whole context


def exact(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """Logits after every token in fp64, computed for the whole sequence at once."""
    double = GPT(model.config).eval().double()
    named = ((name, child) for name, child in model.named_modules() if getattr(child, "weight", None) is not None)
    double.load_state_dict({f"{name}.weight": child.weight.double() for name, child in named})
    return double(tokens)


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@torch.inference_mode()
def test_logits_equal_the_models_for_every_flag(flags, kind):
    """Activations may be rounded as well: with bf16 weights as in torch, with int8 weights to 16 bits."""
    model = randomized(dataclasses.replace(TINY, **flags))
    if kind != "fp32":
        quantize(model, kind)
    run, dtype = CppEngine(model), model.model.norm.weight.dtype
    ours, torchs = [], []
    for batch in (1, 2, 5):
        tokens = torch.randint(0, 97, (batch, 32))
        expected, end = exact(model, tokens), 0
        cache, theirs = KVCache(model.config, batch), KVCache(model.config, batch, dtype=dtype)
        for T in CHUNKS:
            chunk, end = tokens[:, end : end + T], end + T
            ours.append((run(chunk, cache) - expected[:, end - 1]).abs().max())
            torchs.append((EagerEngine(model)(chunk, theirs) - expected[:, end - 1]).abs().max())
    assert max(ours) <= (max(torchs) if kind == "bf16" else {"fp32": 2e-6, "int8": 4e-4}[kind] * expected.abs().max())


# Long prompts: many tokens at once, in the tiles of prefill.h. Without AMX, bf16 products or AVX-512 other lines run.
LONG = {
    "plain": {},
    "one key head": {"n_kv_head": 1},
    "windows": {"window": 40, "layer_pattern": "SL", "n_layer": 3},
    "a window of one": {"window": 1, "layer_pattern": "LS"},
    "gate": {"gate": True, "n_kv_head": 1},
    "odd sizes": {"n_embd": 37, "n_ffn": 51, "head_dim": 6, "vocab_size": 101, "tie_embeddings": False},
    "wide": {"n_embd": 192, "n_ffn": 320, "head_dim": 80, "window": 100, "layer_pattern": "LS", "gate": True},
}
X86 = platform.machine() in ("x86_64", "AMD64")
WITHOUT = {
    "nothing": (),
    "AMX": ("-mno-amx-bf16",),
    "bf16": ("-mno-amx-bf16", "-mno-avx512bf16"),
    "AVX-512": ("-mno-amx-bf16", "-mno-avx512f"),
}


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int8, cache bf16"])
@pytest.mark.parametrize("without", WITHOUT if X86 else ["nothing"])
@torch.inference_mode()
def test_long_prompts_with_and_without_each_instruction_set(kind, without, monkeypatch, clear_compiled):
    clear_compiled()
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, *WITHOUT[without]])
    for flags in LONG.values():
        model = randomized(dataclasses.replace(TINY, context=420, **flags))
        if kind != "fp32":
            quantize(model, kind[:4])
        ours, torchs = [], []
        # pieces of 256 and 85 tokens, and of 6 that are many together
        for batch, pieces in ((1, (300, 1, 33, 86)), (3, (100, 40)), (40, (12,))):
            read, tokens = CppEngine(model), torch.randint(0, 97, (batch, sum(pieces)))
            dtype = torch.bfloat16 if "bf16" in kind else torch.float32
            cache, theirs = (KVCache(model.config, batch, dtype=dtype) for _ in range(2))
            expected, end = exact(model, tokens), 0
            for T in pieces:
                piece, end = tokens[:, end : end + T], end + T
                ours.append((read(piece, cache) - expected[:, end - 1]).abs().max())
                if kind == "bf16":
                    torchs.append((EagerEngine(model)(piece, theirs) - expected[:, end - 1]).abs().max())
        share = {"fp32": 4e-6, "int8": 4e-4, "int8, cache bf16": 0.03}
        # In bf16 both round keys and values alike, and that is most of the error.
        bound = 1.25 * max(torchs) if kind == "bf16" else share[kind] * expected.abs().max()
        assert max(ours) <= bound, flags


@torch.inference_mode()
def test_a_piece_that_wants_no_logits_fills_the_cache_all_the_same():
    model = randomized(dataclasses.replace(TINY, context=600))
    tokens, seen, real = torch.randint(0, 97, (1, 520)), [], decode_step.decode
    one, other = KVCache(model.config, 1), KVCache(model.config, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_step, "decode", lambda *a: (seen.append((a[2].shape[1], a[5] is None)), real(*a))[1])
        CppEngine(model)(tokens, one)
    assert seen == [(256, True), (256, True), (8, False)]
    for piece in tokens.split(20, dim=1):
        CppEngine(model)(piece, other)
    for mine, yours in zip(one.layers, other.layers, strict=True):
        torch.testing.assert_close(mine, yours, atol=2e-5, rtol=2e-5)


@torch.inference_mode()
def test_ring_buffer_and_bf16_cache_equal_torch():
    model = randomized(dataclasses.replace(TINY, window=100, layer_pattern="SL", context=600))
    run, tokens = CppEngine(model), torch.randint(0, 97, (2, 590))
    cache = KVCache(model.config, 2)
    for chunk in tokens.split(59, dim=1):
        got = run(chunk, cache)
    assert cache.layers[0][0].shape[1] < 590
    torch.testing.assert_close(got.double(), exact(model, tokens)[:, -1], atol=3e-5, rtol=3e-5)
    quantize(model, "bf16")
    ours, theirs = (KVCache(model.config, 2, dtype=torch.bfloat16) for _ in range(2))
    run, tokens = CppEngine(model), tokens[:, :20]
    near = (run(tokens, ours) - EagerEngine(model)(tokens, theirs)).abs().max()
    assert near < 0.1 * run(tokens[:, :1], ours).abs().max()  # torch rounds every step to bf16
    for mine, yours in zip(ours.layers[0], theirs.layers[0], strict=True):  # first layer: they differ by one rounding
        torch.testing.assert_close(mine[:, :20], yours[:, :20], atol=0.02, rtol=0.02)


@pytest.mark.parametrize(("kind", "batch"), [("fp32", 40), ("bf16", 31), ("int8", 31)])
@pytest.mark.parametrize("without", WITHOUT if X86 else ["nothing"])
@torch.inference_mode()
def test_logits_have_the_same_bits_whatever_the_batch_and_the_threads(
    kind, batch, without, monkeypatch, clear_compiled
):
    clear_compiled()
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, *WITHOUT[without]])
    before = torch.get_num_threads()
    for flags in (LONG["plain"], LONG["odd sizes"], LONG["wide"]):
        model = randomized(dataclasses.replace(TINY, context=420, **flags))
        if kind != "fp32":
            quantize(model, kind)
        run = CppEngine(model)
        lengths = torch.randint(1, 400, (batch,))
        texts = [torch.randint(0, 97, (1, n + 3)) for n in lengths.tolist()]
        alone = []
        for text in texts:
            cache = KVCache(model.config, 1, dtype=run.cache_dtype)
            run(text[:, :-3], cache)
            alone.append(torch.stack([run(token, cache)[0] for token in text[:, -3:].split(1, dim=1)]))
        try:
            torch.set_num_threads(3)
            cache, rows = KVCache(model.config, batch + 2, dtype=run.cache_dtype), torch.randperm(batch + 2)[:batch]
            for row, text in zip(rows, texts, strict=True):
                run(text[:, :-3], cache.select(row[None], torch.tensor([0])))
            news = torch.cat([text[:, -3:] for text in texts])  # (B, 3)
            together = [run(news[:, n : n + 1], cache.select(rows, lengths + n)) for n in range(3)]
        finally:
            torch.set_num_threads(before)
        assert torch.equal(torch.stack(together, 1), torch.stack(alone)), flags


@torch.inference_mode()
def test_more_threads_than_rows_and_heads():
    model, tokens, before = randomized(TINY), torch.randint(0, 97, (3, 9)), torch.get_num_threads()
    try:
        torch.set_num_threads(40)
        got = CppEngine(model)(tokens, KVCache(model.config, 3))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got, model(tokens)[:, -1], atol=2e-5, rtol=2e-5)


def test_out_of_range_tokens_raise():
    run, cache = CppEngine(randomized(TINY)), KVCache(TINY, 1)
    for tokens in ([97], [-1], [0] * 33, []):
        with pytest.raises(IndexError, match="tokens from 0 to 96, 1 to 32 of them"):
            run(torch.tensor([tokens], dtype=torch.long), cache)


def test_default_cpu_engine_is_cpp_and_generate_uses_it(monkeypatch):
    model = randomized(TINY)
    assert isinstance(make_engine(model), CppEngine)
    asked, real = [], decode_step.decode
    monkeypatch.setattr(decode_step, "decode", lambda *a: (asked.append(a[2].shape), real(*a))[1])
    list(sample.generate(model, [1, 2, 3], max_new_tokens=3, num_samples=2))
    assert asked == [(1, 3), (2, 1), (2, 1)]


# Without the C++ engine ----------------------------------------------------------------------------------------------


def test_without_a_compiler_the_eager_engine_is_used_with_a_warning(monkeypatch, capfd, tmp_path, clear_compiled):
    engine._warn_once.cache_clear()
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    model = randomized(TINY)
    expected = torch.stack(list(sample.generate(model, [5], max_new_tokens=9, seed=3)))
    clear_compiled()
    for compiler, why in (("false", "false failed"), ("/no/compiler", "no C.. compiler")):
        monkeypatch.setenv("CXX", compiler)
        monkeypatch.setattr(build, "FOLDER", tmp_path / "another")
        assert torch.equal(torch.stack(list(sample.generate(model, [5], max_new_tokens=9, seed=3))), expected)
        list(sample.generate(model, [5], max_new_tokens=1))  # the warning is printed once
        said = capfd.readouterr().err.splitlines()
        assert len(said) == 1 and re.search(why, said[0]) and "generating with PyTorch" in said[0]
        clear_compiled()


def test_unknown_flag_uses_the_eager_engine(capfd):
    @dataclasses.dataclass(frozen=True)
    class Later(type(TINY)):
        """A configuration of a later version of heed."""

        softcap: float = 0.0

    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(engine, "ModelConfig", Later)
        engine._warn_once.cache_clear()
        model = randomized(Later(**vars(TINY)))
        assert isinstance(make_engine(model), CppEngine)
        model = randomized(Later(**vars(TINY), softcap=1.0))
        assert not isinstance(make_engine(model), CppEngine)
        assert "model.softcap" in capfd.readouterr().err


def test_compiled_library_is_cached(tmp_path, monkeypatch, clear_compiled):
    def compiled(*flags: str) -> list[int]:
        clear_compiled()
        monkeypatch.setattr(build, "FLAGS", [*build.FLAGS[:1], *flags, *build.FLAGS[1:]])
        cpu.library("linear", ELEMENT=torch.float32)
        return sorted(path.stat().st_mtime_ns for path in tmp_path.iterdir())

    monkeypatch.setattr(build, "FOLDER", tmp_path)
    (kept,) = compiled()
    assert compiled() == [kept]
    assert len(compiled("-O1")) == 2


def test_unwritable_cache_folder_is_reported(tmp_path, monkeypatch, clear_compiled):
    (tmp_path / "file").touch()
    monkeypatch.setattr(build, "FOLDER", tmp_path / "file" / "cpu")
    with pytest.raises(cpu.Unavailable, match=r"file/cpu cannot hold compiled code: .*Not a directory"):
        cpu.library("linear", ELEMENT=torch.float32)


# Quantization --------------------------------------------------------------------------------------------------------


def test_int8_takes_a_quarter_of_the_bytes_and_rounds_to_nearest():
    model = randomized(TINY)
    before = {name: p.clone() for name, p in model.named_parameters() if p.ndim == 2}
    quantize(model, "int8")
    after = {name: m for name, m in model.named_modules() if isinstance(m, Int8)}
    assert {f"{name}.weight" for name in after} == before.keys()
    for name, m in after.items():
        weight = before[f"{name}.weight"]
        assert m.codes.dtype == torch.int8 and m.codes.abs().amax(1).eq(127).all()
        step = weight.abs().amax(1, keepdim=True) / 127
        assert ((m.weight - weight).abs() <= 0.501 * step).all()
    assert sum(p.ndim > 1 for p in model.parameters()) == 0


def test_int8_changes_bits_per_byte_by_less_than_half_a_percent(runs):
    model, tokenizer = sample.load(runs / "songs")
    song = "Song {}: the {} birds sing to the {} bees, and the bees to the {} ants.\n"
    text = "".join(song.format(n, n % 7, n % 5, n % 3) for n in range(40))
    ids = torch.tensor(tokenizer.encode(text))
    sequences = ids[: len(ids) // 32 * 32].view(-1, 32)

    @torch.inference_mode()
    def bits_per_byte(model: GPT, run) -> float:
        total = 0.0
        cache = KVCache(model.config, len(sequences))
        for place in range(31):
            logits = run(sequences[:, place : place + 1], cache)
            total += torch.nn.functional.cross_entropy(logits, sequences[:, place + 1], reduction="sum").item()
        return total / len(text.encode())

    before = bits_per_byte(model, make_engine(model))
    quantize(model, "int8")
    for run in (make_engine(model), EagerEngine(model)):
        after = bits_per_byte(model, run)
        assert abs(after / before - 1) < 0.005
        assert after != before


def test_command_generates_in_int8_with_and_without_a_compiler(runs, sample_py, monkeypatch, clear_compiled):
    said = {}
    for words in ((), ("--quantize=int8",), ("--quantize=bf16",)):
        for compiler in ("g++", "false"):
            engine._warn_once.cache_clear()
            clear_compiled()
            monkeypatch.setenv("CXX", compiler)
            done = sample_py("--greedy", "--max-new-tokens=12", "--prompt=Song", *words, where=runs)
            assert done.returncode == 0, done.stderr
            assert ("generating with PyTorch" in done.stderr) == (compiler == "false")
            said[words, compiler] = done.stdout
    assert said[("--quantize=int8",), "g++"] == said[("--quantize=int8",), "false"]
    assert said[(), "g++"] == said[(), "false"]
