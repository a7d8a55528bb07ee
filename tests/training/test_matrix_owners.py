"""Owners of matrices: results, balance, and the bytes that a process sends in a step, up to 512 processes."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from model import GPT
from tests.training.ranks import call
from tests.training.sent_bytes import Sent
from tests.training.test_parallel import PLAIN, joined
from training import distributed, matrix_owners, optimizers
from training.config import OptimConfig
from training.distributed import World


def shared_out(rank: int, copies: int, shapes, dtype):
    """For each matrix, whether this process's rows of the result are right; the calls of the function."""
    world = joined()
    model = GPT(PLAIN)
    distributed.parallelize(model, world, world.size // copies, torch.device("cpu"))
    mesh = next(model.parameters()).device_mesh
    random = torch.Generator().manual_seed(1)
    matrices = [torch.randn(shape, generator=random).to(dtype) for shape in shapes]
    part = mesh.get_local_rank("shard")

    def rows(matrix):
        size = -(-len(matrix) // mesh.size(1))
        return matrix[part * size : (part + 1) * size]

    calls = []

    def function(batch):
        calls.append(tuple(batch.shape))
        return batch.flip(1) + batch.amax((1, 2), keepdim=True)  # needs all rows, and is exact

    found = matrix_owners.by_owner(function, [rows(m) for m in matrices], shapes, mesh)
    expected = [rows(m.flip(0) + m.amax()) for m in matrices]
    return [got.dtype == dtype and torch.equal(got, right) for got, right in zip(found, expected, strict=True)], calls


SHAPES = [(7, 5), (2, 9), (7, 5), (1, 3), (6, 6), (7, 5), (8, 2)]


def check_owners(size: int, copies: int, shapes, dtype, call=call) -> None:
    """AssertionError unless each result is right, and computed once."""
    results = call(size, shared_out, copies, shapes, dtype)
    assert all(all(right) for right, _ in results)
    batches = [batch for _, calls in results for batch in calls]
    computed = sorted(batch[1:] for batch in batches for _ in range(batch[0]))
    assert computed == sorted(shapes)
    assert all(len({batch[1:] for batch in calls}) == len(calls) for _, calls in results)  # a shape is one batch


@pytest.mark.parametrize(("size", "copies"), [(2, 2), (3, 1), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_function_of_whole_matrices_is_computed_by_their_owners(size, copies, dtype):
    check_owners(size, copies, SHAPES, dtype)
    check_owners(size, copies, SHAPES[:1], dtype)  # fewer matrices than owners


@pytest.mark.parametrize(("copies", "parts"), [(1, 1), (1, 8), (8, 1), (64, 8), (3, 5)])
def test_owners_have_about_equal_work(copies, parts):
    """At most one matrix more than the mean: no schedule could promise less."""
    shapes = tuple([(20, 20), (10, 20), (10, 20), (20, 20), (60, 20), (60, 20), (20, 60)] * 12)
    numbers = matrix_owners.owned(shapes, copies, parts)
    assert len(numbers) == copies and all(len(copy) == parts for copy in numbers)
    owners = [owner for copy in numbers for owner in copy]
    assert sorted(itertools.chain(*owners)) == list(range(len(shapes)))

    def work(numbers) -> int:
        return sum(4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3 for s in (shapes[number] for number in numbers))

    largest = work([4])
    assert max(map(work, owners)) <= work(range(len(shapes))) / len(owners) + largest
    if len(shapes) < len(owners):  # spread over the copies: what a copy sends across is padded to the largest
        assert max(sum(map(len, copy)) for copy in numbers) == -(-len(shapes) // copies)


def communicated(rank: int, size: int, shard: int, config, micro_batches: int):
    """Bytes that rank 0 of `size` sends in a step, by operation. The other processes are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    model = GPT(config)
    distributed.parallelize(model, World(0, size), shard, torch.device("cpu"))
    os_ = optimizers.build_optimizers(model, OptimConfig(), torch.float32)
    tokens = torch.zeros(1, 16, dtype=torch.long)
    with Sent() as sent:
        for number in range(micro_batches):
            distributed.reduce_gradients(model, last=number == micro_batches - 1)
            model.loss(tokens, tokens).backward()
        for optimizer in os_:
            optimizer.step()
    return sent.bytes


@pytest.mark.parametrize(("size", "shard"), [(8, 1), (8, 8), (64, 8), (512, 8), (512, 512), (512, 1)])
def test_communicated_bytes_are_those_of_the_formula(size, shard):
    """Rows are padded to a multiple of `shard`. Nothing is known but the shapes."""
    config, m = dataclasses.replace(PLAIN, n_layer=4, vocab_size=128, n_embd=32, head_dim=8, n_ffn=64), 3
    (sent,) = call(1, communicated, size, shard, config, m)
    S, R = shard, size // shard
    shapes = {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}
    padded = {name: 4 * -(-shape[0] // S) * S * math.prod(shape[1:]) for name, shape in shapes.items()}
    P, blocks = sum(padded.values()), sum(n for name, n in padded.items() if ".layers." in name)
    matrices = [shape for name, shape in shapes.items() if len(shape) == 2 and ".layers." in name]
    numbers = matrix_owners.owned(tuple(matrices), R, S)
    rows = [4 * -(-shape[0] // S) * shape[1] for shape in matrices]  # bytes of rank 0: the first rows
    there = sum(rows[n] for part in range(1, S) for n in numbers[0][part])
    back = sum(4 * matrices[n][0] * matrices[n][1] - rows[n] for n in numbers[0][0])
    across = max(sum(rows[n] for part in copy for n in part) for copy in numbers)
    assert sent == {
        "send": 0,
        "_allgather_base_": m * (P + blocks) * (S - 1) // S,
        "_reduce_scatter_base_": m * P * (S - 1) // S,
        "allreduce_": P // S,
        "alltoall_base_": there + back,
        "allgather_": across * (R - 1),
    }
