"""Damaged files, values at the edges, hostile texts, a full disk.

Every case ends with status 0, or 2 and a message of at most six lines, without a traceback; and what was there before
is still there. The short version takes some cases of each kind, `make torture` all.
"""

import random
import shutil
from pathlib import Path

import pytest

from tests.torture.damage import (
    DAMAGES,
    SMALLEST,
    content,
    damage,
    flag_cases,
    fresh,
    texts,
    toml_cases,
)
from training import checkpoint

FEW = 14  # cases of a kind in the short version
SIZES = pytest.mark.parametrize("size", [pytest.param("few"), pytest.param("all", marks=pytest.mark.full)])


def some(cases: list, size: str, few: int = FEW) -> list:
    """All cases, or a few of them."""
    return cases if size == "all" else random.Random(0).sample(cases, min(few, len(cases)))


@pytest.fixture(scope="session")
def trained(the_server, text, tmp_path_factory):
    """runs/ with a run of four steps and two checkpoints; its training flags."""
    runs = tmp_path_factory.mktemp("trained")
    words = ("shakespeare", "--name=run", *SMALLEST, f"--data.source={text}")
    status, said = the_server.run(*words, "--train.steps=4", runs=runs)
    assert status == 0, said
    return runs, words


@SIZES
def test_files_of_a_run(server, trained, tmp_path, size):
    runs, words = trained
    commands = [
        ("train", (*words, "--train.steps=6", "--resume")),
        ("train", (*words, "--train.steps=4")),
        ("sample", ("--run=RUN", "--max-new-tokens=3")),
        ("convert", ("to-hf", "RUN", "OUT")),
    ]
    files = list(content(runs / "run"))
    cases = [(file, how, command) for file in files for how in DAMAGES for command in commands]
    for file, how, (program, argv) in some(cases, size):
        fresh(runs, tmp_path / "runs")
        run, out = tmp_path / "runs" / "run", tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        damage(run / file, how)
        before = content(run)
        argv = [word.replace("RUN", str(run)).replace("OUT", str(out)) for word in argv]
        said = server.judge(*argv, runs=tmp_path / "runs", program=program)
        after = content(run)
        if "step-000006/state.json" in after:  # it went on from a checkpoint that was intact
            _, state = checkpoint.open_checkpoint(run, "latest", warn=str)
            right = state["step"] == 6 and not list(run.glob(".draft*"))
        else:
            right = after == before and (program != "train" or "train.py: " in said)
        if not right:
            server.wrong.append(f"{file} {how}: {argv}\n{said[-2000:]}")


@SIZES
def test_files_of_the_cache(server, trained, tmp_path, size):
    runs, words = trained
    cache = server.where / "cache"
    kept = fresh(cache, tmp_path / "kept")
    cases = [(file, how) for file in content(cache / "tokens") for how in DAMAGES]
    try:
        for file, how in some(cases, size):
            damage(cache / "tokens" / file, how)
            fresh(runs, tmp_path / "runs")
            before = content(tmp_path / "runs")
            said = server.judge(*words, "--train.steps=5", "--resume", runs=tmp_path / "runs")
            if "train.py: " in said:
                assert content(tmp_path / "runs") == before, (file, how)
            fresh(kept, cache)
    finally:
        fresh(kept, cache)


@SIZES
def test_flags(server, trained, text, tmp_path, size):
    for case in some(flag_cases(), size):
        field = case[0].partition("=")[0]
        words = [word for word in (*SMALLEST, f"--data.source={text}") if not word.startswith(f"{field}=")]
        steps = [] if field in ("--train.steps", "--train.minutes") else ["--train.steps=1"]
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        server.judge("shakespeare", *words, *steps, *case, runs=tmp_path / "runs")


@SIZES
def test_recipes(server, text, tmp_path, size):
    for recipe in some(toml_cases(), size):
        path = tmp_path / "recipe.toml"
        path.write_text(recipe, encoding="utf-8", newline="")
        field = recipe.partition("]\n")[2].partition(" ")[0]
        words = [word for word in (*SMALLEST, f"--data.source={text}") if f".{field}=" not in word]
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        server.judge(str(path), *words, "--train.steps=1", "--overwrite", runs=tmp_path / "runs")
    path.write_bytes(b"\xff\xfe[model]\n")
    server.judge(str(path), runs=tmp_path / "runs")


@SIZES
def test_texts(server, tmp_path, size):
    cases = [
        (name, form, tokenizer) for name in texts(False) for form in ("text", "chat") for tokenizer in ("bpe", "char")
    ]
    for name, form, tokenizer in some(cases, size):
        path = tmp_path / name
        path.write_bytes(texts(False)[name])
        words = [word for word in SMALLEST if not word.startswith("--data.tokenizer")]
        words += [f"--data.source={path}", f"--data.format={form}", f"--data.tokenizer={tokenizer}"]
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        server.judge("shakespeare", *words, "--data.vocab_size=300", "--train.steps=1", runs=tmp_path / "runs")
        assert path.read_bytes() == texts(False)[name]


@pytest.mark.full
def test_one_line_of_100_mb(server, tmp_path):
    path = tmp_path / "line.txt"
    path.write_bytes(texts(True)["line.txt"])
    large = ("--train.batch_tokens=65536", "--train.micro_batch_size=4096", "--data.val_fraction=0.01")
    words = (*SMALLEST, *large, f"--data.source={path}", "--train.steps=1")
    assert "num_steps: 1\n" in server.judge("shakespeare", *words, runs=tmp_path / "runs")


@SIZES
def test_a_full_disk(server, trained, text, tmp_path, size):
    """No file may be larger than a limit: in preparation, in a save, in the picture, in an export."""
    runs, words = trained
    cache, number = server.where / "cache", random.Random(2)
    kept = fresh(cache, tmp_path / "kept")
    largest = max(map(len, content(runs).values()))
    cases = [(what, number.randrange(4096, 2 * largest)) for what in ("resume", "prepare", "to-hf") for _ in range(20)]
    try:
        for what, limit in some(cases, size, few=5):
            fresh(runs, tmp_path / "runs")
            before = content(tmp_path / "runs")
            options = {"runs": tmp_path / "runs", "limit": limit}
            if what == "resume":
                said = server.judge(*words, "--train.steps=6", "--resume", **options)
                run = tmp_path / "runs" / "run"
                state = checkpoint.read_state(checkpoint.find(run, "latest"))
                assert state["step"] == (4 if "train.py: " in said and "cannot be saved" in said else state["step"])
                after = content(tmp_path / "runs")
                for file in before:  # both checkpoints, or later ones
                    if "step-000004" in file and state["step"] == 4:
                        assert after[file] == before[file]
                server.judge(*words, "--train.steps=6", "--resume", runs=tmp_path / "runs")  # the disk has room again
                assert checkpoint.read_state(checkpoint.find(run, "latest"))["step"] == 6
            elif what == "prepare":
                shutil.rmtree(cache / "tokens")
                server.judge(*words, "--train.steps=4", "--overwrite", **options)
                server.judge(*words, "--train.steps=4", "--overwrite", runs=tmp_path / "runs")
                assert not list((cache / "tokens").glob(".tmp-*"))
            else:
                run, out = tmp_path / "runs" / "run", tmp_path / "out"
                shutil.rmtree(out, ignore_errors=True)
                server.judge("to-hf", str(run), str(out), program="convert", **options)
                assert content(tmp_path / "runs") == before
    finally:
        fresh(kept, cache)


def test_there_are_a_thousand_cases(trained):
    runs, _ = trained
    run_files, cache_files = len(content(runs / "run")) * len(DAMAGES) * 4, 4 * len(DAMAGES)
    assert run_files + cache_files + len(flag_cases()) + len(toml_cases()) + 4 * len(texts(False)) + 60 >= 1000
    assert Path(runs).is_dir()
