"""What goes wrong on the Hub's side, played by the stand-in: what is said, what is tried, and what goes on serving.

The application here is a small program with the two ports of a Gradio Space, so that it starts at once; the real one is
in test_branches.py.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from previews import deploy as deploying
from previews.changes import plan
from previews.deploy import Deployer, Options, Result, preview
from previews.errors import Exit, PreviewError, without_secrets
from previews.hub import Hub
from previews.source import branches, read
from tests.previews.stand_in_hub import TOKEN, Space, StandInHub, stand_in_hub

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
            Answers.commit = found[1] if found and "IGNORED" not in body["contents"] else Answers.commit
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
README = "---\ntitle: Small\nsdk: gradio\n---\n# Small\n"


class World:
    """A repository, a stand-in for the Hub, and a deployer between them."""

    def __init__(self, folder: Path, hub: StandInHub) -> None:
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

    def refuse(self, method: str, end: str, *answers: int, **headers: str) -> None:
        said = {"error": f"no, {TOKEN}"}
        self.hub.answers[method, end] = [(status, said, headers) for status in answers]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    import huggingface_hub.constants

    with stand_in_hub(tmp_path / "hub") as hub:
        (hub.folder / "site" / "sitecustomize.py").write_text("")  # nothing of Gradio's to change here
        hub.stale = 0.1
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(huggingface_hub.hf_api.constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(deploying, "HOT_LIMIT", 3.0)
        yield World(tmp_path / "repository", hub)


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
    [(401, Exit.ACCESS, "HF_TOKEN"), (403, Exit.ACCESS, "write access"), (402, Exit.PAYMENT, "PRO")],
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
    sha = world.commit(app=APP + "# IGNORED\n")
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
    assert len(ended) == 2 and any(isinstance(one, Result) for one in ended)
    assert all(isinstance(one, Result) or one is Exit.CONFLICT for one in ended) and world.runs() == sha


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
    world.commit()
    world.deploy(fast_from="team/small")
    (job,) = world.hub.jobs.values()
    assert job["asked"]["expose"] == {"ports": [7860], "portsPublic": [7860]} and job["status"]["stage"] == "CANCELED"
    assert job["asked"]["spaceId"] == "team/small" and job["asked"]["volumes"][0]["source"] == world.target.space
    assert [line for line in world.lines if "$0.02 an hour" in line and "hf.jobs" in line]


def test_files_come_in_the_order_of_their_imports_with_the_stamp_last(world: World) -> None:
    sha = live(world)
    there = Hub(TOKEN).files(world.target.space)
    front = "title: Small\nsdk: gradio\n"
    made = plan(read(world.folder, world.commit(a="import part\n", part="B = 1\n", zoo="import a\n")), there, front)
    assert [file.path for file in made.send] == ["part.py", "a.py", "zoo.py", "app.py"]
    assert plan(read(world.folder, sha), there, front).path.value == "nothing"
    (world.folder / "README.md").write_text(README.replace("Small", "Other"))
    assert plan(read(world.folder, world.commit()), there, front).path.value == "build"


def test_git_tells_the_branches(world: World, tmp_path: Path) -> None:
    world.commit()
    world.git("branch", "日本/x")
    assert branches(world.folder) == {"x", "日本/x"}
    subprocess.run(["git", "clone", "-q", str(world.folder), str(tmp_path / "clone")], check=True)
    assert branches(tmp_path / "clone") == branches(tmp_path / "clone", fetched=True) == {"x", "日本/x"}
