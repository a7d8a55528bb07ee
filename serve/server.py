"""The process: its socket, and how signals end it."""

import asyncio
import ipaddress
import os
import re
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


def allowed_hosts(bound: socket.socket, more: list[str]) -> list[str]:
    """The names that a request may have for the server, or none: every name.

    On an address that only this machine reaches they are its names and `more`, so that no web page reaches the server
    under a name of its own that leads here (DNS rebinding). Elsewhere they are `more`. Raises ValueError.
    """
    for name in more:
        if not re.fullmatch(r"[\w.-]+|\[[\da-fA-F:.]+\]", name):
            raise ValueError(f"--allowed-host {name}: must be a name or an address, without http:// and a port")
    address = bound.getsockname()[0]
    local = ipaddress.ip_address(address).is_loopback
    own = ["localhost", "[::1]", f"[{address}]" if ":" in address else address] if local else []
    return list(dict.fromkeys(name.lower() for name in own + more))


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
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"serving {address}/v1 and the playground at {address} (Ctrl-C ends)", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new connections, and end what has not finished within the time."""
        end = GenerationFailed("the server ends")
        asyncio.get_running_loop().call_later(self.grace, self.scheduler.cancel_all, end)
        await super().shutdown(sockets)
