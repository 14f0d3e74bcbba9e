"""A simulated Hugging Face Hub with Storage Buckets, over HTTP, for the real `huggingface_hub` and `hf_xet` clients.

Simulated: accounts, the Hub's bucket API, and the content-addressed Xet storage behind it, whose binary uploads (xorbs
and shards) are parsed as far as downloads need it. A xorb is a sequence of compressed chunks; a shard lists, for each
file, ranges of chunks in xorbs. Contents are neither decompressed nor verified here: the client does both.
"""

from __future__ import annotations

import json
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_bucketbucketbucketbucketbucket12"
DATE = "2026-11-23T12:00:00.000Z"
SHARD_ENTRY = 48  # bytes of each entry in a shard
WITH_VERIFICATION, WITH_METADATA = 1 << 31, 1 << 30  # flags of a file in a shard


@dataclass
class Bucket:
    """A bucket: its visibility, and its files as path -> the Hub's description."""

    private: bool = True
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


class BucketServer(ThreadingHTTPServer):
    """State of the server, with faults to inject.

    Attributes:
        buckets: Buckets by id.
        xorbs: Uploaded xorbs by hash, and `chunk_ends` the end of each of their chunks in bytes.
        terms: By file hash, the xorb hash, unpacked bytes, first and last chunk of each part of the file.
        status: HTTP status to return for every request instead, or 0.
        on_request: Called with method and path before a request is handled; returns an HTTP status to fail with, or 0.
        requests: Method and path of all requests.
        tokens: Authorization headers of all requests to the Hub's API.
        slow_seconds: Time to wait before each response.
    """

    daemon_threads = True
    request_queue_size = 128  # the Xet client opens many connections at once

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.buckets: dict[str, Bucket] = {}
        self.xorbs: dict[str, bytes] = {}
        self.chunk_ends: dict[str, list[int]] = {}
        self.terms: dict[str, list[tuple[str, int, int, int]]] = {}
        self.status = 0
        self.on_request: Callable[[str, str], int] = lambda _method, _path: 0
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.slow_seconds = 0.0
        self.lock = threading.RLock()
        self.storage_id = f"xet-{uuid.uuid4().hex}"

    @property
    def address(self) -> str:
        """The server's URL."""
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage_address(self) -> str:
        """The URL of the Xet storage. It is new for each server, as clients keep a cache for each URL."""
        return f"{self.address}/{self.storage_id}"

    def paths(self, bucket: str, prefix: str = "") -> list[str]:
        """Return the paths of a bucket's files."""
        with self.lock:
            return sorted(path for path in self.buckets[bucket].files if path.startswith(prefix))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that were killed in the middle of a request."""

    # ── Xet storage ─────────────────────────────────────────────────────────────────────────────────────────────────

    def store_xorb(self, hash: str, data: bytes) -> None:
        """Store a xorb. A chunk begins with version, length (3 bytes), compression, unpacked length (3 bytes)."""
        ends, offset = [], 0
        while offset + 8 <= len(data) and data[offset : offset + 7] != b"XETBLOB":
            offset += 8 + int.from_bytes(data[offset + 1 : offset + 4], "little")
            ends.append(offset)
        self.xorbs[hash], self.chunk_ends[hash] = data, ends

    def store_shard(self, data: bytes) -> bool:
        """Store the files that a shard describes; return False if it refers to a xorb that was not uploaded."""
        offset = SHARD_ENTRY
        while (digest := data[offset : offset + 32]) != b"\xff" * 32:
            flags, count = struct.unpack_from("<II", data, offset + 32)
            terms = []
            for number in range(1, count + 1):
                start = offset + number * SHARD_ENTRY
                _, size, first, last = struct.unpack_from("<IIII", data, start + 32)
                terms.append((_hex(data[start : start + 32]), size, first, last))
            if any(xorb not in self.xorbs for xorb, *_ in terms):
                return False
            self.terms[_hex(digest)] = terms
            offset += SHARD_ENTRY * (1 + count * (2 if flags & WITH_VERIFICATION else 1))
            offset += SHARD_ENTRY if flags & WITH_METADATA else 0
        return True

    def reconstruction(self, file: str, start: int, end: int) -> dict[str, Any] | None:
        """Describe where the bytes [start, end) of a file are; None if the file ends before `start`."""
        terms, spans, position, offset = [], {}, 0, 0
        for xorb, size, first, last in self.terms[file]:
            if position < end and position + size > start:
                offset = offset if terms else start - position
                terms.append({"hash": xorb, "unpacked_length": size, "range": {"start": first, "end": last}})
                low, high = spans.get(xorb, (first, last))
                spans[xorb] = min(low, first), max(high, last)
            position += size
        fetch = {}
        for xorb, (first, last) in spans.items():
            ends = [0, *self.chunk_ends[xorb]]
            url, span = f"{self.storage_address}/xorb/{xorb}", {"start": ends[first], "end": ends[last] - 1}
            fetch[xorb] = [{"range": {"start": first, "end": last}, "url": url, "url_range": span}]
        return {"offset_into_first_range": offset, "terms": terms, "fetch_info": fetch} if terms else None


class _Handler(BaseHTTPRequestHandler):
    """Handles one request."""

    server: BucketServer
    protocol_version = "HTTP/1.1"

    def handle_request(self) -> None:
        """Route the request to the Hub's API or to the Xet storage, unless it is to fail."""
        hub, parts = self.server, urlsplit(self.path)
        body = self._read_body()
        hub.requests.append(f"{self.command} {parts.path}")
        time.sleep(hub.slow_seconds)
        if status := hub.status or hub.on_request(self.command, parts.path):
            self.respond(status, {"error": f"simulated failure, {self.headers.get('Authorization')}"})
        elif parts.path.startswith(("/api/buckets/", "/buckets/")):
            hub.tokens.add(self.headers.get("Authorization", ""))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.respond(401, {"error": "Invalid credentials in Authorization header"})
            else:
                with hub.lock:
                    self.handle_bucket(parts.path, parse_qs(parts.query), body)
        else:
            self.handle_storage(parts.path, body)

    do_GET = do_POST = do_DELETE = do_PUT = do_HEAD = handle_request  # noqa: N815

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    # ── The Hub's API ───────────────────────────────────────────────────────────────────────────────────────────────

    def handle_bucket(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        """Handle a request about a bucket."""
        hub = self.server
        owner, name, *rest = path.removeprefix("/api").removeprefix("/buckets/").split("/")
        id = f"{owner}/{name}"
        if not rest and self.command == "POST":
            exists = id in hub.buckets
            if not exists:
                hub.buckets[id] = Bucket(private=json.loads(body or b"{}").get("visibility") == "private")
            self.respond(409 if exists else 200, {"url": f"{hub.address}/buckets/{id}"})
            return
        bucket = hub.buckets.get(id)
        if bucket is None:
            self.respond(404, {"error": "Bucket not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        match rest:
            case [] if self.command == "DELETE":
                del hub.buckets[id]
                self.respond(200, {})
            case []:
                sizes = [file["size"] for file in bucket.files.values()]
                info = {"id": id, "private": bucket.private, "createdAt": DATE, "size": sum(sizes)}
                self.respond(200, {**info, "totalFiles": len(sizes)})
            case ["xet-write-token" | "xet-read-token"]:
                expires = int(time.time()) + 3600
                url = hub.storage_address
                token = {"accessToken": "xet", "exp": expires, "casUrl": url}
                headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": expires}
                self.respond(200, token, {name: str(value) for name, value in headers.items()})
            case ["paths-info"]:
                wanted = json.loads(body)["paths"]
                self.respond(200, [bucket.files[name] for name in wanted if name in bucket.files])
            case ["tree", *prefix]:
                start = unquote("/".join(prefix))
                files = [file for name, file in sorted(bucket.files.items()) if _is_below(name, start)]
                if query.get("recursive", ["false"])[0].lower() != "true":
                    files = [file for file in files if "/" not in file["path"].removeprefix(start).strip("/")]
                self.respond(200, files)
            case ["batch"]:
                self.apply_batch(bucket, body)
            case ["resolve", *name]:
                file = bucket.files.get(unquote("/".join(name)))
                if file is None:
                    self.respond(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
                else:
                    route = f"{hub.address}/api/buckets/{id}/xet-read-token"
                    headers = {"X-Xet-Hash": file["xetHash"], "X-Xet-Refresh-Route": route}
                    self.respond(200, {}, {**headers, "X-Linked-Size": str(file["size"])})
            case _:
                self.respond(404, {"error": f"not simulated: {path}"})

    def apply_batch(self, bucket: Bucket, body: bytes) -> None:
        """Add and delete files; a file whose content was not uploaded fails, the others are applied."""
        failed = []
        for operation in map(json.loads, body.splitlines()):
            path = operation["path"]
            if operation["type"] == "deleteFile":
                bucket.files.pop(path, None)
            elif operation["xetHash"] in self.server.terms or operation["xetHash"] == "0" * 64:
                size = sum(part[1] for part in self.server.terms.get(operation["xetHash"], []))
                entry = {"type": "file", "path": path, "size": size, "xetHash": operation["xetHash"]}
                bucket.files[path] = {**entry, "uploadedAt": DATE}
            else:
                failed.append({"path": path, "error": "this content was not uploaded"})
        self.respond(200, {"success": not failed, "failed": failed})

    # ── Xet storage ─────────────────────────────────────────────────────────────────────────────────────────────────

    def handle_storage(self, path: str, body: bytes) -> None:
        """Store xorbs and shards, and describe and send what a file consists of."""
        hub, parts = self.server, path.removeprefix(f"/{self.server.storage_id}").strip("/").split("/")
        match parts:
            case ["v1", "xorbs", _, hash]:
                hub.store_xorb(hash, body)
                self.respond(200, {"was_inserted": True})
            case ["shards"] | ["v1", "shards"]:
                is_complete = hub.store_shard(body)
                self.respond(200 if is_complete else 400, {"result": 1})
            case ["v1", "reconstructions", file] if file in hub.terms:
                start, end = self._range()
                description = hub.reconstruction(file, start, end)
                self.respond(200 if description else 416, description or {})
            case ["xorb", hash]:
                start, end = self._range()
                self.respond_raw(206, hub.xorbs[hash][start:end], "application/octet-stream")
            case _:  # such as newer versions of the interface, in place of which the client uses these
                self.respond(404, {"error": "not found"})

    def _range(self) -> tuple[int, int]:
        """Parse the Range header as [start, end)."""
        start, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        return int(start), int(end) + 1 if end else 1 << 62

    def respond(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        """Send a JSON response."""
        self.respond_raw(status, json.dumps(value).encode(), "application/json", headers)

    def respond_raw(self, status: int, body: bytes, content_type: str, headers: dict[str, str] | None = None) -> None:
        """Send a response."""
        self.send_response(status)
        headers = {"Content-Type": content_type, "Content-Length": str(len(body)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def _hex(digest: bytes) -> str:
    """Return a Xet hash as text: four little-endian integers of 64 bits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


def _is_below(path: str, folder: str) -> bool:
    return not folder or path.startswith(f"{folder}/")


@contextmanager
def run_bucket_server(*buckets: str) -> Iterator[BucketServer]:
    """Serve within the context, with empty private buckets of these ids."""
    hub = BucketServer()
    hub.buckets = {bucket: Bucket() for bucket in buckets}
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
