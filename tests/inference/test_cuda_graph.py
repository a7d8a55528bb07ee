"""The CUDA graph engine with a graph simulated on the CPU: operations are recorded, and replayed on the same memory.

As in a real graph, capturing changes no tensor, and a replay reads nothing from the host: a length or a position that
the recorded step had read as a Python number would stay what it was.
"""

import contextlib
import dataclasses
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
import sample
from inference import continuous_batching
from inference.continuous_batching import ContinuousBatch, Sequence
from inference.engine import CudaGraphEngine, EagerEngine, make_engine
from inference.sampling import SamplingParams
from model import KVCache
from tests.conftest import TINY, randomized
from tests.inference.test_continuous_batching import alone, finish
from training import device
from zoo import MIXERS


class Graph(TorchDispatchMode):
    """Records operations with their tensors. What they change is put back at the end of the capture."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing: the host reads a tensor")
        if operation._schema.is_mutable:
            for x in tree_leaves(args):
                if isinstance(x, torch.Tensor):
                    self.before.setdefault(id(x), (x, x.clone()))
        out = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, out))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for x, value in self.before.values():
            x.copy_(value)

    def replay(self):
        for operation, args, kwargs, out in self.calls:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were captured."""
    made = []

    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(Graph()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    return made


STATES = dataclasses.replace(TINY, layer_pattern="DL")
MIXED = dataclasses.replace(TINY, n_layer=len(MIXERS), layer_pattern="".join(MIXERS))
WINDOWED = dataclasses.replace(TINY, window=5, layer_pattern="SL", gate=True)


@pytest.mark.parametrize(
    ("config", "triton", "chunks"),
    [
        (TINY, False, [5, *[1] * 22, 2, *[1] * 3]),
        (STATES, False, [5, *[1] * 22, 2, *[1] * 3]),
        (MIXED, False, [5, *[1] * 22, 2, *[1] * 3]),
        (WINDOWED, False, [5, *[1] * 22, 2, *[1] * 3]),
        (WINDOWED, True, [5, 1, 1, 2, 1]),
    ],
)
@torch.inference_mode()
def test_logits_equal_the_eager_engines(graphs, monkeypatch, config, triton, chunks):
    if triton:
        monkeypatch.setattr(kernels, "preferred", lambda _: ("flash", "asked for"))
    model = randomized(config)
    tokens = torch.randint(0, 97, (3, sum(chunks)), generator=torch.Generator().manual_seed(0))
    caches = [KVCache(config, 3), KVCache(config, 3)]
    run, eager = CudaGraphEngine(model), EagerEngine(model)
    for chunk in tokens.split(chunks, 1):
        got, expected = run(chunk, caches[0]), eager(chunk, caches[1])
        torch.testing.assert_close(got, expected)
        assert caches[0].lengths.equal(caches[1].lengths)
    assert len(graphs) == 1


@torch.inference_mode()
def test_another_cache_is_another_graph(graphs):
    model = randomized(TINY)
    run, eager = CudaGraphEngine(model), EagerEngine(model)
    first, second = KVCache(TINY, 1), KVCache(TINY, 2)
    run(torch.tensor([[5]]), first)
    for token in (7, 8):
        expected = eager(torch.tensor([[token], [9]]), again := second.repeat(1))
        assert again.lengths.tolist() == [token - 6] * 2
        torch.testing.assert_close(run(torch.tensor([[token], [9]]), second), expected)
    assert len(graphs) == 2


def test_generation_past_the_context(graphs, monkeypatch):
    """The graph survives the reset of its cache."""
    model, prompt = randomized(TINY), [1, 2, 3]
    options = {"max_new_tokens": 45, "num_samples": 2, "sampling": SamplingParams(greedy=True)}
    expected = torch.stack(list(sample.generate(model, prompt, **options)))
    monkeypatch.setattr(sample, "make_engine", CudaGraphEngine)
    assert torch.stack(list(sample.generate(model, prompt, **options))).equal(expected)
    assert len(graphs) == 1


def test_the_engine_and_precision_of_a_gpu(monkeypatch):
    gpu = types.SimpleNamespace(device=torch.device("cuda", 0))
    model = types.SimpleNamespace(model=types.SimpleNamespace(cos=gpu, norm=torch.nn.RMSNorm(2)), config=TINY)
    assert isinstance(make_engine(model), CudaGraphEngine)
    for capability, bf16 in (((9, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert device.has_bf16(gpu.device) == bf16
    assert not device.has_bf16(torch.device("cpu"))


@pytest.mark.parametrize("config", [TINY, WINDOWED, STATES, MIXED], ids=["full", "windowed", "states", "mixed"])
def test_a_batch_that_sequences_join_and_leave_is_one_graph(graphs, config, monkeypatch):
    model = randomized(config, seed=3)
    monkeypatch.setattr(continuous_batching, "make_engine", CudaGraphEngine)
    monkeypatch.setattr("sample.make_engine", EagerEngine)
    torch.manual_seed(0)
    prompts = [torch.randint(0, 97, (length,)).tolist() for length in (1, 5, 30, 7, 31, 2)]
    tokens = {Sequence(prompt, SamplingParams(greedy=True)): 9 * n + 3 for n, prompt in enumerate(prompts)}
    expected = {sequence: alone(model, sequence, count) for sequence, count in tokens.items()}
    batch = ContinuousBatch(model, max_sequences=3)
    for sequence in tokens:
        batch.add(sequence)
    assert finish(batch, tokens) == expected
    assert len(graphs) == 1
