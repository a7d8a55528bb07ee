"""python -m benchmarks scale --paper: its formulas against what the engine does, and against numbers by hand."""

import dataclasses
import re

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as bench
from benchmarks import paper
from model import GPT
from tests.conftest import ROOT
from tests.training.ranks import call
from tests.training.test_matrix_owners import communicated
from tests.training.test_parallel import PLAIN
from training import distributed, optimizers
from training.config import OptimConfig
from training.distributed import World

# Rows that 8 devices divide evenly: the formulas leave out padding.
CONFIG = dataclasses.replace(PLAIN, n_layer=4, vocab_size=128, n_embd=32, head_dim=8, n_ffn=64)
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)


@pytest.mark.parametrize(("size", "shard"), [(8, 1), (8, 8), (64, 8), (512, 8)])
@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_bytes_sent_are_those_of_the_engine(size, shard, config):
    S, R, m = shard, size // shard, 3
    (engine,) = call(1, communicated, size, shard, config, m)
    sent = paper.sent(config, S, R, m, muon_bytes=4)  # on a CPU Muon's messages are fp32
    assert sent["weights"] == engine["_allgather_base_"]
    assert sent["gradients"] == engine["_reduce_scatter_base_"]
    assert sent["gradients across"] == pytest.approx(2 * engine["allreduce_"] * (R - 1) / R)
    assert sent["Muon"] == engine["alltoall_base_"]
    assert sent["Muon across"] == engine["allgather_"]


def held(rank: int, size: int, shard: int, config):
    """Bytes of weights, gradients and optimizer state of rank 0 of `size`, after a step."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    model = GPT(config)
    distributed.parallelize(model, World(0, size), shard, torch.device("cpu"))
    os_ = optimizers.build_optimizers(model, OptimConfig(), torch.float32)
    model.loss(*torch.zeros(2, 1, 16, dtype=torch.long)).backward()
    for optimizer in os_:
        optimizer.step()
    states = [x for o in os_ for state in o.state.values() for x in state.values() if torch.is_tensor(x) and x.ndim]
    tensors = [*model.parameters(), *(p.grad for p in model.parameters()), *states]
    return sum(distributed.local(x).nbytes for x in tensors)


@pytest.mark.parametrize(("size", "shard"), [(8, 1), (8, 8), (512, 8)])
def test_state_is_what_a_device_holds(size, shard):
    for config in (CONFIG, UNTIED):
        (engine,) = call(1, held, size, shard, config)
        assert paper.memory(config, shard, 0, checkpointing=True)["state"] == engine


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_flops_of_a_matrix(shape, monkeypatch):
    with FlopCounterMode(display=False) as counter:
        optimizers.orthogonalize(torch.randn(1, *shape))
    alone = paper.Sizes((shape,), 0, 0, 0)
    monkeypatch.setattr(paper, "sizes", lambda config: alone)
    assert paper.orthogonalization(CONFIG, 1, 1) == counter.get_total_flops()
    monkeypatch.setattr(paper, "sizes", lambda config: alone._replace(matrices=(shape,) * 5))
    assert paper.orthogonalization(CONFIG, 2, 2) == 2 * counter.get_total_flops()  # of four owners one has two


def test_numbers_by_hand():
    """124M: 12 layers of 4 x 768^2 + 3 x 768 x 2048, an embedding of 50257 x 768, gains; 8B: Llama 3's 8.03e9."""
    small, _, large = (model.config for model in paper.MODELS)
    n = paper.sizes(small)
    assert n.muon == 12 * (4 * 768**2 + 3 * 768 * 2048) == 84_934_656
    assert n.layers == n.muon + 12 * (2 * 768 + 2 * 64) and n.rest == 50257 * 768 + 768
    assert 8.02e9 < paper.sizes(large).all < 8.04e9
    alone = {"state": 12 * n.muon + 16 * (n.all - n.muon), "gathered": 0, "activations": 0}
    assert paper.memory(small, 1, 0, True) == alone
    found = paper.memory(small, 8, 1000, False)
    assert found["gathered"] == 8 * (2 * n.layers / 12 + n.rest)
    assert found["activations"] == 70 * 12 * 768 * 1000
    assert paper.memory(small, 8, 1000, True)["activations"] == (4 * 12 + 70) * 768 * 1000
    # One device sends nothing: 65,536 tokens of 798e6 FLOPs at 55% of 989e12 are 96 ms.
    one = paper.seconds(small, 1, 1, 4, 65_536)
    assert one["messages"] == one["exposed"] == one["its messages"] == 0
    assert one["matmuls"] == pytest.approx(0.0961, rel=2e-3)
    # Muon: 12 layers of 4 squares, 30 C^3, and of 3 matrices with l = 8/3 C, (20 x 8/3 + 10) C^3.
    flops = 12 * 768**3 * (4 * 30 + 3 * (20 * 8 / 3 + 10))
    assert one["Muon"] == pytest.approx(flops / (0.45 * 989e12))
    assert one["kept"] == pytest.approx(one["matmuls"] / (one["matmuls"] + one["Muon"]))


def test_what_hides_messages():
    """More tokens: the same messages, and less of them exposed. Beyond a node they are slower."""
    config = paper.MODELS[0].config
    short, long = (paper.seconds(config, 512, 1, 1, tokens) for tokens in (1024, 4096))
    assert short["messages"] == long["messages"]
    assert short["exposed"] == pytest.approx(short["messages"] - short["matmuls"])
    assert long["kept"] > 2 * short["kept"]
    across, within = paper.seconds(config, 8, 8, 1, 8192), paper.seconds(config, 8, 1, 1, 8192)
    gradients = 4 * paper.sizes(config).all / 8 * 2 * 7 / 8
    assert across["messages"] - within["messages"] == pytest.approx(gradients / 45e9 + 2 * 13 * 3 * 10e-6)


def test_the_command_and_the_chapter(capsys):
    assert bench.main(bench.arguments(["scale", "--paper"])) == 0
    printed = capsys.readouterr().out
    assert "counted, not measured" in printed and "arXiv 2407.21783" in printed and "assumed" in printed
    chapter = (ROOT / "docs" / "10-scaling.md").read_text()
    told = set(re.findall(r"^\| (?:124M|1\.5B|8B) \|.*$", chapter, re.M))
    assert told == {markdown(row) for row in paper.rows()}
    with pytest.raises(SystemExit):
        bench.arguments(["scale"])


def markdown(row) -> str:
    """A row of the chapter's table: model, GPUs, mesh, tokens, state and memory in all, matmuls, exposed
    communication, Muon with its communication, the share of matmuls."""
    name, gpus, mesh, tokens, state, gathered, activations, matmuls, _, exposed, muon, messages, kept = row
    total = f"{sum(map(float, (state, gathered, activations))):.1f}"
    times = [matmuls, "", "", ""]
    if not isinstance(matmuls, str):
        times = [f"{matmuls:,.1f}", f"{exposed:,.1f}", f"{muon + messages:,.1f}", kept]
    return f"| {' | '.join([name, str(gpus), mesh, tokens, state, total, *times])} |"
