"""The listening socket, uvicorn on it, and its shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Final

import uvicorn

from pipeline.errors import ConfigError
from pipeline.serve.api import LiveServer

# The kernel drops a client that reads nothing for this long; until then it costs an event and this buffer.
_STALLED_SECONDS: Final = 20
_SEND_BUFFER_BYTES: Final = 256 * 1024
_BACKLOG: Final = 4096
_CLOSE_SECONDS: Final = 5


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the role."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """Open the listening socket; port 0 means any free one.

    Raises:
        ConfigError: the address is not available.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"AGENT_METADATA_SERVE_HOST={host} and AGENT_METADATA_SERVE_PORT={port} can't be served: {error.strerror}"
        ) from error
    # Accepted sockets inherit both limits.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALLED_SECONDS * 1000)
    return listening


async def serve(server: LiveServer, listening: socket.socket, stop: asyncio.Event) -> None:
    """Serve on a socket of `listen` until `stop` is set; then end all streams and give requests 5 s to finish."""
    config = uvicorn.Config(
        server.app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )
    uvicorn_server = _Server(config)
    serving = asyncio.create_task(uvicorn_server.serve(sockets=[listening]))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        server.close()
        uvicorn_server.should_exit = True
        await serving
