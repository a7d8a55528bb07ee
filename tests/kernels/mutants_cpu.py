"""Bugs put into heed's C++ on purpose; each must make the file's probe fail (tests/kernels/test_mutants_cpu.py)."""

import copy
import dataclasses

import torch

from inference.engine import CppEngine
from inference.quantize import quantize
from model import KVCache
from tests.conftest import TINY, randomized
from tests.inference.test_engine import exact as logits
from tests.kernels.test_cross_entropy import compare, draw
from tests.kernels.test_muon_step import compare_steps
from tests.training.test_apply_fused_layers import fused, relative_errors, results

# File: (name, text in the file, replacement)
MUTANTS: dict[str, list[tuple[str, str, str]]] = {}
MUTANTS["norm.h"] = [
    ("norm: no division", "L(load<L>(x + i) * scale * load<L>(gain + i))", "L(load<L>(x + i) * load<L>(gain + i))"),
    ("norm: the direction of x stays in the gradient", "- load<L>(x + i) * scale * mean) * scale", ") * scale"),
    ("norm: a sum instead of a mean", "mean = sum(products) / n", "mean = sum(products)"),
    ("norm: the gradient of the gain without x", "+ d * normed)", "+ d)"),
    ("norm: the sums of one thread only", "i < parts.size()", "i < (size_t)n"),
    (
        "norm: the residual's gradient is lost",
        "load<decltype(v)>(dx + i) + load<decltype(v)>(residual + i)",
        "load<decltype(v)>(dx + i)",
    ),
]
MUTANTS["attention.cpp"] = [
    ("RoPE: cos twice", "high * load<L>(sin + d)", "high * load<L>(cos + d)"),
    ("RoPE: the wrong half backward", "high * load<L>(sin + half + d)", "high * load<L>(sin + d)"),
    ("scale: of queries", "(h < m.H ? m.scale : 1) * scales[t]", "scales[t]"),
    ("scale: of the queries' gradient", "float scale = h < m.H ? m.scale : 1;", "float scale = 1;"),
    ("QK-norm: the keys' gain is the queries'", "m.H + k, dk, dqkv, sums_k", "m.H + k, dk, dqkv, sums_q"),
    ("mask: a query's own key is hidden", "(key + k - query, 0, BLOCK)", "(key + k + 1 - query, 0, BLOCK)"),
    ("mask: a window of one too many", "m.end(b, key + k) - query", "m.end(b, key + k) + (m.window > 0) - query"),
    ("mask: later keys are visible backward", "from = std::min(std::max<int64_t>(0, key - first), BLOCK)", "from = 0"),
    ("mask: a window of one too many backward", "m.end(b, key) - first", "m.end(b, key) + (m.window > 0) - first"),
    ("mask: a visible block is skipped backward", "m.begin(b, i) < key + BLOCK", "m.begin(b, i) < key"),
    ("documents: their first key is hidden", "m.begin(b, q) / 32 * 32", "(m.begin(b, q) + m.limited()) / 32 * 32"),
    ("documents: the next one is seen", "ends[b * T + key] : tokens", "ends[b * T + key] + 1 : tokens"),
    ("documents: not with a window", "window ? std::min(end, key + window) : end", "window ? key + window : end"),
    ("documents: those of the first sequence", "ends[b * T + key] :", "ends[key] :"),
    (
        "documents: their keys are skipped",
        "starts ? starts[b * T + query] : 0",
        "starts ? starts[b * T + query] + 64 : 0",
    ),
    ("softmax: the sum of earlier keys is not rescaled", ", sum *= kept;", ";"),
    (
        "softmax: the values of earlier keys are not rescaled",
        "load(sums + d * BLOCK + q) * kept)",
        "load(sums + d * BLOCK + q))",
    ),
    ("softmax: its gradient without the mean", "(load(dp + i) - load(delta + i))", "load(dp + i)"),
    ("keys: their gradient from dout", "at(q, i, 0), BLOCK, D, dk", "at(g, i, 0), BLOCK, D, dk"),
]
MUTANTS["feed_forward.cpp"] = [
    ("swiglu: the other side of the sigmoid", "exp(-x)", "exp(x)"),
    ("swiglu: its slope", "(1 + g * (1 - s))", "(1 - g * (1 - s))"),
    ("swiglu: the gradient of up without the gate", "F + at, d * g * s)", "F + at, d * s)"),
    ("the residual stream is lost", "if (residual) v +=", "if (!residual) v +="),
    ("the gradient of down from the normed x", "columns.fill(dout, all), downs.add", "downs.add"),
]
MUTANTS["linear.cpp"] = [
    ("the residual stream is lost", "if (x) v +=", "if (!x) v +="),
    ("the gradient of q, k and v is transposed", "gradient.add_up(dw, true", "gradient.add_up(dw, false"),
    ("the norms of other tokens", "inverse[first + i], normed.row(i)", "inverse[i], normed.row(i)"),
]
MUTANTS["linear.h"] = [
    ("gradients of one thread only", "for (int64_t t = 1; t < threads; t++)", "for (int64_t t = 1; t < 1; t++)"),
    ("edges: old numbers stay", "if (n % 32) std::fill_n", "if (n % 32 > 31) std::fill_n"),
]
MUTANTS["cross_entropy.cpp"] = [
    (
        "loss: the wrong sign",
        "std::log(all.total) + (all.top - at_target[r])",
        "std::log(all.total) - (all.top - at_target[r])",
    ),
    ("dx: the sign of the target's part", "v -= slopes[first + r]", "v += slopes[first + r]"),
    ("dw: the sign of the target's part", "load<L>(to + c) - slopes[r]", "load<L>(to + c) + slopes[r]"),
    ("half of the z-loss's gradient", "1 + 2 * z * lse", "1 + z * lse"),
    ("the slope of the softcap", "cap ? L(v * (1 - t * t)) : v", "v"),
    ("an ignored target counts", "m.losses[first + r] = counts ?", "m.losses[first + r] = true ?"),
    ("the sum of one thread only", "all.total += found", "all.total = found"),
    ("threads with other largest logits", "* std::exp(own.top - all.top)", ""),
]
MUTANTS["muon.cpp"] = [
    ("momentum: no Nesterov step", "next = g + (kept - g) * mu", "next = kept"),
    ("momentum: of the gradient alone", "kept = old + (g - old) * (1 - mu)", "kept = g"),
    ("a coefficient of the polynomial", "C = 2.0315", "C = 2.5"),
    ("four iterations", "step < 5", "step < 4"),
    ("the lower half of a symmetric matrix", "if (i < j) store", "if (i > j) store"),
    ("no weight decay", "1 - lr * weight_decay", "1"),
    ("tall matrices are not scaled as wide ones", "std::sqrt(wide)", "std::sqrt(matrix.columns)"),
]
MUTANTS["decode_step.cpp"] = [
    ("attend: the last chunk's largest score stays", "kept = std::exp(before - largest)", "kept = before > -INFINITY"),
    ("attend: the last chunk's sum stays", "drawn.total[h] * kept", "drawn.total[h]"),
    ("attend: another head's keys", "h / group * D, &queries", "h % m.K * D, &queries"),
    ("attend: another head's values", "stride + h / group * D;", "stride + h % m.K * D;"),
    ("attend: queries not scaled", "* pitch + d] * scale", "* pitch + d]"),
    ("attend: the newest key is hidden", "+ r % per + 1; };", "+ r % per; };"),
    ("attend: a window of one too many", "std::min(l.window, end(r))", "std::min(l.window + 1, end(r))"),
    (
        "attend: a position falls between two parts",
        "(part + 1) / parts, drawn",
        "(part + 1) / parts - (parts > 1), drawn",
    ),
    ("attend: the cache of another sequence", "rows[r / per] * l.slots", "r / per * l.slots"),
    ("attend: the gate's other side", "1 + std::exp(-q[", "1 + std::exp(q["),
    ("join: parts as if their largest scores were equal", "parts.largest[i * m.H + h] - largest)", "0)"),
    ("join: of one part alone", "total += parts", "total = parts"),
    ("heads: turned by cos twice", "* sin[d];", "* cos[d];"),
    ("heads: put into the cache of another sequence", "rows[r / T] * l->slots", "r / T * l->slots"),
    ("heads: put into the next slot", "+ position % l->slots) * KV", "+ (position + 1) % l->slots) * KV"),
    ("swiglu: the sigmoid's other side", "v / (1 + exp(-v))", "v / (1 + exp(v))"),
    ("the residual stream is lost", "m.H * D, true}", "m.H * D, false}"),
    ("another token's logits", "(b * T + T - 1) * m.C", "b * T * m.C"),
    ("another token's queries in the last layer", "(b * T + T - 1) * Q", "b * T * Q"),
    ("the last layer's positions are the first token's", "skipped = T - 1;", "skipped = 0;"),
    ("prefill: the cache of another sequence", "cache = rows[b] * l->slots", "cache = b * l->slots"),
    ("prefill: a head's queries fall between two threads", "1, i % parts, parts)", "1, i % parts, parts + 1)"),
]
MUTANTS["prefill.h"] = [
    ("attention: the newest key is hidden", "newest + r + 1 - low", "newest + r - low"),
    ("attention: a window of one too many", "position + 1 - window)", "position - window)"),
    ("attention: the ring does not go round", "(position + i) % slots", "(position + i)"),
    ("attention: queries not scaled", "+ d) * scale));", "+ d)));"),
    ("attention: another head's queries", "+ g * q_head + d) * scale", "+ d) * scale"),
    ("softmax: the last chunk's values stay", "if (kept != 1) each(sums", "if (false) each(sums"),
    ("softmax: the last chunk's sum stays", "total * kept + sum", "total + sum"),
    ("softmax: of the last chunk alone", "total = total * kept + sum(added)", "total = sum(added)"),
    ("softmax: later keys are seen", ", std::fill(scores + to, scores + n, -INFINITY);", ";"),
]
MUTANTS["prefill.h, bf16"] = [
    ("matmul: two blocks change places", "turned + j * 32 + i, 32);", "turned + i * 32 + j, 32);"),
    ("matmul: the residual stream is lost", "p.add ? L(v + load<L>(y + i)) : v", "v"),
]
MUTANTS["prefill.h, int8"] = [
    ("matmul: without scales", "if (m.scale) v = v * load<L>(m.scale + n + i);", ""),
    ("matmul: x is rounded to bf16", "if (TERMS<W> == 2) multiply", "if (false) multiply"),
    ("matmul: what bf16 leaves of x is x", "v = v - load<decltype(v)>(term + r * 32 + i);", ""),
]


def probe(file: str) -> None:
    """AssertionError unless what the file computes is right, with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    probes = {
        "cross_entropy.cpp": loss, "muon.cpp": muon, "decode_step.cpp": decode_step, "prefill.h": decode_step,
        "prefill.h, bf16": lambda: prefill("bf16", 0.05), "prefill.h, int8": lambda: prefill("int8", 1e-3),
    }  # fmt: skip
    try:
        probes.get(file, layers)()
    finally:
        torch.set_num_threads(before)


def loss() -> None:
    """Every term of the loss."""
    for terms in ({}, {"z_loss": 0.1, "softcap": 3.0}):
        compare(*draw(37, 24, 65, seed=3), 0.3, backend="cpp", **terms)


def muon() -> None:
    """Tall, wide and square matrices over some steps."""
    for shape in ((48, 37), (33, 70), (64, 64)):
        compare_steps(shape, torch.float32)


def layers() -> None:
    """A model with GQA, a window, and tokens and lengths beyond a block; gradients that two threads add up."""
    model = randomized(dataclasses.replace(TINY, context=150, window=40, layer_pattern="SL"))
    tokens = torch.randint(0, 97, (4, 150), generator=torch.Generator().manual_seed(0))
    exact = results(copy.deepcopy(model).double(), tokens)
    for name, error in relative_errors(results(fused(model), tokens), exact).items():
        assert error < 1e-4, name
    documents()


def documents() -> None:
    """Other documents in each sequence: of one token, of more than a chunk of keys; with and without a window."""
    config = dataclasses.replace(TINY, context=330, window=40, layer_pattern="SL")
    tokens = torch.randint(1, 97, (2, 330), generator=torch.Generator().manual_seed(0))
    tokens[0, [3, 4, 70, 250]] = tokens[1, [31, 200, 320]] = 0
    for changed in ({}, {"layer_pattern": "L", "window": 0}):
        model = randomized(dataclasses.replace(config, **changed))
        model.model.document_start = 0
        exact = results(copy.deepcopy(model).double(), tokens)
        for name, error in relative_errors(results(fused(model), tokens), exact).items():
            assert error < 1e-4, name


@torch.inference_mode()
def decode_step() -> None:
    """Models with GQA, a gate and a window, several chunks of positions long, whose ring goes round: in steps of a few
    tokens and of many, one sequence and three, one key head that two threads share, rows of the cache in any order."""
    for flags, batch, piece in (({}, 3, 50), ({}, 3, 10), ({"n_kv_head": 1}, 1, 200)):
        config = dataclasses.replace(TINY, n_layer=3, context=900, window=100, layer_pattern="SL", gate=True, **flags)
        model = randomized(config)
        tokens = torch.randint(0, 97, (batch, 800), generator=torch.Generator().manual_seed(0))
        expected, cache, read = logits(model, tokens), KVCache(model.config, batch + 1), CppEngine(model)
        cache = cache.select(torch.arange(batch).flip(0) + (batch > 1), torch.zeros(batch, dtype=torch.long))
        for end in range(piece, 801, piece):
            got = read(tokens[:, end - piece : end], cache)
            torch.testing.assert_close(got.double(), expected[:, end - 1], atol=3e-5, rtol=3e-5)


@torch.inference_mode()
def prefill(kind: str, bound: float) -> None:
    """The matmuls of many tokens at once, with sizes that are no multiples of 32."""
    model = quantize(randomized(dataclasses.replace(TINY, n_embd=40, n_ffn=72, context=100)), kind)
    tokens = torch.randint(0, 97, (2, 77), generator=torch.Generator().manual_seed(0))
    for _ in range(3):  # memory that is not cleared may hold zeros at first
        expected, got = logits(model, tokens)[:, -1], CppEngine(model)(tokens, KVCache(model.config, 2))
        assert (got - expected).abs().max() < bound * expected.abs().max()
