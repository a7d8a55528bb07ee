"""tools/hf.py import: checkpoints of transformers' own making become runs that say what transformers says."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Inner
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.tokenizer import EOT, Tokenizer
from model import ModelConfig
from sample import Sampling, speak
from sample import load as load_run
from tests.conftest import TINY, command
from tests.test_hf import HARD, MODELS, TEXTS, YARN, lively, made, same_greedy_text, same_logits, theirs
from tools.hf_config import from_hf, to_hf
from tools.hf_export import export
from tools.hf_import import take_in


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


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("name", HUB)
def test_a_checkpoint_becomes_a_run_with_the_same_logits_and_text(name, shard, tmp_path):
    folder = saved(name, tmp_path / "hub", shard)
    assert len(list(folder.glob("*.safetensors"))) == 1 if shard == "5GB" else 3
    take_in(str(folder), tmp_path / "run")
    ours, tokenizer = load_run(tmp_path / "run")
    model = theirs(folder).float()
    same_logits(ours, model)
    prompt = tokenizer.opening + tokenizer.encode("the cat sat on")
    assert prompt == AutoTokenizer.from_pretrained(folder)("the cat sat on")["input_ids"]
    same_greedy_text(ours, model, prompt)


@pytest.mark.parametrize("name", HUB)
def test_there_and_back_every_weight_and_token_is_the_same(name, tmp_path):
    folder = saved(name, tmp_path / "hub", "20KB")
    take_in(str(folder), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", dtype="bfloat16" if name != "TinyLlama" else "float32")
    before, after = theirs(folder), theirs(tmp_path / "out")
    assert type(before) is type(after)
    for (key, old), (again, new) in zip(before.state_dict().items(), after.state_dict().items(), strict=True):
        assert key == again and torch.equal(old.float(), new.float())
    _, tokenizer = load_run(tmp_path / "run")
    old, new = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert new.eos_token == old.eos_token == HUB[name][3] and new.eos_token_id == tokenizer.eot
    for text in HARD + TEXTS:
        plain = old(text, split_special_tokens=True)["input_ids"]
        assert new(text)["input_ids"] == plain == tokenizer.opening + tokenizer.encode(text)
        assert tokenizer.eot not in plain


@pytest.mark.parametrize("name", HUB)
def test_speaking_follows_the_prompt_as_decoding_the_whole_does(name, tmp_path):
    take_in(str(saved(name, tmp_path / "hub")), tmp_path / "run")
    ours, tokenizer = load_run(tmp_path / "run")
    assert tokenizer.inner.id_to_token(tokenizer.eot) == HUB[name][3]
    model, fast = theirs(tmp_path / "hub").float(), AutoTokenizer.from_pretrained(tmp_path / "hub")
    for prompt in ("the cat", "👩 the cat sat on"):
        said = model.generate(**fast(prompt, return_tensors="pt", return_token_type_ids=False), do_sample=False,
                              max_new_tokens=40)  # fmt: skip
        expected = fast.decode(said[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        parts = speak(ours, tokenizer, prompt, tokens=40, sampling=Sampling(greedy=True))
        assert prompt + "".join(part for _, part in parts) == expected


def test_a_sentencepiece_keeps_the_space_after_the_prompt():
    tokenizer = SENTENCEPIECE
    before, after = tokenizer.encode("the cat"), tokenizer.encode("sat 👩")
    stream = tokenizer.stream(before)
    assert "".join(map(stream.push, after)) + stream.flush() == " sat 👩"
    assert tokenizer.opening == [1] and tokenizer.stream([1]).push(before[0]) == tokenizer.decode(before[:1])
    assert tokenizer.decode(tokenizer.encode("  a </s><0x41>\r\n")) == "  a </s><0x41>\r\n"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 329) | st.sampled_from([1, 2, 0xF0 + 3, 0x9F + 3, 0x91 + 3, 0xA9 + 3]), max_size=20))
def test_streams_survive_what_a_model_may_write(ids):
    stream = SENTENCEPIECE.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == SENTENCEPIECE.decode(ids)
    before = SENTENCEPIECE.encode("a cat 👩")
    stream = SENTENCEPIECE.stream(before)
    said = "".join(map(stream.push, [*ids, *SENTENCEPIECE.encode("end")])) + stream.flush()
    assert said.endswith(" end")


def test_the_named_end_of_text_stays_with_the_tokenizer(tmp_path):
    tokenizer = Tokenizer(smollm2_tokenizer(), "here", "<|im_end|>")
    assert tokenizer.eot == 2 and Tokenizer(smollm2_tokenizer()).eot == 0
    assert tokenizer.sha256 != Tokenizer(smollm2_tokenizer()).sha256  # prepared texts end their documents otherwise
    for folder in ("a", "b"):  # a run's, then that of a run that began with it
        (tmp_path / folder).mkdir()
        tokenizer.save(tmp_path / folder / "tokenizer.json")
        tokenizer = Tokenizer.load(tmp_path / folder / "tokenizer.json")
        assert tokenizer.eot == 2
    config = tmp_path / "a/tokenizer_config.json"
    config.write_text('{"eos_token": {"content": "<|im_start|>", "special": true}}')
    assert Tokenizer.load(tmp_path / "a").eot == 1
    for wrong, says in (('{"eos_token": "<stop>"}', "eos_token = '<stop>': not in"), ("[]", "not a tokenizer_config")):
        config.write_text(wrong)
        with pytest.raises(ValueError, match=says):
            Tokenizer.load(tmp_path / "a")


@pytest.mark.parametrize("flags", [flags for flags, _ in MODELS.values()], ids=MODELS)
def test_what_heed_exported_comes_back(flags, tmp_path):
    config = dataclasses.replace(TINY, vocab_size=0, context=256, **flags)
    run = made(tmp_path / "run", config)
    export(run, tmp_path / "out")
    take_in(str(tmp_path / "out"), tmp_path / "back")
    (ours, one), (again, two) = load_run(run), load_run(tmp_path / "back")
    assert ours.config == again.config and one.sha256 == two.sha256
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, atol=1e-6 if ours.config.gate else 0, rtol=0)


def test_training_begins_where_the_checkpoint_stood_and_cards_say_so(tmp_path):
    take_in(str(saved("SmolLM2", tmp_path / "hub")), tmp_path / "run", context=64)
    ours, _ = load_run(tmp_path / "run")
    assert ours.config.context == 64
    export(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert f"| began as | {tmp_path / 'hub'}, whose licence holds, too |" in card and "trained on" not in card


def test_a_hub_name_is_found_in_the_hubs_cache(tmp_path):
    folder = tmp_path / "home/hub/models--somebody--small"
    saved("Qwen3", folder / "snapshots/abc")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    words = ("import", "somebody/small", str(tmp_path / "run"), "--context", "128")
    done = command("tools/hf.py", *words, where=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert "of somebody/small, context 128, end of text '<|im_end|>'" in done.stdout
    done = command("sample.py", "--run", str(tmp_path / "run"), "--tokens", "5", "--prompt", "the", where=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("the"), done.stderr


def test_old_words_are_understood():
    """config.json as transformers 4 wrote it: TinyLlama's and Qwen3-0.6B's, with YaRN as its card advises."""
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


WORDS = to_hf(dataclasses.replace(TINY, **YARN)) | {"rope_scaling": None}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2': heed reads qwen3, qwen3_next, llama, ministral"),
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
        ({"rope_parameters": WORDS["rope_parameters"] | {"beta_fast": 16}}, "rope_parameters.beta_fast = 16: "),
        ({"rope_parameters": WORDS["rope_parameters"] | {"mscale": 0.7}}, "rope_parameters.mscale = 0.7: "),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types: must be 2 times one of"),
        ({"model_type": "qwen3_next"}, "mlp_only_layers: must name every layer"),
    ],
)
def test_what_heed_cannot_compute_is_refused_by_name(change, says):
    with pytest.raises(ValueError, match=r"^config\.json: ") as error:
        from_hf(WORDS | change)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_broken_folders_are_refused_in_a_line_and_leave_nothing(tmp_path, monkeypatch):
    run = made(tmp_path / "run", dataclasses.replace(TINY, vocab_size=0))
    export(run, folder := tmp_path / "hub")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights, words = load_file(folder / "model.safetensors"), json.loads(files["config.json"])
    some = next(iter(weights))

    def refused(says: str, name: str = "run2", context: int | None = None) -> None:
        with pytest.raises(ValueError) as error:
            take_in(str(folder), tmp_path / name, context)
        assert says in str(error.value) and "\n" not in str(error.value)
        assert not (tmp_path / "run2").exists()
        for path in folder.iterdir():
            path.unlink()
        for file, content in files.items():
            (folder / file).write_bytes(content)

    refused("run: is there and not empty; name a new folder", name="run")
    refused("name = 'a b': must be a folder name", name="a b")
    refused("--context 33: must be from 1 to 32", context=33)
    (folder / "config.json").unlink()
    refused("config.json: no such file")
    (folder / "config.json").write_text("{")
    refused("config.json: not JSON")
    (folder / "config.json").write_text(json.dumps(words | {"eos_token_id": 999}))
    refused("eos_token_id = 999: not in the vocabulary")
    (folder / "config.json").write_text(json.dumps(words | {"vocab_size": 299}))
    refused("tokenizer.json has 300 tokens, but config.json's vocab_size is 299")
    (folder / "config.json").write_text(json.dumps(words | {"intermediate_size": 64}))
    refused("config.json makes it (32, 64)")
    (folder / "tokenizer.json").unlink()
    refused("tokenizer.json': no such file")
    (folder / "model.safetensors").unlink()
    refused("has no model.safetensors, nor an index of several")
    (folder / "model.safetensors").write_bytes(b"not weights")
    refused("model.safetensors: cannot be read")
    save_file({k: v for k, v in weights.items() if k != some}, folder / "model.safetensors")
    refused(f"{some} is in none of its weight files")
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    save_file(weights | bias, folder / "model.safetensors")
    refused("q_proj.bias of (64,): heed's model has no such")
    # what the model does not need is passed over
    angles = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8), "lm_head.weight": weights[some].clone()}
    save_file(weights | angles, folder / "model.safetensors")
    take_in(str(folder), tmp_path / "good")
    assert "transformers" in sys.modules  # of this test; heed's own are without:
    code = "import sys, tools.hf_export, tools.hf_import; assert 'transformers' not in sys.modules"
    import subprocess

    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
