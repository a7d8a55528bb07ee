"""python -m benchmarks scaling: its arithmetic, and its whole path on tiny sizes."""

import csv

import pytest

from benchmarks import __main__ as bench
from benchmarks import scaling


def test_exponents():
    sizes = [1, 2, 4, 8, 16, 32]
    assert scaling.exponent(sizes, [3.0 * n**2 for n in sizes]) == pytest.approx(2)
    assert scaling.exponent(sizes, [100.0, 100.0, 100.0, 8.0, 16.0, 32.0]) == pytest.approx(1)  # the upper half
    assert scaling.exponent([64, 128], [1.0, 8.0]) == pytest.approx(3)


def test_activation_checkpointing_takes_less_memory(monkeypatch):
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
    size = {"context": 256, "width": 128, "batch": 96, "vocabulary": 256}  # activations dominate
    kept, checkpointed = (
        scaling.measure(**size, checkpointing=checkpointing)["bytes"] for checkpointing in (False, True)
    )
    assert checkpointed < 0.9 * kept


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="'vocabulary': 0"):
        scaling.measure(context=64, width=64, batch=1, vocabulary=0, checkpointing=False)


def test_the_whole_path(tmp_path, capsys):
    assert bench.main(bench.arguments(["scaling", "--quick", "--out", str(tmp_path)])) == 0
    assert "exponent" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "scaling.csv").open()))
    assert len(rows) == 10
    assert {row["series"] for row in rows} == {
        "context",
        "context, activation checkpointing",
        "width",
        "batch",
        "vocabulary",
    }
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert (tmp_path / "scaling.png").stat().st_size > 1000
