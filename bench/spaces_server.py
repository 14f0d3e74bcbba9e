"""A stand-in for the Hub's Spaces, over real HTTP, in front of real applications. It is no Hub.

Simulated: accounts, the building of images, and the times that an answer, building and restarting take (`latency`,
`build`, `restart`). Real: each Space's application, a process with Gradio's own hot-reload server, to which a commit
with `hot_reload=1` is passed on; and a Job's command, executed as a process with the mounted path replaced by a folder.
That server's port is always 7887; several Spaces on one machine need one each, which is all that `sitecustomize.py`
changes in the process.
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

TOKEN = "hf_previewspreviewspreviews12"
NOW = "2026-11-23T12:00:00.000Z"
SITE = """
import os
import spaces.reloading
spaces.reloading.start_reload_server.__defaults__ = (int(os.environ["RELOAD_PORT"]),)
"""


def kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@dataclass
class Job:
    """A Job: what was asked, and the process that does it."""

    id: str
    asked: dict[str, Any]
    process: subprocess.Popen[str]
    port: int
    stage: str = "RUNNING"


@dataclass
class Space:
    """One Space: its files and commits, what runs, and what the Hub says of it."""

    id: str
    folder: Path
    variables: dict[str, str]
    secrets: dict[str, str]
    asked: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, str]] = field(default_factory=list)
    stage: str = "NO_APP_FILE"
    running: str | None = None
    reload: str | None = None
    process: subprocess.Popen[str] | None = None
    port: int = 0
    reload_port: int = 0
    starts: int = 0
    turn: int = 0  # of the start that was asked for last: earlier ones give way to it
    log: list[str] = field(default_factory=list)
    build_log: list[str] = field(default_factory=list)
    made: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))

    @property
    def head(self) -> str:
        return self.commits[-1][0] if self.commits else "0" * 40

    @property
    def subdomain(self) -> str:
        return self.id.replace("/", "-").replace("_", "-").replace(".", "-").lower()


class SpacesServer(ThreadingHTTPServer):
    """What it shall do wrong:

    answers: for a method and a path's end, a list of (status, body, headers) given instead, one each time.
    drop: how many commits are made without their answer arriving. cancel: reloads that are canceled. stale: seconds for
    which the old application is told of after a commit. build_fails: lines of a build that fails. meanwhile: called
    before the next commit. apps: whether applications are really started.
    """

    daemon_threads = True

    def __init__(self, folder: Path, build: float = 0.0, restart: float = 0.0, latency: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder, self.build, self.restart, self.latency = folder, build, restart, latency
        self.spaces: dict[str, Space] = {}
        self.answers: dict[tuple[str, str], list[tuple[int, Any, dict[str, str]]]] = {}
        self.drop = self.cancel = self.stuck = self.conflicts = 0
        self.busy: list[list[float]] = []
        self.large: dict[str, bytes] = {}
        self.identity: str | None = None
        self.stale = 0.3
        self.build_fails: list[str] = []
        self.meanwhile: Callable[[], None] | None = None
        self.requests: list[str] = []
        self.uploads: list[tuple[str, bool, list[str]]] = []
        self.jobs: dict[str, Job] = {}
        self.lock = threading.RLock()
        site = folder / "site"
        site.mkdir(parents=True)
        (site / "sitecustomize.py").write_text(SITE)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, space: Space, title: str, changes: dict[str, bytes | None], hot: bool = False) -> str:
        """Makes a commit; then the Space is reloaded or started anew."""
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
        elif space.stage == "PAUSED":
            pass  # it waits for somebody to start it
        else:
            built = bool({"README.md", "requirements.txt"} & set(changes)) or not space.starts
            threading.Thread(target=self.start, args=(space, oid, built), daemon=True).start()
        return oid

    def hot_reload(self, space: Space, oid: str, changes: dict[str, bytes | None]) -> None:
        if self.cancel:
            self.cancel -= 1
            space.reload = "canceled"
            return
        for path, content in changes.items():
            body = {"filepath": path, "contents": (content or b"").decode(), "reloadId": oid}
            for _ in range(50):
                try:
                    told = httpx.post(f"http://127.0.0.1:{space.reload_port}/create-reload", json=body, timeout=20)
                    if told.json()["res"]["status"] != "alreadyReloading":
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
            space.reload = "created"

    def start(self, space: Space, oid: str, built: bool) -> None:
        """Builds, stops what runs, starts the new: each as slow as it was told."""
        with self.at_work():
            self._start(space, oid, built)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Marks the time as busy; while it lasts, without an end."""
        span = [time.monotonic(), math.inf]
        self.busy.append(span)
        try:
            yield
        finally:
            span[1] = time.monotonic()

    def _start(self, space: Space, oid: str, built: bool) -> None:
        space.turn += 1
        turn = space.turn
        time.sleep(self.stale)
        first = not space.starts
        with self.lock:
            space.stage = ("BUILDING" if first else "RUNNING_BUILDING") if built else "RUNNING_APP_STARTING"
        if self.stuck and not built:
            self.stuck -= 1
            return
        time.sleep(self.build if built else self.restart)
        if self.build_fails:
            space.build_log, self.build_fails = self.build_fails, []
            space.stage, space.running = "BUILD_ERROR", oid
            return
        with self.lock:
            if oid != space.head or turn != space.turn:
                return  # a newer commit or start is on its way
            space.stage = "APP_STARTING"
            self.stop(space)
            space.starts += 1
            code = self.unpack(space, f"code{space.starts}")
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
            log = (space.folder / f"log{space.starts}").open("w")
            space.process = subprocess.Popen(
                [sys.executable, "app.py"], cwd=code, env=env, stdout=log, stderr=log, text=True, start_new_session=True
            )
        self.watch(space, oid)

    def unpack(self, space: Space, name: str) -> Path:
        """The Space's files in a folder of their own."""
        code = space.folder / name
        for path, content in space.files.items():
            (code / path).parent.mkdir(parents=True, exist_ok=True)
            (code / path).write_bytes(content)
        return code

    def run_job(self, asked: dict[str, Any]) -> Job:
        """Executes a Job's command on the files of the Space that it mounts."""
        (volume,) = asked["volumes"]
        space = self.spaces[volume["source"]]
        assert volume["revision"] == space.head and asked["expose"] == {"ports": [7860], "portsPublic": [7860]}
        code, port = self.unpack(space, f"job{len(self.jobs)}"), free_port()
        (self.folder / "site" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (self.folder / "site" / "python").chmod(0o755)
        env = {
            "PATH": f"{self.folder / 'site'}:{os.environ['PATH']}",
            "HOME": str(space.folder),
            "OMP_NUM_THREADS": "1",
        }
        env |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "RELOAD_PORT": str(free_port())}
        env |= {**asked["environment"], "GRADIO_SERVER_PORT": str(port), "DATA_DIR": str(space.folder / "jobdata")}
        command = [part.replace(volume["mountPath"], str(code)) for part in asked["command"]]
        log = (space.folder / f"joblog{len(self.jobs)}").open("w")
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, text=True, start_new_session=True)
        job = self.jobs[f"job{len(self.jobs)}"] = Job(f"job{len(self.jobs)}", asked, process, port)
        return job

    def watch(self, space: Space, oid: str) -> None:
        process, log = space.process, space.folder / f"log{space.starts}"
        if process is None:
            return  # it was stopped at once
        while process.poll() is None and space.process is process:
            try:
                httpx.get(f"http://127.0.0.1:{space.port}/healthz", timeout=5).raise_for_status()
                httpx.get(f"http://127.0.0.1:{space.reload_port}/healthz", timeout=5)
                space.stage, space.running, space.reload = "RUNNING", oid, None
                return
            except httpx.HTTPError:
                time.sleep(0.1)
        if space.process is process:
            space.log = log.read_text().splitlines()
            space.stage, space.running = "RUNTIME_ERROR", oid

    def delete_all(self) -> None:
        """As if there had never been a Space."""
        for space in self.spaces.values():
            self.stop(space)
        self.spaces.clear()

    def stop(self, space: Space) -> None:
        process, space.process = space.process, None  # so that who watches it does not take this for a failure
        if process:
            kill(process)


class Answers(BaseHTTPRequestHandler):
    """One request to the stand-in."""

    server: SpacesServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def handle_any(self) -> None:
        with self.server.at_work():
            self.handle_one()

    def handle_one(self) -> None:
        hub, parts = self.server, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(f"{self.command} {parts.path}")
        if parts.path.startswith("/api/") or "/resolve/" in parts.path:
            time.sleep(hub.latency)
        for (method, end), queue in hub.answers.items():
            if queue and method == self.command and parts.path.endswith(end):
                self.answer(*queue.pop(0))
                return
        if parts.path == "/oauth/token":
            known = json.loads(body).get("subject_token") == hub.identity is not None
            self.answer(200, {"access_token": TOKEN}) if known else self.answer(401, {"error": "unknown publisher"})
        elif parts.path.startswith("/large/"):
            self.large(parts.path.rpartition("/")[2], body)
        elif parts.path.endswith(".git/info/lfs/objects/batch"):
            self.batch(json.loads(body))
        elif not parts.path.startswith("/api/") and "/resolve/" not in parts.path:
            self.forward(parts.path, body)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
        else:
            self.hub(parts.path, parse_qs(parts.query), body)

    do_GET = do_POST = do_DELETE = do_PUT = do_HEAD = handle_any

    def hub(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        hub = self.server
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/repos/delete":
            asked = json.loads(body)
            space = hub.spaces.pop(f"{asked['organization']}/{asked['name']}", None)
            if space:
                hub.stop(space)
            self.answer(200, {}) if space else self.missing()
        elif path == "/api/spaces":
            owner = query["author"][0]
            found = [{"id": id, "createdAt": one.made} for id, one in hub.spaces.items() if id.startswith(f"{owner}/")]
            self.answer(200, found)
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif path.startswith("/api/jobs/"):
            self.job(path.split("/")[3:], body)
        elif "/resolve/" in path:
            there = path.replace("/spaces/", "/api/resolve-cache/spaces/", 1).replace("/resolve/main/", "/at/")
            self.answer(307, {}, {"Location": there})
        elif path.startswith("/api/resolve-cache/"):
            id, _, file = path.removeprefix("/api/resolve-cache/spaces/").partition("/at/")
            space = hub.spaces.get(id)
            content = space.files.get(unquote(file)) if space else None
            self.raw(200, content, "text/plain") if content is not None else self.missing()
        else:
            _, _, _, owner, name, *rest = path.split("/")
            space = hub.spaces.get(f"{owner}/{name}")
            if space is None:
                self.missing()
            else:
                self.space(space, rest, query, body)

    def create(self, asked: dict[str, Any]) -> None:
        hub, id = self.server, f"{asked['organization']}/{asked['name']}"
        if id in hub.spaces:
            self.answer(409, {"error": "You already created this space repo", "url": f"{hub.address}/spaces/{id}"})
            return
        if hub.conflicts:
            hub.conflicts -= 1
            self.answer(409, {"error": "Cannot create repo: another conflicting operation is in progress"})
            return
        given = {kind: {one["key"]: one["value"] for one in asked.get(kind, [])} for kind in ("variables", "secrets")}
        folder = hub.folder / f"space{len(list(hub.folder.iterdir()))}"
        folder.mkdir()
        hub.spaces[id] = Space(id, folder, given["variables"], given["secrets"], asked)
        self.answer(200, {"url": f"{hub.address}/spaces/{id}"})

    def space(self, space: Space, rest: list[str], query: dict[str, list[str]], body: bytes) -> None:
        hub = self.server
        match rest:
            case []:
                host = f"{hub.address}/{space.subdomain}"
                about = {"id": space.id, "sha": space.head, "sdk": "gradio", "private": True, "host": host}
                self.answer(200, about | {"subdomain": space.subdomain, "runtime": self.runtime(space)})
            case ["runtime"]:
                self.answer(200, self.runtime(space))
            case ["variables"]:
                self.answer(200, {key: {"key": key, "value": value} for key, value in space.variables.items()})
            case ["tree", "main"]:
                self.answer(200, [entry(path, content) for path, content in space.files.items()])
            case ["commits", "main"]:
                told = [
                    {"id": id, "title": title, "message": "", "date": NOW, "authors": []} for id, title in space.commits
                ]
                self.answer(200, told[::-1])
            case ["preupload", "main"]:
                found = [
                    {"path": file["path"], "uploadMode": mode(file["path"]), "shouldIgnore": False, "oid": None}
                    for file in json.loads(body)["files"]
                ]
                self.answer(200, {"files": found, "commitOid": space.head})
            case ["commit", "main"]:
                self.commit(space, body, "hot_reload" in query)
            case ["logs", kind]:
                lines = space.build_log if kind == "build" else space.log
                events = "".join(f"data: {json.dumps({'data': line, 'timestamp': NOW})}\n\n" for line in lines)
                self.raw(200, events.encode(), "text/event-stream")
            case ["restart"]:
                space.stage = "APP_STARTING"
                threading.Thread(target=hub.start, args=(space, space.head, "factory" in query), daemon=True).start()
                self.answer(200, self.runtime(space))
            case _:
                self.missing()

    def runtime(self, space: Space) -> dict[str, Any]:
        reload = {"status": space.reload, "replicaStatuses": [["r0", "ok"]]} if space.reload else None
        hardware = {"current": "cpu-basic", "requested": "cpu-basic"}
        told = {"stage": space.stage, "hardware": hardware, "sha": space.running, "hotReloading": reload}
        return {key: value for key, value in told.items() if value is not None}

    def commit(self, space: Space, body: bytes, hot: bool) -> None:
        hub = self.server
        if hub.meanwhile:
            meanwhile, hub.meanwhile = hub.meanwhile, None
            meanwhile()
        title, parent, changes = "", None, {}
        for line in body.decode().splitlines():
            part = json.loads(line)
            match part["key"]:
                case "header":
                    title, parent = part["value"]["summary"], part["value"].get("parentCommit")
                case "file":
                    changes[part["value"]["path"]] = base64.b64decode(part["value"]["content"])
                case "lfsFile":
                    changes[part["value"]["path"]] = hub.large[part["value"]["oid"]]
                case "deletedFile":
                    changes[part["value"]["path"]] = None
        with hub.lock:
            if parent and parent != space.head:
                self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
                return
            made = hub.commit(space, title, changes, hot)
        if hub.drop:
            hub.drop -= 1
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        url = f"{hub.address}/spaces/{space.id}/commit/{made}"
        self.answer(200, {"success": True, "commitOid": made, "commitUrl": url, "hookOutput": ""})

    def batch(self, asked: dict[str, Any]) -> None:
        """Where the large files of a commit are to be sent: Git LFS's basic transfer."""
        place = f"{self.server.address}/large"
        objects = [
            {**one, "actions": {"upload": {"href": f"{place}/{one['oid']}"}}, "authenticated": True}
            for one in asked["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def large(self, digest: str, body: bytes) -> None:
        assert hashlib.sha256(body).hexdigest() == digest
        self.server.large[digest] = body
        self.answer(200, {})

    def job(self, rest: list[str], body: bytes) -> None:
        hub = self.server
        match rest:
            case [_]:
                self.answer(200, self.told(hub.run_job(json.loads(body))))
            case [_, id, "cancel"]:
                kill(hub.jobs[id].process)
                hub.jobs[id].stage = "CANCELED"
                self.answer(200, {})
            case _:
                self.answer(200, self.told(hub.jobs[rest[1]]))

    def told(self, job: Job) -> dict[str, Any]:
        """A Job, at its own address; on the Hub that would be https://<id>--7860.hf.jobs."""
        status = {"stage": job.stage, "exposeUrls": [f"http://127.0.0.1:{job.port}"]}
        owner = {"id": "1", "name": "team", "type": "user"}
        return {"id": job.id, "createdAt": NOW, "owner": owner, "status": status, "flavor": job.asked["flavor"]}

    def forward(self, path: str, body: bytes) -> None:
        """To the application, or to its hot-reload server."""
        _, label, *rest = path.split("/")
        space = next((one for one in self.server.spaces.values() if label.split("--")[0] == one.subdomain), None)
        if space is None:
            self.missing()
            return
        port = space.reload_port if label.endswith("--7887") else space.port
        inner = "/".join(part for part in rest if part != "--replicas" and not part.startswith("+"))
        headers = {"Content-Type": self.headers.get("Content-Type") or "text/plain"}
        url = f"http://127.0.0.1:{port}/{inner}"
        try:
            told = httpx.request(self.command, url, content=body, headers=headers, timeout=30)
        except httpx.HTTPError:
            self.answer(503, {"error": "Your space is in error, check its status on hf.co"})
            return
        self.raw(told.status_code, told.content, told.headers.get("content-type", "text/plain"))

    def missing(self) -> None:
        self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def answer(self, code: int, value: object, headers: dict[str, str] | None = None) -> None:
        self.raw(code, json.dumps(value).encode(), "application/json", headers)

    def raw(self, code: int, text: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, said in {"Content-Type": kind, "Content-Length": str(len(text)), **(headers or {})}.items():
            self.send_header(name, said)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


def oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def mode(path: str) -> str:
    """How the Hub wants a file: what is not text goes through Git LFS."""
    return "lfs" if path.endswith((".jpg", ".png", ".safetensors", ".npz")) else "regular"


def entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as a tree lists it: of a large one the name is its pointer's."""
    told = {"type": "file", "path": path, "size": len(content)}
    if mode(path) == "regular":
        return {**told, "oid": oid(content)}
    digest = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n".encode()
    return {**told, "oid": oid(pointer), "lfs": {"oid": digest, "size": len(content), "pointerSize": len(pointer)}}


@contextmanager
def spaces_server(folder: Path, **delays: float) -> Iterator[SpacesServer]:
    """Runs a stand-in, and ends its Spaces with it."""
    hub = SpacesServer(folder, **delays)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        for space in hub.spaces.values():
            hub.stop(space)
        for job in hub.jobs.values():
            kill(job.process)
        hub.shutdown()
        hub.server_close()
