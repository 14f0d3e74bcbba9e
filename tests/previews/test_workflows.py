"""The workflows: checked by their linters, their commands executed in a made-up GitHub, hostile names among them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from previews import github

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
HOSTILE = [
    "$(touch PWNED)",
    "x; touch PWNED",
    '"; touch PWNED; "',
    "`touch PWNED`",
    "日本語",
    "a" * 200,
    "-rf",
    "x|y<b>",
]
RESULT = {"space": "o/s", "branch": "b", "sha": "1" * 40, "url": "https://o-s.hf.space", "path": "hot reload"}
RESULT |= {"reason": "", "seconds": 4.2, "own_seconds": 0.5, "fallbacks": []}
newer = pytest.mark.skipif(sys.version_info < (3, 11), reason="the linters are installed from Python 3.11 on")


@newer
@pytest.mark.parametrize(
    "command",
    [
        ["zizmor", "--offline", "--no-progress", "--no-config", *map(str, WORKFLOWS)],
        ["check-jsonschema", "--builtin-schema", "vendor.github-workflows", *map(str, WORKFLOWS)],
    ],
    ids=["zizmor", "check-jsonschema"],
)
def test_a_linter_finds_nothing(command: list[str]) -> None:
    command[0] = str(Path(sys.executable).with_name(command[0]))
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr


@newer
def test_the_linter_would_find_something(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yml"
    bad.write_text(
        "on: pull_request_target\njobs:\n  x:\n    runs-on: ubuntu-24.04\n    steps:\n"
        "      - uses: actions/checkout@v4\n      - run: echo ${{ github.head_ref }}\n"
    )
    command = [str(Path(sys.executable).with_name("zizmor")), "--offline", "--no-progress", "--no-config", str(bad)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode != 0 and "template-injection" in run.stdout and "dangerous-triggers" in run.stdout


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_secrets_are_near_trusted_code_alone(file: Path) -> None:
    workflow = yaml.safe_load(file.read_text())
    events = workflow[True]  # YAML 1.1 takes `on` for a boolean
    assert "pull_request_target" not in events and "workflow_run" not in events
    if "pull_request" in events:
        assert "secrets." not in file.read_text()


def step(workflow: str, job: str, name: str) -> str:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / workflow).read_text())["jobs"]
    return next(one["run"] for one in jobs[job]["steps"] if one.get("name") == name)


def bash(script: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """As the runner executes a step: bash -eo pipefail. `python` is this one, or a recorder's where there is one."""
    base = {"PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=folder, env={**base, **env}, capture_output=True, text=True)


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """A folder whose `python` writes down what it was given instead of doing it."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "python"
    program.write_text(f'#!{sys.executable}\nimport json, sys\nopen("given", "w").write(json.dumps(sys.argv[1:]))\n')
    program.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("branch", HOSTILE)
@pytest.mark.parametrize("job", ["preview", "production"])
def test_a_branchs_name_stays_one_argument(job: str, branch: str, recorder: Path) -> None:
    run = bash(step("preview.yml", job, "Deploy"), recorder, BRANCH=branch, GITHUB_SHA="1" * 40)
    assert run.returncode == 0, run.stderr
    given = json.loads((recorder / "given").read_text())
    assert given[given.index("--branch") + 1] == branch and given[given.index("--sha") + 1] == "1" * 40
    assert not (recorder / "PWNED").exists()


def test_the_sweep_is_one_command(recorder: Path) -> None:
    assert bash(step("sweep.yml", "sweep", "Sweep"), recorder).returncode == 0
    assert json.loads((recorder / "given").read_text()) == ["-m", "previews", "sweep", "--fetched"]


@pytest.mark.parametrize("branch", HOSTILE)
def test_a_report_gives_outputs_and_a_summary(branch: str, tmp_path: Path) -> None:
    (tmp_path / "preview.json").write_text(json.dumps({**RESULT, "branch": branch}))
    files = {name: str(tmp_path / name) for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    run = bash(step("preview.yml", "preview", "Report"), tmp_path, **files)
    assert run.returncode == 0, run.stderr
    lines = (tmp_path / "GITHUB_OUTPUT").read_text().splitlines()
    assert [line.partition("=")[0] for line in lines] == ["url", "result"]
    summary = (tmp_path / "GITHUB_STEP_SUMMARY").read_text()
    assert "https://o-s.hf.space" in summary and "4.2 s" in summary and "<b>" not in summary


def test_a_failed_deploy_is_reported_as_one(tmp_path: Path) -> None:
    (tmp_path / "preview.json").write_text(json.dumps({"error": "it needs PRO", "code": 4, "log": ["a", "b"]}))
    files = {name: str(tmp_path / name) for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    assert bash(step("preview.yml", "preview", "Report"), tmp_path, **files).returncode == 0
    assert "it needs PRO" in (tmp_path / "GITHUB_STEP_SUMMARY").read_text()


class PlayedGitHub(ThreadingHTTPServer):
    """A pull request's comments, over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.comments: list[dict[str, Any]] = [{"id": n, "body": "a person's"} for n in range(120)]
        self.asked: list[str] = []


class Answers(BaseHTTPRequestHandler):
    server: PlayedGitHub

    def any(self) -> None:
        hub = self.server
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        path, _, query = self.path.partition("?")
        hub.asked.append(f"{self.command} {path}")
        answer: Any = {}
        if path.endswith("/pulls"):
            answer = [{"number": 7, "state": "open"}, {"number": 3, "state": "closed"}]
        elif self.command == "GET":
            page = int(query.rpartition("page=")[2])
            answer = hub.comments[(page - 1) * 100 : page * 100]
        elif self.command == "POST":
            hub.comments.append({"id": 999, **body})
        else:
            next(one for one in hub.comments if path.endswith(f"/{one['id']}"))["body"] = body["body"]
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PATCH = any

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def played() -> Iterator[PlayedGitHub]:
    server = PlayedGitHub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_pull_request_has_one_comment_that_is_edited(played: PlayedGitHub, tmp_path: Path) -> None:
    env = {"GITHUB_API_URL": f"http://127.0.0.1:{played.server_port}", "GITHUB_REPOSITORY": "o/r", "GITHUB_TOKEN": "t"}
    script = step("preview.yml", "comment", "Comment")
    for seconds in (4.2, 5.3):
        told = json.dumps({**RESULT, "seconds": seconds, "branch": "$(touch PWNED)"})
        run = bash(script, tmp_path, RESULT=told, GITHUB_SHA="1" * 40, **env)
        assert run.returncode == 0, run.stderr
    ours = [one for one in played.comments if github.MARK in one["body"]]
    assert len(ours) == 1 and "5.3 s" in ours[0]["body"] and "https://o-s.hf.space" in ours[0]["body"]
    assert [line for line in played.asked if line.startswith(("POST", "PATCH"))] == [
        "POST /repos/o/r/issues/7/comments",
        "PATCH /repos/o/r/issues/comments/999",
    ]
    assert not (tmp_path / "PWNED").exists()
