"""Prepared tokens: complete, no leakage between training and validation, and no incomplete folder is used."""

import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import data.prepare as module
from data import draft, encoding, shards
from data.chunking import SEPARATOR
from data.prepare import prepare
from data.sources import CorpusError
from data.tokenizer import Tokenizer, TokenizerError

ROOT = Path(__file__).parent.parent.parent


def story(i: int) -> str:
    rng = random.Random(i)
    return f"Story {i}. " + " ".join(rng.choice(["cat", "dog", "sün", "moon", "ran", "sat"]) for _ in range(60)) + ".\n"


def documents(folder: Path, split: str) -> list[str]:
    """The documents between end-of-text tokens, read from the shards with numpy."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = [folder / shard["file"] for shard in manifest["splits"][split]["shards"]]
    ids = np.concatenate([np.fromfile(file, manifest["dtype"]) for file in files])
    assert ids[-1] == manifest["eot"]
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.sha256 == manifest["tokenizer"]
    return [tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(ids == manifest["eot"]) + 1)[:-1]]


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    return write(tmp_path / "stories.txt", [story(i) for i in range(300)])


def write(path: Path, stories: list[str]) -> Path:
    path.write_text(f"{SEPARATOR}\n".join(stories))
    return path


def make(source: Path, **options: object) -> Path:
    options = {"tokenizer": "byte", "cache": source.parent / "cache", "log": lambda line: None, **options}
    return prepare(str(source), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_every_document_is_in_one_split_completely(stories: Path, kind: str) -> None:
    folder = make(stories, tokenizer=kind, vocab_size=300, val_fraction=0.2)
    train, val = documents(folder, "train"), documents(folder, "val")
    assert sorted(train + val) == sorted(story(i) for i in range(300))
    assert 30 < len(val) < 90
    manifest = json.loads((folder / "manifest.json").read_text())
    for split, texts in (("train", train), ("val", val)):
        about = manifest["splits"][split]
        assert about["documents"] == len(texts) and about["bytes"] == sum(len(text.encode()) for text in texts)
        assert about["tokens"] == len(texts) + sum(len(Tokenizer.load(folder).encode(text)) for text in texts)
        for shard in about["shards"]:
            assert hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    assert manifest["source"] == str(stories) and manifest["format_version"] == shards.FORMAT_VERSION


def test_validation_split_is_stable_when_text_is_added(stories: Path) -> None:
    before = make(stories, val_fraction=0.2)
    more = [story(i) for i in range(1000, 1100)]
    after = make(write(stories, more[:50] + [story(i) for i in range(300)] + more[50:]), val_fraction=0.2)
    assert before != after
    for side in ("train", "val"):
        assert set(documents(before, side)) <= set(documents(after, side))


def test_duplicates_are_in_the_same_split(stories: Path) -> None:
    folder = make(write(stories, [story(i % 100) for i in range(300)]), val_fraction=0.3)
    train, val = documents(folder, "train"), documents(folder, "val")
    assert not set(train) & set(val)
    assert all(side.count(text) == 3 for side in (train, val) for text in side)


def test_end_of_text_token_at_every_gap(tmp_path: Path) -> None:
    """One document in many pieces: neither split joins text that is not adjacent in the source."""
    text = "\n\n".join(f"Paragraph {i}. " + story(i).strip() for i in range(400))
    (tmp_path / "book.txt").write_text(text)
    folder = make(tmp_path / "book.txt", val_fraction=0.3)
    parts = [(text.index(part), side, part) for side in ("train", "val") for part in documents(folder, side)]
    assert len(parts) > 10 and "".join(part for _, _, part in sorted(parts)) == text
    turns = [side for _, side, _ in sorted(parts)]
    assert all(a != b for a, b in itertools.pairwise(turns))  # and no end-of-text token without a gap


def test_val_source_is_used_completely_and_excluded_from_training(stories: Path, tmp_path: Path) -> None:
    val = write(tmp_path / "val.txt", [story(i) for i in (5, 6, 7, 2000)])
    folder = make(stories, val_source=str(val))
    assert documents(folder, "val") == [story(i) for i in (5, 6, 7, 2000)]
    assert documents(folder, "train") == [story(i) for i in range(300) if i not in (5, 6, 7)]
    with pytest.raises(CorpusError, match=r"data.val_source: contains all"):
        make(val, val_source=str(stories.parent / "val.txt"))
    with pytest.raises(CorpusError, match=r"data.val_source = 'nowhere.txt': no such file"):
        make(stories, val_source="nowhere.txt")


def test_small_texts_work_and_a_too_small_text_raises(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    for i in range(20):  # 20 KB to 100 KB: both splits have text, whatever the hashes
        book.write_text("\n\n".join(story(1000 * i + j).strip() for j in range(60 + 13 * i)))
        folder = make(book, val_fraction=0.02)
        assert documents(folder, "train") and documents(folder, "val")
    book.write_text("Too short.")
    with pytest.raises(CorpusError, match="too short to hold out a part for validation"):
        make(book)
    for fraction in (0, 0.6, -1):
        with pytest.raises(CorpusError, match=r"data.val_fraction"):
            make(book, val_fraction=fraction)


def test_special_tokens_in_text_are_encoded_as_text(tmp_path: Path) -> None:
    texts = [f"{story(i).strip()} {SEPARATOR} and on\n" for i in range(50)]
    folder = make(write(tmp_path / "a.txt", texts), val_fraction=0.2)
    assert sorted(documents(folder, "train") + documents(folder, "val")) == sorted(texts)


# --- the cache -------------------------------------------------------------------------------------------------------


def test_prepared_tokens_are_cached_by_content(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(stories)
    copy = stories.parent / "copy.txt"
    copy.write_bytes(stories.read_bytes())
    monkeypatch.setattr(module, "write", None)  # would fail
    assert make(stories) == make(copy) == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    monkeypatch.undo()
    others = [{"tokenizer": "char"}, {"tokenizer": "bpe", "vocab_size": 280}, {"val_fraction": 0.1}, {"limit": 200}]
    assert len({folder, *(make(stories, **other) for other in others)}) == 5
    (folder / "train-00000.bin").write_bytes(b"truncated")
    assert make(stories) == folder and documents(folder, "train")  # prepared again
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".tmp")]


def test_existing_tokenizer_is_used_unchanged(stories: Path, tmp_path: Path) -> None:
    made = Tokenizer.train("bpe", [story(i) for i in range(20)], 280)
    made.save(tmp_path / "tokenizer.json")
    folder = make(stories, tokenizer=str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(folder).sha256 == made.sha256
    with pytest.raises(TokenizerError, match="no such file"):
        make(stories, tokenizer="missing.json")


@pytest.mark.parametrize(
    "step", ["prepare.train_tokenizer", "prepare.write", "prepare.save_progress", "draft.publish", "draft.sync"]
)
@pytest.mark.parametrize("after", [False, True])
def test_stop_before_and_after_every_step(
    stories: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    """Simulates SIGKILL without cleanup: a folder with the final name is complete or does not exist."""
    where, name = (module if step.startswith("prepare") else draft), step.partition(".")[2]
    real = getattr(where, name)

    def stop(*args: object) -> None:
        if after:
            real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where, name, stop)
        with pytest.raises(KeyboardInterrupt):
            make(stories, tokenizer="bpe", vocab_size=280)
    tokens = stories.parent / "cache" / "tokens"
    named = [path for path in tokens.iterdir() if not path.name.startswith(".tmp")]
    assert len(named) == (step == "draft.publish" and after)
    folder = make(stories, tokenizer="bpe", vocab_size=280)
    assert named in ([], [folder]) and len(documents(folder, "train") + documents(folder, "val")) == 300


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1, 0.3, 0.8])
def test_kill_at_any_time_leaves_no_incomplete_folder(tmp_path: Path, delay: float) -> None:
    source = write(tmp_path / "a.txt", [story(i) for i in range(4000)])
    code = (
        "import pathlib; from data.prepare import prepare; print('ready', flush=True);"
        f"prepare({str(source)!r}, tokenizer='bpe', vocab_size=400, cache=pathlib.Path({str(tmp_path)!r}))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout and child.stdout.readline() == "ready\n"
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    named = [path for path in (tmp_path / "tokens").glob("*") if not path.name.startswith(".tmp")]
    for folder in named:
        assert len(documents(folder, "train") + documents(folder, "val")) == 4000
    folder = make(source, tokenizer="bpe", vocab_size=400, cache=tmp_path)
    assert named in ([], [folder])
    assert len(documents(folder, "train") + documents(folder, "val")) == 4000


def run(source: str, cache: str) -> str:
    return str(prepare(source, tokenizer="bpe", vocab_size=400, cache=Path(cache), log=lambda line: None))


def test_two_concurrent_processes_agree(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", [story(i) for i in range(2000)])
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        folders = pool.starmap(run, [(str(source), str(tmp_path))] * 4)
    assert len(set(folders)) == 1
    assert len(documents(Path(folders[0]), "train") + documents(Path(folders[0]), "val")) == 2000
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == [Path(folders[0]).name]


def test_concurrent_rename_is_not_an_error(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = draft.publish

    def late(temporary: Path, folder: Path) -> None:
        monkeypatch.setattr(draft, "publish", publish)
        assert make(stories) == folder  # another process finishes first
        publish(temporary, folder)

    monkeypatch.setattr(draft, "publish", late)
    folder = make(stories)
    assert list(folder.parent.iterdir()) == [folder] and documents(folder, "train")


def test_failure_or_full_disk_leaves_no_folder(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.Writer, "add", full)
    with pytest.raises(CorpusError, match=r"the disk of .* is full"):
        make(stories)
    assert list((stories.parent / "cache" / "tokens").iterdir()) == []


def test_drafts_that_nobody_continues_are_removed_after_a_week(stories: Path) -> None:
    tokens = stories.parent / "cache" / "tokens"
    for name, age in ((".tmp-old", 8), (".tmp-new", 6)):
        (tokens / name).mkdir(parents=True)
        os.utime(tokens / name, (time.time() - age * 86_400,) * 2)
    folder = make(stories)
    assert sorted(path.name for path in tokens.iterdir()) == [".tmp-new", folder.name]


# --- size ------------------------------------------------------------------------------------------------------------


def test_uint32_for_large_vocabularies(tmp_path: Path) -> None:
    wide = "".join(chr(0x4E00 + i) for i in range(20_000)) + "".join(chr(0x20000 + i) for i in range(50_000))
    source = write(tmp_path / "wide.txt", [wide[i : i + 1000] + "\n" for i in range(0, 70_000, 1000)])
    folder = make(source, tokenizer="char")
    assert json.loads((folder / "manifest.json").read_text())["dtype"] == "uint32"
    assert sorted("".join(documents(folder, "train") + documents(folder, "val")).replace("\n", "")) == sorted(wide)


def test_bpe_sample_is_capped_spread_and_from_training_only(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    train = Tokenizer.train

    def spy(kind: str, texts: object, vocab_size: int) -> Tokenizer:
        seen.extend(texts)  # type: ignore[call-overload]
        return train(kind, list(seen), vocab_size)

    monkeypatch.setattr(Tokenizer, "train", spy)
    monkeypatch.setattr(module, "SAMPLE", stories.stat().st_size // 10)
    folder = make(stories, tokenizer="bpe", vocab_size=280, val_fraction=0.3)
    assert set(seen) <= set(documents(folder, "train"))
    assert 0.02 < sum(map(len, seen)) / stories.stat().st_size < 0.11
    numbers = [int(text.split(".")[0].removeprefix("Story ")) for text in seen]
    assert numbers[0] < 60 and numbers[-1] > 240


def test_memory_does_not_grow_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the text is without blank lines and an eighth of it one long line. Counted: what Python allocates."""
    monkeypatch.setattr(module, "BATCH", 1 << 17)  # so that the pipeline is full from the start
    monkeypatch.setattr(encoding.Worker, "encode", lambda self, pieces: [(np.array([1]), 1, None)] * len(pieces))
    rng, peaks = random.Random(0), list[int]()
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(2000)]
    block = "\n\n".join(" ".join(rng.choices(words, k=60)) + "." for _ in range(2500))
    for blocks in (8, 32):  # of a million characters
        source = tmp_path / f"{blocks}.txt"
        with source.open("w") as file:
            for share in (i / blocks for i in range(blocks)):
                file.write(block + "\n" if share < 0.5 else block.replace("\n\n", "\n" if share < 0.875 else " "))
        tracemalloc.start()
        make(source, tokenizer="byte", cache=tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0], peaks


@pytest.mark.parametrize("below", ["", "cache"])
def test_a_cache_in_a_file_is_one_line(stories: Path, tmp_path: Path, below: str) -> None:
    (file := tmp_path / "file").write_text("")
    with pytest.raises(CorpusError) as told:
        prepare(str(stories), cache=file / below)
    assert str(told.value) == f"HEED_CACHE = {str(file / below)!r}: must be a folder, {file} is a file"
