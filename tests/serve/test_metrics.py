"""GET /metrics: a text that a parser of Prometheus' format accepts, with numbers that add up."""

import re

import httpx2
import openai
import pytest

from serve.metrics import BOUNDS, Histogram
from tests.serve.conftest import eventually, running

NAME, LABELS = r"[a-zA-Z_:][a-zA-Z0-9_:]*", r'\{((?:[a-z_]+="[^"\\\n]*",?)*)\}'
SAMPLE = re.compile(rf"({NAME})(?:{LABELS})? (\S+)")


def parse(text: str) -> dict[str, dict[str, float]]:
    """The samples of each metric, by name and labels; every line must be of the format."""
    metrics: dict[str, dict[str, float]] = {}
    assert text.endswith("\n") and not text.endswith("\n\n")
    lines = iter(text.splitlines())
    for line in lines:
        if about := re.fullmatch(rf"# HELP ({NAME}) \S.*", line):
            kind = re.fullmatch(rf"# TYPE {about[1]} (counter|gauge|histogram)", next(lines))
            assert kind and about[1] not in metrics
            metrics[about[1]] = {}
            continue
        name, labels, value = SAMPLE.fullmatch(line).groups()
        of = re.sub("_(bucket|sum|count)$", "", name) if kind[1] == "histogram" else name
        assert of == list(metrics)[-1]
        key = name.removeprefix(of) + (labels or "")
        assert key not in metrics[of]
        metrics[of][key] = float(value)
    return metrics


def test_the_text_parses_and_adds_up(songs):
    with running(*songs, max_sequences=2) as served:
        empty = parse(httpx2.get(f"{served.address}/metrics").text)
        assert empty["heed_generated_tokens_total"] == empty["heed_prompt_tokens_total"] == {"": 0}
        create, size = served.client.completions.create, len(served.tokenizer.encode("Song 5:"))
        for options in ({}, {"n": 3}, {"stream": True}, {"stop": " "}):
            found = create(model="songs", prompt="Song 5:", max_tokens=4, temperature=0, **options)
            list(found)
        with pytest.raises(openai.NotFoundError):
            create(model="other", prompt="")
        with pytest.raises(openai.NotFoundError):
            served.client.get("/other", cast_to=object)
        eventually(served.idle)
        response = httpx2.get(f"{served.address}/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    metrics = parse(response.text)
    assert metrics["heed_requests_total"] == {
        'path="/metrics",status="200"': 1,
        'path="/v1/completions",status="200"': 4,
        'path="/v1/completions",status="404"': 1,
        'path="other",status="404"': 1,
    }
    assert metrics["heed_sequences_total"] == {'outcome="length"': 5, 'outcome="stop"': 1}
    assert metrics["heed_prompt_tokens_total"] == {"": 6 * size}
    assert metrics["heed_cached_prompt_tokens_total"] == {"": 5 * (size - 1)}
    generated = metrics["heed_generated_tokens_total"][""]
    assert 20 < generated <= 24
    assert metrics["heed_sequences_running"] == metrics["heed_sequences_waiting"] == {"": 0}
    for name, count in (("first", 6), ("per", generated - 6)):
        (histogram,) = (value for key, value in metrics.items() if f"_{name}_token" in key)
        buckets = [value for key, value in histogram.items() if key.startswith("_bucket")]
        assert buckets == sorted(buckets) and buckets[-1] == histogram["_count"] == count
        assert histogram["_sum"] > 0


def test_an_observation_is_in_the_buckets_of_all_larger_bounds():
    histogram = Histogram()
    for value in (0.001, 0.0011, 7, 1e9):
        histogram.observe(value)
    metrics = parse("# HELP a b\n# TYPE a histogram\n" + "\n".join(histogram.lines("a")) + "\n")["a"]
    for bound in BOUNDS:
        assert metrics[f'_bucketle="{bound}"'] == sum(value <= bound for value in (0.001, 0.0011, 7, 1e9))
    assert metrics['_bucketle="+Inf"'] == metrics["_count"] == 4
    assert metrics["_sum"] == pytest.approx(1e9 + 7.0021)
