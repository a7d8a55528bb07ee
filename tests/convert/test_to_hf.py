"""`convert to-hf` against transformers itself: logits, generated text, tokenizer, chat template and model card."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from convert import to_hf
from convert.__main__ import main as convert
from convert.from_hf import import_checkpoint
from convert.to_hf import export
from data import chat_format
from data.tokenizer import EOT, Tokenizer
from model import ModelConfig
from sample import SamplingParams, generate
from sample import load as load_run
from tests.conftest import ROOT, TINY, command, randomized
from training import checkpoint
from training.config import Config, TrainConfig
from training.config_files import dump, load

TEXTS = ["the cat sat on the mat, the other cat sat on the hat. " * 20, "It's 1,234 days — café, 日本語, 👩‍👩‍👧!\n\n"]
HARD = [
    "", " ", "the cat", f"a{EOT}b </s><s><unk> <|im_start|>user<|im_end|>", "👩‍👩‍👧 🇫🇷", "日本語 中文 한국어",
    "e\u0301 é \u200d\ufeff", "a\r\nb\rc\n\n\n", "x" + " " * 40 + "y\t\t \n ", "1234567890 3.14",
    "\0\x7f\x85\u2028", "don't I'LL  we've", "naïve Ωμέγα שלום",
]  # fmt: skip
BPE = Tokenizer.train("bpe", TEXTS, 300)


def enlarge_blocks(model):
    """Enlarge the matrices of the blocks, so that generation does not repeat one token."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p *= 3 if p.ndim == 2 and ".layers." in name else 1
    return model


def made(run: Path, config: ModelConfig, tokenizer: Tokenizer = BPE) -> Path:
    """A run with random weights, in the format of train.py."""
    config = dataclasses.replace(config, vocab_size=config.vocab_size or tokenizer.vocab_size)
    whole = Config(run.name, model=config, train=TrainConfig(steps=7, batch_tokens=4 * config.context))
    run.mkdir(parents=True)
    (run / "config.toml").write_text(dump(whole))
    tokenizer.save(run / "tokenizer.json")
    (run / "metrics.jsonl").write_text('{"step": 7, "val_loss": 3.25, "val_bpb": 1.5}\n')
    checkpoint.save(run, 7, enlarge_blocks(randomized(config)), [], {"steps": 7, "config": dataclasses.asdict(whole)})
    return run


def theirs(folder: Path):
    """The model as loaded by transformers, without missing or unexpected tensors."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def same_logits(ours, model) -> None:
    tokens = torch.randint(0, ours.config.vocab_size, (2, min(48, ours.config.context)))
    with torch.no_grad():
        expected, got = model(tokens).logits, ours(tokens)
    bound = 1e-4 if "D" in ours.config.layer_pattern else 1e-5  # compared with fp64, both are off by that much
    torch.testing.assert_close(got, expected, atol=bound * expected.abs().max().item(), rtol=0)


def same_greedy_text(ours, model, prompt: list[int], tokens: int = 200) -> None:
    model.generation_config.eos_token_id = None
    generated = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=tokens, top_k=None, temperature=None
    )
    made = [int(t) for t in generate(ours, prompt, max_new_tokens=tokens, sampling=SamplingParams(greedy=True))]
    assert made == generated[0, len(prompt) :].tolist()
    assert len(set(made)) > 5  # not a single repeated token


YARN = {"yarn_factor": 4.0, "yarn_original_context": 64}
EXPERTS = {"n_expert": 5, "n_expert_active": 2}
WINDOW = {"n_layer": 3, "layer_pattern": "SSL", "window": 5}
MODELS = {
    "plain": ({}, "Qwen3ForCausalLM"),
    "untied, other constants": (
        {"tie_embeddings": False, "rope_theta": 5e5, "norm_eps": 1e-3, "n_embd": 36},
        "Qwen3ForCausalLM",
    ),
    "multi-head": ({"n_kv_head": 4}, "Qwen3ForCausalLM"),
    "multi-query": ({"n_kv_head": 1, "tie_embeddings": False}, "Qwen3ForCausalLM"),
    "window": (WINDOW, "Qwen3ForCausalLM"),
    "all window": ({"layer_pattern": "S", "window": 3}, "Qwen3ForCausalLM"),
    "yarn": (YARN | WINDOW, "Qwen3ForCausalLM"),
    "gate": ({"gate": True, "norm_eps": 1e-3}, "Qwen3NextForCausalLM"),
    "gate, yarn, untied": ({"gate": True, "n_kv_head": 1, "tie_embeddings": False} | YARN, "Qwen3NextForCausalLM"),
    "hybrid": ({"gate": True, "n_layer": 4, "layer_pattern": "DDDL", "tie_embeddings": False}, "Qwen3NextForCausalLM"),
    "hybrid, yarn": ({"gate": True, "layer_pattern": "LD", "norm_eps": 1e-3} | YARN, "Qwen3NextForCausalLM"),
    "experts": (EXPERTS, "Qwen3MoeForCausalLM"),
    "experts, untied, yarn": (
        {"n_expert": 4, "n_expert_active": 1, "tie_embeddings": False, "router_aux_loss_coef": 0.5} | YARN,
        "Qwen3MoeForCausalLM",
    ),
    "no qk-norm": ({"qk_norm": False, "tie_embeddings": False, "head_dim": 12}, "LlamaForCausalLM"),
    "no qk-norm, yarn": ({"qk_norm": False} | YARN, "LlamaForCausalLM"),
    "no qk-norm, odd width": ({"qk_norm": False, "n_head": 6, "n_kv_head": 3}, "MinistralForCausalLM"),
    "no qk-norm, window": ({"qk_norm": False} | WINDOW, "MinistralForCausalLM"),
}


@pytest.mark.parametrize(("flags", "name"), MODELS.values(), ids=MODELS)
def test_exported_model_has_the_same_logits_and_text(flags, name, tmp_path):
    run = made(tmp_path / "run", dataclasses.replace(TINY, vocab_size=0, context=256, **flags))
    assert name in export(run, tmp_path / "out")
    ours, _ = load_run(run)
    model = theirs(tmp_path / "out")
    assert type(model).__name__ == name
    same_logits(ours, model)
    same_greedy_text(ours, model, BPE.encode("the cat sat on"))


def test_heeds_kernels_package_is_imported():
    assert Path(importlib.util.find_spec("kernels").origin).is_relative_to(ROOT)


def test_bfloat16_export_rounds_the_weights(tmp_path):
    run = made(tmp_path / "run", TINY)
    export(run, tmp_path / "out", dtype="bfloat16")
    ours, _ = load_run(run)
    model = theirs(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    for name, weight in load_file(tmp_path / "out/model.safetensors").items():
        torch.testing.assert_close(weight, ours.get_parameter(name).bfloat16(), atol=0, rtol=0)
    tokens = torch.randint(0, 97, (2, 32))
    with torch.no_grad():
        expected = ours(tokens)
        assert (model(tokens).logits - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("kind", ["bpe", "byte", "char"])
def test_exported_tokenizer_agrees_on_difficult_texts(kind, tmp_path):
    tokenizer = Tokenizer.train(kind, TEXTS + HARD, 300)
    export(made(tmp_path / "run", dataclasses.replace(TINY, vocab_size=0), tokenizer), tmp_path / "out")
    fast = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert fast.eos_token == fast.bos_token == EOT and fast.eos_token_id == tokenizer.eot
    assert fast.model_max_length == TINY.context and len(fast) == tokenizer.vocab_size
    for text in HARD + TEXTS:
        ids = fast(text)["input_ids"]
        assert ids == tokenizer.encode(text) and tokenizer.eot not in ids
        assert fast.decode(ids) == text
    assert fast(f"a{EOT}b", split_special_tokens=False)["input_ids"][1] == tokenizer.eot
    assert fast.decode([tokenizer.eot, *tokenizer.encode("the cat")], skip_special_tokens=True) == "the cat"


def test_chat_template_and_end_tokens_agree(tmp_path):
    tokenizer = chat_format.add_special_tokens(Tokenizer.train("bpe", TEXTS, 300))
    export(made(tmp_path / "run", dataclasses.replace(TINY, vocab_size=0), tokenizer), tmp_path / "out")
    fast = AutoTokenizer.from_pretrained(tmp_path / "out")
    generated = fast.apply_chat_template(
        [{"role": "user", "content": "the cat?\n日本"}], add_generation_prompt=True, return_dict=False
    )
    assert generated == chat_format.render_prompt(tokenizer, [("user", "the cat?\n日本")], 10_000)
    assert set(theirs(tmp_path / "out").generation_config.eos_token_id) == tokenizer.end_tokens
    import_checkpoint(str(tmp_path / "out"), tmp_path / "back")
    _, again = load_run(tmp_path / "back")
    assert (again.end_tokens, again.eot, again.sha256) == (tokenizer.end_tokens, tokenizer.eot, tokenizer.sha256)


def test_model_card_and_generation_config(runs, tmp_path):
    done = command("convert", "to-hf", str(runs / "songs"), str(tmp_path / "out"), where=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'out'}: Qwen3ForCausalLM, ") and done.stdout.count("\n") == 1
    card = (tmp_path / "out/README.md").read_text()
    state = checkpoint.read_state(checkpoint.find(runs / "songs", "best"))
    record = next(
        r
        for r in map(json.loads, (runs / "songs/metrics.jsonl").read_text().splitlines())
        if r["step"] == state["step"] and "val_bpb" in r
    )
    assert f"{record['val_bpb']:.4f} bits per byte, {record['val_loss']:.4f} nats/token" in card
    assert f"{state['step']} steps of 256 tokens: {state['step'] * 256:,} tokens" in card
    assert "| licence of that text | see the source |" in card
    assert (runs / "songs/config.toml").read_text().strip() in card
    ours, tokenizer = load_run(runs / "songs")
    model = theirs(tmp_path / "out")
    assert f"| parameters | {model.num_parameters():,}, in float32 |" in card
    same_logits(ours, model)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eot
    assert model.generation_config.do_sample and model.generation_config.temperature == 0.8


def test_model_card_has_the_licence_of_a_public_text(tmp_path):
    export(made(tmp_path / "run", TINY, Tokenizer.train("byte", [])), tmp_path / "out")
    assert "| licence of that text | public domain |" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"gate": True, "layer_pattern": "SL", "window": 9}, r"model.gate with model.window = 9: no class"),
        (
            {"layer_pattern": "DL"},
            r"model.layer_pattern = 'DL': transformers has Gated DeltaNet \(D\) only beside gated",
        ),
        (
            {"layer_pattern": "D", "gate": True},
            r"model.layer_pattern = 'D': transformers generates only with a layer L",
        ),
        ({"layer_pattern": "LM"}, r"model.layer_pattern = 'LM': heed does not export M"),
        ({"gate": True, "qk_norm": False}, r"model.gate with model.qk_norm = False: no class"),
        ({"positions": "alibi"}, r"model.positions = 'alibi': heed exports RoPE alone"),
        ({"scale_scores": False}, r"model.scale_scores = False: no class"),
        (EXPERTS | {"gate": True}, r"model.n_expert = 5: heed does not export experts with model.gate = True"),
        (EXPERTS | {"qk_norm": False}, r"model.n_expert = 5: heed does not export experts with model.qk_norm = False"),
        (EXPERTS | {"layer_pattern": "S", "window": 4}, r"model.n_expert = 5: heed .* experts with model.window = 4"),
    ],
)
def test_unsupported_flags_raise_and_leave_no_folder(flags, message, tmp_path):
    run = made(tmp_path / "run", dataclasses.replace(TINY, **flags))
    with pytest.raises(ValueError, match=message):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_that_is_not_empty_is_unchanged(tmp_path):
    run = made(tmp_path / "run", TINY)
    before = sorted(run.iterdir())
    done = command("convert", "to-hf", str(run), str(run), where=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"convert: {run}: not empty; name a new folder\n"
    assert sorted(run.iterdir()) == before
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="not empty"):
        export(run, tmp_path / "file")


def test_missing_source_raises(tmp_path):
    with pytest.raises(ValueError, match=r"^./nowhere: neither a folder nor a model on the hub") as error:
        import_checkpoint("./nowhere", tmp_path / "run")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no such run"):
        export(tmp_path / "nowhere", tmp_path / "out")


def test_recipe_of_an_imported_run_loads(tmp_path):
    run = made(tmp_path / "run", dataclasses.replace(TINY, vocab_size=0))
    export(run, tmp_path / "out")
    import_checkpoint(str(tmp_path / "out"), tmp_path / "back")
    assert load(str(tmp_path / "back/config.toml")).model == load(str(run / "config.toml")).model


def test_a_full_disk_is_one_line(runs, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(to_hf, "save_file", full)
    assert convert(["to-hf", str(runs / "songs"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"convert: {tmp_path / 'out' / 'model.safetensors'}: cannot be written (") and (
        "No space left on device" in said and said.count("\n") == 1
    )
