"""python -m benchmarks zoo: the runner and its files, and the members' sizes and memory."""

import csv
import dataclasses
import sys
import types

import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks.zoo import members, recall, run, text
from benchmarks.zoo.results import Results, best_rate
from model import GPT, ModelConfig
from tests.conftest import command

BASE = ModelConfig(vocab_size=96, context=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, head_dim=32, n_ffn=176)


@pytest.fixture
def toy(monkeypatch):
    """An experiment of three points, one of which fails as long as `broken`; `measured` lists the calls."""
    module = types.ModuleType("benchmarks.zoo.toy")

    def measure(x, lr):
        module.measured.append(x)
        if x == 2 and module.broken:
            raise RuntimeError("two\nlines")
        return {"square": x * x * lr}

    module.EXCLUSIVE, module.MEASURES, module.broken, module.measured = False, ("square",), False, []
    module.points = lambda scale, seeds: [{"x": x, "lr": 1 / 3} for x in (1, 2, 3)]
    module.measure = measure
    module.table = lambda rows: f"sum {sum(row['square'] for row in rows):.3f}"
    module.picture = lambda rows, path: path.write_bytes(b"png")
    monkeypatch.setitem(sys.modules, "benchmarks.zoo.toy", module)
    return module


def run_toy(out, minutes=1.0):
    return run.run(["toy"], out, "quick", [], 1, 1, minutes)


def test_rows_table_and_picture_are_written(toy, tmp_path, capsys):
    assert run_toy(tmp_path) == 0
    rows = list(csv.DictReader((tmp_path / "quick" / "toy.csv").open()))
    assert [row["x"] for row in rows] == ["1", "2", "3"] and not any(row["error"] for row in rows)
    assert (tmp_path / "quick" / "toy.md").read_text() == "sum 4.667\n"
    captured = capsys.readouterr()
    assert "sum 4.667" in captured.out and "3/3" in captured.err


def test_a_run_killed_at_any_byte_continues_with_the_missing_points(toy, tmp_path):
    run_toy(tmp_path)
    path = tmp_path / "quick" / "toy.csv"
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        toy.measured.clear()
        assert run_toy(tmp_path) == 0
        assert path.read_bytes() == whole
        done = max(whole[:cut].count(b"\n") - 1, 0)  # without the header
        assert toy.measured == [1, 2, 3][done:]


def test_a_point_that_fails_is_a_row_and_is_tried_again(toy, tmp_path, capsys):
    toy.broken = True
    assert run_toy(tmp_path) == 1
    rows = list(csv.DictReader((tmp_path / "quick" / "toy.csv").open()))
    assert [row["error"] for row in rows] == ["", "RuntimeError: two lines", ""] and rows[1]["square"] == ""
    captured = capsys.readouterr()
    assert "RuntimeError: two lines" in captured.err and "sum 3.333" in captured.out
    toy.broken = False
    toy.measured.clear()
    assert run_toy(tmp_path) == 0
    assert toy.measured == [2]


def test_no_point_starts_after_the_time(toy, tmp_path):
    assert run_toy(tmp_path, minutes=-1.0) == 0
    assert toy.measured == []


def test_a_csv_with_other_columns_is_refused(toy, tmp_path):
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick" / "toy.csv").write_text("x,y\n1,2\n")
    with pytest.raises(ValueError, match=r"toy.csv: its columns are not x, lr, square, error"):
        run_toy(tmp_path)


def test_a_point_in_a_process_of_its_own():
    point = {"member": "softmax attention", "head_dim": 8, "lr": 1.0, "seed": 0, "steps": 0}
    ((_, found, error),) = run.measured(lambda p: run.in_subprocess("recall", 1, p), [point], 1, float("inf"))
    assert error == "" and found.keys() == set(recall.MEASURES) and found["accuracy at 16"] < 0.1
    ((_, found, error),) = run.measured(
        lambda p: run.in_subprocess("recall", 1, p), [{**point, "member": "nobody"}], 1, float("inf")
    )
    assert found is None and error == "ValueError: recall: KeyError: 'nobody'"


def test_the_bar_of_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = run.Progress("toy", 1, 3)
    progress.advance({"x": 1}, "")
    progress.end()
    assert f"\r\033[Ktoy [{'#' * 20}{'.' * 10}] 2/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["nothing"], "zoo nothing: must be one of recall, "),
        (["recall", "--only", "X"], "--only X: must be one of softmax attention, "),
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--minutes", "0"], "--minutes 0: must be above 0"),
    ],
)
def test_wrong_arguments_are_one_line(words, message):
    with pytest.raises(ValueError) as error:
        bench.main(bench.arguments(["zoo", *words]))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_results_that_cannot_be_written_are_one_line(tmp_path):
    (tmp_path / "file").touch()
    done = command("benchmarks", "zoo", "recall", "--quick", "--out", str(tmp_path / "file"), where=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"benchmarks: {tmp_path / 'file' / 'quick'}: Not a directory\n")


def test_only_some_members(toy, tmp_path):
    toy.points = lambda scale, seeds: [{"member": name, "lr": 1.0} for name in members.MEMBERS]
    toy.measure = lambda member, lr: {"square": 1.0}
    run.run(["toy"], tmp_path, "quick", ["D", "sliding window"], 1, 1, 1.0)
    rows = csv.DictReader((tmp_path / "quick" / "toy.csv").open())
    assert {row["member"] for row in rows} == {"Gated DeltaNet", "sliding window"}


def test_best_rate():
    rows = [{"lr": lr, "loss": loss} for lr, loss in ((2, float("nan")), (1, 3.0), (3, 2.0), (1, 0.5), (3, 2.0))]
    assert best_rate(rows, "loss") == [rows[1], rows[3]]
    assert best_rate(rows, "loss", largest=True) == [rows[2], rows[4]]


def test_numbers_survive_the_csv(tmp_path):
    point = {"member": 'a, "b"', "lr": 1 / 3, "seed": 0}
    Results(tmp_path / "x.csv", list(point), ["loss"]).add(point, {"loss": float("nan")})
    opened = Results(tmp_path / "x.csv", list(point), ["loss"])
    assert opened.has(point) and not opened.has({**point, "lr": 0.333})


# Members ------------------------------------------------------------------------------------------------------------


def bases():
    """The baselines of the experiments, with their first layers."""
    yield recall.base(min(recall.HEAD_DIMS)), "C"
    yield dataclasses.replace(text.load("shakespeare").model, vocab_size=4096), ""


def test_members_have_equal_numbers_of_parameters():
    for base, first in bases():
        with torch.device("meta"):
            models = {member: GPT(members.config(member, base, first)) for member in members.MEMBERS}
        numbers = {member: sum(p.numel() for p in model.parameters()) for member, model in models.items()}
        target = pytest.approx(numbers[members.BASELINE], rel=0.005)
        assert numbers == dict.fromkeys(numbers, target)
        assert models[members.BASELINE].config.n_ffn == base.n_ffn


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="RWKV-7: no n_ffn gives it the 42,432 parameters"):
        members.config("RWKV-7", dataclasses.replace(BASE, n_ffn=8))


def test_bytes_of_the_state():
    """Counted by hand: two layers, two heads of 32."""

    def numbers(member, context):
        return members.state_bytes(members.config(member, BASE), context) / 4

    assert numbers("softmax attention", 100) == 2 * 2 * 100 * 64
    assert numbers("multi-query attention", 100) == 2 * 2 * 100 * 32
    assert numbers("sliding window", 4) == 2 * 2 * 4 * 64
    assert numbers("sliding window", 100) == 2 * 2 * 8 * 64  # the window
    assert numbers("Gated DeltaNet", 100) == numbers("Gated DeltaNet", 1) == 2 * (2 * 32 * 32 + 3 * 3 * 64)
    assert numbers("LSTM", 100) == 2 * 2 * 64
