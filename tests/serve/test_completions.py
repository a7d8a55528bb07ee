"""Completions and chats through the openai client: texts of sample.py, log-probabilities of the model."""

import concurrent.futures
import dataclasses
import random

import openai
import pytest
import torch

from data import chat_format
from data.tokenizer import Tokenizer
from sample import SamplingParams, load
from tests.conftest import TINY, randomized
from tests.serve.conftest import GREEDY, eventually, running

PROMPTS = ("", "S", "Song 5:", "Song 12: the 5 birds", "birds sing to the bees, and the bees", "ants.\nSong")


def complete(served, prompt="Song 5:", **options):
    return served.client.completions.create(model="songs", prompt=prompt, **options)


def streamed(chunks) -> dict[int, str]:
    """The text of each choice."""
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            text = choice.text if hasattr(choice, "text") else choice.delta.content or ""
            texts[choice.index] = texts.get(choice.index, "") + text
    return texts


# Texts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_texts_are_those_of_sample_py_whatever_shares_the_batch(served, stream):
    """Requests of many lengths, past the context of 32, greedy and with a seed, from ten clients."""
    numbers = random.Random(stream)
    asked = [(numbers.choice(PROMPTS), numbers.randrange(1, 60), numbers.choice((0, 0, 1.0)), n) for n in range(40)]
    sizes, step = [], served.scheduler.batch.step

    def counted():
        sizes.append(len(served.scheduler.batch.running))
        return step()

    served.scheduler.batch.step = counted

    def ask(prompt, tokens, temperature, seed):
        options = {"max_tokens": tokens, "temperature": temperature, "seed": seed}
        if stream:
            return streamed(complete(served, prompt, stream=True, **options))[0]
        return complete(served, prompt, **options).choices[0].text

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        texts = list(pool.map(lambda request: ask(*request), asked))
    for text, (prompt, tokens, temperature, seed) in zip(texts, asked, strict=True):
        sampling = SamplingParams(temperature) if temperature else GREEDY
        assert text == served.text(prompt, tokens, sampling, seed=seed), (prompt, tokens, temperature, seed)
    assert max(sizes) == 4


def test_a_model_with_states_is_served():
    tokenizer = Tokenizer.train("byte", [])
    config = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size, layer_pattern="DWL")
    with running(randomized(config, 3), tokenizer, max_sequences=2) as served:
        texts = [complete(served, prompt, max_tokens=40, temperature=0, n=2).choices for prompt in PROMPTS[1:4]]
        for prompt, choices in zip(PROMPTS[1:4], texts, strict=True):
            assert [choice.text for choice in choices] == [served.text(prompt, 40)] * 2
        eventually(served.idle)


def test_choices_have_seeds_one_after_another(served):
    options = {"max_tokens": 12, "seed": 7, "temperature": 1.2, "n": 3}
    prompts = ["Song 5:", "the"]
    expected = [
        served.text(prompt, 12, SamplingParams(1.2), seed=7 + 3 * at + n)
        for at, prompt in enumerate(prompts)
        for n in range(3)
    ]
    whole = complete(served, prompts, **options)
    assert [choice.text for choice in whole.choices] == expected
    assert [choice.index for choice in whole.choices] == list(range(6))
    chunks = streamed(complete(served, prompts, stream=True, **options))
    assert [chunks[index] for index in range(6)] == expected
    assert len(set(expected)) > 3


def test_without_a_seed_texts_differ(served):
    assert len({complete(served, max_tokens=30, temperature=2).choices[0].text for _ in range(4)}) > 1


def test_sampling_fields_are_applied(served):
    fields = {"top_k": 5, "min_p": 0.02, "repetition_penalty": 1.3}
    found = complete(served, max_tokens=30, seed=1, temperature=1.5, top_p=0.9, extra_body=fields)
    assert found.choices[0].text == served.text("Song 5:", 30, SamplingParams(1.5, 5, 0.9, 0.02, 1.3), seed=1)


def test_prompts_may_be_tokens(served):
    ids = served.tokenizer.encode("Song 5:")
    text = served.text("Song 5:", 8)
    for prompt in (ids, [ids, ids], "Song 5:", ["Song 5:"]):
        assert {choice.text for choice in complete(served, prompt, max_tokens=8, temperature=0).choices} == {text}


def test_stop_strings_and_reasons_to_finish(served):
    text = served.text("Song 5:", 30)
    stop = text[12:15]
    for stream in (False, True):
        found = complete(served, max_tokens=30, temperature=0, stop=[stop, "zzz"], stream=stream)
        chunks = list(found) if stream else [found]
        assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"
    cut = complete(served, max_tokens=5, temperature=0)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 5)


def test_an_end_token_ends_a_text(songs):
    model, tokenizer = songs
    with running(model, tokenizer, max_sequences=1) as served:
        tokenizer.end_tokens.add(end := tokenizer.encode(served.text("Song 5:", 3))[-1])
        try:
            found = complete(served, max_tokens=30, temperature=0, logprobs=0)
        finally:
            tokenizer.end_tokens.remove(end)
    assert found.choices[0].finish_reason == "stop"
    assert found.choices[0].text == "".join(found.choices[0].logprobs.tokens[:-1])
    assert found.usage.completion_tokens == len(found.choices[0].logprobs.tokens) <= 3


# Numbers ------------------------------------------------------------------------------------------------------------


def test_usage(served):
    prompts = ["Song 5:", "the birds sing"]
    sizes = [len(served.tokenizer.encode(prompt)) for prompt in prompts]
    tokens = [sum(1 for _ in served.parts(prompt, 9)) for prompt in prompts]
    options = {"max_tokens": 9, "temperature": 0}
    found = complete(served, prompts, n=2, **options).usage
    assert (found.prompt_tokens, found.completion_tokens) == (sum(sizes), 2 * sum(tokens))
    assert found.total_tokens == found.prompt_tokens + found.completion_tokens
    again = complete(served, prompts[0], **options).usage
    assert again.prompt_tokens_details.cached_tokens == sizes[0] - 1
    plain = list(complete(served, prompts[0], stream=True, **options))
    assert all(chunk.usage is None and chunk.choices for chunk in plain)
    counted = list(complete(served, prompts[0], stream=True, stream_options={"include_usage": True}, **options))
    assert [chunk.usage is None for chunk in counted] == [True] * (len(counted) - 1) + [False]
    assert counted[-1].choices == [] and counted[-1].usage.total_tokens == sizes[0] + tokens[0]


def expected_logprobs(served, prompt: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    """The greedy tokens after a prompt, and the log-probabilities (tokens, V) from the model without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(served.model(torch.tensor([ids]))[0, -1].argmax()))
        rows = served.model(torch.tensor([ids]))[0, len(prompt) - 1 : -1].log_softmax(1)
    return ids[len(prompt) :], rows


def test_logprobs_of_completions_are_the_models(served):
    tokens, rows = expected_logprobs(served, served.tokenizer.encode("Song 5:"), 10)
    for stream in (False, True):
        found = complete(served, max_tokens=10, temperature=0, logprobs=3, stream=stream)
        parts = [choice.logprobs for chunk in (found if stream else [found]) for choice in chunk.choices]
        names = [name for part in parts for name in part.tokens]
        assert "".join(names) == served.tokenizer.decode(tokens)
        values = [value for part in parts for value in part.token_logprobs]
        torch.testing.assert_close(torch.tensor(values), rows.amax(1), atol=1e-5, rtol=1e-5)
        for top, row in zip([top for part in parts for top in part.top_logprobs], rows, strict=True):
            best = row.topk(3)
            named = {served.tokenizer.decode([i]): p for p, i in zip(*(x.tolist() for x in best), strict=True)}
            assert top.keys() == named.keys()
            assert all(top[name] == pytest.approx(named[name], abs=1e-5) for name in named)


def test_tokens_are_returned_where_asked_for(served):
    tokens, _ = expected_logprobs(served, served.tokenizer.encode("Song 5:"), 10)
    for stream in (False, True):
        body = {"return_token_ids": True}
        found = complete(served, max_tokens=10, temperature=0, logprobs=0, stream=stream, extra_body=body)
        choices = [choice for chunk in (found if stream else [found]) for choice in chunk.choices]
        assert [token for choice in choices for token in choice.token_ids] == tokens
    assert "token_ids" not in complete(served, max_tokens=1).choices[0].model_dump()


def test_the_token_itself_is_among_the_most_likely_ones(served):
    found = complete(served, max_tokens=30, temperature=2, seed=2, logprobs=1).choices[0].logprobs
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == logprob and len(top) <= 2
    assert any(len(top) == 2 for top in found.top_logprobs)


def test_tokens_that_are_no_text_have_the_names_of_the_vocabulary():
    """A byte of a longer character, and a special token."""
    tokenizer = Tokenizer.train("byte", [])
    with running(randomized(dataclasses.replace(TINY, vocab_size=257), 1), tokenizer) as served:
        found = complete(served, "a", max_tokens=3, logprobs=20, temperature=0).choices[0].logprobs
    assert all(len(top) == 20 for top in found.top_logprobs)
    vocabulary = tokenizer.inner.get_vocab()
    assert all(name in vocabulary or name.isascii() for top in found.top_logprobs for name in top)


# Chats --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def assistant(chat_runs):
    with running(*load(chat_runs / "assistant"), name="assistant", max_sequences=3) as server:
        yield server


def chat(assistant, *contents: str, **options):
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return assistant.client.chat.completions.create(model="assistant", messages=messages, **options)


def test_a_chat_is_that_of_sample_py(assistant, chat_runs, sample_py):
    talk = ["what is 7 plus one?"]
    for question in ("and two more?", "and two more?"):
        found = chat(assistant, *talk, max_tokens=20, temperature=0)
        answer = found.choices[0].message
        assert answer.role == "assistant"
        chunks = list(chat(assistant, *talk, max_tokens=20, temperature=0, stream=True))
        assert streamed(chunks) == {0: answer.content}
        assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
        assert chunks[-1].choices[0].finish_reason == found.choices[0].finish_reason
        talk += [answer.content, question]
    words = ("--chat", "--greedy", "--max-new-tokens", "20", "--quantize", "none")
    done = sample_py(*words, where=chat_runs, stdin="".join(f"{text}\n" for text in talk[0::2]))
    assert done.stdout.count("> ") == 4
    for answer in talk[1::2]:
        assert f"{answer}\n" in done.stdout


def test_a_long_conversation_loses_its_oldest_turns(assistant):
    """Half of the context of 128 is left for an answer, a quarter if the last message is long."""
    turns = [(role, f"{n} and more") for n in range(20) for role in ("user", "assistant")][:-1]
    for talk, most in ((turns, 64), ([("user", "what is 7 plus one? " * 30)], 96)):
        found = chat(assistant, *(text for _, text in talk), max_tokens=100, temperature=0)
        prompt = chat_format.render_prompt(assistant.tokenizer, talk, 96, 32)
        assert most - 16 < len(prompt) == found.usage.prompt_tokens <= most
        assert found.choices[0].message.content == assistant.text(prompt, 100)


def test_logprobs_of_chats_are_the_models(assistant):
    question = "what is 7 plus one?"
    prompt = chat_format.render_prompt(assistant.tokenizer, [("user", question)], 96)
    tokens, rows = expected_logprobs(assistant, prompt, 3)
    found = chat(assistant, question, max_completion_tokens=3, temperature=0, logprobs=True, top_logprobs=4)
    content = found.choices[0].logprobs.content
    assert bytes(byte for token in content for byte in token.bytes).decode() == assistant.tokenizer.decode(tokens)
    for token, row in zip(content, rows, strict=True):
        torch.testing.assert_close(torch.tensor([top.logprob for top in token.top_logprobs]), row.topk(4).values)
        assert token.logprob == token.top_logprobs[0].logprob
        assert token.token == token.top_logprobs[0].token


def test_messages_may_have_parts_a_developer_and_what_a_client_adds(assistant):
    plain = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is 7 plus one?"}]
    parts = [{"type": "text", "text": "what is 7 "}, {"type": "text", "text": "plus one?"}]
    other = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    create = assistant.client.chat.completions.create
    same = {"model": "assistant", "max_tokens": 8, "temperature": 0}
    unused = {"user": "me", "presence_penalty": 0, "tools": [], "response_format": {"type": "text"}, "metadata": {}}
    first = create(messages=plain, **same).choices[0].message
    assert create(messages=other, **same, **unused).choices[0].message.content == first.content
    answered = [*plain, first.model_dump(), {"role": "user", "content": "and two more?"}]
    assert create(messages=answered, **same).choices[0].message.content


def test_a_run_that_was_not_trained_to_chat_says_so(served):
    with pytest.raises(openai.BadRequestError, match="it was not trained to chat"):
        served.client.chat.completions.create(model="songs", messages=[{"role": "user", "content": "hi"}])
