"""Everything in README and docs that looks like a command or like code is run, with small numbers.

python blocks of a page run in order, in one namespace, from the root of the repository; what a block prints must be the
text block that follows it. Commands (sh blocks) run as they stand, on the tests' small text instead of Shakespeare.
"""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, SMALL, UNTRACED_ENV

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("[0-9]*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run_and_print_what_the_page_says(page, runs, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sample.RUNS", runs)
    namespace: dict = {}
    found = blocks(page)
    for (kind, code), (next_kind, printed) in zip(found, [*found[1:], ("", "")], strict=False):
        if kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(code, f"{page.name}: {code[:40]!r}", "exec"), namespace)
            if next_kind == "text":
                assert out.getvalue().rstrip() == printed.rstrip(), code


ELSEWHERE = {"python -m benchmarks scaling --quick"}  # tests/benchmarks/test_scaling.py runs it


def commands() -> list[str]:
    lines = [line for page in PAGES for kind, text in blocks(page) if kind == "sh" for line in text.splitlines()]
    found = dict.fromkeys(line.partition("#")[0].strip() for line in lines)
    return [line for line in found if line and line not in ELSEWHERE]


@pytest.fixture(scope="module")
def place(tmp_path_factory, runs):
    """A runs/ folder for the pages' commands; the finished run in it is called `shakespeare`, too."""
    where = tmp_path_factory.mktemp("pages")
    (where / "shakespeare").symlink_to(runs / "songs")
    return where


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A few conversations."""
    path = tmp_path_factory.mktemp("chats") / "chat.jsonl"
    turns = ([{"role": "user", "content": f"Song {n}?"}, {"role": "assistant", "content": f"{n}!"}] for n in range(40))
    path.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    return path


@pytest.mark.parametrize("line", commands())
def test_commands_run(line, place, text, chats, tmp_path):
    program = line.split()[0]
    line = re.sub(
        r"(\.venv/bin/|\b)python (?=-m (?:benchmarks|evals|convert)|train|sample)", f"{sys.executable} ", line
    )
    line = re.sub(r"^torchrun", f"{sys.executable} -m torch.distributed.run --standalone", line)
    if program == "make":
        line = f"{line} --dry-run"  # the real thing is what started these tests
    elif "-m venv" in line:
        line = f"{sys.executable} -m venv --without-pip {tmp_path / 'venv'}"
    elif "pip install" in line:
        line = f"{line} --dry-run --no-deps --no-build-isolation".replace(".venv/bin/pip", f"{sys.executable} -m pip")
    elif "kernels --dry-run" in line:
        line = f"{line} --only cross-entropy"
    elif "train.py" in line and "--help" not in line and re.search(r"train\.py \S", line):
        small = [word for word in SMALL if word.partition("=")[0] not in line]
        source = "" if "--data.source" in line else f"--data.source={text} "
        kept = re.sub(r"--train\.(steps|minutes)[ =]\S+", "", line)
        tokenizer = "" if "--init-from" in line else "--data.tokenizer=bpe "  # else the tokenizer is the other run's
        line = f"{kept} {source}{' '.join(small)} {tokenizer}--train.steps=4 --train.num_evals=1"
        line += "" if "--resume" in line else " --overwrite"
        line += "" if "--name" in line else " --name=page"
    line = re.sub(r"\bruns/", f"{place}/", line)
    line = line.replace("my-notes", str(text.parent)).replace("chat.jsonl", str(chats))
    line = re.sub(r"--nproc-per-node[ =]8", "--nproc-per-node=2", line)
    environment = UNTRACED_ENV | {"HEED_RUNS": str(place), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-ec", line], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


LIMITS = {"model.py": 400, "train.py": 400, "sample.py": 250}


def test_files_are_as_short_as_promised():
    names = subprocess.run(["git", "ls-files", "*.py", "*.cpp", "*.h"], cwd=ROOT, capture_output=True, text=True)
    for path in map(ROOT.joinpath, names.stdout.split()):
        limit = LIMITS.get(path.name, 450) if path.parent == ROOT else 450
        assert len(path.read_text().splitlines()) <= limit, path


def test_links_between_pages_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
