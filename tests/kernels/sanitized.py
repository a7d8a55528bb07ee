"""Run heed's C++ on shapes that hypothesis draws, compiled with AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m tests.kernels.sanitized EXAMPLES FOLDER      FOLDER has the C++ files

The process needs the environment of test_sanitizers.py. It fills memory from malloc with 0xFF, a NaN in fp32 and bf16:
what reads memory before writing it gives a result that is not a number.
"""

import math
import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference.engine import CppEngine
from inference.quantize import quantize
from kernels import attention
from kernels.cpu import build
from kernels.cross_entropy import linear_cross_entropy
from model import GPT, KVCache, ModelConfig
from tests.conftest import randomized
from training.apply_fused_layers import apply_fused_layers
from training.config import OptimConfig
from training.optimizers import build_optimizers

# Without AMX: its loads and stores are inline assembly, unseen by the sanitizers. Vectors take the same addresses.
NO_AMX = ["-mno-amx-tile", "-mno-amx-bf16", "-mno-amx-int8"] if "amx_tile" in build._processor() else []
FLAGS = [
    *(flag.replace("-O3", "-Og") for flag in build.FLAGS), *NO_AMX, "-g1", "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]  # fmt: skip
SIZES = st.integers(1, 70)


@st.composite
def models(draw: st.DrawFn, context: int) -> GPT:
    """Models whose sizes are seldom multiples of anything."""
    K, window = draw(st.integers(1, 3)), draw(st.one_of(st.just(0), st.integers(1, context)))
    model = randomized(
        ModelConfig(
            vocab_size=draw(SIZES), context=context, n_layer=draw(st.integers(1, 2)), n_kv_head=K,
            n_head=K * draw(st.integers(1, 3)), n_embd=draw(SIZES), head_dim=2 * draw(st.integers(1, 35)),
            n_ffn=draw(SIZES), window=window, layer_pattern=draw(st.sampled_from(["S", "SL"])) if window else "L",
            gate=draw(st.booleans()), tie_embeddings=draw(st.booleans()),
        )
    )  # fmt: skip
    model.model.document_start = draw(st.sampled_from([None, 0]))
    return model


def finite(*tensors: torch.Tensor) -> None:
    assert all(bool(x.isfinite().all()) for x in tensors)


@torch.enable_grad()
def train(model: GPT, tokens: torch.Tensor, dtype: torch.dtype) -> None:
    """Two steps with fused layers; the loss is that of model.py."""
    with torch.no_grad():
        expected = float(GPT.loss(model, tokens, tokens))
    apply_fused_layers(model.train())
    optimizers = build_optimizers(model, OptimConfig(), dtype)
    for step in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model.loss(tokens, tokens)
        assert step or math.isclose(loss.item(), expected, rel_tol=1e-4 if dtype == torch.float32 else 0.1)
        loss.backward()
        finite(*(p.grad for p in model.parameters() if p.grad is not None))
        for optimizer in optimizers:
            optimizer.step()
    finite(*model.parameters())


def operations(B: int, T: int, H: int, D: int, V: int, dtype: torch.dtype) -> None:
    """The operations that model.py's training calls in other ways."""
    q, k, v = (torch.randn(B, T, H, D, dtype=dtype, requires_grad=True) for _ in range(3))
    attention(q, k, v, backend="cpp").float().square().sum().backward()
    x, weight = (torch.randn(n, D, dtype=dtype, requires_grad=True) for n in (T, V))
    loss = linear_cross_entropy(x, weight, torch.randint(0, V, (T,)), z_loss=0.1, softcap=3.0, backend="cpp")
    loss.backward()
    finite(loss, *(a.grad for a in (q, k, v, x, weight) if a.grad is not None))


@torch.inference_mode()
def decode(model: GPT, tokens: torch.Tensor, kind: str, pieces: list[int]) -> None:
    """A prompt and more tokens, in pieces, into a cache that just has room for them."""
    if kind != "fp32":
        quantize(model, kind)
    run = CppEngine(model)
    cache = KVCache(model.config, len(tokens), max_seq_len=tokens.shape[1], dtype=run.cache_dtype)
    while tokens.shape[1]:
        finite(run(tokens[:, : pieces[0]], cache))
        tokens, pieces = tokens[:, pieces[0] :], [*pieces[1:], pieces[0]]


def main(examples: int, folder: str) -> None:
    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def test(data: st.DataObject) -> None:
        draw = data.draw
        B, T, kind = draw(st.integers(1, 3)), draw(st.integers(1, 140)), draw(st.sampled_from(["fp32", "bf16", "int8"]))
        model, dtype = draw(models(T)), draw(st.sampled_from([torch.float32, torch.bfloat16]))
        pieces = draw(st.lists(st.integers(1, T), min_size=1, max_size=3))
        torch.set_num_threads(draw(st.integers(1, 3)))
        print(f"B={B} T={T} {dtype} {kind} {pieces} {torch.get_num_threads()} threads {model.config}", flush=True)
        tokens = torch.randint(0, model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(0))
        operations(B, T, model.config.n_head, model.config.head_dim, model.config.vocab_size, dtype)
        train(model, tokens, dtype)
        decode(model, tokens, kind, pieces)

    build.FLAGS, build.HERE = FLAGS, Path(folder)
    test()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
