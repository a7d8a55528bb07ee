"""A run as a model of lm-eval, the evaluation harness that published figures come from.

    python -m evals.lm_eval_adapter --model heed --model_args run=runs/shakespeare --tasks lambada_openai,piqa
    python -m evals.lm_eval_adapter --model heed --model_args run=runs/shakespeare --tasks mine --include_path DIR

This is lm-eval's own command with all of its flags. It adds one model, `heed`: lm-eval finds a model by a name
registered in the same process. In a program: `lm_eval.simple_evaluate(model=Heed("runs/shakespeare"), tasks=[...])`.
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

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # lm-eval's words are sample.py's
DEFAULTS = ("batch_size", "max_batch_size", "device")  # that lm-eval always gives


class Heed(TemplateLM):
    """`--model heed --model_args run=RUN[,checkpoint=best]`.

    It computes where sample.py does, in batches of so many tokens, whatever lm-eval gives as device and batch size.
    Raises ValueError: a run or a checkpoint that is not there, an argument that there is not.
    """

    def __init__(self, run: str = "", checkpoint: str = "best", **others: Any) -> None:
        super().__init__()
        unknown = sorted(others.keys() - set(DEFAULTS))
        if unknown or not run:
            named = f"{unknown[0]} = {others[unknown[0]]!r}: no such argument" if unknown else "names no run"
            raise ValueError(f"model_args: {named}; --model_args run=runs/NAME,checkpoint=best")
        self.model, self.vocabulary = load(Path(run), str(checkpoint))

    @property
    def eot_token_id(self) -> int:
        return self.vocabulary.eot

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return (self.vocabulary.bos_tokens or [self.eot_token_id])[0]

    @property
    def max_length(self) -> int:
        """Tokens that the model sees at once."""
        return self.model.config.context

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of requests knows the tokenizer by."""
        return self.vocabulary.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text; heed adds nothing to it."""
        return self.vocabulary.encode(string)

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """(logprob, greedy) for each ((texts), context ids, continuation ids). A context of nothing but white space has
        no ids left, and begins a document like an empty one."""
        opening = self.vocabulary.bos_tokens
        pairs = [
            (context if context == [self.prefix_token_id] else opening + context or [self.eot_token_id], continuation)
            for _, context, continuation in requests
        ]
        return [(s.logprob, s.greedy) for s in score(self.model, pairs)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, each a document of its own, in windows that do not overlap."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            found.append(sum(s.logprob for s in score(self.model, [make_disjoint_window(pair) for pair in windows])))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to a stop text or a number of tokens; greedy unless do_sample is asked for.

        Raises ValueError for a way to generate that sample.py does not have.
        """
        made = []
        for context, asked in (request.args for request in requests):
            how: dict[str, Any] = dict(normalize_gen_kwargs(asked))
            stop, tokens, draw = how.pop("until"), how.pop("max_gen_toks"), how.pop("do_sample", False)
            unknown = sorted(how.keys() - set(SAMPLING))
            if unknown:
                raise ValueError(f"gen_kwargs: {unknown[0]} = {how[unknown[0]]!r}: sample.py has {', '.join(SAMPLING)}")
            sampling = SamplingParams(**how) if draw else SamplingParams(greedy=True)
            said = stream_generate(
                self.model, self.vocabulary, context, max_new_tokens=tokens, sampling=sampling, stop=stop
            )
            made.append("".join(part for _, part in said))
        return made


def main() -> int:
    """Run lm-eval's command. A user's mistake is one line on stderr and exit status 2."""
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
