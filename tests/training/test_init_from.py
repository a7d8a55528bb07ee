"""--init-from: a run initialized from another: weights, tokenizer, config, resume, errors."""

import dataclasses
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

import train
from data.tokenizer import Tokenizer
from model import GPT
from sample import load
from tests.conftest import SMALL, losses, weights
from training import checkpoint
from training.config import Config, ConfigError
from training.init_from import config_for_init

OWN = [word for word in SMALL if not word.startswith(("--model.", "--data.vocab_size"))]


@pytest.fixture
def tune(runs, text, tmp_path, monkeypatch):
    """tune(name, ...) fine-tunes the finished run `songs` in this process. Returns the new run's folder."""
    monkeypatch.setattr(train, "RUNS", tmp_path)

    def run(name: str, *words: str, origin: str = str(runs / "songs")):
        begin = [] if "--resume" in words else [f"--init-from={origin}"]
        flags = [f"--name={name}", f"--data.source={text}", "--model.context=32", *OWN, *begin, *words]
        train.train(*train.parse_args(["shakespeare", *flags]))
        return tmp_path / name

    return run


def test_first_step_uses_the_other_runs_weights_and_tokenizer(tune, runs, monkeypatch):
    seen, loss = [], GPT.loss

    def spying(self, *batch):
        seen.append({name: value.clone() for name, value in self.state_dict().items()})
        return loss(self, *batch)

    monkeypatch.setattr(GPT, "loss", spying)
    run = tune("further", "--train.steps=2", "--train.num_evals=1")
    best = load_file(checkpoint.find(runs / "songs", "best") / "model.safetensors")
    assert seen[0].keys() == best.keys()
    assert all(torch.equal(seen[0][name], value) for name, value in best.items())
    assert Tokenizer.load(run).sha256 == Tokenizer.load(runs / "songs").sha256
    state = checkpoint.read_state(checkpoint.find(run, "latest"))
    assert state["step"] == 2 and state["config"]["init_from"] == str(runs / "songs")
    assert f'init_from = "{runs / "songs"}"' in (run / "config.toml").read_text()
    assert losses(run)[1] < losses(runs / "songs")[1] - 1  # it starts from trained weights
    assert load(run)[0].config.n_embd == 32  # not the recipe's 128


def test_checkpoint_of_a_step_and_another_context(tune, runs):
    run = tune(
        "step", "--train.steps=1", "--train.num_evals=1", "--model.context=64", origin=f"{runs / 'songs'}@step-000015"
    )
    assert load(run)[0].config.context == 64
    with pytest.raises(checkpoint.CheckpointError, match=r"--init-from .*: no checkpoint 'step-000007'; there are"):
        tune("no", origin=f"{runs / 'songs'}@step-000007")


def test_resume_is_bitwise_equal_without_the_initial_run(tune, runs, tmp_path, monkeypatch):
    shutil.copytree(runs / "songs", tmp_path / "parent")
    words = ("--train.steps=8", "--train.num_evals=2", "--model.dropout=0.1")
    whole = tune("whole", *words, origin=str(tmp_path / "parent"))
    validate = train.validate
    monkeypatch.setattr(train, "validate", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        tune("killed", *words, origin=str(tmp_path / "parent"))
    monkeypatch.setattr(train, "validate", validate)
    shutil.rmtree(tmp_path / "parent")
    killed = tune("killed", *words, "--resume")
    assert losses(killed) == losses(whole) and len(losses(killed)) == 8
    assert weights(killed) == weights(whole)
    with pytest.raises(checkpoint.CheckpointError, match=r"cannot resume from elsewhere: it started from .*parent"):
        tune("killed", *words, "--resume", "--init-from=elsewhere")


def test_new_rows_of_a_larger_vocabulary_are_the_mean_of_the_old_rows(runs):
    model, _ = load(runs / "songs")
    for tied in (True, False):
        config = type(model.config)(**{**vars(model.config), "tie_embeddings": tied})
        checkpoint.save(folder := runs / f"tied-{tied}", 1, small := GPT(config), [], {})
        grown = GPT(type(config)(**{**vars(config), "vocab_size": 303}))
        checkpoint.load_weights(checkpoint.find(folder, "best"), grown, grow=True)
        for old, new in (
            (small.model.embed_tokens.weight, grown.model.embed_tokens.weight),
            (small.head_weight, grown.head_weight),
        ):
            assert torch.equal(new[:300], old)
            torch.testing.assert_close(new[300:], old.mean(0).expand(3, -1))
        with pytest.raises(checkpoint.CheckpointError, match="does not fit this model"):
            checkpoint.load_weights(checkpoint.find(folder, "best"), grown)
        shutil.rmtree(folder)


def test_learned_positions_keep_their_context(runs):
    shape = dataclasses.replace(load(runs / "songs")[0].config, positions="learned")
    checkpoint.save(runs / "learned", 1, GPT(shape), [], {"config": {"model": vars(shape)}})
    begin = Config("new", init_from=f"{runs / 'learned'}@latest", model=dataclasses.replace(shape, context=64))
    with pytest.raises(ConfigError, match=r"^model.context = 64: .* has learned positions, of a context of 32$"):
        config_for_init(begin, runs / "new", {})
    begin = dataclasses.replace(begin, model=dataclasses.replace(shape, dropout=0.5, attention_dropout=0.5))
    assert config_for_init(begin, runs / "new", {}).model == begin.model
    shutil.rmtree(runs / "learned")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--init-from", "runs/nothing"], "--init-from runs/nothing: runs/nothing: no such run"),
        (
            ["--init-from", "SONGS", "--model.n_layer", "3"],
            "--model.n_layer 3: SONGS has 2; only model.context, model.dropout, model.attention_dropout may differ",
        ),
        (["--init-from", "SONGS", "--data.tokenizer", "char"], "--data.tokenizer char: SONGS has "),
        (
            ["--init-from", "SONGS", "--name", "songs"],
            "--init-from SONGS: is the run itself",
        ),
    ],
)
def test_errors_are_one_line(runs, words, message, monkeypatch, capsys):
    monkeypatch.setattr(train, "RUNS", runs)
    songs = str(runs / "songs")
    monkeypatch.setattr(sys, "argv", ["train.py", "shakespeare", *(word.replace("SONGS", songs) for word in words)])
    with pytest.raises(SystemExit) as left:
        train.main()
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert message.replace("SONGS", songs) in error and error.count("\n") == 1
