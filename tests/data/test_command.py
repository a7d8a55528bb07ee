"""`python -m data prepare`: what train.py then finds, progress, interruption, one line for each mistake."""

import errno
import re
import subprocess
import sys

import pytest

import data.__main__ as command
import data.prepare as module
from data import draft, encoding, shards
from tests.conftest import ROOT, SMALL, USER_ENV, train_here
from tests.data.test_prepare import story, write


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, of this process."""
    monkeypatch.setitem(module.prepare.__kwdefaults__, "cache", tmp_path / "cache")
    return tmp_path / "cache"


DATA = ("--data.vocab_size=300", "--data.val_fraction=0.2")


def test_training_finds_what_was_prepared(text, tmp_path, cache, capsys, monkeypatch):
    assert command.main(["prepare", "shakespeare", f"--data.source={text}", *DATA]) == 0
    said = capsys.readouterr().out.splitlines()
    (folder,) = (cache / "tokens").iterdir()
    assert re.fullmatch(rf"{text}: [\d,]+ train tokens and [\d,]+ val tokens are in {folder}", said[-1])
    assert len(said) == 4 and said[1].startswith("tokenizer: bpe, 300 entries")
    monkeypatch.setattr(module, "write", None)  # would fail
    train_here(tmp_path, "shakespeare", *SMALL, f"--data.source={text}", "--train.steps=1", "--train.num_evals=1")
    capsys.readouterr()
    assert command.main(["prepare", "shakespeare", f"--data.source={text}", *DATA]) == 0
    assert capsys.readouterr().out.splitlines() == said[-1:]
    (folder / "train-00000.bin").write_bytes(bytes((folder / "train-00000.bin").stat().st_size))
    assert command.main(["prepare", "shakespeare", f"--data.source={text}", *DATA]) == 2
    assert "train-00000.bin: is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_one_progress_line(tmp_path, cache, capsys, monkeypatch, terminal):
    """With a simulated clock: a minute for each batch. On a terminal each line replaces the one before."""
    source = write(tmp_path / "a.txt", [story(i) for i in range(100)])
    clock = iter(range(0, 10**6, 60))
    monkeypatch.setattr(module, "BATCH", 3000)
    monkeypatch.setattr(encoding, "SMALL", 10**6)
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert command.main(["prepare", "shakespeare", f"--data.source={source}", "--data.tokenizer=byte"]) == 0
    said = capsys.readouterr().out
    progress = [line for line in re.split(r"[\r\n]", said) if "MB/s" in line]
    assert len(progress) > 5 and progress[0].endswith("tokens of " + str(source) + ": 0 of 0 MB, 0.0 MB/s")
    assert all(line.startswith("\x1b[K") == terminal for line in progress)
    assert said.count("\n") == 4 + (0 if terminal else len(progress))


ENDS = """
import os, signal, sys
import data.__main__ as command
import data.prepare as module
from data import encoding
module.BATCH, module.SAVE_EVERY, encoding.SMALL = 3000, 1, 1
save = module.save_progress
def stop(folder, progress):
    save(folder, progress)
    if "pieces" in progress:
        os.killpg(0, signal.SIGINT) if sys.argv.pop() == "ctrl-c" else os.kill(os.getpid(), signal.SIGKILL)
module.save_progress = stop
sys.exit(command.main(["prepare", "shakespeare", "--data.source", sys.argv[1], "--data.tokenizer=byte"]))
"""


@pytest.mark.parametrize(("how", "status"), [("ctrl-c", 130), ("kill", -9)])
def test_ctrl_c_and_a_kill_end_the_workers_too(tmp_path, how, status):
    """The pipe of stderr, which the workers have, too, is closed only when all have ended."""
    source = write(tmp_path / "a.txt", [story(i) for i in range(1000)])
    child = subprocess.Popen(
        [sys.executable, "-c", ENDS, str(source), how], cwd=ROOT, env=USER_ENV | {"HEED_CACHE": str(tmp_path)},
        text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    said = child.communicate(timeout=60)[1]
    assert child.returncode == status
    assert said == ("\ndata: stopped; the same command continues\n" if how == "ctrl-c" else "")
    (left,) = (tmp_path / "tokens").iterdir()
    assert draft.load_progress(left)["pieces"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: command"),
        ("prepare", "the following arguments are required: RECIPE"),
        ("prepaer shakespeare", "argument command: invalid choice: 'prepaer'"),
        ("prepare shakespear", "shakespear: no such recipe, only"),
        ("prepare nowhere.toml", "nowhere.toml: no such file"),
        ("prepare shakespeare more", "more: no such option; see --help"),
        ("prepare shakespeare --data.sorce x", "--data.sorce: no such option; did you mean --data.source?"),
        ("prepare shakespeare --train.steps 3", "--train.steps: no such option; see --help"),
        ("prepare shakespeare --data.limit=-1", "--data.limit: data.limit = -1: must be at least 0"),
        ("prepare shakespeare --data.limit=x", "--data.limit: data.limit = 'x': must be a whole number"),
        ("prepare shakespeare --processes 0", "--processes 0: must be at least 1"),
        ("prepare shakespeare --processes x", "argument --processes: invalid int value: 'x'"),
        ("prepare shakespeare --data.source nowhere", "data.source = 'nowhere': no such file"),
        ("prepare shakespeare --data.source README.md --data.tokenizer x.json", "data.tokenizer = 'x.json': no such"),
        ("prepare chat --data.source README.md", "data.source = 'README.md': with data.format = 'chat' it must be a"),
    ],
)
def test_a_mistake_is_one_line(words, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as left:
        sys.exit(command.main(words.split()))
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"data: {message}") and said.count("\n") == 1


def test_a_full_disk_or_a_file_that_cannot_be_written_is_one_line(text, cache, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.Writer, "add", full)
    assert command.main(["prepare", "shakespeare", f"--data.source={text}", *DATA]) == 2
    assert re.fullmatch(r"data: the disk of .* is full; free some space, .*\n", capsys.readouterr().err)
    cache.joinpath("tokens").rmdir()
    cache.joinpath("tokens").write_text("a file")
    assert command.main(["prepare", "shakespeare", f"--data.source={text}", *DATA]) == 2
    assert capsys.readouterr().err == f"data: {cache}/tokens: File exists\n"
