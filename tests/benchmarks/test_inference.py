"""python -m benchmarks inference: the memory bound, and a run with a tiny model."""

import csv
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import __main__ as bench
from benchmarks import inference, inference_engines
from benchmarks.inference import SIZES, bytes_per_step
from model import GPT, ModelConfig
from tests.conftest import TINY, command


def test_bytes_per_step():
    weights = sum(p.numel() for p in GPT(TINY).parameters())
    row = 2 * 2 * 2 * 16  # keys and values, layers, key heads, head size
    assert bytes_per_step(TINY, "fp32", 3, 10.0) == 4 * weights + 3 * 10 * row * 4
    assert bytes_per_step(TINY, "bf16", 1, 10.0) == 2 * weights + 10 * row * 2
    assert bytes_per_step(TINY, "int8", 1, 10.0) == 1 * weights + 10 * row * 2


@pytest.mark.parametrize("fastest", ["sum", "linalg_vector_norm", "dot", "mv"])
def test_the_bandwidth_is_that_of_the_fastest_kernel(fastest, monkeypatch):
    class Clock(TorchDispatchMode):
        now = 0.0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.now += 2 if op.overloadpacket.__name__ == fastest else 3
            return op(*args, **kwargs or {})

    monkeypatch.setattr(inference, "allocate_huge_pages", lambda size: bytearray(1 << 16))
    with Clock() as clock:
        monkeypatch.setattr(inference.time, "perf_counter", lambda: clock.now)
        assert inference.bandwidth(torch.get_num_threads()) == (1 << 16) / 2


def test_names_of_sizes_are_their_parameters():
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in GPT(config).parameters()) for name, config in SIZES.items()}
    assert {name: round(count / 1e6) for name, count in counts.items()} == {"10M": 11, "50M": 55, "124M": 124}


def test_all_engines_generate_the_same_tokens(tmp_path):
    others = [
        name
        for name in ("transformers", "llama.cpp F32", "llama.cpp BF16 in C++")
        if not inference_engines.missing(name)
    ]
    done = command(
        "benchmarks", "inference", "--quick", f"--out={tmp_path}", "--only", "heed fp32", "heed bf16", "heed int8",
        "nanoGPT",
        *others, where=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nanoGPT skipped: missing --nanogpt DIR" in done.stdout
    rows = list(csv.DictReader((tmp_path / "inference.csv").open()))
    assert [(row["batch"], row["engine"]) for row in rows] == [
        (batch, name) for batch in ("1", "3") for name in ("heed fp32", "heed bf16", "heed int8", *others)
    ]
    speed = float(re.search(r"memory was read at up to ([\d.]+) GB/s", done.stdout)[1]) * 1e9
    for row in rows:
        rate, batch = float(row["tokens/s"]), int(row["batch"])
        read = bytes_per_step(inference.TINY, row["precision"], batch, int(row["prompt"]) + 4 / 2)
        assert float(row["TTFT ms"]) > 0 and float(row["MBU"]) == pytest.approx(rate / batch * read / speed, rel=0.1)
        assert row["same"] == "100%" or row["precision"] != "fp32"
        assert row["engine"].startswith("heed") == (float(row["heed/engine"]) == 1.0)


def test_errors_are_one_line(tmp_path):
    for words, message in (
        (["--nanogpt", str(tmp_path)], "no model.py"),
        (["--max-new-tokens", "1"], "at least 1"),
        (["--prompts", "1000"], "at most 1,024"),
        (["--sizes", "1T"], "--sizes 1T: must be one of 10M, 50M, 124M"),
        (["--only", "me"], "--only me: must be one of heed fp32, "),
    ):
        with pytest.raises(ValueError, match=message):
            bench.main(bench.arguments(["inference", *words]))


def test_failing_engine_is_reported_and_the_others_continue(tmp_path):
    config = ModelConfig(**{**vars(inference.TINY), "vocab_size": 280})
    inference_engines.write(tmp_path, config, [])
    here = inference.EngineProcess("heed fp32", tmp_path, None, 1)
    with pytest.raises(ValueError, match="heed fp32: IndexError"):
        here.generate([280], 1, 2)
    here.close()


def test_an_engine_whose_process_dies_has_a_row_that_says_so(tmp_path):
    """Killed between two settings, as by a signal in a library: both the next setting and the one after go on."""
    inference_engines.write(tmp_path, inference.TINY, [])
    here, other = (inference.EngineProcess(name, tmp_path, None, 1) for name in ("heed fp32", "heed bf16"))
    inference.setting([here, other], inference.TINY, 1, 3, 2, 1)
    other.process.kill()
    for length in (3, 5):
        (good, bad), faults = inference.setting([here, other], inference.TINY, 1, length, 2, 1)
        assert good["engine"] == "heed fp32" and good["tokens/s"] > 0 and good["fault"] is None
        assert bad == dict.fromkeys(good) | {
            "engine": "heed bf16", "precision": "bf16", "fault": "its process died, SIGKILL"
        }  # fmt: skip
        assert faults == ["heed bf16: its process died, SIGKILL"]
    here.close()
