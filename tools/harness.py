"""lm-eval, the harness that published figures come from, with heed's runs in it.

    python tools/harness.py --model heed --model_args run=runs/shakespeare --tasks lambada_openai,piqa
    python tools/harness.py --model heed --model_args run=runs/shakespeare --tasks mine --include_path DIR

This is lm-eval's own command, with all of its flags, which knows one more model: lm-eval finds a model only by a name
that was registered in the same process, so `lm_eval --model heed` needs this file in the place of `lm_eval`.
From a program: `lm_eval.simple_evaluate(model=Heed("runs/shakespeare"), tasks=[...])`, see tools/harness_model.py.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # the repository in this folder's place, where evaluate.py would be the package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


def main() -> int:
    """Run lm-eval's command; a user's mistake is one line and exit status 2."""
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ModuleNotFoundError as error:
        print(f"harness.py: {error}: pip install -e .[eval]", file=sys.stderr)
        return 2
    if "heed" not in model_registry:
        model_registry.register("heed", target="tools.harness_model:Heed")
    try:
        cli_evaluate()
    except ValueError as error:
        print(f"harness.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
