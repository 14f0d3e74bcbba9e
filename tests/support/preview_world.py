"""A small world for the deployer: a repository with a small application, and a stand-in for the Hub.

The application is a small program with the two ports of a Gradio Space: it starts at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from bench.spaces_server import TOKEN, Space, SpacesServer
from previews.deploy import Deployer, Options, Result, preview
from previews.hub import Hub

APP = '''"""A small application."""
import json, os, re, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

def stamped(name, commit):
    return commit

demo = stamped(__name__, "")

class Answers(BaseHTTPRequestHandler):
    commit = demo
    def do_GET(self):
        self.give({"revision": Answers.commit})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "contents" in body:
            found = re.search(r'stamped\\(__name__, "(\\w*)"', body["contents"])
            if found and not body["contents"].endswith("# shows nothing\\n"):
                Answers.commit = found[1]
            self.give({"res": {"status": "created", "reloadId": body["reloadId"]}})
        else:
            self.give({"data": {"kind": "ui", "updated": True}}, b"data: ")
    def give(self, value, before=b""):
        text = before + json.dumps(value).encode() + b"\\n\\n"
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
    servers = [ThreadingHTTPServer(("127.0.0.1", port), Answers) for port in ports]
    threading.Thread(target=servers[1].serve_forever, daemon=True).start()
    servers[0].serve_forever()
'''
ROOT = Path(__file__).resolve().parents[2]
PROOF = {"Authorization": f"Bearer {TOKEN}"}
README = "---\ntitle: Small\nsdk: gradio\n---\n# Small\n"


class World:
    """A repository, a stand-in for the Hub, and a deployer between them."""

    def __init__(self, folder: Path, hub: SpacesServer) -> None:
        self.folder, self.hub, self.lines = folder, hub, []
        folder.mkdir()
        for name, text in (("app.py", APP), ("part.py", '"""A part."""\n'), ("README.md", README)):
            (folder / name).write_text(text)
        self.git("init", "-q", "-b", "x")
        self.target = preview("team", "small", "x")

    def git(self, *arguments: str) -> str:
        command = ["git", "-c", "user.name=T", "-c", "user.email=t@example.org", *arguments]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=True).stdout.strip()

    def commit(self, **files: str) -> str:
        for name, text in files.items():
            (self.folder / f"{name}.py").write_text(text)
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", "a change")
        return self.git("rev-parse", "HEAD")

    def deploy(self, sha: str = "HEAD", token: str = TOKEN, **options: Any) -> Result:
        hub = Hub(token, self.lines.append)
        options = {"poll": 0.05, "timeout": 30.0, **options}
        return Deployer(hub, self.folder, Options(**options), self.lines.append).deploy(self.target, sha)

    @property
    def space(self) -> Space:
        return self.hub.spaces[self.target.space]

    def runs(self) -> str:
        return httpx.get(f"{self.hub.address}/{self.space.subdomain}/healthz").json()["revision"]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The command, in a process of its own."""
        env = {"PATH": os.environ["PATH"], "HOME": str(self.folder.parent), "HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
        env |= {"HF_ENDPOINT": self.hub.address, "HF_HUB_DISABLE_XET": "1", "PREVIEW_OWNER": "team"}
        env |= {"PREVIEW_APP": "small"}
        command = [sys.executable, "-m", "previews", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, env=env, stdout=pipe, stderr=pipe, text=True)

    def cli(self, *arguments: str) -> str:
        """What the command prints, when it succeeds."""
        running = self.start(*arguments)
        out, said = running.communicate(timeout=120)
        assert running.returncode == 0 and TOKEN not in out + said, out + said
        return out

    def failure(self, code: int, *arguments: str) -> str:
        """What the command says, when it fails as it should."""
        running = self.start(*arguments)
        out, said = running.communicate(timeout=120)
        assert running.returncode == code and TOKEN not in out + said, (running.returncode, out + said)
        return out + said

    def refuse(self, method: str, end: str, *answers: int, **headers: str) -> None:
        said = {"error": f"no, {TOKEN}"}
        self.hub.answers[method, end] = [(status, said, headers) for status in answers]
