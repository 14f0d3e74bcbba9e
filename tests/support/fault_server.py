"""A server over real HTTP that plays what can go wrong at Moondream's: for tests of the client. It computes nothing."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "md-secret-0123456789"
FINE = {"request_id": "req-1", "answer": "A cat."}


@dataclass
class Faults:
    """What the server plays, in turn (the last one again and again), and what it was asked.

    A fault is a function of the handler that sends something, a status, or a pair of status and headers.
    """

    address: str = ""
    plays: list[Any] = field(default_factory=lambda: [200])
    asked: list[tuple[str, str, dict[str, str], Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def play(self, *faults: Any) -> None:
        """From now on these."""
        self.plays = list(faults)
        self.asked.clear()
        self.times.clear()

    def next(self) -> Any:
        return self.plays.pop(0) if len(self.plays) > 1 else self.plays[0]


class Handler(BaseHTTPRequestHandler):
    """One connection per request, as HTTP/1.1."""

    protocol_version = "HTTP/1.1"
    faults: Faults
    body: Any = None

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.body = json.loads(body) if body else None
        self.faults.times.append(time.monotonic())
        self.faults.asked.append((self.command, self.path, dict(self.headers), self.body))
        fault = self.faults.next()
        if callable(fault):
            fault(self)
        elif isinstance(fault, dict):
            self.send(200, json.dumps(fault).encode())
        else:
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            told = FINE if status == 200 else {"error": {"message": f"told {KEY} no", "type": "x"}}
            self.send(status, json.dumps(told).encode(), **headers)

    do_GET = do_DELETE = do_POST

    def send(self, status: int, body: bytes, **headers: str) -> None:
        """A whole answer; `headers` with _ for -."""
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def begin(self, kind: str = "text/event-stream") -> None:
        """The head of an answer whose length nobody knows."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

    def event(self, **data: Any) -> None:
        """One server-sent event."""
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()


def hang(handler: Handler) -> None:
    """Says nothing for a long time."""
    time.sleep(3)


def drip(handler: Handler) -> None:
    """A good answer, a byte every 50 ms, with blanks before it."""
    handler.begin("application/json")
    for byte in b" " * 200 + json.dumps(FINE).encode():
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        time.sleep(0.05)


def half_a_stream(handler: Handler) -> None:
    """Two pieces, and no end."""
    handler.begin()
    handler.event(chunk="A ", completed=False)
    handler.event(chunk="cat", completed=False)


def stream(handler: Handler) -> None:
    """A whole stream, with a comment, an unknown line and what the older documentation calls its text."""
    handler.begin()
    handler.wfile.write(b": hello\n\nevent: message\n")
    handler.event(chunk="A ", completed=False)
    handler.event(text="cat.")
    handler.event(completed=True, chunk="", request_id="req-2", metrics={"input_tokens": 735, "output_tokens": 3})


def stream_error(handler: Handler) -> None:
    """A stream that ends in an error."""
    handler.begin()
    handler.event(chunk="A ", completed=False)
    handler.event(error=f"out of memory, {KEY}")


def malformed(handler: Handler) -> None:
    """Half a JSON object, told to be whole."""
    handler.send(200, b'{"answer": "A c')


def html(handler: Handler) -> None:
    """A proxy's error page."""
    handler.send(502, b"<html><script>alert(1)</script>Bad gateway</html>", Content_Type="text/html")


def html_200(handler: Handler) -> None:
    """Somebody else's home page."""
    handler.send(200, b"<html>Welcome</html>", Content_Type="text/html")


def too_short(handler: Handler) -> None:
    """Less than its Content-Length."""
    handler.send(200, b'{"answer": "A cat."}', Content_Length="500")
    handler.close_connection = True


def reset(handler: Handler) -> None:
    """Carries the request out and drops the connection."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    handler.connection.close()
    handler.close_connection = True


def endless(handler: Handler) -> None:
    """More than anybody wants to read."""
    handler.begin("application/json")
    for _ in range(200):
        handler.wfile.write(b" " * 1_000_000)


@contextmanager
def fault_server() -> Iterator[Faults]:
    """Runs on a free port of this machine while the block lasts."""
    faults = Faults()

    class Playing(Handler):
        pass

    Playing.faults = faults
    server = ThreadingHTTPServer(("127.0.0.1", 0), Playing)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    faults.address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield faults
    finally:
        server.shutdown()
        server.server_close()
