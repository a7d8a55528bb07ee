"""Mistakes in the flags of all commands: one line that names the flag, and exit status 2."""

import pytest

import benchmarks.__main__
import convert.__main__
import data.__main__
import evals.__main__
import evals.attention_maps
import evals.compare
import sample
import serve.__main__
from tests.conftest import command

PARSERS = {
    "sample.py": (sample.parse_args, "", "--temperature"),
    "serve": (serve.__main__.parse_args, "RUN", "--checkpoint"),
    "convert": (convert.__main__.parse_args, "to-hf RUN DIR", "--checkpoint"),
    "data": (data.__main__.arguments, "prepare shakespeare", "--processes"),
    "evals": (evals.__main__.arguments, "RUN", "--checkpoint"),
    "evals.attention_maps": (evals.attention_maps.arguments, "RUN --repeated", "--checkpoint"),
    "evals.compare": (evals.compare.arguments, "RUN", "--out"),
    "benchmarks": (benchmarks.__main__.arguments, "scaling", "--out"),
}


@pytest.mark.parametrize("program", PARSERS)
@pytest.mark.parametrize("mistake", ["misspelled", "misspelled with a value", "unknown", "without a value"])
def test_a_mistake_is_one_line(program, mistake, capsys):
    parse, words, flag = PARSERS[program]
    wrong = flag[:-2] + flag[-1]
    given, message = {
        "misspelled": ([wrong], f"{wrong}: no such option; did you mean {flag}?"),
        "misspelled with a value": ([f"{wrong}=x"], f"{wrong}: no such option; did you mean {flag}?"),
        "unknown": (["--zyzzyva"], "--zyzzyva: no such option; see --help"),
        "without a value": ([flag], f"argument {flag}: expected one argument"),
    }[mistake]
    with pytest.raises(SystemExit) as left:
        parse([*words.split(), *given])
    assert (left.value.code, capsys.readouterr()) == (2, ("", f"{program}: {message}\n"))


@pytest.mark.parametrize("program", ["sample.py", "serve"])
def test_the_process_ends_the_same_way(program, tmp_path):
    done = command(program, "--temprature=1", *["RUN"] * (program == "serve"), where=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{program}: --temprature: no such option") and done.stderr.count("\n") == 1
