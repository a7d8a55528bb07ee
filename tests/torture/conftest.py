"""What the torture tests share: a server that runs commands, and a judge of how they end."""

import re
from pathlib import Path

import pytest

from tests.conftest import USER_ENV
from tests.fork_server import ForkServer

LINES = 6  # of an error message, at most


class Server(ForkServer):
    """A server that judges how commands end."""

    def __init__(self, where: Path) -> None:
        self.cases, self.wrong = 0, list[str]()
        environment = {"HEED_CACHE": str(where / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        super().__init__(where, USER_ENV | environment)

    def judge(self, *argv: str, **options) -> str:
        """Run a command that may succeed or refuse, with a short message and no traceback; returns its output.

        What is wrong is collected: the end of the test reports all of it.
        """
        status, said = self.run(*argv, **options)
        self.cases += 1
        wrong = ""
        if status not in (0, 2):
            wrong = f"status {status}"
        elif "Traceback" in said or re.search(r"^\w*(Error|Exception)\b", said, re.M):
            wrong = "a traceback"
        elif status == 2:
            starts = [found.start() for found in re.finditer(r"^(train\.py|sample\.py|convert): ", said, re.M)]
            error = said[starts[-1] :] if starts else ""
            if not error or len(error.strip().splitlines()) > LINES or len(error) > 2000:
                wrong = "no message, or a long one"
        if wrong:
            self.wrong.append(f"{wrong}: {argv} {options}\n{said[-2000:]}")
        return said


@pytest.fixture(scope="session")
def the_server(tmp_path_factory):
    started = Server(tmp_path_factory.mktemp("torture"))
    yield started
    started.close()


@pytest.fixture
def server(the_server):
    """The server; after the test, what was wrong in any of its cases is an error."""
    before = the_server.cases
    yield the_server
    wrong, the_server.wrong = the_server.wrong, []
    print(f"{the_server.cases - before} cases, {len(wrong)} wrong")
    assert not wrong, "\n\n".join(wrong)
