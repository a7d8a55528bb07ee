"""heed trains on text without the packages datasets and wandb, and says in one line what needs them."""

import subprocess
import sys

from tests.conftest import ROOT, SMALL, USER_ENV
from tests.test_layout import NAMES

BLOCKED = (
    "datasets",
    "pyarrow",
    "wandb",
    "transformers",
    "llama_cpp",
    "gguf",
    "lm_eval",
    "fastapi",
    "uvicorn",
    "tensorboard",
)
CODE = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({BLOCKED}))  # importing one of them raises ImportError
for name in sys.argv.pop().split(","):
    importlib.import_module(name)
import train
train.main()
"""


def run(where, *words: str, modules: str = "train") -> subprocess.CompletedProcess:
    env = USER_ENV | {"HEED_RUNS": str(where), "OMP_NUM_THREADS": "1"}
    words = ("-c", CODE, "shakespeare", "--name=bare", *SMALL, *words, modules)
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)


def test_training_without_them(text, tmp_path):
    adapters = {"evals.lm_eval_adapter", "convert.to_gguf"}
    adapters |= {f"serve.{name}" for name in ("app", "openai_api", "playground", "server")}
    commands = {name for name in NAMES if name.endswith("__main__")}
    modules = ",".join(sorted(NAMES - adapters - commands))
    done = run(tmp_path, f"--data.source={text}", "--train.steps=2", "--train.wandb=offline", modules=modules)
    assert done.returncode == 0, done.stderr
    assert "wandb is off, it failed to start: " in done.stdout
    assert "num_steps: 2" in done.stdout


def test_a_table_needs_datasets(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    for source in ("hf:org/name", str(tmp_path / "rows.jsonl")):
        done = run(tmp_path, f"--data.source={source}", "--train.steps=2")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert f"train.py: data.source = '{source}': tables and the hub need the package datasets" in done.stderr


def test_tensorboard_that_is_missing_is_one_line(text, tmp_path):
    done = run(tmp_path, f"--data.source={text}", "--train.steps=2", "--train.tensorboard=true")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("train.py: train.tensorboard = True: needs the package tensorboard")
    assert not any(tmp_path.iterdir())
