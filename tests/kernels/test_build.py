"""The compiler that is found, and which compiled files are loaded."""

import contextlib
import os
from types import SimpleNamespace

import pytest
import torch

from kernels import cpu
from kernels.cpu import build


def compiled():
    return cpu.library("linear", ELEMENT=torch.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch, clear_compiled):
    """An empty folder for compiled files."""
    monkeypatch.setattr(build, "FOLDER", tmp_path / "cpu")
    monkeypatch.setattr(build, "FLAGS", [flag.replace("-O3", "-O0") for flag in build.FLAGS])  # compiles sooner
    return tmp_path / "cpu"


@pytest.mark.parametrize("command", ["g++ -m64", "CCACHE g++", " g++ "])
def test_a_compiler_of_several_words(command, folder, tmp_path, monkeypatch):
    ccache = tmp_path / "ccache"
    ccache.write_text('#!/bin/sh\necho "$@" >> "$0.log"\nexec "$@"\n')
    ccache.chmod(0o755)
    monkeypatch.setenv("CXX", command.replace("CCACHE", str(ccache)))
    assert compiled().heed_multiplied_size() == 4
    assert (tmp_path / "ccache.log").exists() == ("CCACHE" in command)


def test_a_compiler_that_is_none(folder, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(cpu.Unavailable, match=r"no C\+\+ compiler, CXX = 'no-such-compiler -m64' is none"):
        compiled()


def test_a_quote_that_is_not_closed_is_one_line(folder, monkeypatch):
    monkeypatch.setenv("CXX", 'g++ "-m64')
    with pytest.raises(cpu.Unavailable, match=r"CXX = 'g\+\+ \"-m64': No closing quotation"):
        compiled()


@pytest.mark.skipif(os.name != "posix", reason="owners and modes of files are POSIX's")
def test_a_file_that_another_user_owns_or_can_write_is_not_loaded(folder, monkeypatch, clear_compiled):
    """In a shared folder, anybody could put code under the name that heed loads."""
    before = os.umask(0)
    try:
        compiled()
    finally:
        os.umask(before)
    (path,) = folder.iterdir()
    assert path.stat().st_mode & 0o022 == 0
    path.chmod(0o775)
    clear_compiled()
    with pytest.raises(cpu.Unavailable, match="belongs to, or can be written by, another user: delete it"):
        compiled()
    path.chmod(0o755)
    compiled()
    mode = path.stat().st_mode
    for owner, mine in ((os.getuid(), True), (0, True), (os.getuid() + 1, False)):
        assert build._only_ours(SimpleNamespace(st_uid=owner, st_mode=mode)) == mine


@pytest.mark.skipif(os.name != "posix", reason="owners of files are POSIX's")
def test_each_user_has_own_files(folder, monkeypatch, clear_compiled):
    for user in (0, 1):
        clear_compiled()
        monkeypatch.setattr(os, "getuid", lambda user=user: user)
        with contextlib.suppress(cpu.Unavailable):  # the file's owner is neither of these
            compiled()
    assert len(list(folder.iterdir())) == 2
