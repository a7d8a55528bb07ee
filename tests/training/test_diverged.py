"""Weights that are not finite are neither saved nor evaluated."""

import pytest
import torch

import train
from tests.conftest import losses
from training import checkpoint


def test_weights_that_are_not_finite_are_not_saved(run_training, monkeypatch, tmp_path):
    real = train.build_optimizers

    def broken(model, *a):
        adamw, muon = real(model, *a)
        step = adamw.step

        def poisoned():
            step()
            if len(losses(tmp_path / "bad")) == 3:  # the update of step 4
                with torch.no_grad():
                    model.model.norm.weight[0] = torch.nan

        adamw.step = poisoned
        return [adamw, muon]

    monkeypatch.setattr(train, "build_optimizers", broken)
    with pytest.raises(train.Diverged, match="step 4: a weight is not finite, and nothing was saved"):
        run_training("bad", "--train.steps=4", "--train.num_evals=2")
    assert checkpoint.read_state(checkpoint.find(tmp_path / "bad", "latest"))["step"] == 2


def test_a_validation_loss_that_is_not_finite_stops_the_run(run_training, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "validate", lambda *_: float("nan"))
    with pytest.raises(train.Diverged, match="step 2: the loss is nan"):
        run_training("bad", "--train.steps=4", "--train.num_evals=2")
    assert not losses(tmp_path / "bad", "val_loss") and not (tmp_path / "bad" / "best").exists()
