"""Checkpoints of earlier formats load; damaged files and files of other versions are one line."""

import json
import os
import shutil
import stat

import pytest
import torch

from model import GPT
from sample import load
from tests.conftest import ROOT, TINY, losses, train_here
from training import checkpoint
from training.checkpoint import CheckpointError
from training.config import OptimConfig
from training.optimizers import build_optimizers

FORMAT_1 = ROOT / "tests" / "training" / "format_1"  # a run of the last commit before state.json had a version
FLAGS = (
    "--data.tokenizer=byte", "--data.val_fraction=0.2", "--model.n_layer=1", "--model.n_embd=8", "--model.n_head=1",
    "--model.n_kv_head=1", "--model.head_dim=8", "--model.n_ffn=16", "--model.context=16", "--train.batch_tokens=64",
    "--train.micro_batch_size=4", "--train.compile=off", "--train.num_evals=1", "--train.device=cpu", "--train.prompt=",
)  # fmt: skip


@pytest.fixture
def old(tmp_path):
    """A copy of the run in format 1."""
    return shutil.copytree(FORMAT_1, tmp_path / "format_1")


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of step 1 without optimizers."""
    return checkpoint.save(tmp_path / "run", 1, GPT(TINY), [], {"config": {"model": vars(TINY)}})


def change(folder, **values):
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_format_1_generates_and_resumes(old):
    model, tokenizer = load(old)
    assert model.config.n_embd == 8 and tokenizer.kind == "byte"
    assert "format_version" not in json.loads((old / "step-000012" / "state.json").read_text())
    source = f"--data.source={old / 'songs.txt'}"
    with pytest.raises(CheckpointError, match=r"model.positions was 'rope', is 'none'"):  # a newer field
        train_here(old.parent, "shakespeare", "--name=format_1", source, *FLAGS, "--model.positions=none", "--resume")
    train_here(old.parent, "shakespeare", "--name=format_1", source, *FLAGS, "--train.steps=14", "--resume")
    assert list(losses(old)) == list(range(1, 15))
    state = checkpoint.read_state(checkpoint.find(old, "latest"))
    assert (state["step"], state["format_version"]) == (14, checkpoint.FORMAT_VERSION)


def test_states_by_number_are_those_by_name(tmp_path):
    """optimizer.pt of format 2: a list of torch's state_dict() of each optimizer."""
    model = GPT(TINY)
    optimizers = build_optimizers(model, OptimConfig(), torch.float32)
    for p in list(model.parameters())[1:]:  # one parameter has no state
        p.grad = torch.randn_like(p)
    for optimizer in optimizers:
        optimizer.step()
    folder = checkpoint.save(tmp_path, 1, model, optimizers, {})
    others = build_optimizers(model, OptimConfig(), torch.float32)
    for _ in ("format 3", "format 2"):
        checkpoint.load_optimizers(folder, others)
        for optimizer, other in zip(optimizers, others, strict=True):
            assert optimizer.state.keys() == other.state.keys()
            for p, state in optimizer.state.items():
                assert all(torch.equal(value, other.state[p][key]) for key, value in state.items())
            other.state.clear()
        torch.save([optimizer.state_dict() for optimizer in optimizers], folder / "optimizer.pt")


@pytest.mark.parametrize("version", [0, checkpoint.FORMAT_VERSION + 1, "2", None, []])
def test_another_version_is_one_line(folder, version):
    change(folder, format_version=version)
    with pytest.raises(
        CheckpointError, match=r"state.json: format_version = .*: this heed reads 1 to 3; use a"
    ) as told:
        checkpoint.read_state(folder)
    assert ("newer heed" in str(told.value)) == (version == checkpoint.FORMAT_VERSION + 1)


@pytest.mark.parametrize("field", ["rotation", "n_head"])
def test_a_model_that_this_heed_does_not_have_is_one_line(folder, field):
    change(folder, config={"model": vars(TINY) | {field: 3}})
    with pytest.raises(CheckpointError, match=rf"state.json: config.model does not fit this heed: .*{field}"):
        checkpoint.model_config(folder, checkpoint.read_state(folder))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"7", b"null", b'"x"', b"{}", b'{"sha256": 3}', b"[" * 100_000]
)
def test_a_damaged_state_is_one_line(folder, content):
    (folder / "state.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged checkpoint") as told:
        checkpoint.read_state(folder)
    assert "\n" not in str(told.value) and len(str(told.value)) < 500


def test_a_step_that_is_no_number_is_damage(folder):
    change(folder, step="7")
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        checkpoint.read_state(folder)


@pytest.fixture(params=[0o000, 0o022, 0o027])
def mode(request):
    """The mode of files under an umask."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder):
    return {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_files_have_the_mode_that_the_umask_gives(mode, request):
    assert modes(request.getfixturevalue("folder")) == {mode}


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_an_export_has_the_mode_that_the_umask_gives(runs, mode, tmp_path):
    from convert.to_hf import export

    export(runs / "songs", tmp_path / "exported")
    assert modes(tmp_path / "exported") == {mode}


def test_states_of_another_shape_are_one_line(tmp_path):
    """torch would read beyond them."""
    model = GPT(TINY)
    optimizers = build_optimizers(model, OptimConfig(), torch.float32)
    folder = checkpoint.save(tmp_path, 1, model, optimizers, {})
    states = {name: {"momentum": torch.zeros(2, 2)} for name, _ in model.named_parameters()}
    torch.save(states, folder / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"momentum of model.embed_tokens.weight is \(2, 2\), not \(97, 32\)"):
        checkpoint.load_optimizers(folder, optimizers)


def test_another_number_of_optimizers_is_one_line(folder):
    with pytest.raises(CheckpointError, match=r"optimizer.pt: does not fit the optimizers of this run"):
        checkpoint.load_optimizers(folder, [torch.optim.AdamW(GPT(TINY).parameters())])
