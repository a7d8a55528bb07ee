"""Batches are a function of (seed, step, rank) alone, without replacement; validation covers every token."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loader import Loader, ShardError, Shards, validation
from kernels.reference_attention import IGNORE_INDEX
from tests.data.test_shards import store


@pytest.fixture
def counting(tmp_path: Path) -> Shards:
    """1,000 different tokens, 0 to 999, in three shards."""
    return store(tmp_path, [list(range(300)), list(range(300, 301)), list(range(301, 1000))])


def test_targets_are_the_next_tokens(counting: Shards) -> None:
    x, y = Loader(counting, context=16, seed=0).batch(3, 8)
    assert (
        x.shape == y.shape == (8, 16) and x.dtype == y.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()
    )
    assert torch.equal(y, (x + 1) % 1000)


@pytest.mark.parametrize(("context", "sequences"), [(10, 4), (10, 7), (8, 5), (999, 1), (30, 64)])
def test_every_token_is_a_target_once_per_epoch(counting: Shards, context: int, sequences: int) -> None:
    loader = Loader(counting, context=context, seed=3)
    windows = 1000 // context
    assert loader.num_sequences == windows
    rows = torch.cat([loader.batch(step, sequences)[1] for step in range(5 * windows // sequences + 1)])
    epochs = [rows[e * windows : (e + 1) * windows] for e in range(5)]
    for epoch in epochs:
        assert len(epoch) == windows
        targets = epoch.flatten().tolist()
        assert len(set(targets)) == len(targets) == windows * context > 1000 - context
    if windows > 5:
        orders = [epoch[:, 0].tolist() for epoch in epochs]
        assert all(a != b for a, b in itertools.combinations(orders, 2))  # every epoch is reshuffled
        assert len({order[0] % context for order in orders}) > 1  # and its sequences start at another offset
        steps = [{(b - a) % 1000 for a, b in itertools.pairwise(order)} for order in orders]
        assert all(len(step) > 3 for step in steps)  # and they are not in the order of the text


def test_batch_depends_on_seed_and_step_alone(counting: Shards) -> None:
    loader = Loader(counting, context=10, seed=5)
    straight = [loader.batch(step, 12) for step in range(40)]
    resumed = Loader(counting, context=10, seed=5)
    for step in (39, 17, 0, 31, 17):
        assert all(torch.equal(a, b) for a, b in zip(resumed.batch(step, 12), straight[step], strict=True))
    assert not torch.equal(Loader(counting, context=10, seed=6).batch(0, 12)[0], straight[0][0])


def test_order_of_a_seed_is_fixed(counting: Shards) -> None:
    """Recorded values: a run can be resumed with any later version of numpy, torch or heed."""
    assert Loader(counting, context=10, seed=1337).batch(0, 8)[0][:, 0].tolist() == [
        443,
        273,
        513,
        223,
        533,
        563,
        963,
        603,
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
def test_ranks_share_one_global_order(counting: Shards, ranks: int) -> None:
    loader = Loader(counting, context=10, seed=2)
    for step in (0, 7, 8, 9):  # 8: the batch spans two epochs
        whole = loader.batch(step, 12)
        parts = [Loader(counting, context=10, seed=2).batch(step, 12, rank, ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat([x for x, _ in parts]), whole[0])
        assert torch.equal(torch.cat([y for _, y in parts]), whole[1])
    with pytest.raises(ValueError, match="12 sequences per step are not divisible by 5 ranks"):
        loader.batch(0, 12, 0, 5)


def test_text_shorter_than_the_context_raises(tmp_path: Path) -> None:
    shards = store(tmp_path, [list(range(10))])
    with pytest.raises(
        ShardError, match=r"model.context = 10: the training text of 's' has only 10 tokens, and 11 are needed"
    ):
        Loader(shards, context=10, seed=0)
    assert Loader(shards, context=9, seed=0).batch(5, 2)[0].shape == (2, 9)


@pytest.mark.parametrize("tokens", [1, 9, 10, 11, 39, 40, 41, 1000])
def test_validation_has_every_token_as_target_once_in_order(tmp_path: Path, tokens: int) -> None:
    shards = store(tmp_path, [list(range(1, tokens + 1))])
    batches = list(validation(shards, context=10, sequences=4, eot=0))
    assert all(x.shape == y.shape and x.shape[0] <= 4 and x.shape[1] == 10 for x, y in batches)
    x, y = (torch.cat(parts).flatten() for parts in zip(*batches, strict=True))
    assert y[y != IGNORE_INDEX].tolist() == list(range(1, tokens + 1))
    assert x[:tokens].tolist() == list(range(tokens))  # shifted by one, end of text in front
    assert (x[tokens:] == 0).all() and (y[tokens:] == IGNORE_INDEX).all() and len(y) - tokens < 10


def test_a_sequence_is_one_read_and_an_epoch_one_shuffle(counting: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes the loader fast, whatever the machine."""
    reads, shuffles, read, sort = list[int](), list[int](), Shards.read, np.argsort
    monkeypatch.setattr(Shards, "read", lambda self, at, count: reads.append(count) or read(self, at, count))
    monkeypatch.setattr(np, "argsort", lambda a, **options: shuffles.append(len(a)) or sort(a, **options))
    loader = Loader(counting, context=10, seed=0)
    for step in range(40):  # 4 sequences each, of 100 in an epoch
        loader.batch(step, 8, rank=step % 2, ranks=2)
    assert reads == [11] * 160
    assert shuffles == [100] * 4  # 320 sequences of all ranks
