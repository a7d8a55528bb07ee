"""lm-eval itself, offline, on local tasks: its results equal those of `python -m evals` and of transformers."""

import json
import math

import pytest
import torch

from data.tokenizer import Tokenizer
from evals import lm_eval_adapter, tasks
from evals.lm_eval_adapter import Heed
from sample import SamplingParams, load, stream_generate
from tests.conftest import command
from tests.evals.test_evaluate import expected_score

WORDS = [f"the {n % 7} birds sing to the {n % 5} bees, and the bees to the {n % 3} {w}"
         for n, w in enumerate(["ants.", "bees.", "birds", "ants.\n", "ants", "the", "naïve", "to"])]  # fmt: skip
CHOICES = [
    {"prompt": f"Song {n}: the {n % 7} birds sing to the", "choices": [f"{n % 5}", "3 bees, and the bees to", "zq"],
     "answer": n % 3 % 2} for n in range(12)
]  # fmt: skip
TEXTS = ["Song 8: the 1 birds sing", "Nobody sang.\n" * 12, "x"]  # the second is longer than the run's context of 32

TASKS = {
    "last_word": """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' ' + text.split(' ')[-1]}}"
metric_list: [{metric: acc}, {metric: perplexity}]
""",
    "pick": """
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "go_on": """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["sing", "."], max_gen_toks: 40, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
ROWS = {
    "last_word": [{"text": text} for text in WORDS],
    "pick": CHOICES,
    "rolling": [{"text": text} for text in TEXTS],
    "go_on": [{"prompt": row["prompt"], "answer": "x"} for row in CHOICES[:3]],
}


@pytest.fixture(scope="module")
def found(runs, tmp_path_factory) -> dict:
    """The output of the command: the results, and under `samples` each task's answers."""
    where = tmp_path_factory.mktemp("harness")
    for task, recipe in TASKS.items():
        (where / f"{task}.jsonl").write_text("\n".join(map(json.dumps, ROWS[task])))
        data = f"task: {task}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {where / task}.jsonl}}}}\n"
        (where / f"{task}.yaml").write_text(f"{data}test_split: test\n{recipe}")
    done = command(
        "evals.lm_eval_adapter", "--model", "heed", "--model_args", f"run={runs / 'songs'},checkpoint=latest",
        "--tasks", ",".join(TASKS), "--include_path", str(where), "--output_path", str(where / "out"), "--log_samples",
        where=runs, HF_HOME=str(where / "hf"), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(next((where / "out").rglob("results_*.json")).read_text())["results"]
    logs = {task: next((where / "out").rglob(f"samples_{task}_*.jsonl")) for task in TASKS}
    samples = {task: [json.loads(line) for line in log.read_text().splitlines()] for task, log in logs.items()}
    return results | {"samples": {task: sorted(rows, key=lambda row: row["doc_id"]) for task, rows in samples.items()}}


@pytest.fixture(scope="module")
def ours(runs):
    model, tokenizer = load(runs / "songs", "latest")
    return model.cpu(), tokenizer


def test_accuracy_equals_that_of_evals(found, ours):
    items = [{"task": "lambada", "text": text.rstrip("\n")} for text in WORDS]
    items += [{"task": "choice", **row} for row in CHOICES]
    lambada, choice = tasks.evaluate(*ours, [tasks.parse(item, "") for item in items])
    theirs = found["last_word"]
    assert theirs["acc,none"] == lambada.accuracy.value
    assert theirs["acc_stderr,none"] == pytest.approx(lambada.accuracy.error)
    theirs = found["pick"]
    assert (theirs["acc,none"], theirs["acc_bytes,none"]) == (choice.accuracy.value, choice.per_byte.value)
    assert theirs["acc_stderr,none"] == pytest.approx(choice.accuracy.error)
    assert 0 < lambada.accuracy.value < 1
    assert choice.accuracy.value != choice.per_byte.value


def test_perplexity(found, ours):
    model, tokenizer = ours
    total = 0.0
    for text in WORDS:
        context, _, word = text.rpartition(" ")
        ids = tokenizer.encode(context)
        total += expected_score(model, ids, tokenizer.encode(f"{context} {word}")[len(ids) :])[0]
    assert found["last_word"]["perplexity,none"] == pytest.approx(math.exp(-total / len(WORDS)), rel=1e-3)


def test_rolling_loglikelihood(found, ours):
    model, tokenizer = ours
    total = 0.0
    for text in TEXTS:
        ids = [tokenizer.eot, *tokenizer.encode(text)]
        for start in range(1, len(ids), 32):  # 32 tokens at a time, preceded by as many tokens as fit
            scored = ids[start : start + 32]
            total += expected_score(model, ids[:start], scored)[0]
    size = sum(len(text.encode()) for text in TEXTS)
    assert len(tokenizer.encode(TEXTS[1])) > 64
    assert found["rolling"]["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-3)


def test_generation_equals_greedy_sample_up_to_a_stop_string(found, ours):
    for row, sample in zip(ROWS["go_on"], found["samples"]["go_on"], strict=True):
        parts = stream_generate(
            *ours, row["prompt"], max_new_tokens=40, sampling=SamplingParams(greedy=True), stop=["sing", "."]
        )
        assert sample["resps"] == [["".join(part for _, part in parts)]]
        assert "sing" not in sample["resps"][0][0]


# Requests not covered by the tasks above ----------------------------------------------------------------------------


class Request:
    def __init__(self, *args):
        self.args = args


def test_blank_context_starts_a_document(runs, ours):
    model, tokenizer = ours
    heed = Heed(str(runs / "songs"), "latest")
    begins = expected_score(model, [tokenizer.eot], tokenizer.encode(" the"))[0]
    for context, continuation in (("", " the"), (" ", "the")):
        (found,) = heed.loglikelihood([Request(context, continuation)], disable_tqdm=True)
        assert found[0] == pytest.approx(begins, abs=1e-3)
    assert heed.loglikelihood_rolling([Request("")]) == [0]


def test_generation_options(runs):
    heed = Heed(str(runs / "songs"))
    torch.manual_seed(0)
    drawn = heed.generate_until([Request("Song", {"do_sample": True, "temperature": 5.0, "top_k": 50})])
    assert drawn != heed.generate_until([Request("Song", {})])
    with pytest.raises(ValueError, match=r"gen_kwargs: num_beams = 4: sample.py supports temperature, top_k"):
        heed.generate_until([Request("Song", {"num_beams": 4})])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "model_args: no run; --model_args run=runs/NAME"),
        ({"run": "none"}, "none: no such run"),
        ({"run": "none", "pretrained": "gpt2", "batch_size": 1}, "model_args: pretrained = 'gpt2': no such argument"),
    ],
)
def test_invalid_model_args(arguments, message):
    with pytest.raises(ValueError, match=message):
        Heed(**arguments)


def test_error_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: Heed(run="none"))
    assert lm_eval_adapter.main() == 2
    assert capsys.readouterr().err == "lm_eval_adapter: none: no such run\n"


def test_missing_package_prints_a_hint(runs, tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ModuleNotFoundError(\"No module named 'lm_eval'\")")
    done = command("evals.lm_eval_adapter", "--help", where=runs, PYTHONPATH=str(tmp_path))
    assert done.stderr == "lm_eval_adapter: No module named 'lm_eval': pip install -e .[eval]\n"
    assert done.returncode == 2


def test_tok_encode_adds_no_special_tokens(runs):
    heed = Heed(str(runs / "songs"))
    tokenizer = Tokenizer.load(runs / "songs")
    assert heed.tok_encode("Song 1", add_special_tokens=True) == tokenizer.encode("Song 1")
    assert heed.max_length == 32
    assert heed.tokenizer_name == tokenizer.sha256
