"""train.py as a command: list of recipes, --help, and errors."""

import re
import sys

import pytest
import torch

import train
from training.config_files import load


def test_no_arguments_list_the_recipes(capsys):
    assert train.parse_args([]) is None
    output = capsys.readouterr().out
    for name in ("shakespeare", "shakespeare-char", "shakespeare-char-laptop", "tinystories", "gpt2-124m"):
        assert re.search(rf"^  {name} +\S.{{20}}", output, re.M)


def test_help_documents_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as left:
        train.parse_args(["shakespeare", "--help"])
    assert left.value.code == 0
    output = " ".join(capsys.readouterr().out.split()).replace("grouped- query", "grouped-query")
    assert "--model.n_kv_head INT key/value heads per layer; fewer than n_head is grouped-query attention" in output
    assert f"default: {load('shakespeare').model.n_embd}" in output
    assert output.count("default:") > 45


def test_print_config(capsys):
    assert train.parse_args(["shakespeare", "--model.n_layer", "8", "--print-config"]) is None
    assert "n_layer = 8\n" in capsys.readouterr().out


ALONE = ("shakespear", "--model.n_layer")  # a flag that follows would hide the mistake


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shakespear"], "shakespeare-quick, tinystories; did you mean shakespeare?"),
        (["shakespeare", "--model.n_layr", "3"], "--model.n_layr: no such option; did you mean --model.n_layer?"),
        (["shakespeare", "--train.steps"], "argument --train.steps: expected one argument"),
        (["shakespeare", "--model.n_layer", "six"], "model.n_layer = 'six': must be a whole number"),
        (["shakespeare", "--data.source", "no.txt"], "data.source = 'no.txt': no such file"),
        (["shakespeare", "--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["shakespeare", "--name", "nothing", "--resume"], "nothing: no such run"),
        (["shakespeare", "--model.vocab_size", "50"], "model.vocab_size = 50: must be at least the tokenizer's"),
        (
            ["shakespeare", "--train.micro_batch_size", "3"],
            "are not divisible into 1 devices x micro-batches of 3 sequences",
        ),
        (["--resume"], "the recipe comes first: python train.py CONFIG [options]"),
        (["--model.n_layer", "8", "shakespeare"], "the recipe comes first: python train.py CONFIG [options]"),
        (["shakespeare", "--optim.lr", "-1e-3"], "optim.lr = -0.001: must be above 0"),
        (["shakespeare", "--model.n_layer"], "argument --model.n_layer: expected one argument"),
        (["shakespeare", "--lr", "3"], "--lr: no such option; did you mean --optim.lr?"),
        (["shakespeare", "--n_layers", "3"], "--n_layers: no such option; did you mean --model.n_layer?"),
        (["shakespeare", "--batch_size=3"], "--batch_size: no such option; did you mean --train.batch_tokens?"),
        (["shakespeare", "--train.max_iters", "3"], "no such option; did you mean --train.steps?"),
        (["shakespeare", "--resum"], "--resum: no such option; did you mean --resume?"),
        (["shakespeare", "--train.evals", "3"], "--train.evals: renamed to --train.num_evals"),
        (["shakespeare", "--optim.decay=0.5"], "--optim.decay: renamed to --optim.lr_decay_frac"),
        (["shakespeare", "--train.device", "cuda"], "train.device = 'cuda': not available on this machine"),
    ],
)
def test_errors_are_one_line_and_leave_no_run(text, tmp_path, words, message, monkeypatch, capsys):
    monkeypatch.setattr(train, "RUNS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    source = [] if "--data.source" in words or words[-1] in ALONE else ["--data.source", str(text)]
    monkeypatch.setattr(sys, "argv", ["train.py", *words, *source])
    with pytest.raises(SystemExit) as left:
        train.main()
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
