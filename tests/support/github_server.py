"""A simulated GitHub API over HTTP, and a runner that executes the jobs of a workflow.

The API has statuses, the pull requests of a commit, comments, and the identity tokens of jobs. The runner evaluates
expressions and conditions, and executes `run` steps in bash with outputs and summary as GitHub does. `uses` steps are
replaced: checkout clones a local repository, setup-python does nothing; `python -m pip` installs nothing.
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
BOT, USER = {"type": "Bot"}, {"type": "User"}


class GitHubServer(ThreadingHTTPServer):
    """The API of one repository, o/r.

    Attributes:
        comments: Comments of pull request 7; 120 of users at first.
        statuses: Statuses by commit, newest first.
        pulls: Pull requests that contain any commit.
        requests: Methods and paths of all requests.
        error_status: Status with which every request fails, or 0.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), RequestHandler)
        self.comments: list[dict[str, Any]] = [{"id": n, "body": "a user's", "user": USER} for n in range(120)]
        self.statuses: dict[str, list[dict[str, Any]]] = {}
        self.pulls: list[dict[str, Any]] = [{"number": 7, "state": "open"}, {"number": 3, "state": "closed"}]
        self.requests: list[str] = []
        self.error_status = 0

    @property
    def address(self) -> str:
        """The URL of the API."""
        return f"http://127.0.0.1:{self.server_port}"


class RequestHandler(BaseHTTPRequestHandler):
    """Handles one request to the simulated API."""

    server: GitHubServer

    def handle_request(self) -> None:
        """Check the token, and route the request."""
        github, parts = self.server, urlsplit(self.path)
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        github.requests.append(f"{self.command} {parts.path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.respond(401, {"message": "Bad credentials"})
        elif github.error_status:
            self.respond(github.error_status, {"message": f"no, {TOKEN}"})
        else:
            page = int(parse_qs(parts.query).get("page", ["1"])[0])
            self.respond(*self.route(parts.path.split("/")[1:], body, slice((page - 1) * 100, page * 100)))

    def route(self, path: list[str], body: dict[str, Any], page: slice) -> tuple[int, Any]:
        """Return status and body of the response."""
        github = self.server
        match self.command, path:
            case "GET", ["identity"]:
                return 200, {"value": IDENTITY}
            case "POST", ["repos", "o", "r", "statuses", sha]:
                github.statuses.setdefault(sha, []).insert(0, body)
                return 201, body
            case "GET", ["repos", "o", "r", "commits", sha, "statuses"]:
                return 200, github.statuses.get(sha, [])[page]
            case "GET", ["repos", "o", "r", "commits", _, "pulls"]:
                return 200, github.pulls[page]
            case "GET", ["repos", "o", "r", "issues", "7", "comments"]:
                return 200, github.comments[page]
            case "POST", ["repos", "o", "r", "issues", "7", "comments"]:
                github.comments.append({"id": 1000 + len(github.comments), "user": BOT, **body})
                return 201, github.comments[-1]
            case "PATCH", ["repos", "o", "r", "issues", "comments", id]:
                next(comment for comment in github.comments if comment["id"] == int(id)).update(body)
                return 200, {}
        return 404, {"message": "Not Found"}

    do_GET = do_POST = do_PATCH = handle_request  # noqa: N815

    def respond(self, status: int, value: Any) -> None:
        """Send a JSON response."""
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def github_server() -> Iterator[GitHubServer]:
    """Run a simulated GitHub API."""
    server = GitHubServer()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


# ── Runner ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class JobResult:
    """Result of a workflow job.

    Attributes:
        result: "success", "failure" or "skipped".
        outputs: Outputs of the job.
        url: URL of the job's environment.
        summary: Job summary in Markdown.
        log: Everything that the steps printed.
    """

    result: str
    outputs: dict[str, str] = field(default_factory=dict)
    url: str = ""
    summary: str = ""
    log: str = ""


def run_job(
    workflow: str, job: str, folder: Path, repository: Path, contexts: dict[str, Any], environment: Mapping[str, str]
) -> JobResult:
    """Execute a workflow job on a clone of a repository.

    Args:
        workflow: File name of the workflow.
        job: Name of the job.
        folder: Folder for the job's files.
        repository: The repository to clone.
        contexts: Contexts of expressions: github, vars, secrets and needs.
        environment: Environment variables that the runner sets.
    """
    spec = yaml.safe_load((WORKFLOWS / workflow).read_text())["jobs"][job]
    if "if" in spec and not evaluate(str(spec["if"]), contexts):
        return JobResult("skipped")
    workspace, result = folder / "workspace", JobResult("success")
    steps: dict[str, dict[str, Any]] = {}
    contexts = {**contexts, "steps": steps}
    summary = folder / "summary"
    job_env = {"PATH": f"{_python_without_pip(folder)}:{os.environ['PATH']}", "HOME": str(folder)}
    job_env |= {"PYTHONPATH": str(ROOT), "GITHUB_STEP_SUMMARY": str(summary), **environment}
    for step in spec["steps"]:
        if result.result == "failure" and "always()" not in str(step.get("if", "")):
            continue
        if "if" in step and not evaluate(str(step["if"]), contexts):
            continue
        if "uses" in step:
            _run_action(step["uses"], repository, workspace, contexts["github"]["sha"])
            continue
        env = {name: substitute_expressions(str(value), contexts) for name, value in step.get("env", {}).items()}
        output = folder / f"output{len(steps)}"
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        run = subprocess.run(
            command,
            cwd=workspace,
            env={**job_env, **env, "GITHUB_OUTPUT": str(output)},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        result.log += run.stdout + run.stderr
        lines = output.read_text().splitlines() if output.exists() else []
        steps[step.get("id") or str(len(steps))] = {"outputs": dict(line.split("=", 1) for line in lines)}
        if run.returncode:
            result.result = "failure"
    result.outputs = {name: substitute_expressions(text, contexts) for name, text in spec.get("outputs", {}).items()}
    if isinstance(spec.get("environment"), dict):
        result.url = substitute_expressions(spec["environment"].get("url", ""), contexts)
    result.summary = summary.read_text() if summary.exists() else ""
    return result


def substitute_expressions(text: str, contexts: Mapping[str, Any]) -> str:
    """Replace each `${{ expression }}` in a text by its value."""
    return re.sub(r"\$\{\{(.*?)\}\}", lambda match: str(evaluate(match[1], contexts)), text)


def evaluate(expression: str, contexts: Mapping[str, Any]) -> Any:
    """Evaluate an expression of names, strings, comparisons and logical operators."""
    operators = {"&&": " and ", "||": " or ", "!": " not ", "==": "==", "!=": "!=", "always()": "True"}

    def to_python(match: re.Match[str]) -> str:
        token = match[0]
        if token in operators:
            return operators[token]
        if token.startswith("'"):
            return repr(token[1:-1])
        value: Any = contexts
        for part in token.split("."):
            value = value.get(part, "") if isinstance(value, Mapping) else ""
        return repr(value)

    tokens = r"'[^']*'|always\(\)|[A-Za-z_][\w.-]*|&&|\|\||==|!=|!"
    return eval(re.sub(tokens, to_python, expression.strip()), {"__builtins__": {}})


def _run_action(action: str, repository: Path, workspace: Path, sha: str) -> None:
    """Replace the action of a `uses` step."""
    name = action.partition("@")[0]
    if name == "actions/checkout":
        subprocess.run(["git", "clone", "-q", str(repository), str(workspace)], check=True)
        subprocess.run(["git", "-C", str(workspace), "fetch", "-q", "origin"], check=True)
        subprocess.run(["git", "-C", str(workspace), "checkout", "-q", sha], check=True, capture_output=True)
    else:
        assert name == "actions/setup-python", f"the runner does not support {action}"


def _python_without_pip(folder: Path) -> Path:
    """Create a folder with a `python` that runs this interpreter, except that `-m pip` does nothing."""
    tools = folder / "tools"
    tools.mkdir(parents=True)
    script = f'#!/bin/sh\n[ "$1 $2" = "-m pip" ] && exit 0\nexec {sys.executable} "$@"\n'
    (tools / "python").write_text(script)
    (tools / "python").chmod(0o755)
    return tools
