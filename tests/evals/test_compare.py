"""python -m evals.compare: the table against the records, the curves against their data, and what is refused."""

import json
import shutil
from typing import Any

import pytest

from evals import compare
from sample import load
from tests.conftest import losses


@pytest.fixture
def two(runs, tmp_path):
    """The run `songs`, and a copy of it with records written by hand."""
    for name in ("songs", "other"):
        (tmp_path / name).mkdir()
        for file in ("config.toml", "tokenizer.json", "metrics.jsonl"):
            shutil.copy(runs / "songs" / file, tmp_path / name / file)
    records = [
        {"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0},
        {"step": 2, "val_loss": 4.5, "val_bpb": 2.25, "seconds": 90.0},
        {"step": 3, "loss": 3.0}, {"step": 4, "loss": 3.5},
        {"step": 4, "val_loss": 4.75, "val_bpb": 2.5, "seconds": 180.0},
    ]  # fmt: skip
    write(tmp_path / "other", records)
    return tmp_path


def write(run, records) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def table(printed: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in printed.splitlines()[1:3]}


def test_the_table(two, runs, capsys):
    assert compare.main([str(two / "songs"), str(two / "other"), "--out", str(two / "both.png")]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split()[:2] == ["run", "parameters"]
    found = table(printed)
    parameters = sum(p.numel() for p in load(runs / "songs")[0].parameters())
    assert found["other"] == [f"{parameters:,}", "4", f"{4 * 256:,}", "3.0", "4.7500", "4.5000", "2.2500"]
    validation, bits = losses(runs / "songs", "val_loss"), losses(runs / "songs", "val_bpb")
    best = min(validation, key=validation.get)
    assert found["songs"][1:3] == ["30", f"{30 * 256:,}"]
    assert found["songs"][4:] == [f"{validation[30]:.4f}", f"{validation[best]:.4f}", f"{bits[best]:.4f}"]
    assert printed.endswith(f"wrote {two / 'both.png'}\n") and "compared" not in printed
    assert (two / "both.png").read_bytes().startswith(b"\x89PNG")


def test_the_loss_over_the_whole_split_comes_before_those_over_a_part(two, capsys):
    write(
        two / "other",
        [
            {"step": 2, "val_loss": 4.5, "val_bpb": 2.25, "seconds": 90.0},
            {"step": 2, "full_val_loss": 4.6, "full_val_bpb": 2.3, "seconds": 91.0},
        ],
    )
    assert compare.main([str(two / "other"), "--out", str(two / "a.png")]) == 0
    assert table(capsys.readouterr().out)["other"][4:] == ["4.6000", "4.6000", "2.3000"]


def test_the_loss_over_the_whole_split_is_that_of_the_last_step(two, capsys):
    """A finished run that was resumed with more steps: what it had at its first end is neither final nor the best."""
    records = [
        {"step": 2, "val_loss": 4.5, "val_bpb": 2.25, "seconds": 90.0},
        {"step": 2, "full_val_loss": 4.0, "full_val_bpb": 2.0, "seconds": 91.0},
        {"step": 3, "loss": 4.1},
        {"step": 4, "val_loss": 4.25, "val_bpb": 2.125, "seconds": 180.0},
    ]
    for more, expected in (
        ([], ["4.2500", "4.2500", "2.1250"]),
        ([{"step": 4, "full_val_loss": 4.4, "full_val_bpb": 2.2, "seconds": 181.0}], ["4.4000", "4.4000", "2.2000"]),
    ):
        write(two / "other", records + more)
        assert compare.main([str(two / "other"), "--out", str(two / "a.png")]) == 0
        assert table(capsys.readouterr().out)["other"][4:] == expected


def test_the_curves(two, monkeypatch):
    import matplotlib.pyplot as plt

    figures: list[Any] = []
    monkeypatch.setattr(plt, "close", figures.append)
    compare.draw(two / "a.png", [compare.read(two / "other", "other")])
    left, right = figures[0].get_axes()
    train, validation = (line.get_xydata().tolist() for line in left.get_lines())
    assert train == [[256, 5.0], [512, 4.0], [768, 3.0], [1024, 3.5]]
    assert validation == [[512, 4.5], [1024, 4.75]]
    assert [line.get_xydata().tolist() for line in right.get_lines()] == [[[1.5, 2.25], [3.0, 2.5]]]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["other"]


def test_a_run_that_was_not_evaluated_yet(two, capsys):
    write(two / "other", [{"step": 1, "loss": 5.0}])
    assert compare.main([str(two / "other"), str(two / "songs"), "--out", str(two / "a.png")]) == 0
    assert table(capsys.readouterr().out)["other"][1:] == ["1", "256", "-", "-", "-", "-"]


def test_what_must_not_be_compared_is_said(two, capsys):
    out = ["--out", str(two / "a.png")]
    (two / "other" / "tokenizer.json").write_text("{}")
    assert compare.main([str(two / "other"), str(two / "songs"), *out]) == 0
    assert "the runs have different tokenizers: compare bits per byte, not nats per token\n" in capsys.readouterr().out
    recipe = (two / "other" / "config.toml").read_text()
    texts, measured = "the runs have different texts ({}): their losses cannot be compared\n", "the runs differ in {}: "
    for changes, note in (
        ({"songs.txt": "hymns.txt"}, texts.format("data.source")),
        ({"limit = 0": "limit = 9", "val_fraction = 0.2": "val_fraction = 0.1"},
         texts.format("data.limit, data.val_fraction")),
        ({"document_mask = false": "document_mask = true"}, measured.format("data.document_mask")),
        ({"eval_tokens = 0": "eval_tokens = 999", "context = 32": "context = 16"},
         measured.format("train.eval_tokens, model.context") + "their losses are not measured alike\n"),
        ({"vocab_size = 300": "vocab_size = 310", "seed = 0": "seed = 1"}, "a.png\n"),
    ):  # fmt: skip
        changed = recipe
        for old, new in changes.items():
            assert old in changed
            changed = changed.replace(old, new)
        (two / "other" / "config.toml").write_text(changed)
        assert compare.main([str(two / "other"), str(two / "songs"), *out]) == 0
        printed = capsys.readouterr().out
        assert note in printed and ("differ" in printed) == ("differ" in note)
        (two / "other" / "tokenizer.json").write_text((two / "songs" / "tokenizer.json").read_text())


def test_runs_of_one_name_are_told_apart(two, capsys):
    (two / "more").mkdir()
    shutil.copytree(two / "other", two / "more" / "other")
    words = [str(two / "other"), str(two / "more" / "other"), str(two / "other"), "--out", str(two / "a.png")]
    assert compare.main(words) == 0
    found = table(capsys.readouterr().out)
    assert list(found) == [f"{two.name}/other", "more/other"]  # a folder that is named twice is there once


def test_a_mistake_in_a_run_is_said_before_one_in_the_default_of_out(tmp_path, capsys):
    """A new clone has no folder runs/, where the picture goes by default."""
    assert compare.main([str(tmp_path / "none"), "--out", str(tmp_path / "runs" / "compare.png")]) == 2
    assert "none: is not the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: shutil.rmtree(run), "{run}: is not the folder of a run: there is no {run}"),
        (lambda run: (run / "metrics.jsonl").unlink(), "there is no {run}/metrics.jsonl"),
        (lambda run: (run / "config.toml").unlink(), "there is no {run}/config.toml"),
        (lambda run: (run / "metrics.jsonl").write_text("{\n"), "metrics.jsonl: has no record: the run has not made a"),
        (lambda run: (run / "config.toml").write_text("[model]\nlayers = 3\n"), "layers"),
    ],
)
def test_what_is_no_run_is_one_line(two, capsys, change, message):
    change(two / "other")
    assert compare.main([str(two / "songs"), str(two / "other"), "--out", str(two / "a.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("evals.compare: ") and error.count("\n") == 1
    assert message.format(run=two / "other") in error
    assert not (two / "a.png").exists()


@pytest.mark.parametrize("out", ["nowhere/a.png", "a.gif"])
def test_where_no_picture_can_be(two, capsys, out):
    assert compare.main([str(two / "songs"), "--out", str(two / out)]) == 2
    assert "must be a .png in a folder that exists" in capsys.readouterr().err
