"""Generation: probabilities compared with transformers, tokens with a model without a cache, and streamed text."""

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as theirs

from data import chat_format
from data.tokenizer import EOT, Tokenizer, TokenizerError
from inference.engine import CppEngine, EagerEngine
from inference.stop_strings import GeneratedText
from model import KVCache
from sample import SamplingParams, generate, load, print_samples, stream_generate
from tests.conftest import TINY, command, randomized

# Probabilities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 5},
        {"top_k": 500},
        {"top_p": 0.6},
        {"top_p": 0.01},
        {"min_p": 0.2},
        {"repetition_penalty": 1.7},
        {"temperature": 1.4, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
    ],
)
def test_probabilities_equal_transformers(how):
    how = {"temperature": 1.0} | how
    torch.manual_seed(1)
    logits, text = torch.randn(4, 60) * 3, torch.randint(0, 60, (4, 12))
    processors = LogitsProcessorList()
    if "repetition_penalty" in how:
        processors.append(theirs.RepetitionPenaltyLogitsProcessor(how["repetition_penalty"]))
    processors.append(theirs.TemperatureLogitsWarper(how["temperature"]))
    if "top_k" in how:
        processors.append(theirs.TopKLogitsWarper(how["top_k"]))
    if "top_p" in how:
        processors.append(theirs.TopPLogitsWarper(how["top_p"]))
    if "min_p" in how:
        processors.append(theirs.MinPLogitsWarper(how["min_p"]))
    seen = torch.zeros(4, 60, dtype=torch.bool).scatter_(1, text, True)
    torch.testing.assert_close(
        SamplingParams(**how).probabilities(logits, seen), processors(text, logits.clone()).softmax(1)
    )


def test_greedy_has_probability_one_for_the_most_likely_token():
    logits = torch.tensor([[0.0, 3.0, 2.9], [5.0, -1.0, 4.0]])
    seen = torch.tensor([[False, True, False], [False, False, False]])
    assert SamplingParams(greedy=True).probabilities(logits, seen).argmax(1).tolist() == [1, 0]
    assert SamplingParams(greedy=True, repetition_penalty=2.0).probabilities(logits, seen).tolist() == [
        [0, 0, 1],
        [1, 0, 0],
    ]


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])  # the first and the last of torch.rand
def test_token_with_probability_zero_is_never_sampled(number):
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0))
    logits[:, :10] = logits[:, -10:] = float("-inf")
    seen, sampling = torch.zeros(64, 5000, dtype=torch.bool), SamplingParams(temperature=1.0)
    sums = sampling.probabilities(logits, seen).cumsum(1)[:, -1]
    assert (sums < 1).any() and (sums > 1).any()  # rounded sums differ from 1
    drawn = sampling.sample(logits, seen, torch.full((64, 1), number))
    assert drawn.min() >= 10 and drawn.max() < 4990


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.0},
        {"temperature": 1e-39},
        {"temperature": float("nan")},
        {"repetition_penalty": 1e-39},
        {"repetition_penalty": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
    ],
)
def test_invalid_sampling_params_raise(how):
    with pytest.raises(ValueError, match=f"{next(iter(how))} = .*: must be"):
        SamplingParams(**how)


@pytest.mark.parametrize("how", [{}, {"greedy": True}, {"temperature": 1e-6, "repetition_penalty": 1e-6}])
def test_logits_that_are_not_finite_raise(how):
    sampling, seen = SamplingParams(**how), torch.zeros(2, 9, dtype=torch.bool)
    seen[:, 3] = True
    good, uniform = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)) * 1e4, torch.rand(2, 1)
    assert sampling.sample(good, seen, uniform).max() < 9
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="the logits are not finite"):
            sampling.sample(good.index_fill(1, torch.tensor([4]), bad), seen, uniform)
    with pytest.raises(ValueError, match="the logits are not finite"):
        sampling.sample(torch.full_like(good, float("-inf")), seen, uniform)


# Tokens -------------------------------------------------------------------------------------------------------------


def greedy_without_cache(model, prompt, tokens):
    """The definition of `generate`: each token from a forward pass over the last `context` tokens."""
    text, start = list(prompt), max(0, len(prompt) - model.config.context)
    for _ in range(tokens):
        if len(text) - start > model.config.context:
            start = len(text) - max(1, model.config.context // 2)
        with torch.no_grad():
            text.append(int(model(torch.tensor([text[start:]]))[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("length", [1, 5, 31, 32, 33, 80])
def test_tokens_equal_those_without_a_cache_even_past_the_context(length):
    model = randomized(TINY, seed=3)
    prompt = torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    got = [int(t) for t in generate(model, prompt, max_new_tokens=70, sampling=SamplingParams(greedy=True))]
    assert got == greedy_without_cache(model, prompt, 70)
    assert len(set(got)) > 5  # not a single repeated token


def test_seed_determines_the_text():
    model = randomized(TINY)

    def text(seed: int, samples: int = 1) -> list[list[int]]:
        return torch.stack(list(generate(model, [1, 2], max_new_tokens=50, num_samples=samples, seed=seed))).T.tolist()

    assert text(0) == text(0)
    assert text(0) != text(1)
    many = text(0, samples=4)
    assert many == text(0, samples=4)
    assert len({tuple(sample) for sample in many}) == 4


def test_cache_length_is_the_number_of_tokens_up_to_the_context():
    sizes = [[len(keys[0]) for keys, _ in KVCache(TINY, 1, max_seq_len=most).layers] for most in (5, 32, 1000, None)]
    assert sizes == [[5, 5], [32, 32], [32, 32], [32, 32]]


def test_prefill_runs_once_for_all_samples(monkeypatch):
    updates = []
    write = KVCache.update
    monkeypatch.setattr("sample.make_engine", EagerEngine)
    monkeypatch.setattr(KVCache, "update", lambda self, n, k, v: (updates.append(k.shape[:2]), write(self, n, k, v))[1])
    list(generate(randomized(TINY), list(range(20)), max_new_tokens=3, num_samples=5))
    assert updates == [(1, 20)] * 2 + [(5, 1)] * 4  # two layers; the last token is not processed


def test_batch_samples_follow_the_models_probabilities():
    model = randomized(TINY)
    with torch.no_grad():
        expected = (model(torch.tensor([[7, 8]]))[0, -1] / 2.0).softmax(0)
    first = next(
        iter(generate(model, [7, 8], max_new_tokens=1, num_samples=20000, sampling=SamplingParams(temperature=2.0)))
    )
    counted = torch.bincount(first, minlength=97) / 20000
    torch.testing.assert_close(counted, expected, atol=0.015, rtol=0)


# Text ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bytes_tokenizer() -> Tokenizer:
    return Tokenizer.train("byte", iter([]), 257)


def streamed_parts(tokenizer: Tokenizer, text: str, stop: list[str]) -> list[str]:
    generated, parts = GeneratedText(tokenizer, stop), []
    ids = tokenizer.encode(text)
    for number, token in enumerate(ids, 1):
        parts.append(generated.add_token(token, last=number == len(ids)))
        if generated.finished:
            break
    return parts


def test_streamed_characters_are_complete(bytes_tokenizer):
    text = "naïve 语言 🙂👩‍🚀 end"
    parts = streamed_parts(bytes_tokenizer, text, [])
    assert "".join(parts) == text
    assert "🙂" in parts
    assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["ROMEO:"], "Hark! RO ROM "),
        (["x", "! "], "Hark"),
        (["ROMEO:", "ROM "], "Hark! RO "),
        (["zzz"], None),
        (["H"], ""),
    ],
)
def test_text_ends_before_a_stop_string(bytes_tokenizer, stop, expected):
    text = "Hark! RO ROM ROMEO: my"
    assert "".join(streamed_parts(bytes_tokenizer, text, stop)) == (text if expected is None else expected)


def test_end_of_text_ends_a_sample_and_an_empty_prompt_starts_a_document(bytes_tokenizer, monkeypatch):
    monkeypatch.setattr("sample.make_engine", EagerEngine)
    config = type(TINY)(**{**vars(TINY), "vocab_size": 257})
    model = randomized(config)
    asked = []
    head = model.head
    model.head = lambda x: head(x).index_fill_(
        -1, torch.tensor([bytes_tokenizer.eot]), 1e4 if len(asked) == 3 else -1e4
    )
    embed = model.model.embed_tokens.forward
    model.model.embed_tokens.forward = lambda tokens: (asked.append(tokens.tolist()), embed(tokens))[1]
    spoken = list(stream_generate(model, bytes_tokenizer, "", max_new_tokens=50))
    assert asked[0] == [[bytes_tokenizer.eot]]
    assert len(spoken) == 3
    assert EOT not in "".join(text for _, text in spoken)


# The command --------------------------------------------------------------------------------------------------------


def test_default_run_is_the_newest_and_throughput_is_printed(runs, sample_py):
    done = command("sample.py", "--prompt", "Song", "--max-new-tokens", "20", where=runs)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Song")
    assert "20 tokens in" in done.stderr
    again = sample_py("--prompt", "-", "--max-new-tokens", "20", where=runs, stdin="Song")
    assert again.stdout == done.stdout
    model, tokenizer = load(runs / "songs")
    text = "Song" + "".join(part for _, part in stream_generate(model, tokenizer, "Song", max_new_tokens=20))
    assert done.stdout == text + "\n"


def test_flags_are_applied(runs, sample_py):
    plain = sample_py("--prompt", "Song", "--max-new-tokens", "30", "--greedy", where=runs).stdout
    three = sample_py("--prompt", "Song", "--max-new-tokens", "30", "--greedy", "--num-samples", "3", where=runs).stdout
    assert three == f"\n{'-' * 60}\n".join([plain.removesuffix("\n")] * 3) + "\n"
    stopped = sample_py(
        "--prompt", "Song", "--max-new-tokens", "30", "--greedy", "--stop", plain[8:10], where=runs
    ).stdout
    assert stopped == plain[: plain.index(plain[8:10], 4)] + "\n"


def test_interactive_continues_after_an_error(runs, sample_py):
    done = sample_py("--interactive", "--max-new-tokens", "5", where=runs, stdin="Song\n\nthe bees\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == 4
    assert done.stderr.count("5 tokens in") == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "0"], "sample.py: --temperature 0.0: must be at least 1e-6"),
        (["--top-k", "-1"], "sample.py: --top-k -1: must be at least 0"),
        (["--interactive", "--prompt", "hi"], "--prompt 'hi': excludes --interactive"),
        (["--stop", ""], "--stop '': must not be empty"),
        (["--system", "Be brief."], "--system 'Be brief.': needs --chat"),
        (["--max-new-tokens", "0"], "--max-new-tokens: 0: must be from 1 to 1,000,000"),
        (["--max-new-tokens", "10000000000000"], "--max-new-tokens: 10000000000000: must be from 1 to 1,000,000"),
        (["--num-samples", "10000000000000"], "--num-samples: 10000000000000: must be from 1 to 1,000"),
        (["--seed", "99999999999999999999999"], "--seed: 99999999999999999999999: must be from 0 to"),
        (["--run", "runs/nothing"], "runs/nothing: no such run"),
        (["--checkpoint", "step-9"], "no checkpoint 'step-9'; there are: step-0000"),
        (["--max-new-tokens", "many"], "invalid int value: 'many'"),
        (["--top_k", "3"], "--top_k: no such option; did you mean --top-k?"),
    ],
)
def test_errors_are_one_line(runs, words, message, sample_py):
    done = sample_py(*words, where=runs)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_an_error_before_the_first_token_has_a_line_of_its_own(capsys):
    def refused():
        raise TokenizerError("character 0, 'Z', is not in the vocabulary")
        yield

    with pytest.raises(TokenizerError):
        print_samples(["Zz"], refused())
    assert capsys.readouterr().out == ""


def test_missing_run_prints_a_hint(tmp_path, sample_py):
    done = sample_py(where=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "python train.py shakespeare trains one" in done.stderr


def test_help_does_not_import_torch(runs):
    done = command("sample.py", "--help", where=runs, PYTHONVERBOSE="1")
    assert done.returncode == 0
    assert "--repetition-penalty" in done.stdout
    assert "import 'torch'" not in done.stderr


# Whole lines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\ntwo\nthr", [], "one\ntwo"),
        ("one\ntwo\n", [], "one\ntwo"),
        ("one li", [], "one li"),  # the only line is kept
        ("one\ntwo END", [" END"], "one\ntwo"),  # it ends at a stop string and is not cut off
        ("\n", [], ""),
    ],
)
def test_incomplete_last_line_is_dropped(bytes_tokenizer, text, stop, expected):
    generated = GeneratedText(bytes_tokenizer, stop, whole_lines=True)
    ids = bytes_tokenizer.encode(text)
    parts = [generated.add_token(token, last=number == len(ids)) for number, token in enumerate(ids, 1)]
    assert "".join(parts) == expected


def test_finished_document_keeps_its_last_line(bytes_tokenizer):
    generated = GeneratedText(bytes_tokenizer, [], whole_lines=True)
    parts = [generated.add_token(token) for token in [*bytes_tokenizer.encode("one\ntwo"), bytes_tokenizer.eot]]
    assert "".join(parts) == "one\ntwo" and generated.finished


def test_whole_lines_flag_and_renamed_flag(runs, sample_py):
    words = ("--prompt", "Song", "--greedy", "--max-new-tokens", "30")
    plain, whole = (sample_py(*words, *more, where=runs).stdout for more in ((), ("--whole-lines",)))
    assert plain.startswith(whole.rstrip("\n")) and len(whole) < len(plain)
    done = sample_py("--tokens=5", where=runs)
    assert (done.returncode, done.stderr) == (2, "sample.py: --tokens: renamed to --max-new-tokens\n")


# Several prompts, and chats -------------------------------------------------------------------------------------------


def test_each_line_of_a_file_is_continued_in_one_batch(runs, sample_py, tmp_path):
    prompts = ["Song", "the 3 birds", "Song 7: the"]
    (tmp_path / "prompts.txt").write_text("Song\n\nthe 3 birds\nSong 7: the\n")
    words = ("--greedy", "--max-new-tokens", "30")
    done = sample_py("--prompts", str(tmp_path / "prompts.txt"), *words, where=runs)
    assert done.returncode == 0, done.stderr
    texts = [sample_py("--prompt", prompt, *words, where=runs).stdout.removesuffix("\n") for prompt in prompts]
    assert done.stdout == f"\n{'-' * 60}\n".join(texts) + "\n"
    assert "90 tokens in" in done.stderr
    two = sample_py("--prompts", str(tmp_path / "prompts.txt"), *words, "--num-samples=2", where=runs)
    assert two.stdout == f"\n{'-' * 60}\n".join(text for text in texts for _ in range(2)) + "\n"


def test_a_chat_prefills_only_what_is_new(chat_runs, sample_py, monkeypatch):
    model, tokenizer = load(chat_runs / "assistant")
    turns, sizes, expected = [], [], ""
    questions = ["what is 7 plus one?", "and two more?", "what is 9 plus one?"]
    for question in questions:
        turns.append(("user", question))
        prompt = chat_format.render_prompt(tokenizer, turns, model.config.context - 12)
        parts = stream_generate(
            model, tokenizer, prompt, max_new_tokens=12, sampling=SamplingParams(greedy=True), whole_lines=True
        )
        turns.append(("assistant", "".join(text for _, text in parts)))
        sizes.append(len(prompt))
        expected += f"> {turns[-1][1]}\n"
    appended, call = [], CppEngine.__call__
    monkeypatch.setattr(CppEngine, "__call__", lambda self, x, kv: (appended.append(x.shape[1]), call(self, x, kv))[1])
    words = ("--chat", "--greedy", "--whole-lines", "--max-new-tokens=12")
    done = sample_py(*words, where=chat_runs, stdin="\n".join(questions))
    assert done.stdout == expected + "> \n"
    prompts = [size for size in appended if size > 1]
    assert prompts[0] == sizes[0] and len(prompts) == 3
    assert all(new < 20 < whole for new, whole in zip(prompts[1:], sizes[1:], strict=True))


@pytest.mark.parametrize(
    ("words", "content", "message"),
    [
        ([], None, "cannot be read as text"),
        ([], b"\xff\xfe", "cannot be read as text"),
        ([], b"\n\n", "has no line that is not empty"),
        (["--chat"], b"Song\n", "excludes --prompt, --chat and --interactive"),
        (["--prompt", "Song"], b"Song\n", "excludes --prompt, --chat and --interactive"),
    ],
)
def test_unusable_prompt_files_are_one_line(runs, sample_py, tmp_path, words, content, message):
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    done = sample_py("--prompts", str(tmp_path / "prompts.txt"), *words, where=runs)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("sample.py: --prompts ") and message in done.stderr


def test_a_prompt_that_nothing_follows_is_printed(capsys):
    for prompts, printed in ((["To be"], "To be\n"), (["To be", "or not"], f"To be\n{'-' * 60}\nor not\n")):
        assert print_samples(prompts, iter(())) == "To be"
        assert capsys.readouterr().out == printed
