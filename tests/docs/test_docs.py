"""Everything in README and docs that looks like a command or like code is run, with small numbers.

python blocks of a page run in order, in one namespace, from the root of the repository; what a block prints must be the
text block that follows it. A toml block is a recipe, and its first line has its name. Commands (sh blocks) run as they
stand, on the tests' small text instead of Shakespeare. Links, commands within a sentence and the front page's list of
files are checked, not run.
"""

import contextlib
import io
import json
import re
import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks.__main__
import convert.__main__
import data.__main__
import evals.__main__
from tests.conftest import ROOT, SMALL, USER_ENV
from tests.fork_server import ForkServer

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("[0-9]*.md"))]
REFERENCE = [ROOT / name for name in ("benchmarks/README.md", "CONTRIBUTING.md")]
REFERENCE += [ROOT / "docs" / name for name in ("EXPERIMENTS.md", "glossary.md")]
FILES = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
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


ELSEWHERE = {  # other tests run it
    "python -m benchmarks scaling --quick",  # tests/benchmarks/test_scaling.py
    "python -m evals runs/shakespeare --needle",  # tests/evals/test_needle.py, with a context that is long enough
    "python -m serve runs/assistant",  # tests/serve, since it runs until it is stopped
    "python -m serve runs/shakespeare",
}


def commands() -> list[str]:
    lines = [line for page in PAGES for kind, text in blocks(page) if kind == "sh" for line in text.splitlines()]
    found = dict.fromkeys(line.partition("#")[0].strip() for line in lines)
    return [line for line in found if line and line not in ELSEWHERE]


@pytest.fixture(scope="module")
def place(tmp_path_factory, runs):
    """A runs/ folder for the pages' commands, with a copy of the finished run, since commands write into it."""
    where = tmp_path_factory.mktemp("pages")
    shutil.copytree(runs / "songs", where / "shakespeare", symlinks=True)
    words = (string.ascii_letters[n % 40 : n % 40 + 10] for n in range(400))
    (where / "letters.jsonl").write_text("".join(json.dumps({"text": word + word}) + "\n" for word in words))
    return where


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A few conversations."""
    path = tmp_path_factory.mktemp("chats") / "chat.jsonl"
    turns = ([{"role": "user", "content": f"Song {n}?"}, {"role": "assistant", "content": f"{n}!"}] for n in range(40))
    path.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory, text):
    """A folder with the pages' recipes."""
    folder = tmp_path_factory.mktemp("recipes")
    for content in (content for page in PAGES for kind, content in blocks(page) if kind == "toml"):
        content = content.replace('"shakespeare"', f'"{text}"').replace('"my-notes"', f'"{text.parent}"')
        (folder / content.split()[1]).write_text(content)
    return folder


@pytest.fixture(scope="module")
def server(place):
    started = ForkServer(place, USER_ENV)
    yield started
    started.close()


@pytest.mark.parametrize("line", commands())
def test_commands_run(line, place, text, chats, written, server, tmp_path):
    program = line.split()[0]
    line = re.sub(
        r"(\.venv/bin/|\b)python (?=-m (?:benchmarks|data|evals|convert)|train|sample)", f"{sys.executable} ", line
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
    elif line.endswith("--resume"):
        pass  # the run's settings are in its folder
    elif "train.py" in line and "--help" not in line and re.search(r"train\.py \S", line):
        small = [word for word in SMALL if word.partition("=")[0] not in line]
        if "chat.jsonl" in line:  # room for a system message
            small = [word.replace("context=32", "context=128") for word in small]
        source = "" if "--data.source" in line or ".toml" in line else f"--data.source={text} "
        kept = re.sub(r"--train\.(steps|minutes)[ =]\S+", "", line)
        tokenizer = "" if "--init-from" in line else "--data.tokenizer=bpe "  # else the tokenizer is the other run's
        line = f"{kept} {source}{' '.join(small)} {tokenizer}--train.steps=4 --train.num_evals=1"
        line += " --overwrite"
        line += "" if "--name" in line else " --name=page"
    line = re.sub(r"\bruns/", f"{place}/", line)
    line = line.replace("my-notes", str(text.parent)).replace("chat.jsonl", str(chats))
    line = re.sub(r"[\w-]+\.toml", rf"{written}/\g<0>", line)
    line = re.sub(r"--nproc-per-node[ =]8", "--nproc-per-node=2", line)
    # --dry-run sets TRITON_INTERPRET before triton is imported; in the server, it is already.
    heed = re.fullmatch(rf"{sys.executable} (?:-m ((?:benchmarks|data|evals|convert)\S*)|(\w+)\.py)(.*)", line)
    if heed and "--dry-run" not in line:
        module, script, words = heed.groups()
        status, said = server.run(*shlex.split(words), program=module or script, runs=place)
        assert status == 0, f"{line}\n{said}"
        return
    environment = USER_ENV | {"HEED_RUNS": str(place), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-ec", line], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


LIMITS = {"model.py": 400, "train.py": 400, "sample.py": 250}


def test_files_are_as_short_as_promised():
    for path in (ROOT / name for name in FILES if name.endswith((".py", ".cpp", ".h"))):
        limit = LIMITS.get(path.name, 450) if path.parent == ROOT else 450
        assert len(path.read_text().splitlines()) <= limit, path


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "]", text)).lower().replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", [*PAGES, *REFERENCE], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text().replace("\n", " "))
    for target, anchor in links:
        path = page.parent / target if target else page
        assert path.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(path), f"{page.name}: {target}#{anchor}"


PARSERS = {
    "benchmarks": benchmarks.__main__.arguments,
    "evals": evals.__main__.arguments,
    "convert": convert.__main__.parse_args,
    "data": data.__main__.arguments,
}


@pytest.mark.parametrize("page", [*PAGES, *REFERENCE], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_within_a_sentence_exist(page):
    """`python -m benchmarks data --turns 2`: the command and its flags exist. Some arguments may be left out."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S).replace("\n", " ")
    for package, words in re.findall(r"`python -m (benchmarks|data|evals|convert) ([^`]+)`", prose):
        error = io.StringIO()
        with (
            contextlib.suppress(SystemExit),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(error),
        ):
            try:
                PARSERS[package](shlex.split(words))
            except ValueError as reason:
                error.write(str(reason))
        wrong = error.getvalue() and "arguments are required" not in error.getvalue()
        assert not wrong, f"{page.name}: {words}: {error.getvalue()}"


def test_minutes_of_the_chapters():
    """The front page estimates 100 words per minute; a row has chapters and their minutes in the same order."""
    listed: dict[str, str] = {}
    for line in front_page():
        if line.startswith("| [") and (chapters := re.findall(r"\]\((docs/\d+-[\w-]+\.md)\)", line)):
            listed |= zip(chapters, line.rstrip(" |").rpartition("| ")[2].split(", "), strict=True)
    assert [ROOT / chapter for chapter in listed] == sorted(
        PAGES[1:], key=lambda page: int(page.name.partition("-")[0])
    )
    for chapter, minutes in listed.items():
        words = len((ROOT / chapter).read_text().split())
        assert abs(int(minutes) - words / 100) <= 2, f"{chapter}: {words} words"


def front_page() -> list[str]:
    return (ROOT / "README.md").read_text().splitlines()


def test_the_front_page_lists_the_files():
    start = next(n for n, line in enumerate(front_page()) if line.startswith("model.py "))
    listed = [line.split()[0] for line in front_page()[start : front_page().index("```", start)]]
    for name in listed:
        assert any(file == name or (name.endswith("/") and file.startswith(name)) for file in FILES), name
    tops = {file.partition("/")[0] + "/" * ("/" in file) for file in FILES if not file.startswith(".")}
    assert tops - {*listed} == {"CONTRIBUTING.md", "LICENSE", "README.md", "requirements.txt"}


def test_the_front_page_begins_with_what_it_shows():
    """A picture, two sentences, a table, the two commands, a sample; few rows of tables on the whole page."""
    lines = front_page()
    parts = ("![", "heed ", "|", "```sh")
    where = [next(n for n, line in enumerate(lines) if line.startswith(begin)) for begin in parts]
    assert where == sorted(where) and where[0] == 2
    sample = lines.index("```", where[-1] + 4)
    assert lines.index("```", sample + 1) - sample - 1 == 8 and sample < 30
    assert sum(line.startswith("|") for line in lines) <= 12
