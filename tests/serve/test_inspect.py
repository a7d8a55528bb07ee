"""What the playground shows of a text, and who may reach the server."""

import base64
import concurrent.futures
import contextlib
import dataclasses
import json
import re
import socket
import threading

import httpx2
import numpy as np
import pytest
import torch

from data import chat_format
from inference.attention_weights import attention_weights
from inference.quantize import quantize
from model import ModelConfig
from sample import load
from serve import playground
from serve.playground import encode, inspect, most_inspected
from serve.server import allowed_hosts, bind
from tests.conftest import TINY, randomized
from tests.serve.conftest import eventually, running

TEXT = "Song 5: the 5 birds"


def ask(served, status=200, **body) -> dict:
    response = httpx2.post(f"{served.address}/playground/inspect", json=body, timeout=60)
    assert response.status_code == status, response.text
    return response.json() if status == 200 else response.json()["error"]


def numbers(base64_text: str, dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(base64_text), dtype).copy())


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_probabilities_and_rivals_are_those_of_the_model(served, kind):
    tokens = served.tokenizer.encode(TEXT)
    found = ask(served, **({"text": TEXT} if kind == "text" else {"tokens": tokens}))
    assert found["tokens"] == tokens
    assert "".join(found["texts"][str(token)] for token in tokens) == TEXT
    with torch.no_grad():
        logits = served.model(torch.tensor([tokens]))[0].float()
    p = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
    assert found["logprobs"][0] is None
    for at, logprob in enumerate(found["logprobs"][1:], 1):
        assert logprob == pytest.approx(float(p[at - 1, tokens[at]].log()), abs=1e-4)
    for at, row in enumerate(found["rivals"]):
        most = p[at].sort(descending=True).values[:6].log().tolist()
        assert [logprob for _, logprob in row] == pytest.approx(most, abs=1e-4)
        assert all(str(token) in found["texts"] for token, _ in row)
    assert len(found["rivals"]) == len(tokens)
    assert torch.equal(numbers(found["logits"], np.float32), logits[-1])


def unpacked(layer: dict, size: int) -> torch.Tensor:
    """The weights (H, T, T) of a layer, as the page reads them."""
    roots = numbers(layer["roots"], np.uint8).double().view(len(layer["largest"]), -1)
    weights = torch.zeros(len(layer["largest"]), size, size, dtype=torch.double)
    for query in range(size):
        for key in range(query + 1):
            root = roots[:, query * (query + 1) // 2 + key] / 255
            weights[:, query, key] = torch.tensor(layer["largest"]) * root**2
    return weights


def test_maps_are_the_attention_weights_to_half_a_step(served):
    found = ask(served, text=TEXT)
    tokens = torch.tensor(found["tokens"])
    expected = attention_weights(served.model, tokens)
    assert len(found["maps"]) == len(expected) == 2
    for layer, weights in zip(found["maps"], expected, strict=True):
        roots = unpacked(layer, len(tokens)).sqrt()
        largest = torch.tensor(layer["largest"]).sqrt()[:, None, None]
        assert float(((roots - weights.double().sqrt()) / largest).abs().max()) < 0.5 / 255 + 1e-6
        assert torch.equal(torch.tensor(layer["largest"]), weights.amax((1, 2)))


@pytest.mark.parametrize("kind", ["none", "bf16", "int8"])
def test_a_layer_without_a_map_has_none(songs, kind):
    config = dataclasses.replace(TINY, vocab_size=300, layer_pattern="LR", n_kv_head=4)
    model = randomized(config)
    if kind != "none":
        quantize(model, kind)
    found = inspect(model, songs[1], [5, 6, 7])
    assert [layer is None for layer in found["maps"]] == [False, True]
    json.dumps(found, allow_nan=False)


def test_a_conversation_is_the_prompt_of_its_answer(chat_runs):
    model, tokenizer = load(chat_runs / "assistant")
    talk = [{"role": "system", "content": "a"}, {"role": "user", "content": "what is 3 plus one?"}]
    with running(model, tokenizer, "assistant", max_sequences=1) as served:
        found = ask(served, messages=talk, max_tokens=8)
        turns = [(message["role"], message["content"]) for message in talk]
        assert found["tokens"] == chat_format.render_prompt(tokenizer, turns, model.config.context)
        named = {found["texts"][str(token)] for token in found["named"]}
        assert {"<|im_start|>", "<|im_end|>"} <= named
        many = [{"role": role, "content": "b " * 20} for role in ("user", "assistant") * 4 + ("user",)]
        assert len(ask(served, messages=many, max_tokens=40)["tokens"]) <= 128 - 20  # room for half an answer
        message = ask(served, 400, messages=talk[:1])["message"]
        assert message == "ends with system: the user's message is missing"
        assert httpx2.get(f"{served.address}/playground/run").json()["can_chat"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "the body must have one of text, tokens and messages"),
        ({"text": "a", "tokens": [1]}, "the body must have one of text, tokens and messages"),
        ({"text": 5}, "text = 5: must be a valid string"),
        ({"tokens": [300]}, "tokens: token ids must be from 0 to 299"),
        ({"tokens": [-1]}, "tokens: token ids must be from 0 to 299"),
        ({"tokens": [5] * 33}, "the text has 33 tokens, but the model's context is 32"),
        ({"messages": [{"role": "user", "content": "a"}]}, "this tokenizer has no <|im_start|> and <|im_end|>"),
        ({"text": "a", "other": 1}, "other: is not supported"),
    ],
    ids=str,
)
def test_what_cannot_be_shown_has_status_400(served, body, message):
    assert message in ask(served, 400, **body)["message"]


def test_an_empty_text_begins_a_document(served):
    assert ask(served, text="")["tokens"] == [served.tokenizer.eot]
    assert ask(served, tokens=[])["named"] == [served.tokenizer.eot]


def test_how_many_tokens_are_shown():
    """12 layers of 12 heads in 8 MiB: 340 * 341 / 2 * 144 = 8,347,680 bytes fit, 341 * 342 / 2 * 144 do not."""
    config = ModelConfig(vocab_size=300, context=1024, n_layer=12, n_head=12, n_kv_head=12)
    assert most_inspected(config) == 340
    assert most_inspected(dataclasses.replace(config, context=256)) == 256
    assert most_inspected(dataclasses.replace(config, n_layer=10_000, n_head=10_000, n_kv_head=1)) == 1


def test_of_a_long_text_the_last_tokens_are_shown_as_a_text_of_their_own(served, monkeypatch):
    monkeypatch.setattr(playground, "MAP_BYTES", 4 * 10 * 11 // 2)  # 2 layers of 2 heads
    tokens = served.tokenizer.encode(TEXT * 2)
    assert 10 < len(tokens) <= 32
    found, last = ask(served, text=TEXT * 2), ask(served, tokens=tokens[-10:])
    assert (found["skipped"], last["skipped"]) == (len(tokens) - 10, 0)
    assert found["tokens"] == tokens and {str(token) for token in tokens} <= found["texts"].keys()
    assert len(found["maps"][0]["roots"]) == len(encode(torch.zeros(2 * 55, dtype=torch.uint8)))
    for name in ("logprobs", "rivals", "logits", "maps"):
        assert found[name] == last[name]


def test_weights_that_are_damaged_are_reported(songs, endless):
    model, tokenizer = load(endless)
    with running(model, tokenizer, max_sequences=1) as served:
        model.model.norm.weight.data[0] = float("nan")
        assert "the logits are not finite" in ask(served, 500, text="a")["message"]
        model.model.norm.weight.data[0] = 1.0
        assert ask(served, text="a")["tokens"]


def test_parameters_are_those_of_the_run_whatever_the_weights_are(songs, runs):
    size = sum(p.numel() for p in songs[0].parameters())
    for kind in ("bf16", "int8"):
        model, tokenizer = load(runs / "songs")
        with running(quantize(model, kind), tokenizer, max_sequences=1) as served:
            assert httpx2.get(f"{served.address}/playground/run").json()["parameters"] == size


def test_texts_that_wait_are_limited_and_looked_at_by_the_thread_alone(songs, monkeypatch):
    """Some that wait leave; the others are shown. Maps of zoo/ need that no model runs in another thread."""
    threads, real = [], playground.inspect
    monkeypatch.setattr(playground, "inspect", lambda *a: (threads.append(threading.current_thread()), real(*a))[1])
    reached, go = threading.Event(), threading.Event()
    with (
        running(*songs, max_sequences=1) as served,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
        contextlib.ExitStack() as after,
    ):
        after.callback(go.set)  # whatever fails
        served.scheduler.inbox.put(lambda: (reached.set(), go.wait()))  # the thread is busy
        reached.wait()
        content = b'{"text": "a"}'
        head = f"POST /playground/inspect HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
        leaving = socket.create_connection(("127.0.0.1", served.port))
        leaving.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
        asked = [pool.submit(ask, served, text=TEXT) for _ in range(7)]
        eventually(lambda: served.scheduler.num_between == 8)
        found = httpx2.post(f"{served.address}/playground/inspect", json={"text": "a"})
        assert found.status_code == 429 and found.headers["retry-after"] == "1"
        assert found.json()["error"]["message"] == "8 texts wait to be inspected already"
        leaving.close()
        eventually(lambda: served.scheduler.num_between == 7)
        asked.append(pool.submit(ask, served, text=TEXT))
        eventually(lambda: served.scheduler.num_between == 8)
        go.set()
        assert all(one.result()["tokens"] for one in asked)
        assert threads == [served.scheduler.thread] * 8
        eventually(lambda: served.scheduler.num_between == 0)


def test_between_two_steps_there_is_at_most_one_text(endless):
    model, tokenizer = load(endless)
    with running(model, tokenizer, max_sequences=1) as served, concurrent.futures.ThreadPoolExecutor(6) as pool:
        order: list[str] = []
        step, work = served.scheduler.batch.step, served.scheduler.between_steps
        served.scheduler.batch.step = lambda: (order.append("step"), step())[1]
        served.scheduler.between_steps = lambda call: work(lambda: (order.append("text"), call())[1])
        served.hold()
        options = {"max_tokens": 200, "temperature": 0, "stream": True}
        with served.client.completions.create(model="songs", prompt="a", **options) as stream:
            eventually(lambda: order == ["step"])
            asked = [pool.submit(ask, served, text=TEXT) for _ in range(6)]
            eventually(lambda: served.scheduler.inbox.qsize() == 6)
            assert order == ["step"]  # none during a step
            served.go()
            assert sum(len(chunk.choices) for chunk in stream) == 200
        assert all(found.result()["tokens"] for found in asked)
        assert order[:13] == ["step", "text"] * 6 + ["step"]


# Who may reach the server -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/v1/models", "/playground/run", "/metrics"])
def test_a_page_whose_name_leads_here_is_refused(served, path):
    """DNS rebinding: evil.example had its own address when its page was loaded, and now has 127.0.0.1."""
    for host in ("evil.example", f"evil.example:{served.port}", "127.0.0.1.evil.example", "localhost.evil.example", ""):
        refused = httpx2.get(f"{served.address}{path}", headers={"Host": host})
        assert refused.status_code == 400
        assert refused.json()["error"] == {
            "message": f"Host: {host!r}: must be localhost, [::1] or 127.0.0.1; --allowed-host permits another name",
            "type": "invalid_request_error", "param": None, "code": "host_not_allowed",
        }  # fmt: skip
    for host in ("localhost", f"127.0.0.1:{served.port}", f"[::1]:{served.port}", "LOCALHOST:1"):
        assert httpx2.get(f"{served.address}{path}", headers={"Host": host}).status_code == 200, host


def test_a_proxy_has_a_name_of_its_own(songs):
    with running(*songs, hosts=["Heed.example", "[fd00::1]"], max_sequences=1) as served:
        for host in ("heed.example", "HEED.example:443", "[fd00::1]:80", "localhost"):
            assert httpx2.get(served.address, headers={"Host": host}).status_code == 200, host
        for host in ("other.example", "fd00::1"):
            assert "[::1], 127.0.0.1, heed.example or [fd00::1]; --allowed" in httpx2.get(
                served.address, headers={"Host": host}
            ).json()["error"]["message"]  # fmt: skip
        assert served.samples()['heed_requests_total{path="other",status="400"}'] == 2


def test_elsewhere_every_name_may_be_used_or_those_that_are_given():
    with bind("127.0.0.2", 0) as bound:
        assert allowed_hosts(bound, ["a"]) == ["localhost", "[::1]", "127.0.0.2", "a"]
    with bind("0.0.0.0", 0) as bound:
        assert allowed_hosts(bound, []) == [] and allowed_hosts(bound, ["a.example"]) == ["a.example"]
        for wrong in ("http://a.example", "a.example:80", "", "[", "*"):
            with pytest.raises(ValueError, match=rf"^--allowed-host {re.escape(wrong)}: must be a name or an address"):
                allowed_hosts(bound, [wrong])


def test_the_page_is_one_file_and_permits_only_itself(served):
    response = httpx2.get(f"{served.address}/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    for word in ("STYLE", "SCRIPT", "innerHTML", "src=", "@import", "https:"):
        assert word not in response.text, word
    assert len(response.content) < 64_000
