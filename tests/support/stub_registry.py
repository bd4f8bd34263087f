"""A schema registry of a few lines, which answers as it is told: also with errors and with garbage."""

from __future__ import annotations

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class StubRegistry:
    """Serves `answers`: (status, JSON or raw text) by path; counts requests and keeps their headers."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, Any]] = {"/schemas/types": (200, ["AVRO"])}
        self.default: tuple[int, Any] = (404, {"error_code": 40403, "message": "Schema not found"})
        self.requests: Counter[str] = Counter()
        self.authorization: str | None = None
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                stub.requests[path] += 1
                stub.authorization = self.headers.get("Authorization")
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, body = stub.answers.get(path, stub.default)
                content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET  # noqa: N815  # http.server's naming

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
