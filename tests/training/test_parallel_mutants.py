"""Do the tests of several processes have teeth? Bugs are put into training/ one at a time; a check must fail."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from tests.training import test_matrix_owners, test_parallel, test_ranks
from tests.training.ranks import call
from training.checkpoint import CheckpointError

HSDP = (test_parallel.check_mesh, 2, 2, ["tied"])
OWNERS = (test_matrix_owners.check_owners, 4, 2, test_matrix_owners.SHAPES, torch.float32)
RESUME = (test_parallel.check_resume,)
EVALUATE = (test_ranks.check_validation, 4, 1)
PIECES = "(lambda f, rows, *_: [f(x[None])[0] for x in rows])(function, ahead,"
MUTANTS = [  # file in training/, name, right, wrong, check
    ("matrix_owners", "nothing is computed", "function(torch.stack(", "(torch.stack(", OWNERS),
    ("matrix_owners", "pieces of another matrix", "pieces[i :: len(mine)]", "pieces[i * S : (i + 1) * S]", OWNERS),
    ("matrix_owners", "results to the process before", "S, p)] for p in", "S, p - 1)] for p in", OWNERS),
    ("matrix_owners", "the first copy's results for all", "counts, gathered,", "counts, gathered[:1] * R,", OWNERS),
    ("matrix_owners", "one owner for all", "least = min(work)", "least = work[0]", HSDP),
    ("optimizers", "rows are taken for matrices", "by_owner(function, ahead,", PIECES, HSDP),
    ("optimizers", "the size of the rows", "max(shape) ** 0.5", "max(weights[0].shape) ** 0.5", HSDP),
    ("distributed", "no reduction across copies", "all_reduce(last)", "all_reduce(False)", HSDP),
    ("distributed", "all have the first rows", 'mesh.get_local_rank("shard"))]', "0)]", RESUME),
    ("distributed", "a copy's rows in another order", ".full_tensor() if", ".full_tensor().flip(0) if", RESUME),
    ("checkpoint", "moments are not loaded", "= part.clone()", "= 0 * part", RESUME),
    ("checkpoint", "moments of the rows alone", "= whole(value)", "= getattr(value, '_local_tensor', value)", RESUME),
    ("validation_loss", "the last batch counts twice", "if world.rank >= len(group)", "if False", EVALUATE),
    ("validation_loss", "a process has no batch", "min(world.rank, len(group) - 1)", "world.rank", EVALUATE),
]


def mutated(rank: int, file: str, right: str, wrong: str, function, *args):
    """function(rank, *args) with a bug in a module, wherever its names were imported."""
    module = importlib.import_module(f"training.{file}")
    source, before = Path(module.__file__).read_text(), dict(vars(module))
    exec(compile(source.replace(right, wrong), file, "exec"), vars(module))
    for other in [m for name, m in sys.modules.items() if name.startswith(("training", "tests", "train"))]:
        for name, new in vars(module).items():
            if name in before and getattr(other, name, None) is before[name]:
                setattr(other, name, new)
    return function(rank, *args)


def test_without_a_bug_a_check_passes():
    def unchanged(size, function, *args):
        return call(size, mutated, "matrix_owners", "", "", function, *args)

    OWNERS[0](*OWNERS[1:], call=unchanged)


@pytest.mark.parametrize(("file", "name", "right", "wrong", "check"), MUTANTS, ids=[f"{m[0]}: {m[1]}" for m in MUTANTS])
def test_a_mutant_is_caught(file, name, right, wrong, check):
    source = Path(importlib.import_module(f"training.{file}").__file__).read_text()
    assert source.count(right) == 1, f"occurs {source.count(right)} times: {right}"

    def with_a_bug(size, function, *args):
        return call(size, mutated, file, right, wrong, function, *args)

    with pytest.raises((AssertionError, CheckpointError, EOFError)):  # EOFError: a process has raised an error
        check[0](*check[1:], call=with_a_bug)
