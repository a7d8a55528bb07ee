"""python -m benchmarks scaling: its arithmetic, and its whole path on tiny sizes."""

import csv

import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks import scaling


def test_exponents():
    sizes = [1, 2, 4, 8, 16, 32]
    assert scaling.exponent(sizes, [3.0 * n**2 for n in sizes]) == pytest.approx(2)
    assert scaling.exponent(sizes, [100.0, 100.0, 100.0, 8.0, 16.0, 32.0]) == pytest.approx(1)  # the upper half
    assert scaling.exponent([64, 128], [1.0, 8.0]) == pytest.approx(3)


SIZE = {"context": 64, "width": 64, "batch": 4, "vocabulary": 256}


def test_activation_checkpointing_saves_only_the_inputs_of_layers():
    """Counted: the bytes that autograd saves in the forward pass, each storage once."""

    def saved(checkpointing: bool) -> int:
        storages = {}

        def pack(x):
            storage = x.untyped_storage()  # kept alive, so that no other one has its address
            storages[storage.data_ptr()] = storage
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            scaling.step(**SIZE, checkpointing=checkpointing)
        return sum(storage.nbytes() for storage in storages.values())

    kept, checkpointed = saved(False), saved(True)
    assert checkpointed < kept / 2


def test_a_measurement_in_a_process_of_its_own():
    found = scaling.measure(**SIZE, checkpointing=True)
    assert found.keys() == {"seconds", "bytes"} and found["seconds"] > 0 and found["bytes"] > 1


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
