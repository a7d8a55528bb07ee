"""python -m serve RUN: an HTTP server with OpenAI's API, and a page to try the model in a browser.

    python -m serve runs/shakespeare
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "shakespeare", "prompt": "ROMEO:", "max_tokens": 100}'

http://127.0.0.1:8000 is the playground: the probability of each token, its rivals, and what it attends to.

Requests of different lengths are generated together, each with the text that sample.py generates for it alone. There is
no authentication: whoever reaches the port can use the model.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from serve.limits import Limits
from training.command_line import Parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = Parser("python -m serve", __doc__)
    p.add_argument("run", type=Path, metavar="RUN", help="folder of the run; its name is the model's name")
    p.add_argument("--checkpoint", default="best", help="best, latest or a step such as step-000500; default: best")
    p.add_argument("--quantize", choices=["none", "bf16", "int8"], help="convert the weights, as in sample.py")
    p.add_argument("--host", default="127.0.0.1", help="address to listen at; default: 127.0.0.1, this machine only")
    p.add_argument("--port", type=int, default=8000, help="0 for a free one; default: 8000")
    for limit in fields(Limits):
        name, kind, metavar = f"--{limit.name.replace('_', '-')}", limit.type, "N" if limit.type is int else "SECONDS"
        p.add_argument(name, type=kind, default=limit.default, metavar=metavar, help=limit.metadata["help"])
    p.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help="of web pages that may use the "
        "server, such as http://localhost:3000; may be repeated; default: none")  # fmt: skip
    p.add_argument("--allowed-host", action="append", default=[], metavar="NAME", help="a name by which requests may "
        "call the server, such as that of a proxy before it, besides localhost; may be repeated; if --host is an "
        "address that other machines reach: these only, or any if there are none")  # fmt: skip
    return p.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Load the run and serve it until a signal. Raises ValueError."""
    limits = Limits(**{limit.name: getattr(args, limit.name) for limit in fields(Limits)})
    from inference.quantize import quantize
    from sample import load
    from serve.app import create_app
    from serve.server import Server, allowed_hosts, bind
    from training.device import has_bf16

    bound = bind(args.host, args.port)  # before the model, which takes a while
    hosts = allowed_hosts(bound, args.allowed_host)
    model, tokenizer = load(args.run, args.checkpoint)
    kind = args.quantize or ("bf16" if has_bf16(model.model.cos.device) else "none")
    if kind != "none":
        quantize(model, kind)
    app = create_app(args.run.resolve().name, model, tokenizer, limits, args.cors, hosts)
    Server(app, limits).run([bound])


def main(argv: list[str] | None = None) -> int:
    """Run the command. A user error is one line on stderr and exit status 2, without a traceback."""
    args = parse_args(argv)
    try:
        run(args)
    except ModuleNotFoundError as error:
        print(f"serve: {error}: pip install -e '.[serve]'", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while the model is loaded
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
