"""A read-only server for records that are too large for a page, reachable from this machine only.

It answers two kinds of requests: `/`, the page, and `/head/LAYER/HEAD`, the details of one head. It never opens a file
named by a request.
"""

from __future__ import annotations

import errno
import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from regard.view.data import Data
from regard.view.page import document

_HEAD = re.compile(r"/head/(\d{1,5})/(\d{1,5})")
_BUDGET = 6_000_000  # bytes of data in the page; it fetches the details of other heads one by one


class _Handler(BaseHTTPRequestHandler):
    """Answers the two kinds of requests."""

    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        # Protection against DNS rebinding: the name of another site that resolves to this machine is refused.
        host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
        if host not in ("127.0.0.1", "localhost"):
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"this server answers requests to localhost only")
        elif self.path == "/":
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)
        elif (match := _HEAD.fullmatch(self.path)) and (details := self.server.head(int(match[1]), int(match[2]))):
            self._answer(HTTPStatus.OK, "application/json", details)
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"not found; the paths are / and /head/LAYER/HEAD")

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence request logging."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, data: Data, page: bytes) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self._data, self.page = data, page

    def head(self, layer: int, head: int) -> bytes | None:
        """Return the details of a head as JSON, or None if there is no such head."""
        records = self._data.records
        if layer >= len(records) or head >= records[layer].heads:
            return None
        (details,) = self._data.details(layer, [head])
        return json.dumps(details).encode()


@contextmanager
def serving(
    data: Data,
    title: str = "",
    subtitle: str = "",
    port: int = 0,
    budget: int = _BUDGET,
    notes: Sequence[str] = (),
) -> Iterator[str]:
    """Serve a page of `data` on this machine while the block runs, and yield its address.

    Args:
        data: the records.
        title, subtitle: the headings of the page.
        port: 0 selects a free port.
        budget: the size of the data in the page, in bytes; the details of other heads are fetched on demand.
        notes: as in `page`.

    Raises:
        OSError: the port is in use, or may not be used.

    >>> import urllib.request
    >>> from regard.view.data import PageInput
    >>> from regard.watch import watch
    >>> layer = regard.nn.MultiheadAttention(8, 2, batch_first=True)
    >>> with watch(layer, top=3) as records:
    ...     _ = layer(*torch.rand(3, 1, 3, 8))
    >>> with serving(Data([PageInput("a layer", records, ["the", "cat", "sat"])])) as address:
    ...     urllib.request.urlopen(address + "head/0/1").status
    200
    """
    page = document(data, title, subtitle, budget, served=True, notes=notes).encode("utf-8")
    try:
        server = _Server(port, data, page)
    except OSError as error:
        cause = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise OSError(f"port: {port} {cause}; expected another one, or 0 for any free port") from error
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
