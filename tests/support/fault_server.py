"""A fake Moondream API server over real HTTP that produces scripted responses and faults."""

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
SUCCESS = {"request_id": "req-1", "answer": "A cat."}


@dataclass
class FaultServer:
    """Scripted responses and recorded requests of a running fault server.

    Attributes:
        address: Base URL, up to /v1.
        responses: Responses in order; the last one repeats. Each is a function of the handler, a JSON object (status
            200), a status, or a pair of status and headers.
        requests: Method, path, headers and JSON body of each request.
        times: Arrival time of each request, by `time.monotonic()`.
    """

    address: str = ""
    responses: list[Any] = field(default_factory=lambda: [200])
    requests: list[tuple[str, str, dict[str, str], Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def respond_with(self, *responses: Any) -> None:
        """Set the responses and clear the recorded requests."""
        self.responses = list(responses)
        self.requests.clear()
        self.times.clear()

    def next_response(self) -> Any:
        """Return the response to the next request."""
        return self.responses.pop(0) if len(self.responses) > 1 else self.responses[0]


class Handler(BaseHTTPRequestHandler):
    """Handles one request per connection with the next scripted response."""

    protocol_version = "HTTP/1.1"
    server_state: FaultServer
    body: Any = None

    def log_message(self, *_: Any) -> None:
        """Disable logging."""

    def do_POST(self) -> None:
        """Record the request and send the next response."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.body = json.loads(body) if body else None
        self.server_state.times.append(time.monotonic())
        self.server_state.requests.append((self.command, self.path, dict(self.headers), self.body))
        response = self.server_state.next_response()
        if callable(response):
            response(self)
        elif isinstance(response, dict):
            self.send(200, json.dumps(response).encode())
        else:
            status, headers = response if isinstance(response, tuple) else (response, {})
            payload = SUCCESS if status == 200 else {"error": {"message": f"{KEY} was rejected", "type": "x"}}
            self.send(status, json.dumps(payload).encode(), **headers)

    do_GET = do_DELETE = do_POST  # noqa: N815

    def send(self, status: int, body: bytes, **headers: str) -> None:
        """Send a complete response. Header names are written with _ for -."""
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def begin_stream(self, content_type: str = "text/event-stream") -> None:
        """Send the headers of a response without Content-Length."""
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

    def send_event(self, **data: Any) -> None:
        """Send a server-sent event."""
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()


def hang(handler: Handler) -> None:
    """Send nothing for 3 seconds."""
    time.sleep(3)


def drip(handler: Handler) -> None:
    """Send whitespace and a valid response, one byte every 50 ms."""
    handler.begin_stream("application/json")
    for byte in b" " * 200 + json.dumps(SUCCESS).encode():
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        time.sleep(0.05)


def truncated_stream(handler: Handler) -> None:
    """Send two events and close the connection without the final one."""
    handler.begin_stream()
    handler.send_event(chunk="A ", completed=False)
    handler.send_event(chunk="cat", completed=False)


def complete_stream(handler: Handler) -> None:
    """Send a complete stream with a comment, an unknown line and the legacy field `text`."""
    handler.begin_stream()
    handler.wfile.write(b": hello\n\nevent: message\n")
    handler.send_event(chunk="A ", completed=False)
    handler.send_event(text="cat.")
    handler.send_event(completed=True, chunk="", request_id="req-2", metrics={"input_tokens": 735, "output_tokens": 3})


def stream_error(handler: Handler) -> None:
    """Send a stream that ends with an error event."""
    handler.begin_stream()
    handler.send_event(chunk="A ", completed=False)
    handler.send_event(error=f"out of memory, {KEY}")


def malformed_json(handler: Handler) -> None:
    """Send half a JSON object with a matching Content-Length."""
    handler.send(200, b'{"answer": "A c')


def html_error(handler: Handler) -> None:
    """Send the HTML error page of a proxy."""
    handler.send(502, b"<html><script>alert(1)</script>Bad gateway</html>", Content_Type="text/html")


def html_success(handler: Handler) -> None:
    """Send an HTML page with status 200."""
    handler.send(200, b"<html>Welcome</html>", Content_Type="text/html")


def short_body(handler: Handler) -> None:
    """Send fewer bytes than Content-Length says."""
    handler.send(200, b'{"answer": "A cat."}', Content_Length="500")
    handler.close_connection = True


def reset_connection(handler: Handler) -> None:
    """Read the request and reset the connection."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    handler.connection.close()
    handler.close_connection = True


def oversized_body(handler: Handler) -> None:
    """Send 200 MB."""
    handler.begin_stream("application/json")
    for _ in range(200):
        handler.wfile.write(b" " * 1_000_000)


@contextmanager
def fault_server() -> Iterator[FaultServer]:
    """Run a fault server on a free local port."""
    state = FaultServer()

    class BoundHandler(Handler):
        server_state = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    state.address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
