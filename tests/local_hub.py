"""A Hub on this machine, for tests: the unmodified client talks to it through HF_ENDPOINT, faults can be injected.

In pytest: import `hub_of_this_process`, take the fixture `hub`, then `hub.fail("commit", 503)`. By hand:
`python tests/local_hub.py`, then set HF_ENDPOINT, HF_HUB_DISABLE_XET and HF_TOKEN in another terminal, as it prints.

Faults are an HTTP status, or one of: `cut_request` (the connection is reset while the request is read), `cut_reply`
(the request is carried out, its reply is lost), `hang` (no answer until the Hub closes), `corrupt` (one bit of the
content flips on its way).
"""

import json
import socket
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

from hub_routes import KINDS, ROUTES, Reply, Request
from hub_store import Refused, Repo, Store

WRITE, READ, OTHER = "hf_testWRITEtoken", "hf_testREADtoken", "hf_testOTHERtoken"
TOKENS = {WRITE: ("me", "write"), READ: ("me", "read"), OTHER: ("someone", "write")}


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of one kind (None: with all of them)."""

    how: int | str
    times: int | None
    headers: dict[str, str]


class LocalHub:
    """The server: `url` to set as HF_ENDPOINT, `fail` to inject faults, `requests` to see what came in."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.store = Store(folder)
        self.tokens = dict(TOKENS)
        self.faults: dict[str, Fault] = {}
        self.hits: Counter[str] = Counter()  # injected faults that really happened, by request kind
        self.requests: list[tuple[str, int | str]] = []  # (kind, status or fault)
        self.bytes_in = 0
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def fail(self, kind: str, how: int | str, times: int | None = 1, **headers: str) -> None:
        """Let requests of this kind fail; `Retry_After="1"` becomes a header."""
        assert kind in KINDS, f"{kind} is not one of {sorted(KINDS)}"
        self.faults[kind] = Fault(how, times, {name.replace("_", "-"): value for name, value in headers.items()})

    def heal(self) -> None:
        self.faults.clear()

    def take_fault(self, kind: str) -> Fault | None:
        with self.store.lock:
            fault = self.faults.get(kind)
            if fault is None or fault.times == 0:
                return None
            if fault.times is not None:
                fault.times -= 1
            self.hits[kind] += 1
            return fault

    def repo(self, repo_id: str, kind: str = "models") -> Repo:
        return self.store.repos[kind, repo_id]

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """Return path → content of one revision."""
        return {path: self.store.content(blob) for path, blob in self.repo(repo_id, kind).at(revision).files.items()}

    def environment(self, token: str | None = WRITE) -> dict[str, str]:
        """Return the variables that lead a fresh process here; the caller adds HF_HOME."""
        variables = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return variables | ({"HF_TOKEN": token} if token else {})

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Find the route, apply the fault, answer."""

    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Stay silent: tests look at `hub.requests`."""

    def answer(self) -> None:
        url = urlsplit(self.path)
        kind, function, path = next(
            (kind, function, {name: unquote(value) for name, value in match.groupdict().items() if value})
            for method, pattern, kind, function in ROUTES
            if self.command in method.split("|") and (match := pattern.fullmatch(url.path))
        )
        fault = self.hub.take_fault(kind)
        how = fault.how if fault else None
        body = self.read_body(half=how == "cut_request")
        if how == "hang":
            self.hub.closing.wait()
        if how in ("hang", "cut_request"):
            return self.reset(kind, str(how))
        if how == "corrupt" and self.command == "PUT":
            body = flip(body)
        if isinstance(how, int):
            reply = Reply({"error": "injected"}, how, dict(fault.headers) if fault else {})
        else:
            reply = self.carry_out(function, path, parse_qs(url.query), body)
        if how == "cut_reply":
            return self.reset(kind, "cut_reply")
        if how == "corrupt" and self.command == "GET":
            reply.body = flip(reply.body)
        self.hub.requests.append((kind, reply.status))
        self.send(reply)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def carry_out(self, function: Callable[[Request], Reply], path: dict, query: dict, body: bytes) -> Reply:
        try:
            user, role = self.identify()
            with self.hub.store.lock:
                return function(Request(self.hub, user, role, path, query, self.headers, body))
        except Refused as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            return Reply({"error": refusal.message}, refusal.status, headers)

    def identify(self) -> tuple[str | None, str | None]:
        header = self.headers.get("Authorization")
        if header is None:
            return None, None
        if (token := header.removeprefix("Bearer ")) not in self.hub.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def read_body(self, half: bool) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(chunks)
        else:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length // 2 if half else length)
        self.hub.bytes_in += len(body)
        return body

    def reset(self, kind: str, how: str) -> None:
        self.hub.requests.append((kind, how))
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST, not FIN
        self.close_connection = True

    def send(self, reply: Reply) -> None:
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def flip(content: bytes) -> bytes:
    """Flip one bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.fixture(name="hub")
def hub_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A Hub that the client of this process uses, signed in with the writing token."""
    hub = LocalHub(tmp_path / "hub")
    for name, value in hub.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # the client read its variables when it was imported
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr("huggingface_hub.utils._http.time", impatient)
    yield hub
    hub.close()


def main() -> None:
    """Serve until interrupted."""
    with tempfile.TemporaryDirectory() as folder:
        hub = LocalHub(Path(folder))
        print(f"export HF_ENDPOINT={hub.url} HF_HUB_DISABLE_XET=1 HF_TOKEN={WRITE}", flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            hub.close()


if __name__ == "__main__":
    main()
