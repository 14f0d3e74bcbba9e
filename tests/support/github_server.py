"""A stand-in for GitHub's API, over real HTTP, and a runner that executes a job of a workflow. They are no GitHub.

Of the API: statuses, pull requests of a commit, comments, and the identity tokens of a job. Of a runner: expressions,
conditions, environments, outputs, and `run` steps in bash as GitHub runs them; `uses` steps are played (checkout is a
clone of a local repository, setup-python nothing), and `python -m pip` installs nothing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"
TOKEN, IDENTITY = "ghs_workflowworkflowworkflow", "an-identity"
BOT, PERSON = {"type": "Bot"}, {"type": "User"}


class StandInGitHub(ThreadingHTTPServer):
    """One repository. pulls: of any commit. page: how many entries a list gives at a time."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.comments: list[dict[str, Any]] = [{"id": n, "body": "a person's", "user": PERSON} for n in range(120)]
        self.statuses: dict[str, list[dict[str, Any]]] = {}
        self.pulls: list[dict[str, Any]] = [{"number": 7, "state": "open"}, {"number": 3, "state": "closed"}]
        self.asked: list[str] = []
        self.refuse = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    """One request to the stand-in."""

    server: StandInGitHub

    def any(self) -> None:
        hub, parts = self.server, urlsplit(self.path)
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        hub.asked.append(f"{self.command} {parts.path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"message": "Bad credentials"})
        elif hub.refuse:
            self.answer(hub.refuse, {"message": f"no, {TOKEN}"})
        else:
            self.answer(*self.done(parts.path.split("/")[1:], body, int(parse_qs(parts.query).get("page", ["1"])[0])))

    def done(self, path: list[str], body: dict[str, Any], page: int) -> tuple[int, Any]:
        hub = self.server
        match self.command, path:
            case "GET", ["identity"]:
                return 200, {"value": IDENTITY}
            case "POST", ["repos", "o", "r", "statuses", sha]:
                hub.statuses.setdefault(sha, []).insert(0, body)
                return 201, body
            case "GET", ["repos", "o", "r", "commits", sha, "statuses"]:
                return 200, hub.statuses.get(sha, [])[(page - 1) * 100 : page * 100]
            case "GET", ["repos", "o", "r", "commits", _, "pulls"]:
                return 200, hub.pulls[(page - 1) * 100 : page * 100]
            case "GET", ["repos", "o", "r", "issues", "7", "comments"]:
                return 200, hub.comments[(page - 1) * 100 : page * 100]
            case "POST", ["repos", "o", "r", "issues", "7", "comments"]:
                hub.comments.append({"id": 1000 + len(hub.comments), "user": BOT, **body})
                return 201, hub.comments[-1]
            case "PATCH", ["repos", "o", "r", "issues", "comments", id]:
                next(one for one in hub.comments if one["id"] == int(id)).update(body)
                return 200, {}
        return 404, {"message": "Not Found"}

    do_GET = do_POST = do_PATCH = any

    def answer(self, code: int, value: Any) -> None:
        text = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@contextmanager
def stand_in_github() -> Iterator[StandInGitHub]:
    """Runs a stand-in."""
    server = StandInGitHub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


# ── The runner ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Done:
    """What came of a job: success, failure or skipped, its outputs and summary, and all that its steps printed."""

    result: str
    outputs: dict[str, str] = field(default_factory=dict)
    url: str = ""
    summary: str = ""
    printed: str = ""


def run_job(
    workflow: str, job: str, folder: Path, repository: Path, contexts: dict[str, Any], environment: Mapping[str, str]
) -> Done:
    """Executes a job in a folder of its own, on a clone of a repository.

    contexts: github, vars, secrets and needs, as expressions see them. environment: what the runner itself gives.
    """
    asked = yaml.safe_load((WORKFLOWS / workflow).read_text())["jobs"][job]
    if "if" in asked and not evaluate(str(asked["if"]), contexts):
        return Done("skipped")
    workspace, done, steps = folder / "workspace", Done("success"), {}
    tools = _tools(folder)
    base = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(folder), "PYTHONPATH": str(ROOT), **environment}
    base["GITHUB_STEP_SUMMARY"] = str(folder / "summary")
    for step in asked["steps"]:
        here = {**contexts, "steps": steps}
        if done.result == "failure" and "always()" not in str(step.get("if", "")):
            continue
        if "if" in step and not evaluate(str(step["if"]), here):
            continue
        if "uses" in step:
            _play(step["uses"], repository, workspace, contexts)
            continue
        env = {name: fill(str(value), here) for name, value in step.get("env", {}).items()}
        env["GITHUB_OUTPUT"] = str(folder / f"output{len(steps)}")
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        ran = subprocess.run(command, cwd=workspace, env={**base, **env}, capture_output=True, text=True, timeout=200)
        done.printed += ran.stdout + ran.stderr
        steps[step.get("id") or str(len(steps))] = {"outputs": _outputs(Path(env["GITHUB_OUTPUT"]))}
        if ran.returncode:
            done.result = "failure"
    here = {**contexts, "steps": steps}
    done.outputs = {name: fill(value, here) for name, value in asked.get("outputs", {}).items()}
    if isinstance(asked.get("environment"), dict):
        done.url = fill(asked["environment"].get("url", ""), here)
    summary = folder / "summary"
    done.summary = summary.read_text() if summary.exists() else ""
    return done


def fill(text: str, contexts: Mapping[str, Any]) -> str:
    """A text with its expressions replaced by their values."""
    return re.sub(r"\$\{\{(.*?)\}\}", lambda found: str(evaluate(found[1], contexts)), text)


def evaluate(text: str, contexts: Mapping[str, Any]) -> Any:
    """An expression of names, strings, comparisons and logic."""

    def translated(found: re.Match[str]) -> str:
        token = found[0]
        if token in ("&&", "||", "!"):
            return {"&&": " and ", "||": " or ", "!": " not "}[token]
        if token in ("==", "!="):
            return token
        if token == "always()":
            return "True"
        if token.startswith("'"):
            return repr(token[1:-1])
        value: Any = contexts
        for part in token.split("."):
            value = value.get(part, "") if isinstance(value, Mapping) else ""
        return repr(value)

    tokens = r"'[^']*'|always\(\)|[A-Za-z_][\w.-]*|&&|\|\||==|!=|!"
    return eval(re.sub(tokens, translated, text.strip()), {"__builtins__": {}})


def _play(action: str, repository: Path, workspace: Path, contexts: Mapping[str, Any]) -> None:
    name = action.partition("@")[0]
    if name == "actions/checkout":
        subprocess.run(["git", "clone", "-q", str(repository), str(workspace)], check=True)
        subprocess.run(["git", "-C", str(workspace), "fetch", "-q", "origin"], check=True)
        command = ["git", "-C", str(workspace), "checkout", "-q", contexts["github"]["sha"]]
        subprocess.run(command, check=True, capture_output=True)
    else:
        assert name == "actions/setup-python", f"the runner cannot play {action}"


def _tools(folder: Path) -> Path:
    """A python that is this one, but for pip."""
    tools = folder / "tools"
    tools.mkdir(parents=True)
    script = f'#!/bin/sh\n[ "$1 $2" = "-m pip" ] && exit 0\nexec {sys.executable} "$@"\n'
    (tools / "python").write_text(script)
    (tools / "python").chmod(0o755)
    return tools


def _outputs(file: Path) -> dict[str, str]:
    lines = file.read_text().splitlines() if file.exists() else []
    return dict(line.split("=", 1) for line in lines)
