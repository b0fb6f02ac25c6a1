"""The server returns the page and its heads, to this machine only."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.page import block, read_back
from support.records import make_record, random_weights

from regard.view.data import Data, PageInput
from regard.view.serve import serving
from regard.watch import Recording

RECORDS = [make_record(random_weights(1, 3, 9, 9, seed=n), n, k=4) for n in range(2)]
TOKENS = [f"w{n}" for n in range(9)]


@pytest.fixture
def port() -> Iterator[int]:
    with serving(Data([PageInput("served", RECORDS, TOKENS)]), "served", budget=0) as address:
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/", address)
        assert found
        yield int(found[1])


def request(port: int, path: str, host: str = "127.0.0.1", method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", f"{host}:{port}")
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body


def test_server_returns_page_and_heads(port: int) -> None:
    status, body = request(port, "/")
    document = body.decode()
    data = block(document)
    assert status == 200
    assert data["served"]
    assert "connect-src &#x27;self&#x27;" in document
    held = [head["rows"] is not None for layer in data["layers"] for head in layer["heads"]]
    assert sum(held) == 1, "the head that is shown first"
    status, body = request(port, "/head/1/2")
    assert status == 200
    rows = read_back(json.loads(body)["rows"], 9)
    for i, (_, row) in enumerate(rows):
        assert set(row) == set(RECORDS[1].top.keys[0, 2, i].tolist())


@pytest.mark.parametrize(
    "path",
    [
        "/head/2/0", "/head/0/3", "/head/-1/0", "/head/0/0/..", "/../etc/passwd", "//etc/passwd", "/head/0/%2e%2e", "/x",
        "/head/99999999999/0", "/?", "/head/0/0?x=/etc/passwd", "http://127.0.0.1/etc/passwd",
    ],
)  # fmt: skip
def test_other_paths_are_not_found(port: int, path: str) -> None:
    status, body = request(port, path)
    assert status == 404
    assert b"root:" not in body


def test_other_hosts_and_methods_are_refused(port: int) -> None:
    assert request(port, "/", host="evil.example")[0] == 403
    assert request(port, "/", host="localhost")[0] == 200
    for method in ("POST", "PUT", "DELETE"):
        assert request(port, "/", method=method)[0] == 501


def test_port_in_use_raises(port: int) -> None:
    with pytest.raises(OSError, match="in use"), serving(Data([PageInput("served", RECORDS, TOKENS)]), port=port):
        pass


def test_serve_command_serves_a_saved_recording(tmp_path: Path) -> None:
    path = tmp_path / "recording.safetensors"
    Recording(RECORDS, TOKENS).save(path)
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "regard.cli", "serve", str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line, until = "", time.monotonic() + 120
        while "http" not in line and time.monotonic() < until:
            line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        assert found, line
        assert request(int(found[1]), "/head/0/0")[0] == 200
    finally:
        process.kill()
        process.wait()


def test_port_in_use_is_named(port: int) -> None:
    with (
        pytest.raises(OSError, match=f"port: {port} is in use; expected another one, or 0 for any free port"),
        serving(Data([PageInput("served", RECORDS, TOKENS)]), port=port),
    ):
        pass
