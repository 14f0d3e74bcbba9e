"""What goes wrong on the Hub's side, played by the stand-in: what is said, what is tried, and what goes on serving.

The application is the small one of world.py, so that it starts at once; the real one is in test_branches.py.
"""

from __future__ import annotations

import io
import json
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
from previews import hub as hubs
from previews.__main__ import Progress
from previews.deploy import Result
from previews.errors import Exit, PreviewError, without_secrets
from previews.hot_reload import Program
from previews.hub import Hub, patient
from previews.plan import Plan, plan
from previews.source import branches, read
from tests.support.preview_world import APP, PROOF, README, World


def refusal(do: Callable[[], object], code: Exit, *words: str) -> PreviewError:
    with pytest.raises(PreviewError) as caught:
        do()
    assert caught.value.code is code, str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert TOKEN not in str(caught.value)
    return caught.value


def live(world: World) -> str:
    sha = world.commit()
    world.deploy(sha)
    assert world.runs() == sha
    return sha


@pytest.mark.parametrize(
    ("status", "code", "word"),
    [
        (401, Exit.ACCESS, "HF_TOKEN"),
        (403, Exit.ACCESS, "write access"),
        (402, Exit.PAYMENT, "PRO"),
        (409, Exit.CONFLICT, "being changed"),
    ],
)
def test_a_space_that_may_not_be_made_says_why(world: World, status: int, code: Exit, word: str) -> None:
    world.commit()
    world.refuse("POST", "/api/repos/create", status)
    refusal(world.deploy, code, word, "create the Space")
    assert world.hub.spaces == {}


def test_a_wrong_token_is_said_to_be_one(world: World) -> None:
    world.commit()
    refusal(lambda: world.deploy(token="hf_wrongwrongwrongwrong"), Exit.ACCESS, "does not know this token")


def test_a_rate_limit_is_waited_for(world: World) -> None:
    sha = world.commit()
    world.refuse("POST", "/api/repos/create", 429, RateLimit='"api";r=0;t=1')
    world.refuse("GET", "/tree/main", 429, **{"Retry-After": "0.2"})
    assert world.deploy(sha).path == "build" and world.runs() == sha
    assert [line for line in world.lines if "asks to wait 1 s" in line]


def test_a_wait_that_is_too_long_is_an_error(world: World) -> None:
    world.commit()
    world.refuse("POST", "/api/repos/create", 429, **{"Retry-After": "9999"})
    refusal(world.deploy, Exit.RATE_LIMIT, "too many requests", "Run this again later")


def test_without_a_network_the_hub_is_not_reached(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.commit()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    refusal(world.deploy, Exit.NETWORK, "no connection to the Hub", "HF_ENDPOINT")


def test_a_space_that_is_deleted_meanwhile_is_not_waited_for(world: World) -> None:
    live(world)
    (world.folder / "notes.txt").write_text("not Python")
    sha = world.commit()
    world.hub.meanwhile = lambda: threading.Timer(0.05, world.hub.delete_all).start()
    refusal(lambda: world.deploy(sha), Exit.NOT_FOUND, "deleted in the meantime")


def test_a_server_that_fails_for_a_moment_is_asked_again(world: World) -> None:
    sha = world.commit()
    world.refuse("GET", "/variables", 503)
    world.refuse("GET", "/tree/main", 500, 502)
    world.deploy(sha)
    assert world.runs() == sha


def test_what_is_lost_on_the_way_is_not_sent_twice(world: World) -> None:
    live(world)
    sha, before = world.commit(part='"""Another."""\n'), len(world.hub.uploads)
    world.hub.drop = 1
    assert world.deploy(sha).path == "hot reload"
    assert len(world.hub.uploads) == before + 2 and world.runs() == sha
    assert [line for line in world.lines if "looking whether it arrived" in line]


def test_a_running_stage_of_the_old_commit_is_not_believed(world: World) -> None:
    live(world)
    world.hub.stale = 1.0
    (world.folder / "notes.txt").write_text("not Python")
    sha = world.commit()
    result = world.deploy(sha)
    assert result.path == "restart" and "notes.txt" in result.reason and world.runs() == sha


def test_a_canceled_reload_falls_back(world: World) -> None:
    live(world)
    world.hub.cancel = 1
    sha = world.commit(part="A = 1\n")
    result = world.deploy(sha)
    assert result.path == "restart" and "canceled" in result.fallbacks[0] and world.runs() == sha


def test_a_reload_that_shows_nothing_falls_back(world: World) -> None:
    live(world)
    sha = world.commit(app=APP + "# shows nothing\n")
    result = world.deploy(sha)
    assert result.path == "restart" and "another commit's" in result.fallbacks[0] and world.runs() == sha


def test_somebody_elses_commit_in_between_is_seen(world: World) -> None:
    live(world)
    world.hub.meanwhile = lambda: world.hub.commit(world.space, "Update README.md", {"NOTES": b"hand-made"})
    sha = world.commit(part="A = 1\n")
    world.deploy(sha)
    assert world.runs() == sha and "NOTES" not in world.space.files
    assert "somebody else committed to this Space; looking again" in world.lines


def test_of_two_deploys_at_once_the_newer_wins(world: World) -> None:
    live(world)
    older, newer = world.commit(part="A = 1\n"), world.commit(part="A = 2\n")
    world.hub.meanwhile = lambda: world.deploy(newer) and None
    refusal(lambda: world.deploy(older), Exit.CONFLICT, "Superseded", newer[:12])
    assert world.runs() == newer


def test_two_deploys_side_by_side_end_with_one_commit_live(world: World) -> None:
    live(world)
    sha = world.commit(part="A = 1\n")
    ended: list[Any] = []

    def once() -> None:
        try:
            ended.append(world.deploy(sha))
        except PreviewError as error:
            ended.append(error.code)

    threads = [threading.Thread(target=once) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(ended) == 2 and any(isinstance(one, Result) for one in ended), ended
    assert all(isinstance(one, Result) or one is Exit.CONFLICT for one in ended), ended
    assert world.runs() == sha


def test_a_build_error_shows_the_end_of_the_build_log(world: World) -> None:
    world.commit()
    world.hub.build_fails = [*map(str, range(60)), f"ERROR: no matching distribution, {TOKEN}"]
    error = refusal(world.deploy, Exit.BUILD, "could not be built")
    assert error.log[-1].startswith("ERROR: no matching") and len(error.log) == 40 and TOKEN not in "".join(error.log)


def test_an_application_that_does_not_start_shows_its_log(world: World) -> None:
    world.commit(part="raise RuntimeError('no such thing')\n")
    error = refusal(world.deploy, Exit.APP, "does not start")
    assert "RuntimeError: no such thing" in error.log[-1]


def test_a_space_that_never_reports_the_commit_times_out(world: World) -> None:
    world.hub.build = 60.0
    world.commit()
    refusal(lambda: world.deploy(timeout=1.0), Exit.TIMEOUT, "--timeout")


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_run_that_was_killed_can_be_repeated(world: World, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the first commit, between the two of a hot reload, or after them."""
    live(world)
    sha = world.commit(part="A = 1\n")
    commit, made = Hub.commit, []

    def killed(self: Hub, *args: Any, **named: Any) -> str:
        if len(made) == step:
            raise KeyboardInterrupt
        made.append(1)
        return commit(self, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Hub, "commit", killed)
        if step < 2:
            with pytest.raises(KeyboardInterrupt):
                world.deploy(sha)
        else:
            world.deploy(sha)
    assert world.deploy(sha).sha == sha and world.runs() == sha


def test_a_space_of_somebody_elses_is_left_alone(world: World) -> None:
    live(world)
    world.space.variables.clear()
    before = len(world.hub.uploads)
    refusal(lambda: world.deploy(world.commit(part="A = 1\n")), Exit.CONFLICT, "not one of this application's")
    assert len(world.hub.uploads) == before


def test_a_space_that_is_gone_is_deleted_without_a_word(world: World) -> None:
    live(world)
    hub = Hub(TOKEN)
    assert hub.delete(world.target.space) is True
    assert hub.delete(world.target.space) is False
    assert hub.state(world.target.space) is None


def test_secrets_are_passed_at_creation_and_never_shown(world: World) -> None:
    world.commit()
    world.deploy(secrets={"DATABASE_URL": "postgresql://u:p@h/d"})
    assert world.space.secrets == {"DATABASE_URL": "postgresql://u:p@h/d"}
    assert "postgresql" not in "".join(world.lines)
    assert "p@h" not in without_secrets("cannot reach postgresql://u:p@h/d")


def test_a_job_serves_the_first_preview_meanwhile(world: World) -> None:
    """The Job is a real process: it reports the commit before the Space does, and ends when the Space is ready."""
    sha = world.commit()
    world.hub.build = 3.0
    result = world.deploy(fast_from="team/small", secrets={"DATABASE_URL": "sqlite:///x"})
    (job,) = world.hub.jobs.values()
    assert job.asked["spaceId"] == "team/small" and job.asked["volumes"][0]["source"] == world.target.space
    assert job.asked["environment"]["PREVIEW_COMMIT"] == sha and "DATABASE_URL" not in str(job.asked)
    assert result.job_seconds is not None and result.job_seconds < 3.0 < result.seconds
    assert job.stage == "CANCELED" and job.process.poll() is not None and world.runs() == sha
    assert [line for line in world.lines if "$0.02 an hour" in line and "open to all" in line]


def test_without_credit_there_is_no_job_and_the_space_comes_all_the_same(world: World) -> None:
    sha = world.commit()
    world.refuse("POST", "/api/jobs/team", 402)
    assert world.deploy(fast_from="team/small").job_seconds is None and world.runs() == sha
    assert [line for line in world.lines if "no Job" in line and "credit" in line]


def test_a_canceled_workflow_ends_its_job(world: World) -> None:
    world.commit()
    world.hub.build = 60.0
    running = world.start("deploy", "--branch", "x", "--fast")
    while not world.hub.jobs and running.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    running.terminate()
    assert running.wait(30) == 130
    (job,) = world.hub.jobs.values()
    assert job.stage == "CANCELED" and job.process.poll() is not None


def test_a_paused_space_is_started(world: World) -> None:
    live(world)
    while world.space.stage != "RUNNING":
        time.sleep(0.05)
    world.hub.stop(world.space)
    world.space.stage = "PAUSED"
    sha = world.commit(part="A = 1\n")
    result = world.deploy(sha)
    assert result.path == "restart" and "PAUSED" in result.reason and world.runs() == sha
    assert "the Space is paused: starting it" in world.lines


def test_a_restart_that_comes_to_nothing_falls_back_to_a_build(world: World) -> None:
    live(world)
    world.hub.stuck = 1
    (world.folder / "notes.txt").write_text("not Python")
    sha = world.commit()
    result = world.deploy(sha, timeout=3.0)
    assert [why.partition(":")[0] for why in result.fallbacks] == ["restart"] and world.runs() == sha
    assert list(result.by_path) == ["restart", "build"] and result.by_path["restart"] >= 1.5


@pytest.mark.parametrize("path", ["restart", "build"])
def test_more_than_is_needed_can_be_asked_for(world: World, path: str) -> None:
    live(world)
    sha = world.commit(part="A = 1\n")
    for _ in range(2):  # the second time nothing has changed
        told = json.loads(world.cli("deploy", "--branch", "x", "--path", path, "--json"))
        assert (told["path"], told["reason"], told["sha"]) == (path, "asked for", sha) and world.runs() == sha
    assert ("POST /api/spaces/team/small-x-2d711642/restart" in world.hub.requests) == (path == "build")


def test_what_each_path_took_is_told(world: World) -> None:
    live(world)
    world.hub.cancel = 1
    result = world.deploy(world.commit(part="A = 1\n"))
    assert list(result.by_path) == ["hot reload", "restart"]
    assert sum(result.by_path.values()) <= result.seconds and result.since == "start" and result.own_seconds > 0


def test_seconds_count_from_the_push(world: World) -> None:
    live(world)
    world.commit(part="A = 1\n")
    told = json.loads(world.cli("deploy", "--branch", "x", "--pushed-at", str(time.time() - 100), "--json"))
    assert told["since"] == "push" and 100 <= told["seconds"] < 160 and told["path"] == "hot reload"


def test_another_branchs_space_is_left_alone(world: World) -> None:
    """As it would be if the digits of two branches' hashes were the same."""
    live(world)
    world.space.variables["PREVIEW_BRANCH"] = "y"
    before = len(world.hub.uploads)
    refusal(lambda: world.deploy(world.commit(part="A = 1\n")), Exit.CONFLICT, "another branch, 'y'")
    assert len(world.hub.uploads) == before


def test_files_of_before_the_last_commit_are_not_built_upon(world: World) -> None:
    """The Hub names the newer commit and lists the files of before it: that would keep what somebody has added."""
    live(world)
    before = httpx.get(f"{world.hub.address}/api/spaces/{world.target.space}/tree/main", headers=PROOF).json()
    world.hub.commit(world.space, "Add NOTES", {"NOTES": b"hand-made"})
    world.hub.answers["GET", "/tree/main"] = [(200, before, {})]
    sha = world.commit(part="A = 1\n")
    world.deploy(sha)
    assert world.runs() == sha and "NOTES" not in world.space.files
    assert "somebody else committed to this Space; looking again" in world.lines


def test_large_files_go_through_lfs_and_only_once(world: World) -> None:
    """By Git LFS, which HF_HUB_DISABLE_XET chooses: the stand-in has none of Xet's storage."""
    picture = bytes(range(256)) * 8
    (world.folder / "photo.jpg").write_bytes(picture)
    live(world)
    assert world.space.files["photo.jpg"] == picture and list(world.hub.large.values()) == [picture]
    world.hub.large.clear()
    assert world.deploy(world.commit(part="A = 1\n")).path == "hot reload" and not world.hub.large


def test_a_hub_that_makes_another_space_is_asked_again_with_pauses(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha = world.commit()
    patient()
    try:
        world.hub.conflicts = 2
        began = time.monotonic()
        world.deploy(sha)
        assert world.runs() == sha and time.monotonic() - began > 1.4
        world.hub.delete_all()
        world.hub.conflicts = 1000
        monkeypatch.setattr(hubs, "SILENCE", 0.5)
        monkeypatch.setattr(hubs, "TRIES", 1)
        refusal(world.deploy, Exit.NETWORK, "create the Space", "another conflicting operation")
        assert world.hub.conflicts > 980
    finally:
        set_client_factory(default_client_factory)


def test_a_token_goes_to_the_hub_and_its_spaces_alone() -> None:
    hub = Hub(TOKEN)
    with_it = {"Authorization": f"Bearer {TOKEN}"}
    assert hub._proof("https://team-small.hf.space/healthz") == with_it
    for url in ("https://job0--7860.hf.jobs/healthz", "http://team-small.hf.space", "https://hf.space.example.org"):
        assert hub._proof(url) == {}


# ── The other commands ──────────────────────────────────────────────────────────────────────────────────────────────


def test_previews_are_listed_opened_read_and_deleted(world: World) -> None:
    sha = live(world)
    (row,) = json.loads(world.cli("list", "--json"))
    assert (row["branch"], row["revision"], row["stage"]) == ("x", sha[:12], "RUNNING")
    assert world.cli("open", "--branch", "x").strip() == f"{world.hub.address}/{world.space.subdomain}"
    world.space.log = ["starting", f"a line with {TOKEN}"]
    said = world.cli("logs", "--branch", "x")
    assert said.splitlines() == ["starting", "a line with •••"]
    assert json.loads(world.cli("delete", "--branch", "x", "--json"))["deleted"] is True
    assert json.loads(world.cli("delete", "--branch", "x", "--json"))["deleted"] is False
    assert world.cli("list") == "nothing\n" and "does not exist" in world.failure(5, "open", "--branch", "x")


def test_what_is_not_ours_is_not_deleted(world: World) -> None:
    live(world)
    world.space.variables["PREVIEW_OF"] = "other"
    assert "stays" in world.failure(6, "delete", "--branch", "x")
    assert world.cli("sweep") == "nothing\n" and world.target.space in world.hub.spaces


def test_a_second_rollback_goes_further_back(world: World) -> None:
    shas = [live(world), *(world.commit(part=f"A = {n}\n") for n in range(2))]
    for sha in shas[1:]:
        world.deploy(sha)
    for expected in (shas[1], shas[0]):
        assert json.loads(world.cli("rollback", "--branch", "x", "--json"))["sha"] == expected == world.runs()
    assert "no earlier commit" in world.failure(5, "rollback", "--branch", "x")
    assert json.loads(world.cli("rollback", "--branch", "x", "--to", shas[2][:9], "--json"))["sha"] == shas[2]


def test_a_branch_that_is_made_after_the_fetch_is_not_swept(world: World, tmp_path: Path) -> None:
    """A checkout knows the branches of when it was fetched: a newer Space may be a newer branch's."""
    world.commit()
    world.git("branch", "other")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "-b", "other", str(world.folder), str(clone)], check=True)
    subprocess.run(["git", "-C", str(clone), "fetch", "-q"], check=True)
    world.git("checkout", "-q", "-b", "late", "x")
    world.cli("deploy", "--branch", "late")
    assert world.cli("sweep", "--fetched", "--folder", str(clone)) == "nothing\n" and len(world.hub.spaces) == 1
    (space,) = world.hub.spaces.values()
    space.made = "2026-01-01T00:00:00.000Z"
    assert "late" in world.cli("sweep", "--fetched", "--folder", str(clone), "--dry-run") and world.hub.spaces
    assert "late" in world.cli("sweep", "--fetched", "--folder", str(clone)) and not world.hub.spaces


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["deploy", "--branch", "a\nb"], "without control characters"),
        (["deploy", "--branch", ""], "a branch's name is needed"),
        (["deploy", "--branch", "x", "--sha", "no-such-commit"], "git knows no commit"),
        (["deploy", "--branch", "x", "--sha", "--upload-pack=touch"], "expected one argument"),
        (["deploy", "--branch", "x", "--secret", "NOT_SET"], "is not set here"),
        (["deploy", "--branch", "x", "--variable", "NOTHING"], "NAME=VALUE"),
        (["deploy", "--branch", "x", "--pushed-at", "tomorrow"], "seconds since 1970"),
        (["deploy", "--branch", "x", "--owner", "o" * 50], "leaves no room"),
        (["logs", "--branch", "x", "--lines", "0"], "1 or more"),
        (["delete", "--branch", "x", "--production"], "not deleted by this program"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_done(
    world: World, arguments: list[str], words: str
) -> None:
    world.commit()
    assert words in world.failure(2, *arguments)
    assert not world.hub.spaces


def test_without_a_branch_one_must_be_named(world: World) -> None:
    world.commit()
    world.git("checkout", "-q", "--detach")
    assert "name one with --branch" in world.failure(2, "deploy")


def test_what_nobody_foresaw_is_told_without_secrets(world: World) -> None:
    world.commit()
    world.hub.answers["GET", "/tree/main"] = [(200, [{"type": "file", "path": TOKEN}], {})] * 9
    said = world.failure(1, "deploy", "--branch", "x", "--json")
    assert "Something unforeseen went wrong: KeyError" in said and TOKEN not in said


def test_a_passing_line_is_replaced_on_a_terminal_and_rare_elsewhere() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, shown in ((Terminal(), 2), (io.StringIO(), 0)):
        progress = Progress(stream)
        progress.say("a line that stays")
        progress.tick("one")
        progress.tick("two")
        progress.done()
        assert "stays" in stream.getvalue() and stream.getvalue().count("\r\x1b[K[") == shown


def test_files_come_in_the_order_of_their_imports_with_the_stamp_last(world: World) -> None:
    sha = live(world)
    there, front = Hub(TOKEN).files(world.target.space), "title: Small\nsdk: gradio\n"
    old = {"app.py": (world.folder / "app.py").read_bytes(), "part.py": b'"""A part."""\n'}

    def planned(commit: str) -> Plan:
        source = read(world.folder, commit)
        program = Program(source.python)
        return plan(source, there, front, lambda paths: {path: old[path] for path in paths}, lambda: program)

    made = planned(world.commit(a="import part\n", part="B = 1\n", zoo="import a\n"))
    assert [file.path for file in made.send] == ["part.py", "a.py", "zoo.py", "app.py"]
    assert planned(sha).path.value == "nothing"
    (world.folder / "README.md").write_text(README.replace("Small", "Other"))
    assert planned(world.commit()).path.value == "build"


def test_what_only_people_read_restarts_nothing_and_goes_along_with_the_next_restart(world: World) -> None:
    live(world)
    (world.folder / "README.md").write_text(README + "More words.\n")
    (world.folder / "docs").mkdir()
    (world.folder / "docs" / "picture.png").write_bytes(b"\x89PNG")
    sha = world.commit()
    result = world.deploy(sha)
    assert (result.path, world.runs()) == ("hot reload", sha) and "docs/picture.png" not in world.space.files
    assert world.deploy(sha).path == "nothing"
    (world.folder / "notes.txt").write_text("not Python")
    assert world.deploy(world.commit()).path == "restart"
    assert world.space.files["docs/picture.png"] == b"\x89PNG" and b"More words" in world.space.files["README.md"]


def test_git_tells_the_branches(world: World, tmp_path: Path) -> None:
    world.commit()
    world.git("branch", "日本/x")
    assert branches(world.folder) == {"x", "日本/x"}
    subprocess.run(["git", "clone", "-q", str(world.folder), str(tmp_path / "clone")], check=True)
    assert branches(tmp_path / "clone") == branches(tmp_path / "clone", fetched=True) == {"x", "日本/x"}
