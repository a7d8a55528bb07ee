"""lm-eval adapter: evaluates a run with the harness used for published results.

    python -m evals.lm_eval_adapter --model heed --model_args run=runs/shakespeare --tasks lambada_openai,piqa
    python -m evals.lm_eval_adapter --model heed --model_args run=runs/shakespeare --tasks mine --include_path DIR

This is lm-eval's command with all of its flags and one more model, `heed`, since lm-eval finds a model by a name
registered in the same process. From Python: `lm_eval.simple_evaluate(model=Heed("runs/shakespeare"), tasks=[...])`.
lm-eval's TemplateLM tokenizes contexts and continuations; evals/loglikelihood.py scores them.
"""

import sys
from pathlib import Path
from typing import Any

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"lm_eval_adapter: {error}: pip install -e .[eval]", file=sys.stderr)
    sys.exit(2)

from evals.loglikelihood import score
from sample import SamplingParams, load, stream_generate

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # same names in lm-eval and sample.py
DEFAULTS = ("batch_size", "max_batch_size", "device")  # lm-eval always passes these


class Heed(TemplateLM):
    """`--model heed --model_args run=RUN[,checkpoint=best]`.

    It uses the same device as sample.py and its own batch size; lm-eval's device and batch size are ignored.
    Raises ValueError: the run or checkpoint does not exist, or an argument is unknown.
    """

    def __init__(self, run: str = "", checkpoint: str = "best", **others: Any) -> None:
        super().__init__()
        unknown = sorted(others.keys() - set(DEFAULTS))
        if unknown or not run:
            named = f"{unknown[0]} = {others[unknown[0]]!r}: no such argument" if unknown else "no run"
            raise ValueError(f"model_args: {named}; --model_args run=runs/NAME,checkpoint=best")
        self.model, self.vocabulary = load(Path(run), str(checkpoint))

    @property
    def eot_token_id(self) -> int:
        return self.vocabulary.eot

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        return (self.vocabulary.bos_tokens or [self.eot_token_id])[0]

    @property
    def max_length(self) -> int:
        """The context length."""
        return self.model.config.context

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer in lm-eval's request cache."""
        return self.vocabulary.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, without special tokens."""
        return self.vocabulary.encode(string)

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """(logprob, greedy) for each ((texts), context ids, continuation ids). A context of only white space has no ids
        left and starts a document, like an empty context."""
        bos = self.vocabulary.bos_tokens
        pairs = [
            (context if context == [self.prefix_token_id] else bos + context or [self.eot_token_id], continuation)
            for _, context, continuation in requests
        ]
        return [(s.logprob, s.greedy) for s in score(self.model, pairs)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, each a separate document, in non-overlapping sequences."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            found.append(sum(s.logprob for s in score(self.model, [make_disjoint_window(pair) for pair in windows])))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate after each context, up to a stop string or a number of tokens; greedy unless do_sample is set.

        Raises ValueError for a generation option that sample.py does not have.
        """
        texts = []
        for context, gen_kwargs in (request.args for request in requests):
            options: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs))
            stop, tokens, sample = options.pop("until"), options.pop("max_gen_toks"), options.pop("do_sample", False)
            if unknown := sorted(options.keys() - set(SAMPLING)):
                named = f"{unknown[0]} = {options[unknown[0]]!r}"
                raise ValueError(f"gen_kwargs: {named}: sample.py supports {', '.join(SAMPLING)}")
            sampling = SamplingParams(**options) if sample else SamplingParams(greedy=True)
            stream = stream_generate(
                self.model, self.vocabulary, context, max_new_tokens=tokens, sampling=sampling, stop=stop
            )
            texts.append("".join(part for _, part in stream))
        return texts


def main() -> int:
    """Run lm-eval's command. A user error is one line on stderr and exit status 2."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    if "heed" not in model_registry:
        model_registry.register("heed", target="evals.lm_eval_adapter:Heed")
    try:
        cli_evaluate()
    except ValueError as error:
        print(f"lm_eval_adapter: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
