"""heed's voice: `python sample.py --prompt "ROMEO:"` finds the newest run and streams what its model says next.

    prompt -> tokens -> [ model reads what is new -> logits -> one token is drawn ] -> text, whole characters only

`generate` makes tokens, `speak` makes text of them; both are generators that a program can call:

    model, tokenizer = load(newest_run())
    for _, text in speak(model, tokenizer, "ROMEO:"):
        print(text, end="")

Shapes: B samples side by side, V vocabulary.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

RUNS = Path(os.environ.get("HEED_RUNS") or Path(__file__).resolve().parent / "runs")


def read_arguments() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description="Let a trained model speak.", allow_abbrev=False)
    p.add_argument("--prompt", default="", help="how the text begins; - reads standard input; default: a new document")
    p.add_argument("--run", type=Path, help="folder of the run; default: the newest under runs/")
    p.add_argument("--checkpoint", default="best", help="best, latest or a step such as step-000500; default: best")
    p.add_argument("--tokens", type=int, default=200, help="tokens to make at most, a sample; default: 200")
    p.add_argument("--num-samples", type=int, default=1, help="samples, made side by side; default: 1")
    p.add_argument("--temperature", type=float, default=0.8, help="below 1 surer, above 1 wilder; default: 0.8")
    p.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens; default: 0, all")
    p.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest that sum to p; default: 1, all")
    p.add_argument("--min-p", type=float, default=0.0, help="leave out tokens below p times the likeliest; default: 0")
    p.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: avoid what was said; default: 1")
    p.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    p.add_argument("--quantize", choices=["bf16", "int8"], help="weights of fewer bytes: faster, a little less exact")
    p.add_argument("--seed", type=int, default=0, help="same seed, same text; default: 0")
    p.add_argument("--interactive", action="store_true", help="ask for one prompt after another; Ctrl-D ends")
    p.add_argument("--chat", action="store_true", help="hold a conversation with a run that learnt to; Ctrl-D ends")
    p.add_argument("--system", default="", help="with --chat: what the conversation is told first")
    return p.parse_args()


if __name__ == "__main__":
    ARGUMENTS = read_arguments()  # before torch is imported: --help and a typo answer at once

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from data import chat_format  # noqa: E402
from data.tokenizer import Tokenizer, TokenizerError  # noqa: E402
from inference.detokenizer import GeneratedText  # noqa: E402
from inference.engine import cache_dtype, reader  # noqa: E402
from inference.huge_pages import gather  # noqa: E402
from inference.quantize import quantize  # noqa: E402
from inference.sampling import Sampling  # noqa: E402
from model import GPT, KVCache, ModelConfig  # noqa: E402
from training.checkpoint import CheckpointError, find, load_weights, read_state  # noqa: E402

# 1. Tokens, one after another ---------------------------------------------------------------------------------------


@torch.inference_mode()
def generate(
    model: GPT, prompt: Sequence[int], *, tokens: int, samples: int = 1, sampling: Sampling = Sampling(), seed: int = 0
) -> Iterator[Tensor]:
    """Yield `tokens` times the next token of every sample, (samples,) int64. The prompt must have a token.

    The prompt is read once, for all samples. The model sees at most its context: of a longer prompt, the last `context`
    tokens. When the window is full it drops its older half and reads the rest again, from position 0, as in training;
    so text can go on for ever, and each token sees between half a context and a whole one.
    """
    context, device = model.config.context, model.model.cos.device
    random = torch.Generator(device).manual_seed(seed)
    text = torch.zeros(samples, len(prompt) + tokens, dtype=torch.long, device=device)  # prompt and all that follows
    text[:, : len(prompt)] = torch.tensor(prompt)
    seen = torch.zeros(samples, model.config.vocab_size, dtype=torch.bool, device=device)
    seen.index_fill_(1, text[0, : len(prompt)], True)

    read_on = reader(model)
    cache = KVCache(model.config, 1, max_seq_len=len(prompt) + tokens, device=device, dtype=cache_dtype(model, read_on))
    start = read = max(0, len(prompt) - context)  # where the window begins, and up to where it has been read
    for end in range(len(prompt), len(prompt) + tokens):
        if end - start > context:
            start = read = end - max(1, context // 2)
            cache.reset()
        rows = text[:1] if end == len(prompt) else text
        logits = read_on(rows[:, read:end], cache)  # (B, V); after the prompt, of a single token
        if end == len(prompt):
            cache, logits = cache.repeat(samples), logits.expand(samples, -1)
        token = sampling.draw(logits, seen, random)  # (B, 1)
        text[:, end : end + 1] = token
        seen.scatter_(1, token, True)
        read = end
        yield token[:, 0]


# 2. Text, as soon as it is sure -------------------------------------------------------------------------------------


def speak(
    model: GPT, tokenizer: Tokenizer, prompt: str | Sequence[int] = "", *, tokens: int = 200, samples: int = 1,
    sampling: Sampling = Sampling(), seed: int = 0, stop: Sequence[str] = (),
) -> Iterator[tuple[int, str]]:  # fmt: skip
    """Yield (sample, text) for every token made; the texts of one sample, joined, follow the prompt.

    A sample ends with an end mark (of a text or a turn), before a stop text, or after `tokens` tokens. The prompt is
    text or its tokens; an empty one begins a new document. Raises TokenizerError when the tokenizer cannot spell it.
    """
    ids = (tokenizer.opening + tokenizer.encode(prompt) if isinstance(prompt, str) else prompt) or [tokenizer.eot]
    texts = [GeneratedText(tokenizer, stop, ids) for _ in range(samples)]
    made = generate(model, ids, tokens=tokens, samples=samples, sampling=sampling, seed=seed)
    for number, step in enumerate(made, 1):
        for sample, token in enumerate(step.tolist()):
            if not texts[sample].finished:
                yield sample, texts[sample].add_token(token, last=number == tokens)
        if all(text.finished for text in texts):
            return


# 3. The command -----------------------------------------------------------------------------------------------------


def newest_run() -> Path:
    """The run under runs/ that was saved last. Raises CheckpointError when there is none."""
    runs = sorted(RUNS.glob("*/latest"), key=lambda pointer: pointer.stat().st_mtime)
    if not runs:
        raise CheckpointError("runs/: no trained model is there yet; python train.py shakespeare makes one")
    return runs[-1].parent


def load(run: Path, checkpoint: str = "best") -> tuple[GPT, Tokenizer]:
    """A run's model and tokenizer. Raises CheckpointError."""
    folder = find(run, checkpoint)
    config = ModelConfig(**read_state(folder)["config"]["model"])
    load_weights(folder, model := GPT(config).eval())
    return gather(model.to("cuda" if torch.cuda.is_available() else "cpu")), Tokenizer.load(run / "tokenizer.json")


def say(
    model: GPT, tokenizer: Tokenizer, prompt: str | Sequence[int], sampling: Sampling, a: argparse.Namespace
) -> str:
    """Print the prompt, if it is text, and what follows: one sample as it is made, several one after another. Returns
    the first sample."""
    shown = prompt if isinstance(prompt, str) else ""
    stream, texts = a.num_samples == 1, [shown] * a.num_samples
    made, first, start = 0, 0.0, time.perf_counter()
    print(shown if stream else "", end="", flush=True)
    asked = {"tokens": a.tokens, "samples": a.num_samples, "sampling": sampling, "seed": a.seed, "stop": a.stop}
    for sample, text in speak(model, tokenizer, prompt, **asked):
        made, first = made + 1, first or time.perf_counter() - start
        texts[sample] += text
        print(text if stream else "", end="", flush=True)
    print("" if stream else f"\n{'-' * 60}\n".join(texts))
    took = time.perf_counter() - start
    speed = f"{made / took:,.0f} tokens/s, the first after {first * 1000:,.0f} ms"
    print(f"[{made} tokens in {took:.2f} s: {speed}]", file=sys.stderr)
    return texts[0]


def main(a: argparse.Namespace) -> None:
    """Load a run and say what was asked for."""
    sampling = Sampling(a.temperature, a.top_k, a.top_p, a.min_p, a.repetition_penalty, a.greedy)
    if min(a.tokens, a.num_samples) < 1:
        raise ValueError(f"tokens = {a.tokens}, num_samples = {a.num_samples}: both must be at least 1")
    if a.system and not a.chat:
        raise ValueError(f"system = {a.system!r}: goes with --chat")
    model, tokenizer = load(a.run or newest_run(), a.checkpoint)
    if a.quantize:
        quantize(model, a.quantize)
    turns = [("system", a.system)] if a.system else []  # of a chat, so far
    most = model.config.context - min(a.tokens, model.config.context // 2)  # the rest is for the answer

    def answer(prompt: str) -> None:
        begin = chat_format.opening(tokenizer, [*turns, ("user", prompt)], most) if a.chat else prompt
        turns.extend([("user", prompt), ("assistant", say(model, tokenizer, begin, sampling, a))])

    if a.chat:
        chat_format.marks(tokenizer)  # raises if there are none
    if not (a.interactive or (a.chat and not a.prompt)):
        answer(sys.stdin.read() if a.prompt == "-" else a.prompt)
        return
    while True:
        try:
            answer(input("> "))
        except TokenizerError as error:
            print(error, file=sys.stderr)


if __name__ == "__main__":
    try:
        main(ARGUMENTS)
    except ValueError as error:  # a wrong flag, run, checkpoint or prompt: each names itself
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)
    except EOFError:  # Ctrl-D ends the conversation
        print()
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)
