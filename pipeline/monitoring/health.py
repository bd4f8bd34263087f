"""/metrics, /live and /ready of a role, served by their own thread, so that they answer when the event loop can't."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from pipeline.errors import ConfigError, ExitCode

# A process ends after it was stuck at this many checks in a row, a second apart: a single one may be the moment after
# its machine woke from sleep.
_STUCK_LOOKS: Final = 5
_LOOK_SECONDS: Final = 1.0

# Returns why a process is not live or ready; None if it is.
Why = Callable[[], str | None]


class Heartbeat:
    """Beats on the event loop; the age of the last beat tells other threads whether the loop still runs."""

    def __init__(self, stuck_seconds: float) -> None:
        self._stuck_seconds = stuck_seconds
        self._at = time.monotonic()
        self._task = asyncio.create_task(self._beat())

    def why_stuck(self) -> str | None:
        """Say for how long the event loop has not run, if that is too long."""
        age = time.monotonic() - self._at
        return f"the event loop has not run for {age:.0f} s" if age > self._stuck_seconds else None

    async def _beat(self) -> None:
        while True:
            self._at = time.monotonic()
            await asyncio.sleep(1.0)


class Outage:
    """How long a service has been unavailable; readable from any thread."""

    def __init__(self, service: str) -> None:
        self.service = service
        self._since: float | None = None

    def note(self, *, answers: bool) -> None:
        """Record whether the service answers now."""
        if answers:
            self._since = None
        elif self._since is None:
            self._since = time.monotonic()

    def seconds(self) -> float:
        """Return for how long it has not answered; 0 if it does."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def why_unavailable(self) -> str | None:
        """Say for how long it has not answered, if it doesn't."""
        return f"{self.service} has not answered for {self.seconds():.0f} s" if self._since is not None else None


def exit_when_stuck(why_not_live: Why) -> None:
    """Watch the process from a thread; when it is stuck, exit with 1 and one line, to be restarted by its supervisor.

    The exit is immediate, like kill -9: a stuck process can't shut down cleanly, and only safe work was committed.
    """

    def watch() -> None:
        looks = 0
        while looks < _STUCK_LOOKS:
            time.sleep(_LOOK_SECONDS)
            why = why_not_live()
            looks = looks + 1 if why is not None else 0
        sys.stderr.write(f"agent-metadata: {why}; exiting to be restarted; nothing is lost\n")
        sys.stderr.flush()
        os._exit(ExitCode.FAILURE)

    threading.Thread(target=watch, name="watchdog", daemon=True).start()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Log nothing: probes and scrapes are routine."""


def serve_health(port: int, registry: CollectorRegistry, *, why_not_live: Why, why_not_ready: Why) -> None:
    """Serve until the process ends; a port of 0 serves nothing.

    /live and /ready answer 200, or 503 with the reason in the body.

    Raises:
        ConfigError: the port can't be bound.
    """
    if not port:
        return
    metrics = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        if path == "/metrics":
            answered: Iterable[bytes] = metrics(environ, start_response)
            return answered
        if path not in ("/live", "/ready"):
            start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
            return [b"try /metrics, /live or /ready\n"]
        why = (why_not_live if path == "/live" else why_not_ready)()
        status = "200 OK" if why is None else "503 Service Unavailable"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{why or 'ok'}\n".encode()]

    try:
        server = make_server("", port, answer, server_class=_Server, handler_class=_Quiet)
    except OSError as error:
        raise ConfigError(f"AGENT_METADATA_METRICS_PORT={port} can't be served: {error.strerror}") from error
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
