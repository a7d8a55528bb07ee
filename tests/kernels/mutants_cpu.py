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
from tests.training.test_fused import far, in_cpp, results

# (name, what stands in the file, what is put in its place)
MUTANTS: dict[str, list[tuple[str, str, str]]] = {}
MUTANTS["train_ops"] = [
    # RMSNorm
    ("norm: not divided", "L(load<L>(from + i) * scale *", "L(load<L>(from + i) *"),
    ("norm: x's own direction stays in the gradient", "- load<L>(x + i) * scale * mean) * scale", ") * scale"),
    ("norm: a sum in the place of a mean", "mean = sum(products) / n", "mean = sum(products)"),
    ("norm: the gain's gradient without x", "+ d * normed)", "+ d)"),
    ("norm: the sums of one thread alone", "i < parts.size()", "i < (size_t)n"),
    # heads
    ("heads: turned by cos twice", "high * load<L>(sin + d)", "high * load<L>(cos + d)"),
    ("heads: turned back by the wrong half", "high * load<L>(sin + half + i)", "high * load<L>(sin + i)"),
    ("heads: queries not scaled", "(h < m.H ? m.scale : 1) * (m.normed", "(m.normed"),
    ("heads: their gradient not scaled", "float scale = h < m.H ? m.scale : 1;", "float scale = 1;"),
    ("heads: keys' gain is the queries'", "h < m.H ? sums_q : sums_k", "sums_q"),
    # softmax
    ("softmax: the query's own key is hidden", "row % queries - low + 1", "row % queries - low"),
    ("softmax: a window of one too many", "end(row) - window)", "end(row) - window - 1)"),
    ("softmax: what lies before the window is seen", "std::fill(all, p, E(0.f));", ""),
    ("softmax: later keys are seen", "std::fill(p + n, all + m.keys, E(0.f));", ""),
    ("softmax: gradient without its mean", "(load<L>(d + i) - g)", "load<L>(d + i)"),
    # SwiGLU
    ("swiglu: the sigmoid's other side", "g / (1 + exp(-g)) *", "g / (1 + exp(g)) *"),
    ("swiglu: its slope", "(1 + g * (1 - s))", "(1 - g * (1 - s))"),
    ("swiglu: the up's gradient without the gate", "L(d * g * s)", "L(d * s)"),
    # cross-entropy
    ("loss: the wrong side", "std::log(total) + (top - at_target)", "std::log(total) - (top - at_target)"),
    ("loss: the target's own gradient", "* factor - 1) * slope", "* factor + 1) * slope"),
    ("loss: half of the z-loss's gradient", "1 + 2 * z * lse", "1 + z * lse"),
    ("loss: the softcap's slope", "v *= 1 - t * t;", ""),
    ("loss: what does not count counts", "losses[r] = counts ? std::log", "losses[r] = true ? std::log"),
]
MUTANTS["decode_step"] = [
    ("attend: the last chunk's largest score stays", "kept = std::exp(before - largest)", "kept = before > -INFINITY"),
    ("attend: the last chunk's sum stays", "drawn.total[h] * kept", "drawn.total[h]"),
    ("attend: another head's keys", "h / group * D, &queries", "h % m.K * D, &queries"),
    ("attend: another head's values", "stride + h / group * D;", "stride + h % m.K * D;"),
    ("attend: queries not scaled", "* pitch + d] * scale", "* pitch + d]"),
    ("attend: the newest key is hidden", "+ r % per + 1, cache", "+ r % per, cache"),
    ("attend: a window of one too many", "end - l.window)", "end - l.window - 1)"),
    (
        "attend: a position falls between two threads",
        "(i % split + 1) / split",
        "(i % split + 1) / split - (split > 1)",
    ),
    ("attend: the gate's other side", "1 + std::exp(-q[", "1 + std::exp(q["),
    ("join: parts as if their largest scores were equal", "parts.largest[i * m.H + h] - largest)", "0)"),
    ("join: of one part alone", "total += parts", "total = parts"),
    ("heads: turned by cos twice", "* sin[d];", "* cos[d];"),
    ("heads: put into the next slot", "+ position % l->slots) * KV", "+ (position + 1) % l->slots) * KV"),
    ("swiglu: the sigmoid's other side", "v / (1 + exp(-v))", "v / (1 + exp(v))"),
    ("the residual stream is lost", "m.H * D, true}", "m.H * D, false}"),
    ("another token's logits", "(b * T + T - 1) * m.C", "b * T * m.C"),
    ("another token's queries in the last layer", "(b * T + T - 1) * Q", "b * T * Q"),
    ("the last layer's positions are the first token's", "skipped = T - 1;", "skipped = 0;"),
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
    """AssertionError unless what it computes is right, with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        {
            "train_ops": train_ops, "decode_step": decode_step, "prefill.h": decode_step,
            "prefill.h, bf16": lambda: prefill("bf16", 0.05), "prefill.h, int8": lambda: prefill("int8", 1e-3),
        }[file]()  # fmt: skip
    finally:
        torch.set_num_threads(before)


def train_ops() -> None:
    """Every term of the loss; a model with GQA, a window
    and lengths beyond a block; gradients that two threads add up."""
    for terms in ({}, {"z_loss": 0.1, "softcap": 3.0}):
        compare(*draw(37, 24, 65, seed=3), 0.3, backend="cpp", **terms)
    model = randomized(dataclasses.replace(TINY, context=150, window=40, layer_pattern="SL"))
    tokens = torch.randint(0, 97, (2, 150), generator=torch.Generator().manual_seed(0))
    exact = results(copy.deepcopy(model).double(), tokens)
    for name, error in far(results(in_cpp(model), tokens), exact).items():
        assert error < 1e-4, name


@torch.inference_mode()
def decode_step() -> None:
    """Models with GQA, a gate and a window, several chunks of positions long, whose ring goes round: in steps of a few
    tokens and of many, one sequence and three, one key head that two threads share."""
    for flags, batch, piece in (({}, 3, 50), ({}, 3, 10), ({"n_kv_head": 1}, 1, 200)):
        config = dataclasses.replace(TINY, n_layer=3, context=900, window=100, layer_pattern="SL", gate=True, **flags)
        model = randomized(config)
        tokens = torch.randint(0, 97, (batch, 800), generator=torch.Generator().manual_seed(0))
        expected, cache, read = logits(model, tokens), KVCache(model.config, batch), CppEngine(model)
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
