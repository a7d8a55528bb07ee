"""Bugs put into heed's C++ on purpose; each must make the file's probe fail (tests/kernels/test_mutants_cpu.py)."""

import copy
import dataclasses

import torch

from inference.engine import CppEngine
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
    ("attend: the newest key is hidden", "+ r % T + 1, cache", "+ r % T, cache"),
    ("attend: a window of one too many", "end - l->window)", "end - l->window - 1)"),
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
]


def probe(file: str) -> None:
    """AssertionError unless what it computes is right, with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        {"train_ops": train_ops, "decode_step": decode_step}[file]()
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
    """A model with GQA, a gate and a window, several chunks of positions long, whose ring goes round."""
    model = randomized(dataclasses.replace(TINY, context=450, window=100, layer_pattern="SL", gate=True))
    tokens = torch.randint(0, 97, (3, 450), generator=torch.Generator().manual_seed(0))
    expected, cache, read = logits(model, tokens), KVCache(model.config, 3), CppEngine(model)
    for end in range(50, 451, 50):
        got = read(tokens[:, end - 50 : end], cache)
        torch.testing.assert_close(got.double(), expected[:, end - 1], atol=3e-5, rtol=3e-5)
