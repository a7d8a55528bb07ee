"""Text generation: `python sample.py --prompt "ROMEO:"` loads the newest run and streams a continuation.

    prompt -> tokens -> [ prefill or decode step -> logits -> sample one token ] -> text, whole characters only

`generate` yields tokens, `stream_generate` yields text. Both can be called from a program:

    model, tokenizer = load(newest_run())
    for _, text in stream_generate(model, tokenizer, "ROMEO:"):
        print(text, end="")

Shapes: B samples, V vocabulary.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from training.command_line import Parser, whole

MAX_BATCH = 32  # sequences that --prompts and --chat generate at a time; others wait
RUNS = Path(os.environ.get("HEED_RUNS") or Path(__file__).resolve().parent / "runs")


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = Parser("sample.py", "Generate text with a trained model.")
    p.add_argument("--prompt", default="", help="text to continue; - reads standard input; default: a new document")
    p.add_argument("--prompts", type=Path, metavar="FILE", help="continue each line of a file, all as one batch")
    p.add_argument("--run", type=Path, help="folder of the run; default: the newest under runs/")
    p.add_argument("--checkpoint", default="best", help="best, latest or a step such as step-000500; default: best")
    p.add_argument("--max-new-tokens", type=whole(1, 1_000_000), default=200, help="tokens per sample, at most; "
        "default: 200")  # fmt: skip
    p.add_argument("--num-samples", type=whole(1, 1000), default=1, help="samples per prompt, as one batch; default: 1")
    p.add_argument("--temperature", type=float, default=0.8, help="below 1 sharper, above 1 flatter; default: 0.8")
    p.add_argument("--top-k", type=int, default=0, help="sample from the k most likely tokens; default: 0, all")
    p.add_argument("--top-p", type=float, default=1.0, help="sample from the fewest tokens that sum to p; default: 1")
    p.add_argument("--min-p", type=float, default=0.0, help="drop tokens below p times the most likely; default: 0")
    p.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 penalizes earlier tokens; default: 1")
    p.add_argument("--greedy", action="store_true", help="always take the most likely token")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    p.add_argument("--whole-lines", action="store_true", help="leave out a last line that --max-new-tokens cuts off")
    p.add_argument("--quantize", choices=["none", "bf16", "int8"], help="convert the weights: faster, slightly less "
        "exact; default: bf16 on a GPU that computes in it, else none")  # fmt: skip
    p.add_argument("--seed", type=whole(0, 2**63 - 1), default=0, help="the same seed gives the same text; default: 0")
    p.add_argument("--interactive", action="store_true", help="read prompts one after another; Ctrl-D ends")
    p.add_argument("--chat", action="store_true", help="chat with a run trained on conversations; Ctrl-D ends")
    p.add_argument("--system", default="", help="with --chat: the system message")
    return p.parse_args(words)


if __name__ == "__main__":
    ARGUMENTS = parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from data import chat_format  # noqa: E402
from data.tokenizer import Tokenizer, TokenizerError  # noqa: E402
from inference.continuous_batching import ContinuousBatch, stream_batch  # noqa: E402
from inference.engine import make_engine  # noqa: E402
from inference.huge_pages import use_huge_pages  # noqa: E402
from inference.quantize import quantize  # noqa: E402
from inference.sampling import SamplingParams  # noqa: E402
from inference.stop_strings import GeneratedText  # noqa: E402
from model import GPT, KVCache  # noqa: E402
from training.checkpoint import WEIGHTS, CheckpointError, load_weights, model_config, open_checkpoint  # noqa: E402
from training.device import has_bf16  # noqa: E402

# 1. Tokens ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def generate(
    model: GPT, prompt: Sequence[int], *, max_new_tokens: int, num_samples: int = 1,
    sampling: SamplingParams = SamplingParams(), seed: int = 0,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield the next token of every sample, (num_samples,) int64, `max_new_tokens` times.

    The prompt has at least one token and is prefilled once for all samples. The model attends to at most its context:
    of a longer prompt, to the last `context` tokens. When the context is full, the older half is dropped and the rest
    is prefilled again from position 0, as in training. So generation never has to stop, and each token attends to
    between half a context and a whole one.
    """
    context, device = model.config.context, model.model.cos.device
    random = torch.Generator(device).manual_seed(seed)
    text = torch.zeros(num_samples, len(prompt) + max_new_tokens, dtype=torch.long, device=device)
    text[:, : len(prompt)] = torch.tensor(prompt)
    seen = torch.zeros(num_samples, model.config.vocab_size, dtype=torch.bool, device=device)
    seen.index_fill_(1, text[0, : len(prompt)], True)

    engine = make_engine(model)
    cache = KVCache(model.config, 1, max_seq_len=text.shape[1], device=device, dtype=engine.cache_dtype)
    start = cached = max(0, len(prompt) - context)  # the cache holds the tokens start ... cached
    for end in range(len(prompt), len(prompt) + max_new_tokens):
        if end - start > context:
            start = cached = end - max(1, context // 2)
            cache.reset()
        rows = text[:1] if end == len(prompt) else text
        logits = engine(rows[:, cached:end], cache)  # (B, V); the prefill of the prompt has one row
        if end == len(prompt):
            cache, logits = cache.repeat(num_samples), logits.expand(num_samples, -1)
        uniform = torch.rand(num_samples, 1, generator=random, dtype=torch.float32, device=device)
        token = sampling.sample(logits, seen, uniform)  # (B, 1)
        text[:, end : end + 1] = token
        seen.scatter_(1, token, True)
        cached = end
        yield token[:, 0]


# 2. Text ------------------------------------------------------------------------------------------------------------


def stream_generate(
    model: GPT, tokenizer: Tokenizer, prompt: str | Sequence[int] = "", *, max_new_tokens: int = 200,
    num_samples: int = 1, sampling: SamplingParams = SamplingParams(), seed: int = 0, stop: Sequence[str] = (),
    whole_lines: bool = False,
) -> Iterator[tuple[int, str]]:  # fmt: skip
    """Yield (sample, text) for every generated token; the texts of one sample, joined, continue the prompt.

    A sample ends at an end token (of a document or a turn), before a stop string, or after `max_new_tokens` tokens;
    `whole_lines` leaves out an incomplete last line. Raises TokenizerError if the tokenizer cannot encode the prompt.
    """
    ids = tokenizer.encode_prompt(prompt)
    texts = [GeneratedText(tokenizer, stop, ids, whole_lines) for _ in range(num_samples)]
    steps = generate(model, ids, max_new_tokens=max_new_tokens, num_samples=num_samples, sampling=sampling, seed=seed)
    for number, step in enumerate(steps, 1):
        for sample, token in enumerate(step.tolist()):
            if not texts[sample].finished:
                yield sample, texts[sample].add_token(token, last=number == max_new_tokens)
        if all(text.finished for text in texts):
            return


# 3. The command -----------------------------------------------------------------------------------------------------


def newest_run() -> Path:
    """The most recently saved run under runs/. Raises CheckpointError if there is none."""
    runs = sorted(RUNS.glob("*/latest"), key=lambda pointer: pointer.stat().st_mtime)
    if not runs:
        raise CheckpointError("runs/: no trained model; python train.py shakespeare trains one")
    return runs[-1].parent


def load(run: Path, checkpoint: str = "best") -> tuple[GPT, Tokenizer]:
    """Load a run's model and tokenizer; the newest intact checkpoint if the best is damaged. Raises CheckpointError."""

    def warn(line: str) -> None:
        print(f"sample.py: {line}", file=sys.stderr)

    folder, state = open_checkpoint(run, checkpoint, warn, verify=WEIGHTS)
    load_weights(folder, model := GPT(model_config(folder, state)).eval())
    model = use_huge_pages(model.to("cuda" if torch.cuda.is_available() else "cpu"))
    return model, Tokenizer.load(run / "tokenizer.json")


def print_samples(prompts: list[str], samples: Iterator[tuple[int, str]]) -> str:
    """Print the prompt and the continuation of every sample; a single one is streamed. Returns the first sample."""
    stream, texts = len(prompts) == 1, list(prompts)
    num_tokens, first, start = 0, 0.0, time.perf_counter()
    for sample, text in samples:
        if stream:  # an error before the first token begins a line of its own
            print(text if num_tokens else texts[0] + text, end="", flush=True)
        num_tokens, first = num_tokens + 1, first or time.perf_counter() - start
        texts[sample] += text
    print("" if stream and num_tokens else f"\n{'-' * 60}\n".join(texts))
    seconds = time.perf_counter() - start
    speed = f"{num_tokens / seconds:,.0f} tok/s, TTFT {first * 1000:,.0f} ms"
    print(f"[{num_tokens} tokens in {seconds:.2f} s: {speed}]", file=sys.stderr)
    return texts[0]


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty. Raises ValueError if there are none."""
    try:
        if prompts := [line for line in path.read_text(encoding="utf-8").split("\n") if line]:
            return prompts
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {path}: cannot be read as text ({error})") from None
    raise ValueError(f"--prompts {path}: has no line that is not empty")


def main(args: argparse.Namespace) -> None:
    """Load a run and generate."""
    try:
        sampling = SamplingParams(**{name: getattr(args, name) for name in vars(SamplingParams())})
    except ValueError as error:  # "top_k = -1: ..." is "--top-k -1: ..." here
        name, _, rest = str(error).partition(" = ")
        raise ValueError(f"--{name.replace('_', '-')} {rest}") from None
    if args.system and not args.chat:
        raise ValueError(f"--system {args.system!r}: needs --chat")
    if args.prompts and (args.prompt or args.chat or args.interactive):
        raise ValueError(f"--prompts {args.prompts}: excludes --prompt, --chat and --interactive")
    if args.interactive and args.prompt:
        raise ValueError(f"--prompt {args.prompt!r}: excludes --interactive")
    if "" in args.stop:
        raise ValueError("--stop '': must not be empty")
    prompts = read_prompts(args.prompts) if args.prompts else []
    model, tokenizer = load(args.run or newest_run(), args.checkpoint)
    kind = args.quantize or ("bf16" if has_bf16(model.model.cos.device) else "none")
    if kind != "none":
        quantize(model, kind)
    if args.chat:
        chat_format.special_tokens(tokenizer)  # raises if there are none
    turns = [("system", args.system)] if args.system else []  # of the chat so far
    # Half of the context is kept free for the answer, or a quarter if the last message is long.
    half, quarter = (min(args.max_new_tokens, model.config.context // part) for part in (2, 4))
    options: dict[str, Any] = {name: getattr(args, name) for name in ("max_new_tokens", "seed", "stop", "whole_lines")}
    options["sampling"] = sampling
    texts = [prompt for prompt in prompts or [""] for _ in range(args.num_samples)]
    if prompts or args.chat:  # in a chat, a turn finds the keys and values of earlier ones in the cache
        batch = ContinuousBatch(model, min(MAX_BATCH, len(texts)))
    if prompts:
        print_samples(texts, stream_batch(batch, tokenizer, texts, **options))
        return

    def answer(prompt: str) -> None:
        if not args.chat:
            samples = stream_generate(model, tokenizer, prompt, num_samples=args.num_samples, **options)
            print_samples([prompt] * args.num_samples, samples)
            return
        talk, room = [*turns, ("user", prompt)], model.config.context - quarter
        rendered = chat_format.render_prompt(tokenizer, talk, room, half - quarter)
        samples = stream_batch(batch, tokenizer, [rendered] * args.num_samples, **options)
        turns.extend([("user", prompt), ("assistant", print_samples(texts, samples))])

    if not (args.interactive or (args.chat and not args.prompt)):
        answer(sys.stdin.read() if args.prompt == "-" else args.prompt)
        return
    while True:
        try:
            answer(input("> "))
        except TokenizerError as error:
            print(error, file=sys.stderr)


if __name__ == "__main__":
    try:
        main(ARGUMENTS)
    except ValueError as error:  # a wrong flag, run, checkpoint or prompt: the message names it
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)
    except EOFError:  # Ctrl-D
        print()
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)
