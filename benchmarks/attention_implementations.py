"""The implementations of a case: heed's kernels and others, all with the same inputs.

Every implementation is a call that returns a tuple of results in the same order, for a common check:
forward, decode: (out,); backward: (dq, dk, dv); cross-entropy: (loss, dx, dW).
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import PAGE, Case
from kernels import CAUSAL, FULL, MaskSpec, attention
from kernels.cross_entropy import linear_cross_entropy
from kernels.reference_attention import attention_mask

Results = tuple[Tensor, ...]
HEED = "heed"
COMPILED = ("flex", "compiled")  # by torch.compile, for seconds: for one set of inputs alone


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """The inputs of a case, random. q (B, T, H, D), k and v (B, S, K, D); x (T, D), w (V, D), t (T,)."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device).to(dtype)

    c = case
    if c.kernel == "cross-entropy":
        return {
            "x": normal(c.T, c.D).requires_grad_(),
            "w": (normal(c.V, c.D) * c.D**-0.5).requires_grad_(),
            "t": torch.randint(c.V, (c.T,), generator=g, device=device),
        }
    inputs = {"q": normal(c.B, c.T, c.H, c.D), "k": normal(c.B, c.S, c.K, c.D), "v": normal(c.B, c.S, c.K, c.D)}
    if c.kernel == "backward":
        inputs = {name: x.requires_grad_() for name, x in inputs.items()} | {"dout": normal(c.B, c.T, c.H, c.D)}
    if c.unit == "GB/s":
        inputs["cache_seqlens"] = torch.full((c.B,), c.S, device=device)
    if c.kernel == "paged":  # the pool's pages (P, PAGE, K, D) are those of the caches in a random order
        order = torch.randperm(c.B * c.S // PAGE, generator=g, device=device)
        inputs["block_table"] = order.argsort().int().view(c.B, c.S // PAGE)
        inputs["pool_k"], inputs["pool_v"] = (inputs[x].view(-1, PAGE, c.K, c.D)[order] for x in "kv")
    return inputs


def exact(case: Case, inputs: dict[str, Tensor]) -> Results:
    """The results of the definition in fp64."""
    if case.kernel == "cross-entropy":
        x, w = (inputs[name].detach().double().requires_grad_() for name in "xw")
        return _with_gradients(F.cross_entropy(x @ w.T, inputs["t"], reduction="sum"), (x, w))
    q, k, v = (inputs[name].detach().double().requires_grad_() for name in "qkv")
    out = attention(q, k, v, CAUSAL if case.causal else FULL, backend="reference")
    return torch.autograd.grad(out, (q, k, v), inputs["dout"].double()) if case.kernel == "backward" else (out,)


def plain(case: Case, inputs: dict[str, Tensor]) -> Results:
    """The results of ordinary operations in the dtype, every step rounded: the baseline for the allowed error."""
    if case.kernel == "cross-entropy":
        x, w = inputs["x"], inputs["w"]
        return _with_gradients(F.cross_entropy(x @ w.T, inputs["t"], reduction="sum"), (x, w))
    q, k, v = (inputs[name] for name in "qkv")
    G = case.H // case.K
    wide_k, wide_v = (x.repeat_interleave(G, 2) for x in (k, v))  # (B, S, K, D) -> (B, S, H, D)
    scores = torch.einsum("bthd,bshd->bhts", q, wide_k) * case.D**-0.5
    mask = attention_mask(CAUSAL if case.causal else FULL, case.T, case.S, q.device, None, None)
    out = torch.einsum("bhts,bshd->bthd", scores.masked_fill(~mask, float("-inf")).softmax(-1), wide_v)
    return torch.autograd.grad(out, (q, k, v), inputs["dout"]) if case.kernel == "backward" else (out,)


def _with_gradients(loss: Tensor, inputs: Results) -> Results:
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def implementations(case: Case, inputs: dict[str, Tensor]) -> dict[str, Callable[[], Callable[[], Results]]]:
    """name -> a function that does the setup (compiles, runs a forward pass) and returns the call to time."""
    if case.kernel == "cross-entropy":
        return _losses(inputs)
    q, k, v = (inputs[name] for name in "qkv")
    mask_spec = CAUSAL if case.causal else FULL
    if case.unit == "GB/s":
        return _decoders(case, inputs)
    forwards: dict[str, Callable[[], Callable[[], Tensor]]] = {
        HEED: lambda: lambda: attention(q, k, v, mask_spec, backend="flash"),
        "sdpa": lambda: lambda: attention(q, k, v, mask_spec, backend="sdpa"),
        "flex": lambda: _flex(case, q, k, v),
    }
    if q.is_cuda:  # each of the two that SDPA chooses from
        for name in ("cudnn", "flash"):
            forwards[f"sdpa {name}"] = partial(_sdpa_backend, name, q, k, v, mask_spec)
    if _installed(q):
        from flash_attn import flash_attn_func

        forwards["flash-attn"] = lambda: lambda: flash_attn_func(q, k, v, causal=case.causal)
    if case.kernel == "forward":
        return {name: partial(_as_tuple, make) for name, make in forwards.items()}
    return {name: partial(_backward, make, (q, k, v), inputs["dout"]) for name, make in forwards.items()}


def _decoders(case: Case, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """One query against full caches. No mask is needed: the fastest case of the other implementations."""
    q, k, v, cache_seqlens = (inputs[name] for name in ("q", "k", "v", "cache_seqlens"))
    if case.kernel == "paged":
        pool_k, pool_v, block_table = (inputs[name] for name in ("pool_k", "pool_v", "block_table"))
        made: dict[str, Any] = {
            HEED: lambda: (
                lambda: attention(
                    q, pool_k, pool_v, cache_seqlens=cache_seqlens, block_table=block_table, backend="decode"
                )
            )
        }
        cache = {"k_cache": pool_k, "v_cache": pool_v, "block_table": block_table}
    else:
        made = {
            HEED: lambda: lambda: attention(q, k, v, cache_seqlens=cache_seqlens, backend="decode"),
            "sdpa": lambda: lambda: attention(q, k, v, FULL, backend="sdpa"),
            "flex": lambda: _flex(case, q, k, v),
        }
        cache = {"k_cache": k, "v_cache": v}
    if _installed(q):
        from flash_attn import flash_attn_with_kvcache

        seen = cache_seqlens.int()
        made["flash-attn"] = lambda: lambda: flash_attn_with_kvcache(q, **cache, cache_seqlens=seen, causal=True)
    return {name: partial(_as_tuple, make) for name, make in made.items()}


def _losses(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Loss and both gradients. The other implementations store all logits, in x's dtype and in fp32."""
    x, w, t = inputs["x"], inputs["w"], inputs["t"]

    def theirs(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w).float(), t, reduction="sum")

    def compiled() -> Callable[[], Results]:
        loss = _compile(theirs, x.device)
        return lambda: _with_gradients(loss(x, w), (x, w))

    return {
        HEED: lambda: lambda: _with_gradients(linear_cross_entropy(x, w, t, backend="triton"), (x, w)),
        "torch": lambda: lambda: _with_gradients(theirs(x, w), (x, w)),
        "compiled": compiled,
    }


def _sdpa_backend(name: str, q: Tensor, k: Tensor, v: Tensor, mask_spec: MaskSpec) -> Callable[[], Tensor]:
    """SDPA with one of torch's backends, "cudnn" or "flash"; it raises RuntimeError if it cannot run the call."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[name]

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return attention(q, k, v, mask_spec, backend="sdpa")

    return call


def _flex(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """FlexAttention, compiled for this shape."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if case.causal and case.T > 1:
        mask = create_block_mask(lambda b, h, t, s: t >= s, None, None, case.T, case.S, device=q.device)
    flex = _compile(flex_attention, q.device)
    # (B, T, H, D) -> (B, H, T, D) and back
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return lambda: flex(q, k, v, block_mask=mask, enable_gqa=case.H != case.K).transpose(1, 2)


def _compile(function: Any, device: torch.device) -> Any:
    """Compile for one shape, after a reset, since torch stops recompiling after eight. No-op on a CPU (dry run)."""
    if device.type != "cuda":
        return function
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # not possible for a graph with several backward passes
    return torch.compile(function, dynamic=False)


def _installed(q: Tensor) -> bool:
    return q.is_cuda and importlib.util.find_spec("flash_attn") is not None


def _as_tuple(make: Callable[[], Callable[[], Tensor]]) -> Callable[[], Results]:
    call = make()
    return lambda: (call(),)


def _backward(make: Callable[[], Callable[[], Tensor]], inputs: Results, dout: Tensor) -> Callable[[], Results]:
    """Run the forward pass once; the call computes its gradients."""
    out = make()()
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)
