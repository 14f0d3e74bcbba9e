"""Deploys and commands against the simulated Hub: failures, retries, fallbacks, and what keeps serving.

The application is the small one of `tests.support.preview_world`; test_branches.py deploys the real one.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import default_client_factory

from bench.spaces_server import TOKEN
from previews import hub as hub_client
from previews.__main__ import Progress
from previews.deploy import Deployer, DeployOptions, DeployResult
from previews.errors import ExitCode, PreviewError, redact_secrets
from previews.hot_reload import Codebase
from previews.hub import Hub, configure_hub_client
from previews.plan import Plan, make_plan
from previews.source import list_branches, read_commit
from tests.support.preview_world import APP, AUTH_HEADERS, README, PreviewWorld

pytestmark = pytest.mark.slow


def assert_fails(function: Callable[[], object], code: ExitCode, *parts: str) -> PreviewError:
    """Assert that a call raises PreviewError with a code and all parts of a message, and return the error."""
    with pytest.raises(PreviewError) as caught:
        function()
    message = str(caught.value)
    assert caught.value.code is code, message
    assert all(part in message for part in parts), message
    assert TOKEN not in message
    return caught.value


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("status", "code", "part"),
    [
        (401, ExitCode.ACCESS, "HF_TOKEN"),
        (403, ExitCode.ACCESS, "write access"),
        (402, ExitCode.PAYMENT, "PRO"),
        (409, ExitCode.CONFLICT, "being changed"),
    ],
)
def test_rejected_space_creation_explains_the_reason(
    world: PreviewWorld, status: int, code: ExitCode, part: str
) -> None:
    world.commit()
    world.fail_requests("POST", "/api/repos/create", status)
    assert_fails(world.deploy, code, part, "create the Space")
    assert world.hub.spaces == {}


def test_invalid_token_is_an_access_error(world: PreviewWorld) -> None:
    world.commit()
    assert_fails(lambda: world.deploy(token="hf_wrongwrongwrongwrong"), ExitCode.ACCESS, "rejected the token")


def test_deploy_waits_for_the_rate_limit(world: PreviewWorld) -> None:
    sha = world.commit()
    world.fail_requests("POST", "/api/repos/create", 429, RateLimit='"api";r=0;t=1')
    world.fail_requests("GET", "/tree/main", 429, **{"Retry-After": "0.2"})
    assert world.deploy(sha).path == "build" and world.live_commit() == sha
    assert [line for line in world.lines if "rate limit of the Hub: waiting 1 s" in line]


def test_rate_limit_beyond_the_maximum_wait_is_an_error(world: PreviewWorld) -> None:
    world.commit()
    world.fail_requests("POST", "/api/repos/create", 429, **{"Retry-After": "9999"})
    assert_fails(world.deploy, ExitCode.RATE_LIMIT, "too many requests", "Run the command again later")


def test_missing_network_is_a_network_error(world: PreviewWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    world.commit()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    assert_fails(world.deploy, ExitCode.NETWORK, "no connection to the Hub", "HF_ENDPOINT")


def test_deleting_the_space_ends_the_deploy(world: PreviewWorld) -> None:
    world.deploy_first()
    (world.folder / "notes.txt").write_text("not Python")
    sha = world.commit()
    world.hub.before_commit = lambda: threading.Timer(0.05, world.hub.delete_all_spaces).start()
    assert_fails(lambda: world.deploy(sha), ExitCode.NOT_FOUND, "was deleted during the deploy")


def test_transient_server_errors_are_retried(world: PreviewWorld) -> None:
    sha = world.commit()
    world.fail_requests("GET", "/variables", 503)
    world.fail_requests("GET", "/tree/main", 500, 502)
    world.deploy(sha)
    assert world.live_commit() == sha


def test_commit_with_a_lost_response_is_not_repeated(world: PreviewWorld) -> None:
    world.deploy_first()
    sha, before = world.commit(part='"""Another."""\n'), len(world.hub.uploads)
    world.hub.lost_responses = 1
    assert world.deploy(sha).path == "hot reload"
    assert len(world.hub.uploads) == before + 2 and world.live_commit() == sha
    assert [line for line in world.lines if "checking whether it arrived" in line]


def test_stale_running_stage_of_the_old_commit_is_ignored(world: PreviewWorld) -> None:
    world.deploy_first()
    world.hub.stale_seconds = 0.5
    (world.folder / "notes.txt").write_text("not Python")
    sha = world.commit()
    result = world.deploy(sha)
    assert result.path == "restart" and "notes.txt" in result.reason and world.live_commit() == sha


def test_canceled_hot_reload_falls_back_to_restart(world: PreviewWorld) -> None:
    world.deploy_first()
    world.hub.canceled_reloads = 1
    sha = world.commit(part="A = 1\n")
    result = world.deploy(sha)
    assert result.path == "restart" and "canceled" in result.fallbacks[0] and world.live_commit() == sha


def test_hot_reload_without_effect_falls_back_to_restart(world: PreviewWorld) -> None:
    world.deploy_first()
    sha = world.commit(app=APP + "# reload has no effect\n")
    result = world.deploy(sha)
    assert (
        result.path == "restart" and "still shows another commit" in result.fallbacks[0] and world.live_commit() == sha
    )


def test_concurrent_commit_starts_the_deploy_over(world: PreviewWorld) -> None:
    world.deploy_first()
    world.hub.before_commit = lambda: world.hub.commit(world.space, "Update README.md", {"NOTES": b"hand-made"})
    sha = world.commit(part="A = 1\n")
    world.deploy(sha)
    assert world.live_commit() == sha and "NOTES" not in world.space.files
    assert "the Space received another commit meanwhile; starting over" in world.lines


def test_newer_concurrent_deploy_supersedes_the_older(world: PreviewWorld) -> None:
    world.deploy_first()
    older, newer = world.commit(part="A = 1\n"), world.commit(part="A = 2\n")
    world.hub.before_commit = lambda: world.deploy(newer) and None
    assert_fails(lambda: world.deploy(older), ExitCode.CONFLICT, "Superseded", newer[:12])
    assert world.live_commit() == newer


def test_two_concurrent_deploys_end_with_the_commit_live(world: PreviewWorld) -> None:
    world.deploy_first()
    sha = world.commit(part="A = 1\n")
    outcomes: list[Any] = []

    def deploy() -> None:
        try:
            outcomes.append(world.deploy(sha))
        except PreviewError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=deploy) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(outcomes) == 2 and any(isinstance(outcome, DeployResult) for outcome in outcomes), outcomes
    assert all(isinstance(outcome, DeployResult) or outcome is ExitCode.CONFLICT for outcome in outcomes), outcomes
    assert world.live_commit() == sha


def test_build_error_shows_the_end_of_the_build_log(world: PreviewWorld) -> None:
    world.commit()
    world.hub.build_errors = [*map(str, range(60)), f"ERROR: no matching distribution, {TOKEN}"]
    error = assert_fails(world.deploy, ExitCode.BUILD, "could not be built")
    assert error.log[-1].startswith("ERROR: no matching") and len(error.log) == 40 and TOKEN not in "".join(error.log)


def test_application_that_does_not_start_shows_its_log(world: PreviewWorld) -> None:
    world.commit(part="raise RuntimeError('no such thing')\n")
    error = assert_fails(world.deploy, ExitCode.APP, "does not start")
    assert "RuntimeError: no such thing" in error.log[-1]


def test_space_that_never_reports_the_commit_times_out(world: PreviewWorld) -> None:
    world.hub.build_seconds = 60.0
    world.commit()
    assert_fails(lambda: world.deploy(timeout=1.0), ExitCode.TIMEOUT, "--timeout")


@pytest.mark.parametrize("step", [0, 1, 2])
def test_killed_deploy_can_be_repeated(world: PreviewWorld, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deploy is killed before the first commit, between the two of a hot reload, or after them."""
    world.deploy_first()
    sha = world.commit(part="A = 1\n")
    commit, commits = Hub.commit, []

    def interrupted_commit(self: Hub, *args: Any, **kwargs: Any) -> str:
        if len(commits) == step:
            raise KeyboardInterrupt
        commits.append(1)
        return commit(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Hub, "commit", interrupted_commit)
        if step < 2:
            with pytest.raises(KeyboardInterrupt):
                world.deploy(sha)
        else:
            world.deploy(sha)
    assert world.deploy(sha).sha == sha and world.live_commit() == sha


def test_space_of_another_application_is_not_changed(world: PreviewWorld) -> None:
    world.deploy_first()
    world.space.variables.clear()
    before = len(world.hub.uploads)
    assert_fails(
        lambda: world.deploy(world.commit(part="A = 1\n")), ExitCode.CONFLICT, "belongs to another application"
    )
    assert len(world.hub.uploads) == before


def test_deleting_a_missing_space_returns_false(world: PreviewWorld) -> None:
    world.deploy_first()
    hub = Hub(TOKEN)
    assert hub.delete(world.target.space) is True
    assert hub.delete(world.target.space) is False
    assert hub.state(world.target.space) is None


def test_secrets_are_set_at_creation_and_never_logged(world: PreviewWorld) -> None:
    world.commit()
    world.deploy(secrets={"DATABASE_URL": "postgresql://u:p@h/d"})
    assert world.space.secrets == {"DATABASE_URL": "postgresql://u:p@h/d"}
    assert "postgresql" not in "".join(world.lines)
    assert "p@h" not in redact_secrets("cannot reach postgresql://u:p@h/d")


def test_job_serves_the_first_preview_during_the_build(world: PreviewWorld) -> None:
    """The Job is a real process that reports the commit before the Space does, and ends when the Space is ready."""
    sha = world.commit()
    world.hub.build_seconds = 3.0
    result = world.deploy(job_image_space="team/small", secrets={"DATABASE_URL": "sqlite:///x"})
    (job,) = world.hub.jobs.values()
    assert job.request["spaceId"] == "team/small" and job.request["volumes"][0]["source"] == world.target.space
    assert job.request["environment"]["PREVIEW_COMMIT"] == sha and "DATABASE_URL" not in str(job.request)
    assert result.job_seconds is not None and result.job_seconds < 3.0 < result.seconds
    assert job.stage == "CANCELED" and job.process.poll() is not None and world.live_commit() == sha
    assert [line for line in world.lines if "$0.02 an hour" in line and "public" in line]


def test_missing_job_credit_does_not_fail_the_deploy(world: PreviewWorld) -> None:
    sha = world.commit()
    world.fail_requests("POST", "/api/jobs/team", 402)
    assert world.deploy(job_image_space="team/small").job_seconds is None and world.live_commit() == sha
    assert [line for line in world.lines if "no temporary Job" in line and "credit" in line]


def test_job_that_cannot_be_canceled_does_not_fail_a_live_deploy(world: PreviewWorld) -> None:
    sha = world.commit()
    world.fail_requests("POST", "/cancel", *[500] * 10)
    result = world.deploy(job_image_space="team/small")
    assert result.sha == sha == world.live_commit()
    assert [line for line in world.lines if "could not be canceled" in line and "30 minutes" in line]


def test_job_that_cannot_be_canceled_does_not_hide_why_the_deploy_failed(world: PreviewWorld) -> None:
    world.commit()
    world.hub.build_errors = ["Collecting gradio", "ERROR: no such version"]
    world.fail_requests("POST", "/cancel", *[500] * 10)
    error = assert_fails(lambda: world.deploy(job_image_space="team/small"), ExitCode.BUILD, "could not be built")
    assert error.log[-1] == "ERROR: no such version"
    assert [line for line in world.lines if "could not be canceled" in line]


def test_canceled_workflow_cancels_its_job(world: PreviewWorld) -> None:
    world.commit()
    world.hub.build_seconds = 600.0
    process = world.start_cli("deploy", "--branch", "x", "--fast")
    assert process.stderr is not None
    while "temporary Job" not in (line := process.stderr.readline()):
        assert line, "the deploy ended without starting a Job"
    process.terminate()
    try:
        code = process.wait(60)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # prints the stacks of all threads
        pytest.fail(f"The deploy does not end:\n{process.communicate(timeout=30)[1]}")
    assert code == 130
    (job,) = world.hub.jobs.values()
    assert job.stage == "CANCELED" and job.process.poll() is not None


def test_interrupt_that_other_code_swallows_is_raised_by_the_next_progress(world: PreviewWorld) -> None:
    sha, stream = world.commit(), io.StringIO()
    world.hub.build_seconds = 60.0
    progress = Progress(stream)

    def log(line: str) -> None:
        progress.log(line)
        if "starting a temporary Job" in line:
            with contextlib.suppress(KeyboardInterrupt):  # as Python does in `__del__`
                progress.interrupt()

    options = DeployOptions(poll=0.05, timeout=30.0, job_image_space="team/small")
    deployer = Deployer(Hub(TOKEN, log), world.folder, options, log, progress.update)
    with pytest.raises(KeyboardInterrupt):
        deployer.deploy(world.target, sha)
    (job,) = world.hub.jobs.values()
    assert job.stage == "CANCELED" and "has been canceled" in stream.getvalue()


def test_paused_space_is_restarted(world: PreviewWorld) -> None:
    world.deploy_first()
    wait_until(lambda: world.space.stage == "RUNNING")
    world.space.stop()
    world.space.stage = "PAUSED"
    sha = world.commit(part="A = 1\n")
    result = world.deploy(sha)
    assert result.path == "restart" and "PAUSED" in result.reason and world.live_commit() == sha
    assert "the Space is paused: starting it" in world.lines


def test_stuck_restart_falls_back_to_a_build(world: PreviewWorld) -> None:
    world.deploy_first()
    world.hub.stuck_restarts = 1
    (world.folder / "notes.txt").write_text("not Python")
    sha = world.commit()
    result = world.deploy(sha, timeout=3.0)
    assert [reason.partition(":")[0] for reason in result.fallbacks] == ["restart"] and world.live_commit() == sha
    assert list(result.by_path) == ["restart", "build"] and result.by_path["restart"] >= 1.5


@pytest.mark.parametrize("path", ["restart", "build"])
def test_path_option_forces_a_restart_or_build(world: PreviewWorld, path: str) -> None:
    world.deploy_first()
    sha = world.commit(part="A = 1\n")
    for _ in range(2):  # the second time, no file changes
        result = json.loads(world.cli("deploy", "--branch", "x", "--path", path, "--json"))
        assert (result["path"], result["reason"], result["sha"]) == (
            path,
            "requested with --path",
            sha,
        ) and world.live_commit() == sha
    assert ("POST /api/spaces/team/small-x-2d711642/restart" in world.hub.requests) == (path == "build")


def test_result_lists_the_seconds_of_each_path(world: PreviewWorld) -> None:
    world.deploy_first()
    world.hub.canceled_reloads = 1
    result = world.deploy(world.commit(part="A = 1\n"))
    assert list(result.by_path) == ["hot reload", "restart"]
    assert sum(result.by_path.values()) <= result.seconds and result.since == "start" and result.own_seconds > 0


def test_seconds_are_measured_from_the_push(world: PreviewWorld) -> None:
    world.deploy_first()
    world.commit(part="A = 1\n")
    result = json.loads(world.cli("deploy", "--branch", "x", "--pushed-at", str(time.time() - 100), "--json"))
    assert result["since"] == "push" and 100 <= result["seconds"] < 160 and result["path"] == "hot reload"


def test_space_of_another_branch_is_not_changed(world: PreviewWorld) -> None:
    """This happens if the truncated hashes of two branches collide."""
    world.deploy_first()
    world.space.variables["PREVIEW_BRANCH"] = "y"
    before = len(world.hub.uploads)
    assert_fails(lambda: world.deploy(world.commit(part="A = 1\n")), ExitCode.CONFLICT, "another branch, 'y'")
    assert len(world.hub.uploads) == before


def test_stale_file_list_starts_the_deploy_over(world: PreviewWorld) -> None:
    """The Hub reports the newer commit with the older files; deploying on these would keep the added file."""
    world.deploy_first()
    before = httpx.get(f"{world.hub.address}/api/spaces/{world.target.space}/tree/main", headers=AUTH_HEADERS).json()
    world.hub.commit(world.space, "Add NOTES", {"NOTES": b"hand-made"})
    world.hub.responses["GET", "/tree/main"] = [(200, before, {})]
    sha = world.commit(part="A = 1\n")
    world.deploy(sha)
    assert world.live_commit() == sha and "NOTES" not in world.space.files
    assert "the Space received another commit meanwhile; starting over" in world.lines


def test_large_files_are_uploaded_by_lfs_once(world: PreviewWorld) -> None:
    """HF_HUB_DISABLE_XET selects Git LFS: the simulated Hub has no Xet storage."""
    picture = bytes(range(256)) * 8
    (world.folder / "photo.jpg").write_bytes(picture)
    world.deploy_first()
    assert world.space.files["photo.jpg"] == picture and list(world.hub.lfs_objects.values()) == [picture]
    world.hub.lfs_objects.clear()
    assert world.deploy(world.commit(part="A = 1\n")).path == "hot reload" and not world.hub.lfs_objects


def test_conflicting_space_creation_is_retried_with_pauses(
    world: PreviewWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha = world.commit()
    configure_hub_client()
    try:
        world.hub.create_conflicts = 2
        began = time.monotonic()
        world.deploy(sha)
        assert world.live_commit() == sha and time.monotonic() - began > 1.4
        world.hub.delete_all_spaces()
        world.hub.create_conflicts = 1000
        monkeypatch.setattr(hub_client, "HUB_TIMEOUT", 0.5)
        monkeypatch.setattr(hub_client, "MAX_ATTEMPTS", 1)
        assert_fails(world.deploy, ExitCode.NETWORK, "create the Space", "another conflicting operation")
        assert world.hub.create_conflicts > 980
    finally:
        set_client_factory(default_client_factory)


def test_token_is_sent_to_the_hub_and_its_spaces_only() -> None:
    hub = Hub(TOKEN)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert hub._auth_headers("https://team-small.hf.space/healthz") == headers
    for url in ("https://job0--7860.hf.jobs/healthz", "http://team-small.hf.space", "https://hf.space.example.org"):
        assert hub._auth_headers(url) == {}


# ── The other commands ──────────────────────────────────────────────────────────────────────────────────────────────


def test_list_open_logs_and_delete_commands(world: PreviewWorld) -> None:
    sha = world.deploy_first()
    (row,) = json.loads(world.cli("list", "--json"))
    assert (row["branch"], row["revision"], row["stage"]) == ("x", sha[:12], "RUNNING")
    assert world.cli("open", "--branch", "x").strip() == f"{world.hub.address}/{world.space.subdomain}"
    world.space.log = ["starting", f"a line with {TOKEN}"]
    output = world.cli("logs", "--branch", "x")
    assert output.splitlines() == ["starting", "a line with •••"]
    assert json.loads(world.cli("delete", "--branch", "x", "--json"))["deleted"] is True
    assert json.loads(world.cli("delete", "--branch", "x", "--json"))["deleted"] is False
    assert world.cli("list") == "nothing\n" and "does not exist" in world.cli_error(5, "open", "--branch", "x")


def test_delete_and_sweep_keep_spaces_of_other_applications(world: PreviewWorld) -> None:
    world.deploy_first()
    world.space.variables["PREVIEW_OF"] = "other"
    assert "not deleted" in world.cli_error(6, "delete", "--branch", "x")
    assert world.cli("sweep") == "nothing\n" and world.target.space in world.hub.spaces


def test_state_bucket_is_created_passed_and_deleted_with_its_preview(
    world: PreviewWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.commit()
    monkeypatch.setenv("STATE_BUCKET_TOKEN", "hf_tokenofthebucketonly")
    output = world.cli("deploy", "--branch", "x", "--state-bucket", "--json")
    bucket = f"{world.target.space}-state"
    assert world.hub.buckets == {bucket: True}, "the bucket must be private"
    assert world.space.variables["STATE_BUCKET"] == bucket
    assert world.space.secrets == {"STATE_BUCKET_TOKEN": "hf_tokenofthebucketonly"}
    assert "hf_tokenofthebucketonly" not in output + json.dumps(world.space.variables)
    world.cli("deploy", "--branch", "x", "--state-bucket", "--path", "restart")
    assert world.hub.buckets == {bucket: True}
    assert json.loads(world.cli("delete", "--branch", "x", "--json"))["deleted"] is True
    assert world.hub.buckets == {} and world.hub.spaces == {}


def test_state_bucket_is_kept_if_requested_or_shared(world: PreviewWorld) -> None:
    world.commit()
    world.deploy(state_bucket="")
    world.cli("delete", "--branch", "x", "--keep-state")
    assert world.hub.spaces == {} and list(world.hub.buckets) == [f"{world.target.space}-state"]
    world.deploy(state_bucket="team/shared")
    world.cli("delete", "--branch", "x")
    assert world.hub.spaces == {} and "team/shared" in world.hub.buckets


def test_sweep_deletes_the_buckets_of_deleted_previews(world: PreviewWorld) -> None:
    world.commit()
    world.deploy(state_bucket="")
    world.git("checkout", "-q", "-b", "other")
    world.git("branch", "-q", "-D", "x")
    world.cli("sweep", "--dry-run")
    assert len(world.hub.buckets) == 1
    world.fail_requests("DELETE", "-state", 403)
    world.cli_error(3, "sweep")
    assert len(world.hub.buckets) == len(world.hub.spaces) == 1, "the preview is deleted after its bucket"
    world.cli("sweep")
    assert world.hub.buckets == {} and world.hub.spaces == {}


def test_preview_whose_bucket_is_missing_is_deleted(world: PreviewWorld) -> None:
    world.commit()
    world.deploy(state_bucket="")
    world.hub.buckets.clear()
    world.cli("delete", "--branch", "x")
    assert world.hub.spaces == {}


def test_existing_space_gets_no_state_bucket(world: PreviewWorld) -> None:
    sha = world.deploy_first()
    assert world.deploy(sha, state_bucket="").sha == sha
    assert world.hub.buckets == {} and "STATE_BUCKET" not in world.space.variables
    assert [line for line in world.lines if "STATE_BUCKET only applies to a new Space" in line]


def test_second_rollback_goes_further_back(world: PreviewWorld) -> None:
    shas = [world.deploy_first(), *(world.commit(part=f"A = {n}\n") for n in range(2))]
    for sha in shas[1:]:
        world.deploy(sha)
    for expected in (shas[1], shas[0]):
        assert json.loads(world.cli("rollback", "--branch", "x", "--json"))["sha"] == expected == world.live_commit()
    assert "no earlier commit" in world.cli_error(5, "rollback", "--branch", "x")
    assert json.loads(world.cli("rollback", "--branch", "x", "--to", shas[2][:9], "--json"))["sha"] == shas[2]


def test_sweep_keeps_previews_newer_than_the_fetch(world: PreviewWorld, tmp_path: Path) -> None:
    """A clone lists the branches of its last fetch; a newer Space may belong to a newer branch."""
    world.commit()
    world.git("branch", "other")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "-b", "other", str(world.folder), str(clone)], check=True)
    subprocess.run(["git", "-C", str(clone), "fetch", "-q"], check=True)
    world.git("checkout", "-q", "-b", "late", "x")
    world.cli("deploy", "--branch", "late")
    assert world.cli("sweep", "--fetched", "--folder", str(clone)) == "nothing\n" and len(world.hub.spaces) == 1
    (space,) = world.hub.spaces.values()
    space.created = "2026-01-01T00:00:00.000Z"
    assert "late" in world.cli("sweep", "--fetched", "--folder", str(clone), "--dry-run") and world.hub.spaces
    assert "late" in world.cli("sweep", "--fetched", "--folder", str(clone)) and not world.hub.spaces


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["deploy", "--branch", "a\nb"], "without control characters"),
        (["deploy", "--branch", ""], "must be a branch name"),
        (["deploy", "--branch", "x", "--sha", "no-such-commit"], "is not in this repository"),
        (["deploy", "--branch", "x", "--sha", "--upload-pack=touch"], "expected one argument"),
        (["deploy", "--branch", "x", "--secret", "NOT_SET"], "the environment variable is not set"),
        (["deploy", "--branch", "x", "--variable", "NOTHING"], "NAME=VALUE"),
        (["deploy", "--branch", "x", "--state-bucket"], "set STATE_BUCKET_TOKEN"),
        (["deploy", "--branch", "x", "--state-bucket", "no-owner"], "must be owner/name"),
        (["deploy", "--branch", "x", "--pushed-at", "tomorrow"], "seconds since 1970"),
        (["deploy", "--branch", "x", "--owner", "o" * 50], "leaves no room"),
        (["logs", "--branch", "x", "--lines", "0"], "1 or more"),
        (["delete", "--branch", "x", "--production"], "production Space is not deleted here"),
    ],
)
def test_usage_errors_change_nothing(world: PreviewWorld, arguments: list[str], message: str) -> None:
    world.commit()
    assert message in world.cli_error(2, *arguments)
    assert not world.hub.spaces


def test_detached_head_requires_a_branch(world: PreviewWorld) -> None:
    world.commit()
    world.git("checkout", "-q", "--detach")
    assert "set --branch" in world.cli_error(2, "deploy")


def test_unexpected_error_is_reported_without_secrets(world: PreviewWorld) -> None:
    world.commit()
    world.hub.responses["GET", "/tree/main"] = [(200, [{"type": "file", "path": TOKEN}], {})] * 9
    output = world.cli_error(1, "deploy", "--branch", "x", "--json")
    assert "Unexpected error: KeyError" in output and TOKEN not in output


def test_transient_progress_is_overwritten_on_a_terminal_only() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, transient_lines in ((Terminal(), 2), (io.StringIO(), 0)):
        progress = Progress(stream)
        progress.log("a line that stays")
        progress.update("one")
        progress.update("two")
        progress.close()
        assert "stays" in stream.getvalue() and stream.getvalue().count("\r\x1b[K[") == transient_lines


def test_plan_sorts_files_by_imports_with_app_last(world: PreviewWorld) -> None:
    sha = world.deploy_first()
    remote, front_matter = Hub(TOKEN).files(world.target.space), "title: Small\nsdk: gradio\n"
    old = {"app.py": (world.folder / "app.py").read_bytes(), "part.py": b'"""A part."""\n'}

    def plan_deploy(commit: str) -> Plan:
        source = read_commit(world.folder, commit)
        codebase = Codebase(source.python)
        return make_plan(
            source, remote, front_matter, lambda paths: {path: old[path] for path in paths}, lambda: codebase
        )

    plan = plan_deploy(world.commit(a="import part\n", part="B = 1\n", zoo="import a\n"))
    assert [file.path for file in plan.upload] == ["part.py", "a.py", "zoo.py", "app.py"]
    assert plan_deploy(sha).path.value == "nothing"
    (world.folder / "README.md").write_text(README.replace("Small", "Other"))
    assert plan_deploy(world.commit()).path.value == "build"


def test_documentation_is_uploaded_with_the_next_restart(world: PreviewWorld) -> None:
    world.deploy_first()
    (world.folder / "README.md").write_text(README + "More words.\n")
    (world.folder / "docs").mkdir()
    (world.folder / "docs" / "picture.png").write_bytes(b"\x89PNG")
    sha = world.commit()
    result = world.deploy(sha)
    assert (result.path, world.live_commit()) == ("hot reload", sha) and "docs/picture.png" not in world.space.files
    assert world.deploy(sha).path == "nothing"
    (world.folder / "notes.txt").write_text("not Python")
    assert world.deploy(world.commit()).path == "restart"
    assert world.space.files["docs/picture.png"] == b"\x89PNG" and b"More words" in world.space.files["README.md"]


def test_list_branches_with_and_without_a_remote(world: PreviewWorld, tmp_path: Path) -> None:
    world.commit()
    world.git("branch", "日本/x")
    assert list_branches(world.folder) == {"x", "日本/x"}
    subprocess.run(["git", "clone", "-q", str(world.folder), str(tmp_path / "clone")], check=True)
    assert list_branches(tmp_path / "clone") == list_branches(tmp_path / "clone", fetched=True) == {"x", "日本/x"}
