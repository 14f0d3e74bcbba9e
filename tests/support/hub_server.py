"""Fake of the Hugging Face Hub and of Hugging Face Jobs over HTTP.

Accounts, prices and a job's machine are simulated. A job's command is executed as a local process, with the mounted
path replaced by the folder of uploaded files, and with a `pip` that installs nothing.
"""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

NOW = "2026-11-23T12:00:00.000Z"
COMMIT = "1" * 40
TOKEN = "hf_secretsecretsecretsecretsecret12"
HARDWARE = [
    {
        "name": "l4x1",
        "prettyName": "1x Nvidia L4",
        "cpu": "8 vCPU",
        "ram": "30 GB",
        "ephemeralStorage": "400 GB",
        "accelerator": {"type": "gpu", "model": "L4", "quantity": "1", "vram": "24 GB", "manufacturer": "Nvidia"},
        "unitCostMicroUSD": 13333,
        "unitCostUSD": 0.013333,
        "unitLabel": "minute",
    },
    {
        "name": "cpu-basic",
        "prettyName": "CPU Basic",
        "cpu": "2 vCPU",
        "ram": "16 GB",
        "ephemeralStorage": "20 GB",
        "accelerator": None,
        "unitCostMicroUSD": 167,
        "unitCostUSD": 0.000167,
        "unitLabel": "minute",
    },
]


class HubServer(ThreadingHTTPServer):
    """State of the server: uploaded files and jobs.

    Attributes:
        files: Folder of the uploaded files, of all repositories together.
        created: Body of the last request that created a repository.
        refuse: HTTP error by the beginning of the paths that it is returned for.
        dropped_streams: Number of log streams to break off after three lines.
        job_log: What jobs print instead of being executed; `job_stage` is how they then end.
        job_specs: Specifications of the submitted jobs.
        jobs: Jobs by id.
        paths: Paths of all requests.
        tokens: Authorization headers of all requests.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.files = folder / "files"
        self.files.mkdir(parents=True)
        self.created: dict[str, Any] = {}
        self.refuse: dict[str, int] = {}
        self.dropped_streams = 0
        self.job_log: list[str] | None = None
        self.job_stage = "COMPLETED"
        self.job_specs: list[dict[str, Any]] = []
        self.jobs: dict[str, JobProcess] = {}
        self.paths: list[str] = []
        self.tokens: set[str] = set()

    @property
    def address(self) -> str:
        """The server's URL."""
        return f"http://127.0.0.1:{self.server_port}"

    def describe(self, file: Path) -> dict[str, Any]:
        """Return an uploaded file as the Hub's API describes it."""
        name = file.relative_to(self.files).as_posix()
        return {"type": "file", "path": name, "size": file.stat().st_size, "oid": COMMIT}

    def start_job(self, spec: dict[str, Any]) -> JobProcess:
        """Start a job by its specification."""
        self.job_specs.append(spec)
        job = JobProcess(f"job{len(self.jobs)}", spec, self)
        self.jobs[job.id] = job
        return job


class JobProcess:
    """A job: its log so far, its stage, and its process if it is executed."""

    def __init__(self, id: str, spec: dict[str, Any], hub: HubServer) -> None:
        self.id, self.spec, self.log = id, spec, list(hub.job_log or [])
        self.process: subprocess.Popen[str] | None = None
        self.stage = hub.job_stage if hub.job_log is not None else "RUNNING"
        if hub.job_log is None:
            self.process = self._execute(hub)
            threading.Thread(target=self._read_output, daemon=True).start()

    def _execute(self, hub: HubServer) -> subprocess.Popen[str]:
        mount = self.spec["volumes"][0]["mountPath"]
        tools = hub.folder / "tools"
        tools.mkdir(exist_ok=True)
        for name, script in (("pip", "#!/bin/sh\n"), ("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')):
            (tools / name).write_text(script)
            (tools / name).chmod(0o755)
        env = {"PATH": f"{tools}:{os.environ['PATH']}", "HF_ENDPOINT": hub.address, "HOME": str(hub.folder)}
        env |= {"OMP_NUM_THREADS": "1", **self.spec["environment"], **self.spec["secrets"]}
        return subprocess.Popen(
            [part.replace(mount, str(hub.files)) for part in self.spec["command"]],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _read_output(self) -> None:
        assert self.process and self.process.stdout
        for line in self.process.stdout:
            self.log.append(line.rstrip("\n"))
        code = self.process.wait()
        if self.stage == "RUNNING":
            self.stage = "ERROR" if code else "COMPLETED"

    def cancel(self) -> None:
        """End the job at once."""
        self.stage = "CANCELED"
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)

    def description(self) -> dict[str, Any]:
        """Return the job as the Hub's API describes it."""
        return {
            "id": self.id,
            "createdAt": NOW,
            "dockerImage": self.spec.get("dockerImage"),
            "status": {"stage": self.stage, "message": "Out of memory" if self.stage == "ERROR" else None},
            "owner": {"id": "1", "name": "me", "type": "user"},
            "flavor": self.spec["flavor"],
            "command": self.spec["command"],
            "secrets": {},
        }


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: HubServer

    def do_POST(self) -> None:
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.record()
        if self.refused(path):
            return
        if path.startswith("/api/jobs/") and path.endswith("/cancel"):
            hub.jobs[path.split("/")[4]].cancel()
            self.answer(200, {})
        elif path.startswith("/api/jobs/"):
            self.answer(200, hub.start_job(json.loads(body)).description())
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            self.answer(200, {"files": files, "commitOid": COMMIT})
        elif "/paths-info/" in path:
            names = parse_qs(body.decode()).get("paths", [])
            self.answer(200, [hub.describe(hub.files / name) for name in names if (hub.files / name).is_file()])
        elif "/commit/" in path:
            self.store_files(body)
            _, _, kind, owner, name, *_ = path.split("/")
            url = f"{self.repo_url(kind, owner, name)}/commit/{COMMIT}"
            self.answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        elif path.startswith("/api/repos/create"):
            hub.created = json.loads(body)
            kind = f"{hub.created.get('type') or 'model'}s"
            url = self.repo_url(kind, hub.created.get("organization") or "me", hub.created["name"])
            self.answer(200, {**hub.created, "url": url})
        else:
            self.answer(200, {"errors": [], "warnings": []})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, self.record()
        if self.refused(path):
            return
        if path == "/api/whoami-v2":
            self.answer(200, {"type": "user", "id": "1", "name": "me", "orgs": []})
        elif path == "/api/jobs/hardware":
            self.answer(200, HARDWARE)
        elif path.startswith("/api/jobs/") and path.endswith("/logs"):
            self.stream_log(hub.jobs[path.split("/")[4]])
        elif path.startswith("/api/jobs/"):
            self.answer(200, hub.jobs[path.split("/")[4]].description())
        elif "/tree/" in path:
            files = [file for file in sorted(hub.files.rglob("*")) if file.is_file()]
            self.answer(200, [hub.describe(file) for file in files])
        elif "/resolve/" in path:
            self.send_file(hub.files / unquote(path.split("/resolve/", 1)[1].split("/", 1)[1]))
        else:
            self.answer(200, {"id": "me/playground-runs", "sha": COMMIT, "siblings": [], "private": True})

    def record(self) -> str:
        """Record path and token of the request; return the path."""
        path = urlsplit(self.path).path
        self.server.paths.append(path)
        self.server.tokens.add(self.headers.get("Authorization", ""))
        return path

    def refused(self, path: str) -> bool:
        """Answer with an error, which echoes the token, if the path is to be refused."""
        code = next((code for start, code in self.server.refuse.items() if path.startswith(start)), 0)
        if code:
            self.answer(code, {"error": f"no, {self.headers.get('Authorization')}"})
        return bool(code)

    def repo_url(self, kind: str, owner: str, name: str) -> str:
        prefix = "" if kind == "models" else f"/{kind}"
        return f"{self.server.address}{prefix}/{owner}/{name}"

    def store_files(self, body: bytes) -> None:
        """Store the files of a commit."""
        for line in body.decode().splitlines():
            operation = json.loads(line)
            if operation["key"] == "file":
                file = self.server.files / operation["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(operation["value"]["content"]))

    def stream_log(self, job: JobProcess) -> None:
        """Send a job's log as server-sent events, from its beginning until the job has ended."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        drop = self.server.dropped_streams > 0
        self.server.dropped_streams = max(0, self.server.dropped_streams - 1)
        sent = 0
        while True:
            ended = job.stage != "RUNNING"
            while sent < len(job.log):
                event = {"data": job.log[sent], "timestamp": NOW}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                sent += 1
                if drop and sent == 3:
                    self.close_connection = True
                    return
            if ended:
                return
            time.sleep(0.05)

    def send_file(self, file: Path) -> None:
        """Send an uploaded file."""
        if not file.is_file():
            self.answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
            return
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(part[1]), int(part[2]) + 1) if part else (0, file.stat().st_size)
        with open(file, "rb") as content:
            content.seek(start)
            data = content.read(end - start)
        self.send_response(206 if part else 200)
        for name, value in (("ETag", f'"{len(data)}-{file.name}"'), ("X-Repo-Commit", COMMIT)):
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def answer(self, code: int, payload: object, headers: dict[str, str] | None = None) -> None:
        """Send a JSON response."""
        body = json.dumps(payload).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def run_hub_server(folder: Path) -> Iterator[HubServer]:
    """Serve within the context, with files in `folder`; jobs that are still running end with it."""
    hub = HubServer(folder)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        for job in hub.jobs.values():
            if job.process and job.process.poll() is None:
                job.cancel()
        hub.shutdown()
        hub.server_close()
