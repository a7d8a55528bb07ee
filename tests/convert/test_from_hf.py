"""`convert from-hf`: checkpoints written by transformers become runs with the same logits and the same text."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from convert.from_hf import import_checkpoint
from convert.to_hf import export
from data.tokenizer import Tokenizer
from inference.detokenizer import StreamingDetokenizer
from sample import SamplingParams, stream_generate
from sample import load as load_run
from tests.conftest import ROOT, TINY, command
from tests.convert.hub import HUB, SENTENCEPIECE, saved, smollm2_tokenizer
from tests.convert.test_to_hf import HARD, MODELS, TEXTS, made, same_greedy_text, same_logits, theirs


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("name", HUB)
def test_imported_run_has_the_same_logits_and_text(name, shard, tmp_path):
    folder = saved(name, tmp_path / "hub", shard)
    assert len(list(folder.glob("*.safetensors"))) == 1 if shard == "5GB" else 3
    import_checkpoint(str(folder), tmp_path / "run")
    ours, tokenizer = load_run(tmp_path / "run")
    model = theirs(folder).float()
    same_logits(ours, model)
    prompt = tokenizer.bos_tokens + tokenizer.encode("the cat sat on")
    assert prompt == AutoTokenizer.from_pretrained(folder)("the cat sat on")["input_ids"]
    if shard == "5GB":
        same_greedy_text(ours, model, prompt)


@pytest.mark.parametrize("name", HUB)
def test_round_trip_keeps_every_weight_and_token(name, tmp_path):
    folder = saved(name, tmp_path / "hub", "20KB")
    import_checkpoint(str(folder), tmp_path / "run")
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
        assert (
            new(text, split_special_tokens=True)["input_ids"] == plain == tokenizer.bos_tokens + tokenizer.encode(text)
        )
        assert tokenizer.eot not in plain


@pytest.mark.parametrize("name", HUB)
def test_streamed_text_equals_decoding_everything_at_once(name, tmp_path):
    import_checkpoint(str(saved(name, tmp_path / "hub")), tmp_path / "run")
    ours, tokenizer = load_run(tmp_path / "run")
    assert tokenizer.inner.id_to_token(tokenizer.eot) == HUB[name][3]
    model, fast = theirs(tmp_path / "hub").float(), AutoTokenizer.from_pretrained(tmp_path / "hub")
    for prompt in ("the cat", "👩 the cat sat on"):
        generated = model.generate(**fast(prompt, return_tensors="pt", return_token_type_ids=False), do_sample=False,
                              max_new_tokens=40)  # fmt: skip
        expected = fast.decode(generated[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        parts = stream_generate(ours, tokenizer, prompt, max_new_tokens=40, sampling=SamplingParams(greedy=True))
        assert prompt + "".join(part for _, part in parts) == expected


def test_sentencepiece_keeps_the_space_after_the_prompt(monkeypatch):
    tokenizer = SENTENCEPIECE
    before, after = tokenizer.encode("the cat"), tokenizer.encode("sat 👩")
    stream = StreamingDetokenizer(tokenizer, before)
    assert "".join(map(stream.add_token, after)) + stream.finalize() == " sat 👩"
    assert tokenizer.bos_tokens == [1] and StreamingDetokenizer(tokenizer, [1]).add_token(
        before[0]
    ) == tokenizer.decode(before[:1])
    assert tokenizer.decode(tokenizer.encode("  a </s><0x41>\r\n")) == "  a </s><0x41>\r\n"
    monkeypatch.setattr("sample.generate", lambda *_, **__: (torch.tensor([i]) for i in tokenizer.encode("sat on")))
    assert "".join(part for _, part in stream_generate(None, tokenizer, "the cat")) == " sat on"


@settings(max_examples=200, deadline=None, derandomize=True)
@example([259, 35])  # a last byte that is a space
@given(st.lists(st.integers(0, 329) | st.sampled_from([1, 2, 0xF0 + 3, 0x9F + 3, 0x91 + 3, 0xA9 + 3]), max_size=20))
def test_detokenizer_accepts_any_token_ids(ids):
    stream = StreamingDetokenizer(SENTENCEPIECE)
    assert "".join(map(stream.add_token, ids)) + stream.finalize() == SENTENCEPIECE.decode(ids)
    before = SENTENCEPIECE.encode("a cat 👩")
    stream = StreamingDetokenizer(SENTENCEPIECE, before)
    streamed = "".join(map(stream.add_token, [*ids, *SENTENCEPIECE.encode("end")])) + stream.finalize()
    assert streamed.endswith(" end")


def test_end_of_text_token_is_saved_with_the_tokenizer(tmp_path):
    tokenizer = Tokenizer(smollm2_tokenizer(), "here", "<|im_end|>")
    assert tokenizer.eot == 2 and Tokenizer(smollm2_tokenizer()).eot == 0
    assert tokenizer.sha256 != Tokenizer(smollm2_tokenizer()).sha256  # prepared texts use another end-of-text token
    for folder in ("a", "b"):  # of a run, then of a run initialized from it
        (tmp_path / folder).mkdir()
        tokenizer.save(tmp_path / folder / "tokenizer.json")
        tokenizer = Tokenizer.load(tmp_path / folder / "tokenizer.json")
        assert tokenizer.eot == 2
    config = tmp_path / "a/tokenizer_config.json"
    config.write_text('{"eos_token": {"content": "<|im_start|>", "special": true}}')
    assert Tokenizer.load(tmp_path / "a").eot == 1
    for wrong, message in (
        ('{"eos_token": "<stop>"}', "eos_token = '<stop>': not in"),
        ('{"eos_token": 2}', "eos_token = 2: not in"),
        ("[]", "not a tokenizer_config"),
    ):
        config.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            Tokenizer.load(tmp_path / "a")


@pytest.mark.parametrize("flags", [flags for flags, _ in MODELS.values()], ids=MODELS)
def test_export_and_import_round_trip(flags, tmp_path):
    config = dataclasses.replace(TINY, vocab_size=0, context=256, **flags)
    run = made(tmp_path / "run", config)
    export(run, tmp_path / "out")
    import_checkpoint(str(tmp_path / "out"), tmp_path / "back")
    (ours, one), (again, two) = load_run(run), load_run(tmp_path / "back")
    assert ours.config == again.config and one.sha256 == two.sha256
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, atol=1e-6 if ours.config.gate else 0, rtol=0)


def test_training_starts_from_the_imported_checkpoint_and_the_card_names_it(tmp_path):
    import_checkpoint(str(saved("SmolLM2", tmp_path / "hub")), tmp_path / "run", context=64)
    ours, _ = load_run(tmp_path / "run")
    assert ours.config.context == 64
    export(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert f"| initialized from | {tmp_path / 'hub'}, whose licence applies as well |" in card
    assert "trained on" not in card


def test_hub_name_is_found_in_the_hub_cache(tmp_path):
    folder = tmp_path / "home/hub/models--somebody--small"
    saved("Qwen3", folder / "snapshots/abc")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    words = ("from-hf", "somebody/small", str(tmp_path / "run"), "--context", "128")
    done = command("convert", *words, where=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert "of somebody/small, context 128, end of text '<|im_end|>'" in done.stdout
    ours, _ = load_run(tmp_path / "run")
    assert ours.config.context == 128


def test_invalid_folder_raises_and_leaves_no_run(tmp_path):
    run = made(tmp_path / "run", dataclasses.replace(TINY, vocab_size=0))
    export(run, folder := tmp_path / "hub")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights, words = load_file(folder / "model.safetensors"), json.loads(files["config.json"])
    some = next(iter(weights))

    def check_refused(message: str, name: str = "run2", context: int | None = None) -> None:
        with pytest.raises(ValueError) as error:
            import_checkpoint(str(folder), tmp_path / name, context)
        assert message in str(error.value) and "\n" not in str(error.value)
        assert not (tmp_path / "run2").exists()
        for path in folder.iterdir():
            path.unlink()
        for file, content in files.items():
            (folder / file).write_bytes(content)

    check_refused("run: not empty; name a new folder", name="run")
    check_refused("name = 'a b': must be a folder name", name="a b")
    check_refused("--context 33: must be from 1 to 32", context=33)
    (folder / "config.json").unlink()
    check_refused("config.json: no such file")
    (folder / "config.json").write_text("{")
    check_refused("config.json: not JSON")
    (folder / "config.json").write_text(json.dumps(words | {"eos_token_id": 999}))
    check_refused("eos_token_id = 999: not in the vocabulary")
    (folder / "config.json").write_text(json.dumps(words | {"vocab_size": 299}))
    check_refused("tokenizer.json has 300 tokens, but config.json's vocab_size is 299")
    (folder / "config.json").write_text(json.dumps(words | {"intermediate_size": 64}))
    check_refused("config.json gives (32, 64)")
    (folder / "tokenizer.json").unlink()
    check_refused("tokenizer.json': no such file")
    (folder / "model.safetensors").unlink()
    check_refused("has no model.safetensors and no index file")
    (folder / "model.safetensors").write_bytes(b"not weights")
    check_refused("model.safetensors: cannot be read")
    save_file({k: v for k, v in weights.items() if k != some}, folder / "model.safetensors")
    check_refused(f"{some} is missing from the weight files")
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    save_file(weights | bias, folder / "model.safetensors")
    check_refused("q_proj.bias has shape (64,): heed has no such weight")
    # tensors that the model does not need are ignored
    angles = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8), "lm_head.weight": weights[some].clone()}
    save_file(weights | angles, folder / "model.safetensors")
    import_checkpoint(str(folder), tmp_path / "good")


def test_convert_does_not_import_transformers():
    code = "import sys, convert.to_hf, convert.from_hf; assert 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
