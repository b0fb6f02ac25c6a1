"""A server for records that are too large for a page: this machine alone, read only, and nothing but the record.

It answers two kinds of request: `/`, the page, and `/head/LAYER/HEAD`, the weights of one head. It reads no path from a
request, so none can lead out of the record.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from regard.view.data import Data
from regard.view.page import document

_HEAD = re.compile(r"/head/(\d{1,5})/(\d{1,5})")
_BUDGET = 6_000_000  # bytes that the first page holds; the rest is asked for, a head at a time


class _Handler(BaseHTTPRequestHandler):
    """Answers the two kinds of request, for `server.data`."""

    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:  # noqa: N802: the name is http.server's
        # A page of another site, whose name leads here, would come with its own name.
        host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
        if host not in ("127.0.0.1", "localhost"):
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"this server answers to this machine alone")
        elif self.path == "/":
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)
        elif (found := _HEAD.fullmatch(self.path)) and (told := self.server.head(int(found[1]), int(found[2]))):
            self._answer(HTTPStatus.OK, "application/json", told)
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"there is nothing here but / and /head/LAYER/HEAD")

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads along."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, data: Data, page: bytes) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self._data, self.page = data, page

    def head(self, layer: int, head: int) -> bytes | None:
        """One head in detail, or None where there is no such head."""
        records = self._data.records
        if layer >= len(records) or head >= records[layer].heads:
            return None
        (told,) = self._data.details(layer, [head])
        return json.dumps(told).encode()


@contextmanager
def serving(data: Data, title: str = "", subtitle: str = "", port: int = 0, budget: int = _BUDGET) -> Iterator[str]:
    """Serve a page of `data` on this machine while the block runs, and give its address; port 0 is any that is free.

    Raises OSError where the port is taken.
    """
    server = _Server(port, data, document(data, title, subtitle, budget, served=True).encode("utf-8"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
