"""A stand-in for the Hugging Face Hub and its Jobs, over real HTTP. It is no Hub.

Simulated: accounts, prices, and the machine of a job. A job's command is really executed, as a process here, with the
mounted path replaced by a folder that holds the repository's files, and with a `pip` that installs nothing.
"""

from __future__ import annotations

import base64
import json
import os
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
from urllib.parse import unquote, urlsplit

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


class StandInHub(ThreadingHTTPServer):
    """Files of one repository, and jobs. What it shall do wrong:

    refuse: paths that begin with a key are answered with its number. drop: how many log streams break off after three
    lines. lines: what a job prints instead of being executed, and `stage` how it ends then.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files = folder / "files"
        self.files.mkdir(parents=True)
        self.folder = folder
        self.refuse: dict[str, int] = {}
        self.drop = 0
        self.lines: list[str] | None = None
        self.stage = "COMPLETED"
        self.asked: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.tokens: set[str] = set()
        self.jobs: dict[str, PlayedJob] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def start_job(self, spec: dict[str, Any]) -> PlayedJob:
        """Begins a job as its specification says."""
        self.asked.append(spec)
        job = PlayedJob(f"job{len(self.jobs)}", spec, self)
        self.jobs[job.id] = job
        return job


class PlayedJob:
    """A job: its log so far, and its stage."""

    def __init__(self, id: str, spec: dict[str, Any], hub: StandInHub) -> None:
        self.id, self.spec, self.log = id, spec, list(hub.lines or [])
        self.process: subprocess.Popen[str] | None = None
        self.stage = hub.stage if hub.lines is not None else "RUNNING"
        if hub.lines is None:
            self.process = self._execute(hub)
            threading.Thread(target=self._read, daemon=True).start()

    def _execute(self, hub: StandInHub) -> subprocess.Popen[str]:
        mount = self.spec["volumes"][0]["mountPath"]
        tools = hub.folder / "tools"
        tools.mkdir(exist_ok=True)
        for name, text in (("pip", "#!/bin/sh\n"), ("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')):
            (tools / name).write_text(text)
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

    def _read(self) -> None:
        assert self.process and self.process.stdout
        for line in self.process.stdout:
            self.log.append(line.rstrip("\n"))
        code = self.process.wait()
        if self.stage == "RUNNING":
            self.stage = "ERROR" if code else "COMPLETED"

    def cancel(self) -> None:
        """Ends it at once."""
        self.stage = "CANCELED"
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)

    def told(self, hub: StandInHub) -> dict[str, Any]:
        """As the Hub tells of it."""
        owner = {"id": "1", "name": "me", "type": "user"}
        status = {"stage": self.stage, "message": "Out of memory" if self.stage == "ERROR" else None}
        told = {"id": self.id, "createdAt": NOW, "dockerImage": self.spec.get("dockerImage"), "status": status}
        return told | {"owner": owner, "flavor": self.spec["flavor"], "command": self.spec["command"], "secrets": {}}


class Answers(BaseHTTPRequestHandler):
    """One request to the stand-in."""

    server: StandInHub

    def do_POST(self) -> None:
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.seen()
        if self.refused(path):
            return
        if path.startswith("/api/jobs/") and path.endswith("/cancel"):
            hub.jobs[path.split("/")[4]].cancel()
            self.answer(200, {})
        elif path.startswith("/api/jobs/"):
            self.answer(200, hub.start_job(json.loads(body)).told(hub))
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            self.answer(200, {"files": files, "commitOid": COMMIT})
        elif "/commit/" in path:
            self.keep(body)
            url = f"{hub.address}/datasets/me/playground-runs/commit/{COMMIT}"
            self.answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        elif path.startswith("/api/repos/create"):
            self.answer(200, {"url": f"{hub.address}/datasets/me/playground-runs", **json.loads(body)})
        else:
            self.answer(200, {"errors": [], "warnings": []})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, self.seen()
        if self.refused(path):
            return
        if path == "/api/whoami-v2":
            self.answer(200, {"type": "user", "id": "1", "name": "me", "orgs": []})
        elif path == "/api/jobs/hardware":
            self.answer(200, HARDWARE)
        elif path.startswith("/api/jobs/") and path.endswith("/logs"):
            self.stream(hub.jobs[path.split("/")[4]])
        elif path.startswith("/api/jobs/"):
            self.answer(200, hub.jobs[path.split("/")[4]].told(hub))
        elif "/tree/" in path:
            found = [one for one in sorted(hub.files.rglob("*")) if one.is_file()]
            names = [one.relative_to(hub.files).as_posix() for one in found]
            entries = [{"type": "file", "path": name, "size": 1, "oid": COMMIT} for name in names]
            self.answer(200, entries)
        elif "/resolve/" in path:
            self.give(hub.files / unquote(path.split("/resolve/", 1)[1].split("/", 1)[1]))
        else:
            self.answer(200, {"id": "me/playground-runs", "sha": COMMIT, "siblings": [], "private": True})

    def seen(self) -> str:
        path = urlsplit(self.path).path
        self.server.paths.append(path)
        self.server.tokens.add(self.headers.get("Authorization", ""))
        return path

    def refused(self, path: str) -> bool:
        code = next((code for start, code in self.server.refuse.items() if path.startswith(start)), 0)
        if code:
            self.answer(code, {"error": f"no, {self.headers.get('Authorization')}"})
        return bool(code)

    def keep(self, body: bytes) -> None:
        for line in body.decode().splitlines():
            part = json.loads(line)
            if part["key"] == "file":
                file = self.server.files / part["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(part["value"]["content"]))

    def stream(self, job: PlayedJob) -> None:
        """A job's log as server-sent events, from its beginning, until the job has ended."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        breaks_off, self.server.drop = self.server.drop > 0, max(0, self.server.drop - 1)
        place = 0
        while True:
            ended = job.stage != "RUNNING"
            while place < len(job.log):
                event = {"data": job.log[place], "timestamp": NOW}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                place += 1
                if breaks_off and place == 3:
                    self.close_connection = True
                    return
            if ended:
                return
            time.sleep(0.05)

    def give(self, file: Path) -> None:
        if not file.is_file():
            self.answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
            return
        data = file.read_bytes()
        self.send_response(200)
        for name, value in (("ETag", f'"{len(data)}-{file.name}"'), ("X-Repo-Commit", COMMIT)):
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def answer(self, code: int, value: object, headers: dict[str, str] | None = None) -> None:
        text = json.dumps(value).encode()
        self.send_response(code)
        for name, said in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, said)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@contextmanager
def stand_in_hub(folder: Path) -> Iterator[StandInHub]:
    """Runs a stand-in with its files in a folder."""
    hub = StandInHub(folder)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        for job in hub.jobs.values():
            if job.process and job.process.poll() is None:
                job.cancel()
        hub.shutdown()
        hub.server_close()
