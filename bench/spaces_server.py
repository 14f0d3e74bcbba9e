"""A simulated Hugging Face Hub for Spaces, over HTTP, in front of real applications.

Simulated: accounts, image builds, and the durations of responses, builds and restarts. Real: each Space's application,
a process with Gradio's own hot-reload server, which receives the commits with `hot_reload=1`; and a Job's command,
executed as a process with its mount path replaced by a folder. Gradio's hot-reload server always uses port 7887;
several Spaces on one machine need one port each, which is all that `sitecustomize.py` changes in the process.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import httpx

from bench.app import free_port

TOKEN = "hf_previewspreviewspreviews12"
DATE = "2026-11-23T12:00:00.000Z"
SITECUSTOMIZE = """
import os
import spaces.reloading
spaces.reloading.start_reload_server.__defaults__ = (int(os.environ["RELOAD_PORT"]),)
"""


@dataclass
class Job:
    """A Job: the request that started it, and its process."""

    id: str
    request: dict[str, Any]
    process: subprocess.Popen[str]
    port: int
    stage: str = "RUNNING"

    def to_dict(self) -> dict[str, Any]:
        """Convert to the Hub's JSON; the real Hub's URL would be https://<id>--7860.hf.jobs."""
        status = {"stage": self.stage, "exposeUrls": [f"http://127.0.0.1:{self.port}"]}
        owner = {"id": "1", "name": "team", "type": "user"}
        return {"id": self.id, "createdAt": DATE, "owner": owner, "status": status, "flavor": self.request["flavor"]}


@dataclass
class Space:
    """A Space: its files and commits, its process, and the status that the Hub reports.

    Attributes:
        request: The request that created it.
        commits: Hash and title, oldest first.
        running: Commit that the Hub reports as running.
        reload: Hot-reload status: "created", "canceled" or None.
        starts: Number of times the application was started.
        start_requests: Number of requested starts; only the last one is carried out.
    """

    id: str
    folder: Path
    variables: dict[str, str]
    secrets: dict[str, str]
    request: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, str]] = field(default_factory=list)
    stage: str = "NO_APP_FILE"
    running: str | None = None
    reload: str | None = None
    process: subprocess.Popen[str] | None = None
    port: int = 0
    reload_port: int = 0
    starts: int = 0
    start_requests: int = 0
    log: list[str] = field(default_factory=list)
    build_log: list[str] = field(default_factory=list)
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))

    @property
    def head(self) -> str:
        """The last commit's hash."""
        return self.commits[-1][0] if self.commits else "0" * 40

    @property
    def subdomain(self) -> str:
        """The Space's name in URLs."""
        return self.id.replace("/", "-").replace("_", "-").replace(".", "-").lower()

    def runtime(self) -> dict[str, Any]:
        """Return the Hub's JSON of the runtime."""
        reload = {"status": self.reload, "replicaStatuses": [["r0", "ok"]]} if self.reload else None
        hardware = {"current": "cpu-basic", "requested": "cpu-basic"}
        runtime = {"stage": self.stage, "hardware": hardware, "sha": self.running, "hotReloading": reload}
        return {key: value for key, value in runtime.items() if value is not None}

    def stop(self) -> None:
        """Stop the application."""
        process, self.process = self.process, None  # first, so that its end does not count as a failure
        if process:
            kill(process)


class SpacesServer(ThreadingHTTPServer):
    """The simulated Hub, with faults to inject.

    Attributes:
        build_seconds: Duration of an image build.
        restart_seconds: Duration of a restart.
        latency: Duration of a response of the Hub's API, in seconds.
        poll: Seconds between two checks of whether an application has started.
        responses: By method and end of the path, a list of (status, body, headers) to return instead, one each time.
        lost_responses: Commits that are made without returning a response.
        canceled_reloads: Hot reloads to cancel.
        stuck_restarts: Restarts that never finish.
        create_conflicts: Creations of Spaces that fail with a conflict.
        stale_seconds: Time after a commit during which the old status is reported.
        build_errors: Log lines with which the next build fails.
        before_commit: Called once before the next commit.
        identity: Identity token that is exchanged for an access token.
        busy: Start and end of all times in which the Hub or an application was working; infinity if it still is.
        requests: Method and path of all requests.
        uploads: Title, hot reload and file names of all commits.
        lfs_objects: Large files by SHA-256.
        buckets: Whether each Storage Bucket is private, by id; their files are not simulated.
    """

    daemon_threads = True

    def __init__(self, folder: Path, build: float = 0.0, restart: float = 0.0, latency: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), RequestHandler)
        self.folder, self.build_seconds, self.restart_seconds, self.latency = folder, build, restart, latency
        self.poll = 0.1
        self.spaces: dict[str, Space] = {}
        self.jobs: dict[str, Job] = {}
        self.is_closed = False
        self.responses: dict[tuple[str, str], list[tuple[int, Any, dict[str, str]]]] = {}
        self.lost_responses = self.canceled_reloads = self.stuck_restarts = self.create_conflicts = 0
        self.stale_seconds = 0.3
        self.build_errors: list[str] = []
        self.before_commit: Callable[[], None] | None = None
        self.identity: str | None = None
        self.busy: list[list[float]] = []
        self.requests: list[str] = []
        self.uploads: list[tuple[str, bool, list[str]]] = []
        self.lfs_objects: dict[str, bytes] = {}
        self.buckets: dict[str, bool] = {}
        self.lock = threading.RLock()
        site = folder / "site"
        site.mkdir(parents=True)
        (site / "sitecustomize.py").write_text(SITECUSTOMIZE)

    @property
    def address(self) -> str:
        """The Hub's URL."""
        return f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def track_busy_time(self) -> Iterator[None]:
        """Record the time as busy."""
        span = [time.monotonic(), math.inf]
        self.busy.append(span)
        try:
            yield
        finally:
            span[1] = time.monotonic()

    def commit(self, space: Space, title: str, changes: dict[str, bytes | None], hot: bool = False) -> str:
        """Commit to a Space, then hot-reload or start it.

        Args:
            space: The Space.
            title: Title of the commit.
            changes: New contents by path; None deletes.
            hot: Whether to hot-reload.

        Returns:
            The commit's hash.
        """
        for path, content in changes.items():
            if content is None:
                space.files.pop(path, None)
            else:
                space.files[path] = content
        oid = hashlib.sha1(f"{space.head}{title}{time.time_ns()}".encode()).hexdigest()
        space.commits.append((oid, title))
        self.uploads.append((title, hot, sorted(changes)))
        if hot:
            self.hot_reload(space, oid, changes)
        elif space.stage != "PAUSED":  # a paused Space is started by request only
            needs_build = bool({"README.md", "requirements.txt"} & set(changes)) or not space.starts
            threading.Thread(target=self.start, args=(space, oid, needs_build), daemon=True).start()
        return oid

    def hot_reload(self, space: Space, oid: str, changes: dict[str, bytes | None]) -> None:
        """Send the changes to the application's hot-reload server."""
        if self.canceled_reloads:
            self.canceled_reloads -= 1
            space.reload = "canceled"
            return
        for path, content in changes.items():
            body = {"filepath": path, "contents": (content or b"").decode(), "reloadId": oid}
            for _ in range(50):
                try:
                    response = httpx.post(f"http://127.0.0.1:{space.reload_port}/create-reload", json=body, timeout=20)
                    if response.json()["res"]["status"] != "alreadyReloading":
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
            space.reload = "created"

    def start(self, space: Space, oid: str, needs_build: bool) -> None:
        """Build if necessary, stop the old application, start the new one, and wait until it responds."""
        with self.track_busy_time():
            if self._start_process(space, oid, needs_build):
                self._wait_until_started(space, oid)

    def _start_process(self, space: Space, oid: str, needs_build: bool) -> bool:
        space.start_requests += 1
        start_request = space.start_requests
        time.sleep(self.stale_seconds)
        with self.lock:
            build_stage = "RUNNING_BUILDING" if space.starts else "BUILDING"
            space.stage = build_stage if needs_build else "RUNNING_APP_STARTING"
        if self.stuck_restarts and not needs_build:
            self.stuck_restarts -= 1
            return False
        time.sleep(self.build_seconds if needs_build else self.restart_seconds)
        if self.build_errors:
            space.build_log, self.build_errors = self.build_errors, []
            space.stage, space.running = "BUILD_ERROR", oid
            return False
        with self.lock:
            if self.is_closed or oid != space.head or start_request != space.start_requests:
                return False  # superseded by a newer commit or start
            space.stage = "APP_STARTING"
            space.stop()
            space.starts += 1
            space.port, space.reload_port = free_port(), free_port()
            env = {
                "PATH": os.environ["PATH"],
                "HOME": str(space.folder),
                "PYTHONPATH": str(self.folder / "site"),
                "OMP_NUM_THREADS": "1",
                "SYSTEM": "spaces",
                "SPACE_ID": space.id,
                "GRADIO_SERVER_PORT": str(space.port),
                "GRADIO_ANALYTICS_ENABLED": "False",
                "HF_HUB_OFFLINE": "1",
                "RELOAD_PORT": str(space.reload_port),
                "DATA_DIR": str(space.folder / "data"),
                **space.variables,
                **space.secrets,
            }
            code = write_files(space, f"code{space.starts}")
            log = (space.folder / f"log{space.starts}").open("w")
            space.process = subprocess.Popen(
                [sys.executable, "app.py"], cwd=code, env=env, stdout=log, stderr=log, text=True, start_new_session=True
            )
        return True

    def _wait_until_started(self, space: Space, oid: str) -> None:
        process, log = space.process, space.folder / f"log{space.starts}"
        if process is None:
            return  # stopped meanwhile
        while process.poll() is None and space.process is process:
            try:
                httpx.get(f"http://127.0.0.1:{space.port}/healthz", timeout=5).raise_for_status()
                httpx.get(f"http://127.0.0.1:{space.reload_port}/healthz", timeout=5)
                space.stage, space.running, space.reload = "RUNNING", oid, None
                return
            except httpx.HTTPError:
                time.sleep(self.poll)
        if space.process is process:
            space.log = log.read_text().splitlines()
            space.stage, space.running = "RUNTIME_ERROR", oid

    def run_job(self, request: dict[str, Any]) -> Job:
        """Execute a Job's command on the files of the Space that it mounts."""
        (volume,) = request["volumes"]
        space = self.spaces[volume["source"]]
        assert volume["revision"] == space.head and request["expose"] == {"ports": [7860], "portsPublic": [7860]}
        id, port, site = f"job{len(self.jobs)}", free_port(), self.folder / "site"
        code = write_files(space, id)
        (site / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (site / "python").chmod(0o755)
        env = {"PATH": f"{site}:{os.environ['PATH']}", "HOME": str(space.folder), "OMP_NUM_THREADS": "1"}
        env |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "RELOAD_PORT": str(free_port())}
        env |= {**request["environment"], "GRADIO_SERVER_PORT": str(port), "DATA_DIR": str(space.folder / "jobdata")}
        command = [part.replace(volume["mountPath"], str(code)) for part in request["command"]]
        log = (space.folder / f"{id}.log").open("w")
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, text=True, start_new_session=True)
        job = self.jobs[id] = Job(id, request, process, port)
        return job

    def delete_all_spaces(self) -> None:
        """Stop and delete all Spaces."""
        for space in self.spaces.values():
            space.stop()
        self.spaces.clear()


class RequestHandler(BaseHTTPRequestHandler):
    """Handles one request to the simulated Hub."""

    server: SpacesServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        """Disable Nagle's algorithm."""
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def handle_request(self) -> None:
        """Return an injected response, or route the request."""
        with self.server.track_busy_time():
            self.route()

    do_GET = do_POST = do_DELETE = do_PUT = do_HEAD = handle_request  # noqa: N815

    def route(self) -> None:
        """Route the request to the API, Git LFS, or a Space's application."""
        hub, parts = self.server, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(f"{self.command} {parts.path}")
        is_api = parts.path.startswith("/api/") or "/resolve/" in parts.path
        if is_api:
            time.sleep(hub.latency)
        for (method, end), responses in hub.responses.items():
            if responses and method == self.command and parts.path.endswith(end):
                self.respond(*responses.pop(0))
                return
        if parts.path == "/oauth/token":
            if json.loads(body).get("subject_token") == hub.identity is not None:
                self.respond(200, {"access_token": TOKEN})
            else:
                self.respond(401, {"error": "unknown publisher"})
        elif parts.path.startswith("/large/"):
            digest = parts.path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == digest
            hub.lfs_objects[digest] = body
            self.respond(200, {})
        elif parts.path.endswith(".git/info/lfs/objects/batch"):
            self.start_lfs_upload(json.loads(body))
        elif not is_api:
            self.forward_to_application(parts.path, body)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.respond(401, {"error": "Invalid credentials in Authorization header"})
        else:
            self.route_api(parts.path, parse_qs(parts.query), body)

    def route_api(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        """Handle a request to the Hub's API."""
        hub = self.server
        if path == "/api/repos/create":
            self.create_space(json.loads(body))
        elif path == "/api/repos/delete":
            request = json.loads(body)
            space = hub.spaces.pop(f"{request['organization']}/{request['name']}", None)
            if space:
                space.stop()
            self.respond(200, {}) if space else self.respond_not_found()
        elif path == "/api/spaces":
            prefix = f"{query['author'][0]}/"
            spaces = [
                {"id": id, "createdAt": space.created} for id, space in hub.spaces.items() if id.startswith(prefix)
            ]
            self.respond(200, spaces)
        elif path == "/api/validate-yaml":
            self.respond(200, {"errors": [], "warnings": []})
        elif path.startswith("/api/buckets/"):
            self.handle_bucket(path.removeprefix("/api/buckets/"), body)
        elif path.startswith("/api/jobs/"):
            self.handle_job(path.split("/")[3:], body)
        elif "/resolve/" in path:
            location = path.replace("/spaces/", "/api/resolve-cache/spaces/", 1).replace("/resolve/main/", "/at/")
            self.respond(307, {}, {"Location": location})
        elif path.startswith("/api/resolve-cache/"):
            id, _, file = path.removeprefix("/api/resolve-cache/spaces/").partition("/at/")
            space = hub.spaces.get(id)
            content = space.files.get(unquote(file)) if space else None
            self.respond_raw(200, content, "text/plain") if content is not None else self.respond_not_found()
        else:
            _, _, _, owner, name, *rest = path.split("/")
            space = hub.spaces.get(f"{owner}/{name}")
            if space is None:
                self.respond_not_found()
            else:
                self.handle_space(space, rest, query, body)

    def create_space(self, request: dict[str, Any]) -> None:
        """Create a Space."""
        hub, id = self.server, f"{request['organization']}/{request['name']}"
        if id in hub.spaces:
            self.respond(409, {"error": "You already created this space repo", "url": f"{hub.address}/spaces/{id}"})
            return
        if hub.create_conflicts:
            hub.create_conflicts -= 1
            self.respond(409, {"error": "Cannot create repo: another conflicting operation is in progress"})
            return
        variables, secrets = (
            {item["key"]: item["value"] for item in request.get(kind, [])} for kind in ("variables", "secrets")
        )
        folder = hub.folder / f"space{len(list(hub.folder.iterdir()))}"
        folder.mkdir()
        hub.spaces[id] = Space(id, folder, variables, secrets, request)
        self.respond(200, {"url": f"{hub.address}/spaces/{id}"})

    def handle_space(self, space: Space, rest: list[str], query: dict[str, list[str]], body: bytes) -> None:
        """Handle a request about one Space; `rest` is the path after its id."""
        hub = self.server
        match rest:
            case []:
                host = f"{hub.address}/{space.subdomain}"
                info = {"id": space.id, "sha": space.head, "sdk": "gradio", "private": True, "host": host}
                self.respond(200, info | {"subdomain": space.subdomain, "runtime": space.runtime()})
            case ["runtime"]:
                self.respond(200, space.runtime())
            case ["variables"]:
                self.respond(200, {key: {"key": key, "value": value} for key, value in space.variables.items()})
            case ["tree", "main"]:
                self.respond(200, [tree_entry(path, content) for path, content in space.files.items()])
            case ["commits", "main"]:
                commits = [
                    {"id": id, "title": title, "message": "", "date": DATE, "authors": []}
                    for id, title in reversed(space.commits)
                ]
                self.respond(200, commits)
            case ["preupload", "main"]:
                files = [
                    {"path": file["path"], "uploadMode": upload_mode(file["path"]), "shouldIgnore": False, "oid": None}
                    for file in json.loads(body)["files"]
                ]
                self.respond(200, {"files": files, "commitOid": space.head})
            case ["commit", "main"]:
                self.commit(space, body, "hot_reload" in query)
            case ["logs", kind]:
                lines = space.build_log if kind == "build" else space.log
                events = "".join(f"data: {json.dumps({'data': line, 'timestamp': DATE})}\n\n" for line in lines)
                self.respond_raw(200, events.encode(), "text/event-stream")
            case ["restart"]:
                space.stage = "APP_STARTING"
                threading.Thread(target=hub.start, args=(space, space.head, "factory" in query), daemon=True).start()
                self.respond(200, space.runtime())
            case _:
                self.respond_not_found()

    def commit(self, space: Space, body: bytes, hot: bool) -> None:
        """Commit the changes of a request, unless its parent is not the Space's head."""
        hub = self.server
        if hub.before_commit:
            before_commit, hub.before_commit = hub.before_commit, None
            before_commit()
        title, parent, changes = "", None, {}
        for line in body.decode().splitlines():
            part = json.loads(line)
            match part["key"]:
                case "header":
                    title, parent = part["value"]["summary"], part["value"].get("parentCommit")
                case "file":
                    changes[part["value"]["path"]] = base64.b64decode(part["value"]["content"])
                case "lfsFile":
                    changes[part["value"]["path"]] = hub.lfs_objects[part["value"]["oid"]]
                case "deletedFile":
                    changes[part["value"]["path"]] = None
        with hub.lock:
            if parent and parent != space.head:
                self.respond(412, {"error": "A commit has happened since. Please refresh and try again."})
                return
            oid = hub.commit(space, title, changes, hot)
        if hub.lost_responses:
            hub.lost_responses -= 1
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        url = f"{hub.address}/spaces/{space.id}/commit/{oid}"
        self.respond(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def start_lfs_upload(self, request: dict[str, Any]) -> None:
        """Return the upload URLs of large files: Git LFS's basic transfer."""
        objects = [
            {
                **item,
                "actions": {"upload": {"href": f"{self.server.address}/large/{item['oid']}"}},
                "authenticated": True,
            }
            for item in request["objects"]
        ]
        self.respond(200, {"transfer": "basic", "objects": objects})

    def handle_bucket(self, id: str, body: bytes) -> None:
        """Create, describe or delete a Storage Bucket."""
        buckets = self.server.buckets
        if self.command == "POST" and id not in buckets:
            buckets[id] = json.loads(body).get("visibility") == "private"
            self.respond(200, {"url": f"{self.server.address}/buckets/{id}"})
        elif self.command == "POST":
            self.respond(
                409, {"error": "You already created this bucket", "url": f"{self.server.address}/buckets/{id}"}
            )
        elif id not in buckets:
            self.respond_not_found()
        elif self.command == "DELETE":
            del buckets[id]
            self.respond(200, {})
        else:
            info = {"id": id, "private": buckets[id], "createdAt": DATE, "size": 0, "totalFiles": 0}
            self.respond(200, info)

    def handle_job(self, rest: list[str], body: bytes) -> None:
        """Start, cancel or describe a Job."""
        hub = self.server
        match rest:
            case [_]:
                self.respond(200, hub.run_job(json.loads(body)).to_dict())
            case [_, id, "cancel"]:
                kill(hub.jobs[id].process)
                hub.jobs[id].stage = "CANCELED"
                self.respond(200, {})
            case _:
                self.respond(200, hub.jobs[rest[1]].to_dict())

    def forward_to_application(self, path: str, body: bytes) -> None:
        """Forward the request to a Space's application or its hot-reload server."""
        _, label, *rest = path.split("/")
        spaces = self.server.spaces.values()
        space = next((space for space in spaces if label.split("--")[0] == space.subdomain), None)
        if space is None:
            self.respond_not_found()
            return
        port = space.reload_port if label.endswith("--7887") else space.port
        inner = "/".join(part for part in rest if part != "--replicas" and not part.startswith("+"))
        headers = {"Content-Type": self.headers.get("Content-Type") or "text/plain"}
        if "Authorization" in self.headers:
            headers["Authorization"] = self.headers["Authorization"]
        url = f"http://127.0.0.1:{port}/{inner}"
        try:
            response = httpx.request(self.command, url, content=body, headers=headers, timeout=60)
        except httpx.HTTPError:
            self.respond(503, {"error": "Your space is in error, check its status on hf.co"})
            return
        self.respond_raw(response.status_code, response.content, response.headers.get("content-type", "text/plain"))

    def respond_not_found(self) -> None:
        """Send the Hub's response for a missing repository."""
        self.respond(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def respond(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        """Send a JSON response."""
        self.respond_raw(status, json.dumps(value).encode(), "application/json", headers)

    def respond_raw(self, status: int, text: bytes, content_type: str, headers: dict[str, str] | None = None) -> None:
        """Send a response."""
        self.send_response(status)
        headers = {"Content-Type": content_type, "Content-Length": str(len(text)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a process and its children."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def write_files(space: Space, name: str) -> Path:
    """Write a Space's files to a new folder, and return it."""
    folder = space.folder / name
    for path, content in space.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def blob_oid(content: bytes) -> str:
    """Compute the git blob hash of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def upload_mode(path: str) -> str:
    """Return how the Hub stores a file: "lfs" for binary files."""
    return "lfs" if path.endswith((".jpg", ".png", ".safetensors", ".npz")) else "regular"


def tree_entry(path: str, content: bytes) -> dict[str, Any]:
    """Return a file as the Hub lists it; the oid of a large file is that of its pointer."""
    entry = {"type": "file", "path": path, "size": len(content)}
    if upload_mode(path) == "regular":
        return {**entry, "oid": blob_oid(content)}
    digest = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n".encode()
    lfs = {"oid": digest, "size": len(content), "pointerSize": len(pointer)}
    return {**entry, "oid": blob_oid(pointer), "lfs": lfs}


@contextmanager
def spaces_server(folder: Path, **durations: float) -> Iterator[SpacesServer]:
    """Run a simulated Hub; stop its Spaces and Jobs at the end.

    Args:
        folder: Folder for its files.
        **durations: Seconds of `build`, `restart` and `latency`.
    """
    hub = SpacesServer(folder, **durations)
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        with hub.lock:
            hub.is_closed = True  # no start that waits begins now
        for space in hub.spaces.values():
            space.stop()
        for job in hub.jobs.values():
            kill(job.process)
        hub.shutdown()
        hub.server_close()
