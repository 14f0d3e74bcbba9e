"""A small git repository, a simulated Hub, and a deployer, for the tests of previews.

The application is a small program with the two ports of a Gradio Space, so that it starts at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from bench.spaces_server import TOKEN, Space, SpacesServer
from previews.deploy import Deployer, DeployOptions, DeployResult, preview_target
from previews.hub import Hub

APP = '''"""A small application."""
import json, os, re, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

def space_page(name, commit):
    return commit

demo = space_page(__name__, "")

class Handler(BaseHTTPRequestHandler):
    commit = demo
    def do_GET(self):
        self.reply({"revision": Handler.commit})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "contents" in body:
            stamp = re.search(r'space_page\\(__name__, "(\\w*)"', body["contents"])
            if stamp and not body["contents"].endswith("# reload has no effect\\n"):
                Handler.commit = stamp[1]
            self.reply({"res": {"status": "created", "reloadId": body["reloadId"]}})
        else:
            self.reply({"data": {"kind": "ui", "updated": True}}, b"data: ")
    def reply(self, value, prefix=b""):
        text = prefix + json.dumps(value).encode() + b"\\n\\n"
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def log_message(self, *_):
        pass

if __name__ == "__main__":
    print("starting")
    import part
    ports = int(os.environ["GRADIO_SERVER_PORT"]), int(os.environ["RELOAD_PORT"])
    servers = [ThreadingHTTPServer(("127.0.0.1", port), Handler) for port in ports]
    threading.Thread(target=servers[1].serve_forever, daemon=True).start()
    servers[0].serve_forever()
'''
ROOT = Path(__file__).resolve().parents[2]
AUTH_HEADERS = {"Authorization": f"Bearer {TOKEN}"}
README = "---\ntitle: Small\nsdk: gradio\n---\n# Small\n"


class PreviewWorld:
    """A repository, a simulated Hub, and a deployer between them.

    Attributes:
        folder: Working tree of the repository.
        hub: The simulated Hub.
        lines: Progress lines of the deployer.
        target: Preview Space of branch "x".
    """

    def __init__(self, folder: Path, hub: SpacesServer) -> None:
        self.folder, self.hub = folder, hub
        self.lines: list[str] = []
        folder.mkdir()
        for name, text in (("app.py", APP), ("part.py", '"""A part."""\n'), ("README.md", README)):
            (folder / name).write_text(text)
        self.git("init", "-q", "-b", "x")
        self.target = preview_target("team", "small", "x")

    @property
    def space(self) -> Space:
        """The preview Space of branch "x"."""
        return self.hub.spaces[self.target.space]

    def git(self, *arguments: str) -> str:
        """Run git and return its output."""
        command = ["git", "-c", "user.name=T", "-c", "user.email=t@example.org", *arguments]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=True).stdout.strip()

    def commit(self, **modules: str) -> str:
        """Write Python modules by name, commit all changes, and return the new commit."""
        for name, text in modules.items():
            (self.folder / f"{name}.py").write_text(text)
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", "a change")
        return self.git("rev-parse", "HEAD")

    def deploy(self, sha: str = "HEAD", token: str = TOKEN, **options: Any) -> DeployResult:
        """Deploy a commit to the preview Space in this process."""
        deploy_options = DeployOptions(**{"poll": 0.05, "timeout": 30.0, **options})
        hub = Hub(token, self.lines.append)
        return Deployer(hub, self.folder, deploy_options, self.lines.append).deploy(self.target, sha)

    def deploy_first(self) -> str:
        """Commit, deploy, and return the commit that is live."""
        sha = self.commit()
        self.deploy(sha)
        assert self.live_commit() == sha
        return sha

    def live_commit(self) -> str:
        """Return the commit that the Space's application reports."""
        return httpx.get(f"{self.hub.address}/{self.space.subdomain}/healthz").json()["revision"]

    def start_cli(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `python -m previews` in a process."""
        env = {"PATH": os.environ["PATH"], "HOME": str(self.folder.parent), "HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
        env |= {"HF_ENDPOINT": self.hub.address, "HF_HUB_DISABLE_XET": "1", "PREVIEW_OWNER": "team"}
        env |= {"PREVIEW_APP": "small", "STATE_BUCKET_TOKEN": os.environ.get("STATE_BUCKET_TOKEN", "")}
        env |= {"PYTHONFAULTHANDLER": "1"}
        poll = ["--poll", "0.05"] if arguments[0] in ("deploy", "promote", "rollback") else []
        command = [sys.executable, "-m", "previews", *arguments, *poll]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, env=env, stdout=pipe, stderr=pipe, text=True)

    def cli(self, *arguments: str) -> str:
        """Run `python -m previews`, assert success, and return stdout."""
        process = self.start_cli(*arguments)
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0 and TOKEN not in stdout + stderr, stdout + stderr
        return stdout

    def cli_error(self, code: int, *arguments: str) -> str:
        """Run `python -m previews`, assert the exit code, and return stdout and stderr."""
        process = self.start_cli(*arguments)
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == code and TOKEN not in stdout + stderr, (process.returncode, stdout + stderr)
        return stdout + stderr

    def fail_requests(self, method: str, path_end: str, *statuses: int, **headers: str) -> None:
        """Make the Hub's next responses to a request errors, one for each status."""
        body = {"error": f"no, {TOKEN}"}
        self.hub.responses[method, path_end] = [(status, body, headers) for status in statuses]
