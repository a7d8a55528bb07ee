"""A preparation that is killed and continued leaves the same shards, byte for byte, as an undisturbed one."""

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import data.prepare as module
from data import draft, encoding, shards, sources
from data.chunking import Piece
from data.prepare import prepare
from data.sources import CorpusError
from data.tokenizer import Tokenizer, TokenizerError
from tests.conftest import ROOT, USER_ENV
from tests.data.test_chat_format import line
from tests.data.test_prepare import story, write
from tests.torture.damage import DAMAGES, content, damage


class Stop(BaseException):
    """Stands for SIGKILL: nothing handles it."""


def source(kind: str, folder: Path) -> tuple[str, dict[str, object]]:
    """A source and further arguments of prepare."""
    stories = [story(i) for i in range(100)]
    text = str(write(folder / "stories.txt", stories))
    (folder / "book.txt").write_text("\n\n".join(f"Paragraph {i}. {story(i).strip()}" for i in range(150)))
    if kind == "text":
        return text, {"val_source": str(folder / "book.txt"), "tokenizer": "bpe", "vocab_size": 300}
    if kind == "one document":  # in pieces: a save is within it
        return str(folder / "book.txt"), {}
    if kind == "chat":
        turns = ([("user", f"{i}?"), ("assistant", story(i).strip())] for i in range(100))
        (folder / "chat.jsonl").write_text("\n".join(line(*turn) for turn in turns))
        return str(folder / "chat.jsonl"), {"format": "chat"}
    (folder / "hub").mkdir()
    (folder / "hub" / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in stories))
    return f"hf:{folder / 'hub'}", {"limit": 90}


@pytest.fixture(params=["text", "one document", "chat", "hub"])
def make(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """make(cache) prepares a source in small batches, saved each, in several shards, encoded in this process."""
    monkeypatch.setattr(module, "BATCH", 3000)
    monkeypatch.setattr(module, "SAVE_EVERY", 1)
    monkeypatch.setattr(shards, "SHARD", 2500)
    monkeypatch.setattr(encoding, "SMALL", 10**6)
    name, options = source(request.param, tmp_path)
    how: dict[str, Any] = {"tokenizer": "byte", "val_fraction": 0.2, **options}
    return lambda cache: prepare(name, cache=tmp_path / cache, log=lambda _: None, **how)


def drafts(folder: Path) -> list[Path]:
    return list(folder.glob("tokens/.tmp-*"))


@pytest.mark.parametrize("more", [0, 1])
def test_stopped_at_every_save(make, tmp_path, monkeypatch, more):
    """Each call is stopped after a save, when `more` batches are written and not saved."""
    folder = make("whole")
    assert len(list(folder.iterdir())) >= 6  # several shards
    save, saved, since = module.save_progress, list[int](), list[int]()

    def stop(folder: Path, progress: dict[str, Any]) -> None:
        if "pieces" in progress:
            since.append(progress["pieces"])
            if len(since) > more:
                if not more:
                    save(folder, progress)
                shutil.copytree(folder, tmp_path / "image")  # what a kill leaves
                raise Stop
        save(folder, progress)

    monkeypatch.setattr(module, "save_progress", stop)
    for _ in range(100):
        try:
            assert make("stopped").name == folder.name
            break
        except Stop:
            saved.append(since[0])
            since.clear()
            (left,) = drafts(tmp_path / "stopped")
            shutil.rmtree(left)
            (tmp_path / "image").rename(left)
            assert list((tmp_path / "stopped" / "tokens").iterdir()) == [left]
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")
    assert len(saved) > 5 and all(a < b for a, b in itertools.pairwise(saved))  # each call continues


@pytest.mark.parametrize("make", ["one document"], indirect=True)
def test_a_damaged_draft_changes_nothing(make, tmp_path, monkeypatch):
    make("whole")
    save = module.save_progress
    with monkeypatch.context() as patch:

        def stop(folder: Path, progress: dict[str, Any]) -> None:
            save(folder, progress)
            if progress.get("pieces", 0) > 8:
                raise Stop

        patch.setattr(module, "save_progress", stop)
        with pytest.raises(Stop):
            make("draft")
    files = ("progress.json", "tokenizer.json", "train-00000.bin", "train-00001.bin", "val-00000.bin")
    assert set(files) <= set(content(drafts(tmp_path / "draft")[0]))
    for number, (file, how) in enumerate(itertools.product(files, DAMAGES)):
        if how != "unreadable" and number % 3 == 0:
            shutil.copytree(tmp_path / "draft", tmp_path / "damaged")
            damage(drafts(tmp_path / "damaged")[0] / file, how)
            make("damaged")
            assert content(tmp_path / "damaged") == content(tmp_path / "whole"), (file, how)
            shutil.rmtree(tmp_path / "damaged")
    other = Tokenizer.train("char", [story(1)])  # a good one, but not that of the draft
    other.save(drafts(tmp_path / "draft")[0] / "tokenizer.json")
    make("draft")
    assert content(tmp_path / "draft") == content(tmp_path / "whole")


def test_killed_at_function_calls(tmp_path):
    """Whole processes, with processes of their own that tokenize. The undisturbed one has other numbers of both."""
    text = write(tmp_path / "a.txt", [story(i) for i in range(1500)])
    prepare(str(text), vocab_size=400, val_fraction=0.2, cache=tmp_path / "whole", processes=1)

    def run(*kills: int) -> list[str]:
        words = [sys.executable, "-m", "tests.data.kills", str(text), str(tmp_path / "killed"), *map(str, kills)]
        done = subprocess.run(words, cwd=ROOT, env=USER_ENV, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout.splitlines()

    calls = int(re.findall(r"calls: (\d+)", run(0)[0])[0])
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    shutil.rmtree(tmp_path / "killed")
    number = random.Random(0)
    said = run(*(number.randrange(1, calls // 3) for _ in range(8)), 0)
    statuses = [line.split()[0] for line in said]
    assert statuses == ["-9"] * (len(said) - 1) + ["0"] and len(said) > 5
    assert "MB were finished before" in said[-1]
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_killed_worker_is_one_line_and_its_work_is_done_again(tmp_path, monkeypatch):
    text = write(tmp_path / "a.txt", [story(i) for i in range(300)])
    monkeypatch.setattr(module, "BATCH", 3000)
    monkeypatch.setattr(module, "SAVE_EVERY", 3)
    monkeypatch.setattr(encoding, "SMALL", 1)
    how: dict[str, Any] = {"tokenizer": "byte", "log": lambda _: None}
    prepare(str(text), cache=tmp_path / "whole", processes=3, **how)
    encode, calls = encoding.Worker.encode, itertools.count()

    def killed(self: encoding.Worker, pieces: list[Piece]) -> encoding.Encoded:
        assert os.getsid(self.process.pid) == self.process.pid  # it does not receive Ctrl-C
        if next(calls) == 10:
            self.process.kill()
            self.process.wait()
        return encode(self, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(encoding.Worker, "encode", killed)
        with pytest.raises(TokenizerError, match=r"one of the processes has ended with status -9; the same command"):
            prepare(str(text), cache=tmp_path / "killed", processes=2, **how)
    assert draft.load_progress(drafts(tmp_path / "killed")[0])["pieces"] > 0
    prepare(str(text), cache=tmp_path / "killed", processes=1, **how)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_an_error_in_a_worker_is_that_of_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 3000)
    monkeypatch.setattr(encoding, "SMALL", 1)
    Tokenizer.train("char", [story(i) for i in range(200)]).save(tmp_path / "tokenizer.json")
    text = write(tmp_path / "a.txt", [story(i) for i in range(200)] + ["a star *"])
    with pytest.raises(TokenizerError, match=r"character 7 is '\*', not one of the \d+ characters"):
        prepare(str(text), tokenizer=str(tmp_path / "tokenizer.json"), cache=tmp_path, processes=2)
    assert not drafts(tmp_path)  # nothing was saved


@pytest.mark.parametrize("make", ["hub"], indirect=True)
def test_a_hub_that_fails_loses_nothing(make, tmp_path, monkeypatch):
    make("whole")
    monkeypatch.setattr(encoding, "SMALL", 1)
    monkeypatch.setattr(encoding, "cores", lambda: 1)

    def fail(text: str, ends: bool) -> Piece:
        if text == story(60):
            raise ConnectionError("no route to the hub")
        return Piece(text, ends)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "Piece", fail)
        with pytest.raises(CorpusError, match=r"the hub failed \(ConnectionError: no route to the hub\)"):
            make("failed")
    assert draft.load_progress(drafts(tmp_path / "failed")[0])["pieces"] > 30
    make("failed")
    assert content(tmp_path / "failed") == content(tmp_path / "whole")


def test_a_draft_in_use_is_not_continued(tmp_path):
    folder = tmp_path / "tokens" / "key"
    folder.parent.mkdir()
    first, lock = draft.claim(folder)
    second, other = draft.claim(folder)
    assert first != second
    os.close(lock)
    assert draft.claim(folder)[0] == first
    os.close(other)


def test_without_locks_every_call_has_its_own_draft(tmp_path, monkeypatch):
    """Windows, and some network file systems."""
    monkeypatch.setattr(draft, "fcntl", None)
    folder = tmp_path / "tokens" / "key"
    folder.parent.mkdir()
    assert draft.claim(folder)[0] != draft.claim(folder)[0]
