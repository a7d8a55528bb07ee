"""data.document_mask: packed documents are as if each was alone, in training, validation and evaluation."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

import evals.__main__
import kernels
import model as model_module
import train
from data.mixture import open_shards
from data.prepare import prepare
from data.tokenizer import Tokenizer
from model import GPT
from sample import load
from tests.conftest import TINY, losses, randomized, weights
from tests.training.test_apply_fused_layers import fused, relative_errors
from training.checkpoint import CheckpointError
from training.config import Config, ConfigError, DataConfig, TrainConfig
from training.distributed import World
from training.validation_loss import validate

EOT, LENGTHS = 0, (5, 1, 130, 64, 70, 30)  # of documents; the first one began before the sequence
CONFIG = dataclasses.replace(TINY, context=300)
PATTERNS = {"full": {}, "window": {"layer_pattern": "SL", "window": 20}, "gate": {"gate": True, "n_kv_head": 1}}


def documents(lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    """Documents (1, T), each after an end-of-text token, but the first one."""
    g = torch.Generator().manual_seed(0)
    drawn = [torch.randint(1, 97, (1, T), generator=g) for T in lengths]
    for document in drawn[1:]:
        document[0, 0] = EOT
    return drawn


def fp64(model: GPT) -> GPT:
    """The model in fp64. RoPE is relative only as far as its tables are exact."""
    model = copy.deepcopy(model).double()
    angles = torch.outer(torch.arange(300), 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16))
    model.model.cos, model.model.sin = angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), 1)
    return model


def gradients(model: GPT, sequences: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The summed loss over sequences, and its gradients. A target is a function of its token, wherever that is."""
    logits = torch.cat([model(tokens)[0] for tokens in sequences])  # GPT.loss has no fp64
    loss = F.cross_entropy(logits, torch.cat(sequences, 1)[0] * 31 % 97, reduction="sum")
    found = torch.autograd.grad(loss, list(model.parameters()))
    return {"loss": loss.detach()} | {name: g for (name, _), g in zip(model.named_parameters(), found, strict=True)}


@functools.cache
def alone(pattern: str, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return gradients(fp64(randomized(dataclasses.replace(CONFIG, **PATTERNS[pattern]))), documents(lengths))


def masked(model: GPT) -> GPT:
    model.model.document_start = EOT
    return model


def recomputed(model: GPT) -> GPT:
    model.train().model.activation_checkpointing = True
    return model


def through(backend: str, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "preferred", lambda device: (backend, ""))
    monkeypatch.setattr(kernels, "faster_backend", lambda *_: "flash")


WAYS = {  # the model, the backend that is preferred, and the largest error
    "fp64": (fp64, "blocks", 1e-12),
    "fp64, sdpa": (fp64, "sdpa", 1e-12),
    "fp64, recomputed": (lambda model: recomputed(fp64(model)), "blocks", 1e-12),
    "fp32, C++ attention": (lambda model: model, "cpp", 1e-4),
    "fp32, fused layers": (fused, "cpp", 1e-4),
    "fp32, Triton": (lambda model: model, "flash", 1e-4),  # interpreted: with fewer tokens
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("way", WAYS)
def test_packed_documents_are_as_each_alone(way, pattern, monkeypatch):
    change, backend, bound = WAYS[way]
    lengths = (5, 1, 20) if backend == "flash" else LENGTHS
    packed, expected = [torch.cat(documents(lengths), 1)], alone(pattern, lengths)
    through(backend, monkeypatch)
    model = masked(change(randomized(dataclasses.replace(CONFIG, **PATTERNS[pattern]))))
    assert max(relative_errors(gradients(model, packed), expected).values()) < bound
    model.model.document_start = None
    assert abs(gradients(model, packed)["loss"] / expected["loss"] - 1) > 1e-4


@torch.no_grad()
def test_logits_of_a_batch_without_gradients():
    """Sequences with other documents each; the end-of-text token sees itself alone."""
    plain = fp64(randomized(CONFIG))
    model = masked(copy.deepcopy(plain))
    first, *others = documents()
    orders = [[first, *others], [first, *others[::-1]]]
    rows = torch.cat([torch.cat(order, 1) for order in orders])
    for row, order in zip(model(rows), orders, strict=True):
        expected = torch.cat([plain(part)[0] for part in order])
        torch.testing.assert_close(row, expected, atol=1e-11, rtol=0)


def test_off_is_not_one_operation(monkeypatch):
    asked = []
    real = model_module.attention
    monkeypatch.setattr(
        model_module, "attention", lambda *a, **k: (asked.append(k.get("document_ids")), real(*a, **k))[1]
    )
    monkeypatch.setattr(model_module, "document_bounds", lambda ids: asked.append(ids))
    GPT(TINY)(torch.zeros(1, 8, dtype=torch.long))
    assert asked == [None] * TINY.n_layer
    assert DataConfig().document_mask is False


@pytest.mark.parametrize("letter", "ABCDKMPQRTW")
def test_what_carries_a_state_across_documents_is_refused(letter):
    free = {"attention_dropout": 0.0, "n_kv_head": 4}
    try:
        model = dataclasses.replace(TINY, layer_pattern=f"L{letter}", **free)
    except ValueError:  # a letter that needs another field
        model = dataclasses.replace(TINY, layer_pattern=f"L{letter}", **free, positions="none")
    why = rf"data.document_mask = true: {letter} in model.layer_pattern reads the documents before; only L and S"
    with pytest.raises(ValueError, match=why):
        Config("x", model=model, data=DataConfig(document_mask=True), train=TrainConfig(steps=1, batch_tokens=64))


MASK = ("--data.document_mask=true", "--train.steps=6", "--train.num_evals=2")


def test_a_run_its_validation_and_its_evaluation(run_training, capsys):
    run = run_training("masked", *MASK)
    assert "attention within documents (data.document_mask)" in capsys.readouterr().out
    model, tokenizer = load(run, "latest")
    config = train.load(str(run / "config.toml"))
    text = open_shards(prepare(**config.data.preparation), "val")
    model = model.double()
    total, T = 0.0, config.model.context
    tokens = torch.tensor([tokenizer.eot, *text.read(0, text.tokens)])
    for first in range(0, text.tokens, T):  # as validation cuts the text; here each piece of a document is alone
        x, y = tokens[first : first + T][: text.tokens - first], tokens[first + 1 : first + 1 + T]
        starts = [0, *((x[1:] == tokenizer.eot).nonzero()[:, 0] + 1).tolist(), len(x)]
        for start, end in itertools.pairwise(starts):
            with torch.no_grad():
                total += float(F.cross_entropy(model(x[None, start:end])[0], y[start:end], reduction="sum"))
    expected = total / text.tokens
    recorded = losses(run, "val_loss")[6]
    assert math.isclose(recorded, expected, rel_tol=2e-6)
    assert evals.__main__.main([str(run), "--checkpoint", "latest"]) == 0
    printed = capsys.readouterr().out
    assert "attention within documents (data.document_mask)" in printed
    assert f"{expected:.4f}" in printed
    model.model.document_start = None
    across = validate(model.float(), text, config, World(), StandIn(), tokenizer.eot)
    assert abs(across / expected - 1) > 1e-5


class StandIn:
    """A machine that computes as the model is."""

    device = torch.device("cpu")

    def autocast(self):
        return contextlib.nullcontext()


def test_resume_is_bitwise_equal_and_refuses_another_mask(run_training):
    whole = run_training("whole", *MASK, "--train.compile=auto")
    half = run_training("half", *MASK, "--train.compile=auto")
    (half / "latest").write_text("step-000003\n")
    run_training("half", *MASK, "--train.compile=auto", "--resume")
    assert weights(half) == weights(whole)
    with pytest.raises(CheckpointError, match=r"cannot be resumed: data.document_mask was True, is False"):
        run_training("half", "--data.document_mask=false", "--train.compile=auto", "--resume")
    plain = run_training("plain", *MASK[1:], "--train.compile=auto")
    assert weights(plain) != weights(whole)


@pytest.mark.parametrize("end", ["<|im_end|>", "</s>"])
def test_a_chat_needs_an_end_of_text_token_of_its_own(end, run_training, chat_runs, tmp_path):
    """A tokenizer of another tool that has no other end than that of a turn: every turn would be a document."""
    content = json.loads(Tokenizer.train("byte", []).inner.to_str())
    content["model"]["vocab"][end] = content["model"]["vocab"].pop("<|endoftext|>")
    content["added_tokens"][0]["content"] = end
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    words = ["--train.steps=1", "--train.num_evals=1", f"--data.tokenizer={tmp_path / 'tokenizer.json'}"]
    run_training("text", *words, "--data.document_mask=true")  # texts have no turns
    words += ["--data.format=chat", f"--data.source={chat_runs / 'chat.jsonl'}", "--model.context=128"]
    run_training("chat", *words)
    if end == "</s>":
        run_training("masked", *words, "--data.document_mask=true")
        return
    with pytest.raises(ConfigError) as error:
        run_training("masked", *words, "--data.document_mask=true")
    assert str(error.value) == (
        "data.document_mask = true: each turn of a chat would be a document, since <|im_end|> is this tokenizer's "
        "end-of-text token, too; must be false with it"
    )


def test_a_mistake_names_the_field(run_training):
    with pytest.raises(ConfigError, match=r"data.document_mask = 1: must be true or false"):
        run_training("wrong", "--data.document_mask=1")


# Do the tests have teeth? --------------------------------------------------------------------------------------------

MUTANTS = {
    "a document begins after its end-of-text token": lambda ids: kernels.document_bounds(F.pad(ids, (1, 0))[:, :-1]),
    "one document": lambda ids: kernels.document_bounds(ids * 0),
    "the documents of the first sequence": lambda ids: kernels.document_bounds(ids[:1].expand_as(ids)),
    "a document has one token": lambda ids: kernels.document_bounds(torch.arange(ids.shape[1]).expand_as(ids)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name, monkeypatch):
    monkeypatch.setattr(model_module, "document_bounds", MUTANTS[name])
    with pytest.raises(AssertionError):
        test_logits_of_a_batch_without_gradients()
