"""Part `correctness`: every kernel against the definition in fp64 on the GPU itself.

The rule is FlashAttention's: an error of at most twice that of the same computation by plain torch in the same dtype,
and a small absolute term. Outputs are full of NaN before the kernels write them. Gradients of all inputs are checked,
and must be the same bits in a second run. A whole block must compile as one graph (torch.compile, fullgraph=True).
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from benchmarks.gpu.part import Task
from kernels import CAUSAL, FULL, MaskSpec, attention, document_bounds
from kernels.cross_entropy import linear_cross_entropy
from kernels.dropout import dropout
from kernels.reference_attention import attention_mask, relative_positions
from model import GPT, KVCache, ModelConfig

DRY = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if DRY else "cuda")
SCALE, DROPOUT = 0.3, 0.2
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-3}  # as in tests/kernels

FLAGS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"mask": FULL},
    "window": {"mask": MaskSpec(True, 100)},
    "two-sided window": {"mask": MaskSpec(False, 100)},
    "softcap": {"mask": MaskSpec(True, None, 1.5)},
    "documents": {"documents": True},
    "slopes": {"slopes": True},
    "sinks": {"sinks": True},
    "dropout": {"dropped": True},
    "everything": {"mask": MaskSpec(True, 200, 2.0), "documents": True, "slopes": True, "sinks": True},
}
SHAPES = [  # B, T, S, H, K, D: aligned, ragged, more queries than keys, odd head size, one query, large heads
    (2, 256, 256, 4, 2, 64), (1, 333, 333, 8, 1, 128), (1, 203, 113, 2, 2, 64), (1, 97, 190, 3, 1, 40),
    (1, 1, 300, 4, 4, 128), (1, 130, 130, 2, 1, 256),
]  # fmt: skip


def run(task: Task) -> None:
    """Check group by group, several at a time."""
    if DRY:
        torch.set_num_threads(1)
    for group, rows in task.map(check, groups()):
        if isinstance(rows, Exception):
            task.emit(group=group, ok=False, error=str(rows))
            continue
        for row in rows:
            task.emit(group=group, **row)


def groups() -> list[str]:
    """Names of the groups, those that take longest first; a dry run checks a few."""
    if DRY:
        return ["flash everything float32", "decode window", "cross-entropy bfloat16", "block window"]
    flash = [f"flash {flags} bfloat16" for flags in reversed(FLAGS)]
    flash += [f"flash {flags} {dtype}" for flags in ("everything", "causal") for dtype in ("float32", "float16")]
    decode = [f"decode {flags}" for flags in ("plain", "window", "pages", "ring", "everything")]
    losses = [f"cross-entropy {dtype}" for dtype in ("bfloat16", "float16", "float32")]
    return [
        *(f"block {kind}" for kind in ("plain", "window", "gate")),
        "model",
        *flash,
        *decode,
        *losses,
        "far offsets",
    ]


def check(group: str) -> list[dict[str, Any]]:
    """The results of one group: what was compared, the largest share of the allowed error, and whether all is right."""
    kind, _, rest = group.partition(" ")
    if kind == "flash":
        flags, _, dtype = rest.rpartition(" ")
        return [
            flash(shape, getattr(torch, dtype), **FLAGS[flags])
            for shape in ([(1, 20, 20, 2, 1, 16)] if DRY else SHAPES)
        ]
    if kind == "cross-entropy":
        return [cross_entropy(getattr(torch, rest), *terms) for terms in ((0.0, None), (1e-3, 5.0))]
    return {"decode": decode, "block": block, "model": model_gradients, "far": far_offsets}[kind](rest)


def compare(
    what: str, exact: list[Tensor], plain: list[Tensor], ours: list[Tensor], tolerance: float, floor: float = 1.0
) -> dict[str, Any]:
    """The largest error as a share of the allowed one: at most 1, not NaN; infinities must agree.

    Allowed is twice the error of `plain`, and the tolerance times the sum of the floor and the largest value.
    """
    worst = 0.0
    for truth, theirs, mine in zip(exact, plain, ours, strict=True):
        finite = truth.isfinite()
        if not mine.double()[~finite].equal(truth[~finite]):
            worst = math.nan
        if finite.any():
            bound = 2 * (theirs.double() - truth)[finite].abs().max() + tolerance * (floor + truth[finite].abs().max())
            share = float((mine.double() - truth)[finite].abs().max() / bound)
            worst = share if not share <= worst else worst
    return {"what": what, "share_of_allowed_error": worst, "ok": worst <= 1}


def full_of_nan(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.empty, or a function like it, that fills what it returns with NaN."""

    def made(*shape: Any, **how: Any) -> Tensor:
        x = make(*shape, **how)
        return x.fill_(math.nan) if x.is_floating_point() else x

    return made


def naive(
    q: Tensor, k: Tensor, v: Tensor, mask_spec: MaskSpec, documents: Tensor | None, slopes: Tensor | None,
    sinks: Tensor | None, cache_seqlens: Tensor | None = None, seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition in the inputs' own dtype, every step rounded to it: out and log-sum-exp."""
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    # (B, T, H, D) -> (B, T, K, G, D); (B, K, G, T, S) -> (B, H, T, S)
    scores = torch.einsum("btkgd,bskd->bkgts", q.view(B, T, K, H // K, D), k).reshape(B, H, T, S) * SCALE
    if mask_spec.softcap is not None:
        scores = mask_spec.softcap * torch.tanh(scores / mask_spec.softcap)
    if slopes is not None:
        distance = relative_positions(T, S, q.device, cache_seqlens)[0].abs()[:, None]  # (B or 1, 1, T, S)
        scores = scores - (slopes[:, None, None] * distance).to(q.dtype)
    mask = attention_mask(mask_spec, T, S, q.device, cache_seqlens, documents)[:, None]  # (B or 1, 1, T, S)
    scores = scores.masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(q.dtype)[:, None])
    weights = (scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    if seed is not None:
        weights = dropout(weights, DROPOUT, seed, S - T, 0)
    out = torch.einsum("bkgts,bskd->btkgd", weights.view(B, K, H // K, T, S), v).reshape(B, T, H, D)
    return out, lse.transpose(1, 2)


def flash(
    shape: tuple[int, ...], dtype: torch.dtype, mask: MaskSpec = CAUSAL, documents: bool = False, slopes: bool = False,
    sinks: bool = False, dropped: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """out, log-sum-exp and all gradients of flash attention."""
    B, T, S, H, K, D = shape
    T = min(T, S) if documents else T
    g = torch.Generator(DEVICE).manual_seed(T)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=DEVICE)

    inputs = [normal(B, T, H, D).to(dtype), normal(B, S, K, D).to(dtype), normal(B, S, K, D).to(dtype)]
    extras = [normal(H).abs() if slopes else None, normal(H) if sinks else None]
    ids = torch.randint(0, 2 + S // 40, (B, S), generator=g, device=DEVICE).sort(1).values if documents else None
    weight, weight_lse = normal(B, T, H, D), normal(B, T, H)
    seed = torch.tensor([T, S], dtype=torch.int32, device=DEVICE) if dropped else None

    def results(function: Callable[..., tuple[Tensor, Tensor]], kind: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(kind).requires_grad_() for x in inputs]
        precise = torch.promote_types(kind, torch.float32)
        more = [None if x is None else x.detach().to(precise).requires_grad_() for x in extras]
        out, lse = function(*leaves, mask, ids, *more)
        loss = (out * weight.to(out.dtype)).sum(dtype=precise)
        loss = loss + (lse.masked_fill(lse.isneginf(), 0.0) * weight_lse.to(lse.dtype)).sum(dtype=precise)
        loss.backward()
        gradients = [x.grad for x in (*leaves, *more) if x is not None and x.grad is not None]
        return [out.detach(), lse.detach(), *gradients]

    def heed(
        q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, ids: Any, slopes: Any, sinks: Any
    ) -> tuple[Tensor, Tensor]:
        bounds = None if ids is None else document_bounds(ids)
        options = {"alibi_slopes": slopes, "sinks": sinks, "document_ids": bounds, "softmax_scale": SCALE}
        options |= {"dropout_p": DROPOUT, "dropout_seed": seed} if dropped else {}
        return attention(q, k, v, mask, **options, backend="flash", return_lse=True)

    with patch.object(torch, "empty", full_of_nan(torch.empty)):
        ours, again = results(heed, dtype), results(heed, dtype)
    plain = partial(naive, seed=seed)
    row = compare(f"{shape}", results(plain, torch.float64), results(plain, dtype), ours, TOLERANCE[dtype])
    same = all(a.equal(b) for a, b in zip(ours, again, strict=True))
    return row | {"same_bits": same, "ok": row["ok"] and same}


def decode(flags: str) -> list[dict[str, Any]]:
    """Flash-decoding over caches of several lengths, split and not, one and several queries."""
    rows = []
    for dtype, D, T, length in itertools.product(
        [torch.float32] if DRY else [torch.bfloat16, torch.float16, torch.float32], [16] if DRY else [64, 128], (1, 5),
        [40] if DRY else [70, 1000, 8192],
    ):  # fmt: skip
        g = torch.Generator(DEVICE).manual_seed(length)

        def normal(*size: int, g: torch.Generator = g, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(size, generator=g, device=DEVICE).to(dtype)

        B, H, K, page = 3, 8, 2, 16
        S = -(-length // page) * page
        q, k, v = normal(B, T, H, D), normal(B, S, K, D), normal(B, S, K, D)
        seen = torch.tensor([length, length // 2, T], device=DEVICE) + (S if flags == "ring" else 0)
        everything = flags == "everything"
        mask = MaskSpec(True, 48 if flags == "window" or everything else None, 2.0 if everything else None)
        options: dict[str, Any] = {"cache_seqlens": seen, "softmax_scale": SCALE}
        if everything:
            options |= {"alibi_slopes": normal(H).float().abs(), "sinks": normal(H).float()}
        ours = options
        pool_k, pool_v = k, v
        if flags in ("pages", "everything"):  # the same keys in pages in a random order
            order = torch.randperm(B * S // page, generator=g, device=DEVICE)
            table = order.argsort().int().view(B, S // page)
            pool_k, pool_v = (x.view(-1, page, K, D)[order] for x in (k, v))  # (B, S, K, D) -> (pages, page, K, D)
            ours = options | {"block_table": table}
        doubles = q.double(), k.double(), v.double()
        exact = attention(*doubles, mask, **options, backend="reference", return_lse=True)
        plain = naive(q, k, v, mask, None, options.get("alibi_slopes"), options.get("sinks"), seen)
        with patch.object(torch, "empty", full_of_nan(torch.empty)), torch.no_grad():
            found = attention(q, pool_k, pool_v, mask, **ours, backend="decode", return_lse=True)
        what = f"{dtype}, D {D}, {T} queries, {length} keys"
        rows.append(compare(what, list(exact), list(plain), list(found), TOLERANCE[dtype]))
    return rows


def cross_entropy(dtype: torch.dtype, z_loss: float, softcap: float | None) -> dict[str, Any]:
    """Loss and gradients, with an odd vocabulary and ignored targets."""
    N, C, V = (9, 16, 61) if DRY else (500, 256, 50257)
    g = torch.Generator(DEVICE).manual_seed(0)
    x, w = torch.randn(N, C, generator=g, device=DEVICE), torch.randn(V, C, generator=g, device=DEVICE) * C**-0.5
    targets = torch.randint(V, (N,), generator=g, device=DEVICE)
    targets[::7] = -100

    def results(kind: torch.dtype, ours: bool) -> list[Tensor]:
        leaves = [a.to(dtype).to(kind).requires_grad_() for a in (x, w)]
        if ours:
            loss = linear_cross_entropy(leaves[0], leaves[1], targets, z_loss=z_loss, softcap=softcap, backend="triton")
        else:
            scores = leaves[0] @ leaves[1].T
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            squares = scores.logsumexp(1).square()[targets != -100].sum()
            loss = F.cross_entropy(scores, targets, reduction="sum") + z_loss * squares
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    found = results(dtype, True)
    return compare(
        f"z_loss {z_loss}, softcap {softcap}",
        results(torch.float64, False),
        results(dtype, False),
        found,
        TOLERANCE[dtype],
    )


def _config(kind: str) -> ModelConfig:
    window, width = 24 if kind == "window" else 0, 64 if DRY else 256
    return ModelConfig(
        vocab_size=300, context=32 if DRY else 300, n_layer=1 if DRY else 2, n_head=4, n_kv_head=2, n_embd=width,
        head_dim=width // 4, n_ffn=2 * width, window=window, layer_pattern="S" if window else "L", gate=kind == "gate",
    )  # fmt: skip


def _gradients(config: ModelConfig, dtype: torch.dtype, backend: str, compile: bool = False) -> list[Tensor]:
    """Loss and gradients of a model on fixed tokens and weights, by one backend of attention."""
    torch.manual_seed(0)
    model = GPT(config).to(DEVICE, dtype)
    tokens = torch.randint(300, (2, config.context), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    kind = backend if backend == "flash" else "reference"
    with (
        patch.object(kernels, "preferred", lambda device: (kind, "")),
        patch.object(kernels, "faster_backend", lambda *_: kind),
    ):
        if compile:
            torch._dynamo.reset()
            for layer in model.model.layers:
                layer.compile(fullgraph=True, backend="aot_eager" if DRY else "inductor")
        x = model.model(tokens).flatten(0, 1)  # (B, T, C) -> (B * T, C)
        loss = F.cross_entropy(model.head(x).float() if dtype != torch.float64 else model.head(x), tokens.flatten())
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def block(kind: str) -> list[dict[str, Any]]:
    """Blocks compiled as one graph each, with heed's kernels, against the definition."""
    config, dtype = _config(kind), torch.float32
    ours = _gradients(config, dtype, "flash", compile=True)
    exact, plain = _gradients(config, torch.float64, ""), _gradients(config, dtype, "")
    return [compare("compiled, fullgraph", exact, plain, ours, 1e-5, floor=0)]


def model_gradients(_: str) -> list[dict[str, Any]]:
    """The model in bf16, and generation from the KV cache against the whole sequence."""
    config, dtype = _config("plain"), torch.bfloat16
    ours = _gradients(config, dtype, "flash")
    exact, plain = _gradients(config, torch.float64, ""), _gradients(config, dtype, "")
    rows = [compare("bf16", exact, plain, ours, 1e-2, floor=0)]
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(config, context=300)).to(DEVICE).eval()
    tokens = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.inference_mode():
        from inference.engine import make_engine

        expected, engine, cache = model(tokens), make_engine(model), KVCache(config, 2, device=DEVICE)
        found = [
            engine(part, cache).clone() for part in tokens.split([7, *[1] * 33], 1)
        ]  # a prompt, then token by token
    error = float((torch.stack(found, 1) - expected[:, 6:]).abs().max())
    allowed = 1e-4 * float(expected.abs().max())
    return [*rows, {"what": "generation", "share_of_allowed_error": error / allowed, "ok": error <= allowed}]


def far_offsets(_: str) -> list[dict[str, Any]]:
    """The last of many sequences, beyond 2**31 elements, is computed as it is alone."""
    B, S, H, D = 33, 16384, 32, 128  # 2.2e9 elements
    g = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (torch.empty(B, S, H, D, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    for x in (q, k, v):
        x[-1].normal_(generator=g)
    window = MaskSpec(True, 256)  # few operations
    found = attention(q, k, v, window, backend="flash")[-1:]
    expected = attention(q[-1:], k[-1:], v[-1:], window, backend="flash")
    seen = torch.full((B,), S, device=DEVICE)
    step = attention(q[:, -1:], k, v, window, cache_seqlens=seen, backend="decode")[-1:]
    alone = attention(q[-1:, -1:], k[-1:], v[-1:], window, cache_seqlens=seen[-1:], backend="decode")
    same = found.equal(expected) and torch.allclose(step.float(), alone.float(), atol=1e-2)
    return [{"what": f"{q.numel():,} elements", "ok": same}]
