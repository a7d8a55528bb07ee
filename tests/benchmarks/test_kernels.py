"""The kernel benchmark without a GPU: roofline arithmetic, a dry run on tiny shapes, errors."""

import csv
import json
import math
import re

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from benchmarks import __main__ as bench
from benchmarks import attention_block_maps, attention_implementations, kernel_costs, kernels, roofline, timing
from benchmarks.attention_block_maps import PART, SKIPPED, WHOLE, blocks
from benchmarks.kernel_costs import GPUS, bound, rate
from benchmarks.shapes import Case, cases, dry_cases
from kernels import CAUSAL, attention
from kernels.reference_attention import attention_mask, document_bounds
from kernels.triton import flash_decoding, tiles
from kernels.triton.flash_attention import _key_range, _query_range
from tests.conftest import command

CPU = torch.device("cpu")


def run(*words: str) -> int:
    return bench.main(bench.arguments(list(words)))


# The bound


@pytest.mark.parametrize(
    ("kernel", "D", "expected"),
    [  # calculated for an H100: 132 processors at 1.83 GHz, 16 exp2 and 128 fp32 instructions per clock
        ("forward", 64, (660, 495, 396)),
        ("forward", 128, (989, 659, 565)),
        ("backward", 64, (706, 450, 380)),
        ("backward", 128, (706, 549, 495)),
    ],
)
def test_bound(kernel, D, expected):
    work, seconds = roofline.attention(kernel, D, False, "sm_90")
    assert tuple(round(rate(work, s, "TFLOP/s")) for s in seconds) == expected
    causal, half = roofline.attention(kernel, D, True, "sm_90")
    assert half == pytest.approx([s / 2 for s in seconds])  # half of the FLOPs in half of the time
    assert rate(causal, half.overlap, "TFLOP/s") == pytest.approx(rate(work, seconds.overlap, "TFLOP/s"))


def test_bound_per_score():
    """One forward pass at D 64 on an H100, in femtoseconds per score."""
    matmuls = 4 * 64 / 989e12 * 1e15
    exp2, fp32 = (n / (132 * 1.83e9) * 1e15 for n in (1 / 16, 4 / 128))
    work = kernel_costs.forward(1, 16384, 16384, 32, 32, 64, False)
    a_score = [s * 1e15 / (32 * 16384**2) for s in bound(work, GPUS["sm_90"])]
    assert a_score == pytest.approx([exp2 + fp32, matmuls + exp2, matmuls + exp2 + fp32])
    assert a_score == pytest.approx([388, 518, 647], abs=0.5)


def test_decoding_is_memory_bound():
    work = kernel_costs.decode(1, 1, 8192, 8, 8, 128)
    assert bound(work, GPUS["sm_90"]).overlap == pytest.approx(10.0e-6, rel=0.01)
    assert work[0].bytes == pytest.approx(4 * 8192 * 8 * 128, rel=0.001)
    assert rate(work, 1e-5, "GB/s") == pytest.approx(3355, rel=0.001)


def test_order_of_bounds():
    for case in [*cases(), *dry_cases()]:
        for gpu in GPUS.values():
            seconds = bound(case.work(), gpu)
            assert 0 < seconds.overlap <= seconds.matmul_exp2_series <= seconds.series, case


def test_gpu_is_identified_by_device_name():
    names = ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA B200", "AMD Instinct MI300X")
    assert [kernel_costs.gpu_of(name) for name in names] == list(GPUS.values())
    assert kernel_costs.gpu_of("NVIDIA H100 PCIe") is None and kernel_costs.gpu_of("NVIDIA GB200") is None


def test_printed_bounds_state_their_kind(capsys, monkeypatch, tmp_path):
    figures = {"tile": {"M": 128, "N": 64, "warps": 8, "stages": 2}, "registers": 192, "spilled": 0, "shared": 98304}
    figures |= {"programs": 1, "matrix unit": "HGMMA", "loads": "LDGSTS", "serialized": False}
    kernels = {"flash_forward D 128 on sm_90": figures, "flash_forward D 128 everything on sm_90": figures}
    (tmp_path / "budget.json").write_text(json.dumps({"triton": "3.7.1", "kernels": kernels}))
    monkeypatch.setattr(roofline, "BUDGET", tmp_path / "budget.json")
    assert run("kernels", "--bound") == 0
    sections = capsys.readouterr().out.split("\n\n")
    assert all(re.search(r"\[(bound|measured.*|compiled)\]", s.splitlines()[0]) for s in sections[1:-1])
    out = re.sub(" +", " ", "\n".join(sections))
    for part in (
        "forward D 64 full 324 403 413 497 660 / 495 / 396", "10.0 us, 3,350 GB/s", "x 64: 19.8%", "32 splits, +3.1%",
        *(gpu.name for gpu in GPUS.values()), "arXiv 2407.08608", "arXiv 2307.08691",
        "flash_forward D 128 on sm_90 128 x 64, 8 warps, 2 stages 192 0 98304 1 HGMMA LDGSTS",
    ):  # fmt: skip
        assert part in out
    assert "everything" not in out


# Causal waste


@pytest.mark.parametrize("T", [1, 31, 64, 200])
@pytest.mark.parametrize(("M", "N"), [(16, 16), (32, 16), (16, 64)])
def test_causal_waste_equals_the_count(T, M, N):
    mask = attention_mask(CAUSAL, T, T, CPU, None, None)[0]
    computed = sum(  # (T, T) blocks counted in plain Python
        M * N for t in range(0, T, M) for s in range(0, T, N) if any(mask[i, s] for i in range(t, min(t + M, T)))
    )
    assert kernel_costs.causal_waste(T, M, N) == pytest.approx(1 - mask.sum().item() / computed)
    assert (blocks(mask, M, N) != SKIPPED).sum() * M * N == computed


def test_block_map():
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[:2, :2] = mask[4, 4:] = mask[2, 3] = True  # a full block, a full block at the edge, a single score
    assert blocks(mask, 2, 2).tolist() == [
        [WHOLE, SKIPPED, SKIPPED],
        [SKIPPED, PART, SKIPPED],
        [SKIPPED, SKIPPED, WHOLE],
    ]


@triton.jit
def ranges(out, first, last, T, S, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """The ranges of each block of queries and of keys as in flash_attention.py: out (2, blocks, 2)."""
    i, n = tl.program_id(0), tl.num_programs(0)
    low, high = _key_range(i * M, 0, first, last, T, S, CAUSAL, WINDOW, M, N)
    tl.store(out + i * 2, low)
    tl.store(out + i * 2 + 1, high)
    low, high = _query_range(i * N, 0, first, last, T, S, CAUSAL, WINDOW, M, N)
    tl.store(out + (n + i) * 2, low)
    tl.store(out + (n + i) * 2 + 1, high)


@pytest.mark.parametrize("name", attention_block_maps.MAPS)
def test_kernels_compute_the_blocks_of_the_map(name):
    """For the plotted maps: the ranges are from the first to the last block of keys and queries not skipped."""
    mask_spec, document_ids = attention_block_maps.MAPS[name]
    T, M, N = attention_block_maps.T, attention_block_maps.BLOCK_M, attention_block_maps.BLOCK_N
    first, last = (None, None) if document_ids is None else document_bounds(document_ids)
    out = torch.empty(2, T // M, 2, dtype=torch.int32)
    ranges[(T // M,)](out, first, last, T, T, CAUSAL=mask_spec.causal, WINDOW=mask_spec.window, M=M, N=N)
    computed = blocks(attention_mask(mask_spec, T, T, CPU, None, document_ids)[0], M, N) != SKIPPED
    for map_, spans, size in ((computed, out[0], N), (computed.T, out[1], M)):
        for row, (low, high) in zip(map_, spans.tolist(), strict=True):
            assert row.nonzero().flatten().tolist() == list(range(low // size, math.ceil(high / size)))


def test_split_bytes_equal_the_allocated_bytes(monkeypatch):
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: made.append(empty(*shape, **how)) or made[-1])
    q, k = torch.randn(2, 1, 4, 16), torch.randn(2, 64, 2, 16)
    flash_decoding.decode_attention(q, k, k, CAUSAL, 1.0, torch.tensor([64, 64]), splits=3)
    parts = sum(x.numel() * 4 for x in made if x.shape[0] == 3)
    assert kernel_costs.split_bytes(3, 2, 1, 4, 16) == 2 * parts  # written and read
    assert kernel_costs.split_bytes(1, 2, 1, 4, 16) == 0


def test_splits_equal_those_of_the_kernel(monkeypatch):
    """The splits that --bound prints for an H100 are those that kernels/triton/flash_decoding.py chooses there."""
    H, K, D = roofline.HEADS
    tile = tiles.TABLE["decode"]["sm_90"][D]
    assert H // K <= 16 <= tile.M
    assert roofline.splits(1, 8192, "sm_90") == flash_decoding.choose_splits(K, 8192 // tile.N, 132) == 32


# The benchmark


def test_dry_run(tmp_path, capsys):
    assert run("kernels", "--dry-run", "--out", str(tmp_path / "new")) == 0
    out = capsys.readouterr().out
    assert out.startswith("DRY RUN") and "WRONG" not in out
    with (tmp_path / "new/kernels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["kind"] for row in rows} == {"dry run"}
    heed = [(row["series"], int(row["length"])) for row in rows if row["implementation"] == "heed"]
    assert heed == [(case.series, case.length) for case in dry_cases()]
    assert {row["implementation"] for row in rows} == {"heed", "sdpa", "flex", "torch", "compiled"}
    for row in rows:
        assert float(row["rate"]) / float(row["bound"]) == pytest.approx(float(row["share"]))
    assert (tmp_path / "new/kernels.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_implementation_is_not_timed(monkeypatch, capsys):
    def worse(q, k, v, *rest, backend, **named):
        return attention(q, k, v, *rest, backend=backend, **named) * (1.001 if backend == "decode" else 1)

    monkeypatch.setattr(attention_implementations, "attention", worse)
    assert run("kernels", "--dry-run", "--only", "decode") == 1
    out = capsys.readouterr().out
    assert "decode, heed: WRONG: result 0 is off by" in out
    assert len(re.findall("GB/s +- ", out)) == 2  # heed's column comes after the unit


def test_nan_result_is_wrong():
    x = torch.ones(3)
    assert kernels.compare([x], [x.double()], [x]) == ""
    assert "off by nan" in kernels.compare([x * math.nan], [x.double()], [x])


def test_failing_implementation_is_reported_and_the_others_continue(monkeypatch, capsys):
    def fails(case, q, k, v):
        raise RuntimeError("no such luck\nand a long story")

    monkeypatch.setattr(attention_implementations, "_flex", fails)
    assert run("kernels", "--dry-run", "--only", "forward") == 0
    out = capsys.readouterr().out
    assert "forward, flex: RuntimeError: no such luck\n" in out and "long story" not in out


def test_gpu_timing_alternates_and_takes_the_median(monkeypatch):
    """The code for timing on a GPU, with a simulated clock."""
    now, order = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, other):
            return other.at - self.at

    def call(name, milliseconds):
        order.append(name)
        now[0] += milliseconds + (100 if len(order) == 9 else 0)  # one outlier

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: empty(1))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    got = timing.medians({"a": lambda: call("a", 20), "b": lambda: call("b", 30)}, torch.device("cuda"))
    assert got == {"a": pytest.approx(0.02), "b": pytest.approx(0.03)}
    assert order == ["a"] * 3 + ["b"] * 3 + ["a", "b"] * 10


def test_cases_equal_those_of_the_papers():
    every = list(cases())
    assert len({(case.series, case.length) for case in every}) == len(every)
    for case in every:
        if case.kernel in ("forward", "backward"):
            assert case.B * case.T == 16384 and case.H * case.D == 2048 and case.S == case.T
        assert case.small(333).H // case.small(333).K == case.H // case.K
    causal, full = (Case("forward", 1, 4096, 4096, 16, 16, 128, causal) for causal in (True, False))
    assert full.work()[0].counted == 4 * 4096**2 * 16 * 128 == 2 * causal.work()[0].counted
    assert sum(w.counted for w in Case("backward", 1, 64, 64, 2, 2, 16).work()) == 2.5 * 4 * 64**2 * 2 * 16 / 2


# Tiles


def test_tile_search_does_not_change_the_table(capsys):
    before = {kernel: {where: dict(rows) for where, rows in targets.items()} for kernel, targets in tiles.TABLE.items()}
    assert run("tiles", "--dry-run") == 0
    out = capsys.readouterr().out
    printed = eval("{" + out.partition("\n")[2] + "}", {"Tile": tiles.Tile})
    assert list(printed) == list(tiles.TABLE)
    assert all(set(rows) == {"interpreter"} for rows in printed.values())
    assert before == tiles.TABLE


# Errors


def test_missing_gpu_prints_one_line(tmp_path):
    done = command("benchmarks", "kernels", where=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("benchmarks: no GPU found.") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kernels", "--dry-run", "--only", "sideways"], "--only sideways: must be one of forward, backward, decode"),
        (["tiles", "sideways", "--dry-run"], "tiles sideways: must be one of "),
    ],
)
def test_unknown_kernel_raises(words, message):
    with pytest.raises(ValueError, match=message):
        run(*words)


def test_interpreter_with_a_gpu_raises(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 is set"):
        run("kernels")
