"""Do the tests of several processes have teeth? Bugs are put into training/ and kernels/ one at a time; a check must
fail."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels import test_context_parallel
from tests.training import test_matrix_owners, test_parallel, test_ranks
from tests.training.ranks import call
from training.checkpoint import CheckpointError

HSDP = (test_parallel.check_mesh, 2, 2, ["tied"])
OWNERS = (test_matrix_owners.check_owners, 4, 2, test_matrix_owners.SHAPES, torch.float32)
RESUME = (test_parallel.check_resume,)
EVALUATE = (test_ranks.check_validation, 4, 1)
PIECES = "(lambda f, rows, *_: [f(x[None])[0] for x in rows])(function, ahead,"
SHARED = (test_parallel.check_mesh, 2, 2, ["full and window layers"], 2, "ring")
FUSED = (test_parallel.check_mesh, 1, 2, ["fused"], 2, "ring")
EVALUATE_2 = (test_ranks.check_validation, 4, 1, 2)
GATHER, RING, ULYSSES = (
    (test_context_parallel.check, n, method, names)
    for n, method, names in ((2, "gather", ["a window of 7"]), (3, "ring", ["causal"]), (2, "ulysses", ["ALiBi"]))
)
PARALLEL, RINGS = "kernels.context_parallel", "kernels.ring_attention"
MUTANTS = [  # file in training/, or module, name, right, wrong, check
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
    (PARALLEL, "chunks that are not balanced", "late.flip(0)), 2)", "late), 2)", GATHER),
    (PARALLEL, "the second chunk is another device's", "2 * n - 1 - self.rank)", "n + self.rank)", GATHER),
    (PARALLEL, "a window without its first key", "mask_spec.window + 1)", "mask_spec.window + 2)", GATHER),
    (PARALLEL, "gradients stay where they are", "AllToAll.apply(dy, ctx.group)", "dy", GATHER),
    (PARALLEL, "the first heads' slopes", "x.chunk(n)[self.rank]", "x.chunk(n)[0]", ULYSSES),
    (RINGS, "later keys", "(both, first) if step <= rank", "(both, both) if step <= rank", RING),
    (RINGS, "the ring turns the other way", "for step in (1, -1)", "for step in (-1, 1)", RING),
    (RINGS, "the local log-sum-exp", "lse[:, queries] = both", "pass", RING),
    (RINGS, "shares of the other part", "* share + part * part_share", "* part_share + part * share", RING),
    (RINGS, "gradients do not come home", "dk, dv = returned() if returned else dkv", "dk, dv = dkv", RING),
    ("distributed", "positions from 0", "split(positions)", "split(positions) % 8", SHARED),
    ("distributed", "attention to own tokens", "self_attn.attend = attend", "self_attn.other = attend", SHARED),
    ("apply_fused_layers", "C++ attends to own tokens", "mixer.attend is attention", "mixer.attend", FUSED),
    ("validation_loss", "batches are left out", "islice(batches, world.data_size)", "islice(batches, 4)", EVALUATE_2),
    ("validation_loss", "the last batch counts twice", "if world.data_rank >= len(group)", "if False", EVALUATE),
    ("validation_loss", "a process has no batch", "min(world.data_rank, len(group) - 1)", "world.data_rank", EVALUATE),
]


def full_name(file: str) -> str:
    return file if "." in file else f"training.{file}"


def mutated(rank: int, file: str, right: str, wrong: str, function, *args):
    """function(rank, *args) with a bug in a module, wherever its names were imported."""
    module = importlib.import_module(full_name(file))
    source, before = Path(module.__file__).read_text(), dict(vars(module))
    exec(compile(source.replace(right, wrong), file, "exec"), vars(module))
    for other in [m for name, m in sys.modules.items() if name.startswith(("kernels", "training", "tests", "train"))]:
        for name, new in vars(module).items():
            if name in before and getattr(other, name, None) is before[name]:
                setattr(other, name, new)
    return function(rank, *args)


def test_without_a_bug_a_check_passes():
    def unchanged(size, function, *args):
        return call(size, mutated, "matrix_owners", "", "", function, *args)

    OWNERS[0](*OWNERS[1:], call=unchanged)
    for check in (GATHER, RING, ULYSSES, FUSED, EVALUATE_2):
        check[0](*check[1:], call=unchanged)


@pytest.mark.parametrize(("file", "name", "right", "wrong", "check"), MUTANTS, ids=[f"{m[0]}: {m[1]}" for m in MUTANTS])
def test_a_mutant_is_caught(file, name, right, wrong, check):
    source = Path(importlib.import_module(full_name(file)).__file__).read_text()
    assert source.count(right) == 1, f"occurs {source.count(right)} times: {right}"

    def with_a_bug(size, function, *args):
        return call(size, mutated, file, right, wrong, function, *args)

    with pytest.raises((AssertionError, CheckpointError, EOFError)):  # EOFError: a process has raised an error
        check[0](*check[1:], call=with_a_bug)
