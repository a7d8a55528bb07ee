"""python -m benchmarks gpu without a GPU: every part on tiny shapes, and parts that fail, hang or are too many."""

import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import __main__ as bench
from benchmarks import training
from benchmarks.gpu import ROW, attention, correctness, generation, pretraining, report, run, shakespeare
from benchmarks.gpu.part import Task
from benchmarks.shapes import gpu_cases
from benchmarks.training import Run
from kernels import gpu_choices
from kernels.triton import flash_attention
from tests.conftest import ROOT, command


def rows_of(part, capsys, **options) -> list[dict]:
    capsys.readouterr()
    part.run(Task(seconds=1000.0, dry=True, **options))
    return [json.loads(line.removeprefix(ROW)) for line in capsys.readouterr().out.splitlines() if line.startswith(ROW)]


# The parts, in this process


@pytest.fixture
def dry(monkeypatch):
    monkeypatch.setattr(correctness, "DRY", True)
    monkeypatch.setattr(correctness, "DEVICE", torch.device("cpu"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_correctness(capsys, dry):
    rows = rows_of(correctness, capsys)
    assert [row["group"] for row in report.by_group(rows)] == correctness.groups()
    assert all(row["ok"] and 0 < row["share_of_allowed_error"] <= 1 for row in rows)
    assert rows[0]["same_bits"]


@pytest.mark.parametrize("worse", [lambda out: out * 1.01, lambda out: out.fill_(math.nan)], ids=["1%", "NaN"])
def test_a_wrong_kernel_is_reported(capsys, dry, monkeypatch, worse):
    """One of the two results, in the forward pass alone."""
    right = flash_attention.flash_attention

    def wrong(*args):
        out, lse = right(*args)
        return worse(out.clone()), lse

    monkeypatch.setattr(flash_attention, "flash_attention", wrong)
    monkeypatch.setattr(correctness, "groups", lambda: ["flash causal float32"])
    (row,) = rows_of(correctness, capsys)
    assert not row["ok"]
    results = {"parts": {"correctness": {"rows": [row]}}}
    assert report.faults(results) == ["correctness: flash causal float32, (1, 20, 20, 2, 1, 16): WRONG"]


def test_gradients_that_differ_between_two_runs_are_reported(capsys, dry, monkeypatch):
    right, calls = flash_attention.flash_attention, []

    def restless(*args):
        calls.append(args)
        out, lse = right(*args)
        return out * (1 + 2e-7 * len(calls)), lse

    monkeypatch.setattr(flash_attention, "flash_attention", restless)
    monkeypatch.setattr(correctness, "groups", lambda: ["flash causal float32"])
    (row,) = rows_of(correctness, capsys)
    assert row["share_of_allowed_error"] <= 1 and not row["same_bits"] and not row["ok"]


def test_a_check_that_raises_is_a_result(capsys, dry, monkeypatch):
    def fails(*_):
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(correctness, "flash", fails)
    monkeypatch.setattr(correctness, "groups", lambda: ["flash causal float32", "cross-entropy float32"])
    first, *others = rows_of(correctness, capsys)
    assert first == {"group": "flash causal float32", "ok": False, "error": "RuntimeError: no kernel image"}
    assert len(others) == 2 and all(row["ok"] for row in others)


def test_attention(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(attention, "dry_cases", lambda: [case for case in DRY if case.kernel != "cross-entropy"])
    rows = rows_of(attention, capsys)
    timed = {(row["series"], row["length"], row["implementation"]) for row in rows if "rate" in row}
    assert {name for *_, name in timed} == {"heed", "sdpa"}
    assert {row.get("checked") for row in rows} >= {5}
    assert not [row for row in rows if row.get("implementation") == "heed" and "error" in row]
    tables = report.tables("attention", rows)
    assert "decode, B 2" in tables and "choices" in tables


DRY = list(attention.dry_cases())


def test_choices_are_the_faster_backend_by_head_size():
    seconds = {
        ("forward", 64, "heed"): 1.0, ("forward", 64, "sdpa"): 2.0, ("backward", 64, "heed"): 9.0,
        ("backward", 64, "sdpa"): 3.0, ("forward", 128, "heed"): 2.0, ("forward", 128, "sdpa"): 1.0,
        ("backward", 128, "heed"): 1.0, ("backward", 128, "sdpa"): 3.0,
    }  # fmt: skip
    rows = [
        {"kernel": kernel, "D": D, "series": f"{kernel}, causal, D {D}", "length": 1, "implementation": name}
        | {"seconds": time, "causal": True, "round": 1}
        for (kernel, D, name), time in seconds.items()
    ]
    line = attention.choices([*rows, rows[0] | {"seconds": 99.0, "round": 2}], "a card")
    (choices,) = eval("{" + line + "}", {"Choices": gpu_choices.Choices}).values()
    assert choices.train == {64: "sdpa", 128: "flash"} and choices.inference == {64: "flash", 128: "sdpa"}


def test_cases_cover_what_is_asked_for():
    cases = list(gpu_cases())
    for kernel in ("forward", "backward"):
        own = {(case.D, case.T, case.causal, case.H // case.K) for case in cases if case.kernel == kernel}
        assert len(own) == 2 * 6 * 2 * 3 and {T for _, T, *_ in own} == {512 << n for n in range(6)}
    assert {case.kernel for case in cases} == {"forward", "backward", "decode", "paged", "cross-entropy"}
    assert len(set(cases)) == len(cases)


def test_pretraining(capsys):
    heed, nanogpt = rows_of(pretraining, capsys)
    assert heed["tokens_per_second"] > 0 and heed["micro_batch_tokens"] == 64
    n = pretraining.BATCH / 64
    took = n * heed["micro_batch_seconds"] + heed["optimizer_seconds"]
    assert heed["tokens_per_second"] == pytest.approx(pretraining.BATCH / took)
    assert nanogpt["error"] == "skipped: needs --nanogpt DIR"


def test_generation(capsys, monkeypatch):
    monkeypatch.setattr(generation, "ENGINES", ("heed fp32", "", "llama.cpp F32"))
    monkeypatch.setattr(generation.inference_engines, "missing", lambda name: "it" if "llama" in name else "")
    skipped, row = rows_of(generation, capsys)
    assert skipped == {"engine": "llama.cpp F32", "fault": "skipped: needs it"}
    assert (row["engine"], row["batch"], row["fault"]) == ("heed fp32", 2, None) and row["tokens/s"] > 0


def test_shakespeare(capsys, monkeypatch, tmp_path):
    """With both trainings replaced: tests/benchmarks/test_training.py runs them."""
    (tmp_path / "config").mkdir()
    for name in ("train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "input.txt").write_text("a song " * 50)
    curve = [(1.0, 1.6), (2.0, 1.4)]
    monkeypatch.setattr(training, "train_heed", lambda setting, where, seed, extra: Run("heed", seed, 2.0, 1.4, curve))

    def fails(*_):
        raise ValueError("train.py failed: CUDA out of memory")

    monkeypatch.setattr(training, "train_nanogpt", fails)
    rows = rows_of(shakespeare, capsys, nanogpt=str(tmp_path), text=str(tmp_path / "input.txt"))
    assert rows[0]["seconds_to_target"] == 2.0 and rows[1]["error"] == "train.py failed: CUDA out of memory"
    machine = {"machine": {"gpu": "none"}, "dry": True, "parts": {"shakespeare": {"rows": rows}}}
    report.pictures(tmp_path, machine)
    assert (tmp_path / "gpu-training.png").stat().st_size > 1000


def test_every_setting_of_nanogpt_in_full():
    setting = training.SETTINGS["gpu-full"]
    assert (setting.total_steps, setting.nanogpt, setting.heed) == (0, (), ("shakespeare-char",))


# The command


def test_one_part_in_its_process(tmp_path):
    done = command("benchmarks", "gpu", "--dry-run", "--only", "tiles", "--out", str(tmp_path / "new"), where=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert results["dry"] and results["machine"]["gpu"] == "none" and list(results["parts"]) == ["tiles"]
    assert {row["kernel"] for row in results["parts"]["tiles"]["rows"]} == {"flash_forward"}
    text = (tmp_path / "new" / "gpu.md").read_text()
    assert text.startswith("# DRY RUN: not a measurement") and "## Tile search" in text
    assert len(list((tmp_path / "new").iterdir())) <= 8


PARTS = """
import json, subprocess, sys, time
name, task = sys.argv[1], json.loads(sys.argv[2])
def emit(**row):
    print("ROW " + json.dumps(row), flush=True)
emit(machine={"gpu": "a card"})
if name == "correctness":
    emit(group="first", what="a", ok=True)
    sys.exit("out of luck")
if name == "attention":
    emit(checked=1)
    print("a word before it hangs", flush=True)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(sys.argv[0] + ".pid", "w").write(str(child.pid))
    time.sleep(60)
emit(system="heed", attention="", context=int(task["seconds"]), tokens_per_second=1.0)
"""


@pytest.fixture
def parts(monkeypatch, tmp_path) -> Path:
    """Parts that need no torch: one fails, one hangs together with a process that it started, the others succeed."""
    script = tmp_path / "part.py"
    script.write_text(PARTS)
    monkeypatch.setattr(run, "COMMAND", [sys.executable, str(script)])
    return script


def running(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_parts_that_fail_or_hang_are_stopped_and_the_others_go_on(parts, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "PARTS", {n: p._replace(share=1, least=0.5) for n, p in run.PARTS.items()})
    monkeypatch.setattr(run, "END", 0.0)
    out = tmp_path / "out"
    assert run.run(out, ["correctness", "attention", "pretraining", "shakespeare"], 16 / 60, None, None, False) == 1
    results = json.loads((out / "gpu.json").read_text())
    found = results["parts"]
    assert found["correctness"]["status"] == "failed: out of luck"
    assert found["correctness"]["rows"] == [{"group": "first", "what": "a", "ok": True}]  # what was there is kept
    assert found["attention"]["status"].startswith("stopped after") and found["attention"]["rows"] == [{"checked": 1}]
    assert found["pretraining"]["status"] == "ok" and found["pretraining"]["rows"][0]["tokens_per_second"] == 1.0
    assert found["shakespeare"]["status"] == "skipped: needs --nanogpt DIR and --text FILE"
    assert results["machine"]["gpu"] == "a card"
    assert "a word before it hangs" in (out / "gpu.log").read_text()
    assert "failed: out of luck" in capsys.readouterr().out
    child = int(Path(f"{parts}.pid").read_text())
    until = time.monotonic() + 10
    while running(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not running(child)


def test_what_does_not_fit_is_skipped_and_time_that_is_left_goes_to_later_parts(parts, monkeypatch, tmp_path):
    each = {"share": 1, "least": 5.0, "needs_nanogpt": False}
    monkeypatch.setattr(run, "PARTS", {n: run.PARTS[n]._replace(**each) for n in ("pretraining", "tiles")})
    monkeypatch.setattr(run, "END", 0.0)
    assert run.run(tmp_path / "out", [], 40 / 60, None, None, False) == 0
    given = [p["rows"][0]["context"] for p in json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"].values()]
    assert 12 <= given[0] <= 15  # half of the time, less five seconds
    assert given[1] > 2 * given[0]
    assert run.run(tmp_path / "out", [], 6 / 60, None, None, False) == 0
    status = [p["status"] for p in json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"].values()]
    assert status[0] == "skipped: needs 5 s, has 3" and status[1] == "ok"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "everything"], "--only everything: must be one of correctness, attention"),
        (["--nanogpt", "nowhere"], "--nanogpt nowhere: no train.py"),
        (["--text", "nothing.txt"], "--text nothing.txt: no such file"),
        (["--minutes", "0"], "--minutes 0: must be above 0"),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(ValueError, match=message):
        bench.main(bench.arguments(["gpu", "--dry-run", *words]))


def test_without_a_gpu(tmp_path):
    done = command("benchmarks", "gpu", where=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stderr.startswith("benchmarks: no GPU found.")
    assert not (ROOT / "gpu-results").exists()
