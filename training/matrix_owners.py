"""Whole matrices within a step: each is made whole by one process, its owner, and computed once.

fully_shard divides a matrix by rows, and Muon's step needs all of them. Weights, gradients and momentum stay divided:
owners exist within a step only, so neither memory nor a checkpoint depends on them.

    there      all-to-all within a copy of the model: every process sends the owner its rows
    compute    the owner computes, all matrices of one shape as one batch
    back       all-to-all within the copy, then an all-gather across the copies, whose owners have other matrices

Of P numbers in all matrices, N processes that hold R copies send P / N each there and back, and receive P R / N across.
For optimizers that divide whole matrices among data-parallel processes see Liu et al. 2025, arXiv 2502.16982, section
2.3; a process that owns its matrices only while it computes needs no other communication than this.

Shapes: R copies of the model, S parts of each; a matrix is (rows, columns).
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Shape = tuple[int, ...]


def rows_of(rows: int, parts: int, part: int) -> slice:
    """The rows of one part of a matrix, as torch.chunk and fully_shard divide it: the last parts may have none."""
    size = -(-rows // parts)
    return slice(min(part * size, rows), min((part + 1) * size, rows))


@functools.cache
def owned(shapes: tuple[Shape, ...], copies: int, parts: int) -> list[list[list[int]]]:
    """For each copy of the model and each part of it, the numbers of the matrices that it owns.

    The next most expensive matrix goes to the owner with the least work (Graham 1969), to that in another copy before
    that in the same one. The cost is that of orthogonalizing (s, l): 4 s^2 l + 2 s^3 FLOPs an iteration, s <= l.
    """

    def cost(number: int) -> int:
        s, l = sorted(shapes[number])  # noqa: E741
        return 4 * s * s * l + 2 * s**3

    work = [[0, part, copy] for part in range(parts) for copy in range(copies)]
    numbers: list[list[list[int]]] = [[[] for _ in range(parts)] for _ in range(copies)]
    for number in sorted(range(len(shapes)), key=cost, reverse=True):
        least = min(work)
        least[0] += cost(number)
        numbers[least[2]][least[1]].append(number)
    return numbers


def by_owner(
    function: Callable[[Tensor], Tensor], divided: Sequence[Tensor], shapes: Sequence[Shape], mesh: DeviceMesh
) -> list[Tensor]:
    """Apply `function` to whole matrices, (number, rows, columns) -> the same shape; each is computed by one process.

    divided: of every matrix the rows of this process, all of one dtype. shapes: of the whole matrices. mesh: of
    training/distributed.py. Returns the rows of this process of every result.
    """
    (R, S), (copy, part) = mesh.shape, mesh.get_coordinate() or (0, 0)
    within, across = mesh.get_group("shard"), mesh.get_group("replicate")
    numbers = owned(tuple(tuple(shape) for shape in shapes), R, S)
    mine, ours = numbers[copy][part], [number for owner in numbers[copy] for number in owner]

    def size(number: int, part: int) -> int:
        rows = rows_of(shapes[number][0], S, part)
        return (rows.stop - rows.start) * shapes[number][1]

    def join(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([divided[0].new_empty(0), *(tensor.flatten() for tensor in tensors)])

    # There: this process's rows of the matrices of each owner in its copy, for the rows of its own from each part.
    to_owners = [sum(size(number, part) for number in owner) for owner in numbers[copy]]
    from_parts = [sum(size(number, p) for number in mine) for p in range(S)]
    sent = join(divided[number] for number in ours)
    received = sent.new_empty(sum(from_parts))
    dist.all_to_all_single(received, sent, from_parts, to_owners, group=within)
    pieces = received.split([size(number, p) for p in range(S) for number in mine])

    # Compute.
    whole = {number: join(pieces[i :: len(mine)]).view(shapes[number]) for i, number in enumerate(mine)}
    by_shape: dict[Shape, list[int]] = defaultdict(list)
    for number in mine:
        by_shape[tuple(shapes[number])].append(number)
    for same in by_shape.values():
        results = function(torch.stack([whole[number] for number in same]))
        whole |= dict(zip(same, results.unbind(), strict=True))

    # Back, and across: the results of a copy are padded to those of the copy with the most.
    back = join(whole[number][rows_of(shapes[number][0], S, p)] for p in range(S) for number in mine)
    dist.all_to_all_single(sent, back, to_owners, from_parts, group=within)
    orders = [[number for owner in of_copy for number in owner] for of_copy in numbers]
    counts = [[size(number, part) for number in order] for order in orders]
    padded = sent.new_empty(max(map(sum, counts)))
    padded[: len(sent)] = sent
    gathered = [torch.empty_like(padded) for _ in range(R)]
    dist.all_gather(gathered, padded, group=across)
    rows: dict[int, Tensor] = {}
    for order, count, flat in zip(orders, counts, gathered, strict=True):
        rows |= dict(zip(order, flat[: sum(count)].split(count), strict=True))
    return [rows[number].view(-1, shapes[number][1]) for number in range(len(shapes))]
