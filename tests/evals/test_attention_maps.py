"""python -m evals.attention_maps: what it prints and writes, compared with the model's weights; and what it refuses."""

import base64
import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest
import torch

from evals import attention_heads, attention_maps, attention_pictures
from inference.attention_weights import attention_weights
from sample import load
from tests.conftest import SMALL, TINY, randomized, train_here


@pytest.fixture
def songs(runs, tmp_path):
    """The run `songs`, in a folder that may be written to."""
    for path in (runs / "songs").iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def page_data(page: str) -> dict[str, Any]:
    found = re.search(r"^const data = (.*);$", page, re.M)
    assert found
    return json.loads(found[1])


def test_the_page_has_the_weights_and_the_tokens(songs, capsys):
    prompt = "Song 1: the </script><b> bees & ants"
    assert attention_maps.main([str(songs), "--prompt", prompt, "--head", "2.1"]) == 0
    printed, page = capsys.readouterr().out, (songs / "attention.html").read_text()
    assert page.count("<script>") == page.count("</script>") == 1 and "http" not in page
    data = page_data(page)
    model, tokenizer = load(songs)
    tokens = torch.tensor(tokenizer.encode_prompt(prompt))
    assert "".join(data["tokens"]) == prompt and data["large"] == [2, 1]
    for layer, weights in zip(data["layers"], attention_weights(model, tokens), strict=True):
        root = np.frombuffer(base64.b64decode(layer["maps"]), np.int8).reshape(weights.shape) / 127
        assert np.abs(root**2 - weights.numpy()).max() < 1 / 127
        assert layer["heads"] == len(layer["names"]) == 2
    found = re.search(r"^weights times values equal the output of the model's kernel within (\S+) of", printed, re.M)
    assert found and float(found[1]) < 1e-5
    assert (songs / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_each_heads_numbers(songs, capsys):
    assert attention_maps.main([str(songs), "--repeated"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if re.match(r"\d\.\d ", line)]
    assert [row[0] for row in rows] == ["1.1", "1.2", "2.1", "2.2"]
    model, tokenizer = load(songs)
    tokens = attention_heads.random_text(model, tokenizer, 0)
    weights = attention_weights(model, tokens)[1][0].double()  # of head 2.1
    T = len(tokens)
    rows_of_weights = [[float(p) for p in row if p] for row in weights]
    entropy = sum(-sum(p * np.log(p) for p in row) for row in rows_of_weights) / T
    distance = sum(float(weights[t, s]) * (t - s) for t in range(T) for s in range(t)) / T
    previous = sum(float(weights[t, t - 1]) for t in range(1, T)) / (T - 1)
    expected = f"{entropy:.2f}", f"{distance:.1f}", f"{previous:.2f}"
    assert (rows[2][1], rows[2][3], rows[2][4]) == expected
    assert any(re.fullmatch(r"random tokens cost \d+\.\d\d nats/token, at their second .* \d+\.\d\d", x) for x in lines)


def test_a_hybrid_says_which_layer_has_no_map(text, tmp_path, capsys):
    words = [*SMALL, f"--data.source={text}", "--model.layer_pattern=RM", "--model.n_kv_head=2", "--train.steps=1"]
    run = train_here(tmp_path, "shakespeare", "--name=hybrid", "--train.num_evals=1", *words)
    capsys.readouterr()
    assert attention_maps.main([str(run), "--prompt", "Song 1: the 2 birds"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("layer 1, LSTM: no map (not linear in any values)\n")
    assert re.findall(r"^(\d\.\d) ", printed, re.M) == ["2.1", "2.2", "2.3", "2.4"]  # Mamba-2 has 2 n_head heads
    first, second = page_data((run / "attention.html").read_text())["layers"]
    assert first is None and np.frombuffer(base64.b64decode(second["maps"]), np.int8).min() < 0
    train_here(tmp_path, "shakespeare", "--name=hybrid", "--train.num_evals=1", *words, "--overwrite")  # all is heed's
    assert not (run / "attention.html").exists()
    words[-2] = "--model.layer_pattern=R"
    run = train_here(tmp_path, "shakespeare", "--name=lstm", "--train.num_evals=1", *words[:-3], *words[-2:])
    capsys.readouterr()
    assert attention_maps.main([str(run), "--prompt", "Song 1"]) == 2
    assert capsys.readouterr().err == f"evals.attention_maps: {run}: no layer has a map\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "Song " * 40], r"--prompt: has \d+ tokens, must have 2 to model.context = 32"),
        (["--prompt", ""], "--prompt: has 1 tokens, must have 2 to model.context = 32"),
        (
            ["--prompt", "Song 1", "--head", "3.1"],
            r"--head 3\.1: must be a layer with a map and its head, from 1\.1 to",
        ),
        (["--prompt", "Song 1", "--checkpoint", "step-7"], "step-7"),
    ],
)
def test_what_cannot_be_is_one_line(songs, capsys, words, message):
    assert attention_maps.main([str(songs), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("evals.attention_maps: ") and error.count("\n") == 1 and re.search(message, error)
    assert not (songs / "attention.html").exists()


def test_the_range_of_heads_is_by_number():
    heads = [attention_heads.Head(layer, head, *[0.0] * 6) for layer in range(2, 12) for head in range(1, 13)]
    with pytest.raises(ValueError, match=r"its head, from 2\.1 to 11\.12$"):
        attention_maps.large("1.1", heads)
    with pytest.raises(ValueError, match=r"its head, from 2\.1 to 2\.1$"):
        attention_maps.large("1.1", heads[:1])


@pytest.mark.parametrize("pattern", ["L", "RM", "CDTW", "ABKPQ"])
def test_the_number_of_maps(pattern):
    config = dataclasses.replace(TINY, n_layer=len(pattern), layer_pattern=pattern, n_kv_head=4)
    maps = attention_weights(randomized(config), torch.arange(5))
    assert attention_maps.number_of_maps(config) == sum(len(found) for found in maps if found is not None)


def test_what_cannot_be_written_is_one_line(songs, capsys):
    (songs / "attention.html").mkdir()
    assert attention_maps.main([str(songs), "--prompt", "Song 1: the 2 birds"]) == 2
    assert capsys.readouterr().err == f"evals.attention_maps: {songs / 'attention.html'}: Is a directory\n"


def test_maps_that_are_too_many_for_a_page(songs, capsys, monkeypatch):
    monkeypatch.setattr(attention_maps, "LARGEST", 100)
    monkeypatch.setattr(attention_maps, "attention_weights", lambda *_: 1 / 0)  # they are not computed
    assert attention_maps.main([str(songs), "--prompt", "Song 1: the 2 birds"]) == 2
    assert re.search(r"--prompt: \d+ tokens make [\d,]+ weights, at most 100 fit", capsys.readouterr().err)


def test_weights_that_are_not_the_kernels_are_refused(songs, capsys, monkeypatch):
    """The check has teeth: the kernel computes with another scale than the reference."""
    import model

    kernel = model.attention
    monkeypatch.setattr(
        model, "attention", lambda *a, softmax_scale, **k: kernel(*a, softmax_scale=softmax_scale * 1.3, **k)
    )
    assert attention_maps.main([str(songs), "--prompt", "Song 1: the 2 birds"]) == 2
    assert re.search(r"weights times values differ from the kernel's output by \d\.\de-0\d", capsys.readouterr().err)


def test_a_control_character_is_escaped_for_the_font():
    pieces = ["", " a\n", "\t$", "\x00", "\r\x1b", "\u200b", "é语"]
    shown = ["∅", "·a⏎", r"⇥\$", r"\x00", r"\r\x1b", r"\u200b", "é语"]
    assert [attention_pictures.visible(piece) for piece in pieces] == shown


def test_the_picture_shows_the_large_head_and_all_tokens(tmp_path, monkeypatch):
    """With a text of more tokens than an axis can name, some are left out."""
    import matplotlib.pyplot as plt

    figures: list[Any] = []
    monkeypatch.setattr(plt, "close", figures.append)
    maps = [torch.rand(2, 70, 70).tril(), None, torch.randn(3, 70, 70).clamp(-1, 1).tril()]
    names = {(1, 1): "induction", (1, 2): "", (3, 1): "", (3, 2): "first token", (3, 3): ""}
    attention_pictures.draw(tmp_path / "a.png", maps, names, (3, 2), ["a\n", " $"] * 35, "title")
    axes = [axis for axis in figures[0].get_axes() if axis.get_visible()]
    titles = [axis.get_title() for axis in axes]
    assert titles[:5] == ["1.1 induction", "1.2 ", "3.1 ", "3.2 first token", "3.3 "]
    large = next(axis for axis in axes if axis.get_title() == "layer 3, head 2  first token")
    shown = np.asarray(large.images[0].get_array())
    assert np.allclose(np.sign(shown) * shown**2, maps[2][1], atol=1e-6)
    assert [label.get_text() for label in large.get_yticklabels()] == ["a⏎"] * 35
