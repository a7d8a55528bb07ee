"""The process: its socket, and how signals end it."""

import asyncio
import os
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from serve.limits import Limits
from serve.scheduler import GenerationFailed


def bind(host: str, port: int) -> socket.socket:
    """A socket with this address; port 0 is a free one. Raises ValueError, one line."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address[0], port, *address[2:]))
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port}: {error}") from None
    return bound


class Server(uvicorn.Server):
    """uvicorn's server. SIGINT or SIGTERM lets it finish what it has begun, within limits.grace seconds; a second
    signal ends the process at once."""

    def __init__(self, app: FastAPI, limits: Limits) -> None:
        self.scheduler, self.grace = app.state.scheduler, limits.grace
        patience = limits.grace + 5  # for clients that do not read the end of their response
        config = uvicorn.Config(app, http="h11", log_level="warning", timeout_graceful_shutdown=patience)
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal. uvicorn's own method raises it again at the end."""
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            os.kill(os.getpid(), sig)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and print where."""
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        print(f"serving http://{f'[{host}]' if ':' in host else host}:{port}/v1 (Ctrl-C ends)", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new connections, and end what has not finished within the time."""
        end = GenerationFailed("the server ends")
        asyncio.get_running_loop().call_later(self.grace, self.scheduler.cancel_all, end)
        await super().shutdown(sockets)
