"""A run on Hugging Face Jobs: the production code over HTTP, against a stand-in that executes a job as a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from tests.support.fake_run import write_adapter
from tests.support.hub_server import TOKEN, HubServer
from training.runs import hf_jobs as jobs
from training.runs.hf_jobs import MARK, Job, follow, hardware, submit
from training.runs.run import Run, RunConfig, RunError, RunStore

ROOT = Path(__file__).resolve().parents[3]
ASKED: dict[str, Any] = {"base": "moondream-tiny", "reward": {"sharpness": 1}, "seed": 7, "where": "jobs"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return RunStore(tmp_path / "runs").create(RunConfig.create(**ASKED))


def marked(kind: str, **line: Any) -> str:
    return MARK + json.dumps([kind, line])


def start(run: Run, hub: HubServer) -> subprocess.Popen[str]:
    """The command as a user gives it."""
    env = os.environ | {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "training.grpo", str(run.folder), "--where", "jobs"]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(what: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)


def test_a_run_on_jobs_comes_back_whole_though_its_follower_was_killed(hub: HubServer, tmp_path: Path) -> None:
    """A real fine-tune: sent, followed, the follower killed, found again, and brought home."""
    config = {key: value for key, value in ASKED.items() if key != "where"}
    few = {"steps": 2, "photos_per_step": 1, "rollouts": 2, "max_photos": 3, "probe_every": 1}
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    (run.folder / "config.json").write_text(json.dumps(config | few))
    first = start(run, hub)
    wait_for(lambda: Job.of(run))
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert run.status().state == "interrupted"
    hub.drop = 2
    out, _ = start(run, hub).communicate(timeout=240)
    told = json.loads(out.splitlines()[-1])
    assert told["state"] == "done" and told["wins"] in (True, False), out
    assert len(hub.jobs) == 1, "it was found again, not started again"
    assert run.status().state == "done" and run.status().step == 2
    assert [line["step"] for line in run.metrics()] == [1, 2]
    assert [line["step"] for line in run.probes()] == [0, 1, 2]
    assert run.has_adapter and (run.folder / "reward.png").is_file() and (run.folder / "pair-0.png").is_file()
    spec = hub.asked[0]
    assert spec["flavor"] == "l4x1" and spec["timeoutSeconds"] == 7200 and spec["secrets"] == {"HF_TOKEN": TOKEN}
    assert TOKEN not in out and hub.tokens <= {f"Bearer {TOKEN}", ""}
    assert all(TOKEN.encode() not in file.read_bytes() for file in run.folder.rglob("*") if file.is_file())


def test_what_a_job_tells_is_in_the_folder_as_if_it_were_here(
    hub: HubServer, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.lines = [
        "loading",
        marked("status", state="running", phase="training", step=0, steps=3),
        marked("metrics", step=1, reward=0.5),
        marked("probes", step=1, recipe="crop 0 0 100 100"),
        marked("metrics", step=2, reward=0.6),
        MARK + "no JSON",
        MARK + '["metrics", 3]',
        marked("status", state="failed", phase="", step=2, steps=3, message="A reward gave nan."),
    ]
    hub.stage = "ERROR"
    hub.drop = 1
    with pytest.raises(RunError, match=r"A reward gave nan\."):
        follow(run, run.config(), lambda words: None)
    assert [line["reward"] for line in run.metrics()] == [0.5, 0.6], "also when the stream breaks off, nothing twice"
    assert run.probes()[0]["recipe"].startswith("crop") and run.status().step == 2
    printed = capsys.readouterr().out
    assert "loading" in printed and MARK not in printed
    assert Job.of(run) is None, "to resume it means a new job"


@pytest.mark.parametrize(
    ("path", "code", "words"),
    [
        ("/api/whoami", 401, "does not know this token"),
        ("/api/jobs/me", 402, "no credit"),
        ("/api/jobs/me", 403, "may not run Jobs"),
        ("/api/jobs/me", 429, "asks to wait"),
        ("/api/datasets", 403, "may not run Jobs"),
    ],
)
def test_a_refusal_says_what_to_do_and_not_the_token(
    hub: HubServer, run: Run, path: str, code: int, words: str
) -> None:
    hub.refuse[path] = code
    with pytest.raises(RunError, match=words) as refused:
        follow(run, run.config(), lambda words: None)
    assert TOKEN not in str(refused.value) and Job.of(run) is None


def test_a_job_that_ends_without_a_word_is_a_failed_run(hub: HubServer, run: Run) -> None:
    hub.lines, hub.stage = ["Killed"], "ERROR"
    with pytest.raises(RunError, match=r"ended as ERROR \(Out of memory\)"):
        follow(run, run.config(), lambda words: None)


def test_without_a_token_nothing_is_sent(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "get_token", lambda: None)
    with pytest.raises(RunError, match="token is needed"):
        follow(run, run.config(), lambda words: None)


def test_a_hub_that_is_not_there_is_said(run: Run, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match="could not be reached"):
        follow(run, run.config(), lambda words: None)


def test_a_cancelled_run_is_told_to_its_job_and_ended_when_that_does_not_listen(
    hub: HubServer, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "GRACE", 0.3)
    monkeypatch.setattr(jobs, "COMMAND", "echo deaf; sleep 600")
    follower: list[Any] = []
    thread = threading.Thread(target=lambda: follower.append(follow(run, run.config(), lambda words: None)))
    thread.start()
    wait_for(lambda: Job.of(run))
    run.cancel()
    thread.join(60)
    assert follower == [None] and hub.jobs["job0"].stage == "CANCELED"
    assert (hub.files / "runs" / run.id / "cancel").is_file()


def test_own_photos_and_the_base_go_along(hub: HubServer, tmp_path: Path) -> None:
    before = RunStore(tmp_path / "runs").create(RunConfig.create(base="moondream-tiny", reward={"colour": 1}, seed=1))
    write_adapter(before)
    photos = tmp_path / "mine"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"photo")
    asked = ASKED | {"base": str(before.folder), "photos": str(photos), "held_out": "hub:me/photos"}
    run = RunStore(tmp_path / "runs").create(RunConfig.create(**asked))
    hub.lines = []
    submit(run, run.config(), huggingface_hub.HfApi(token=TOKEN))
    sent = hub.files / "runs" / run.id
    config = RunConfig.from_json((sent / "config.json").read_bytes())
    assert (config.backend, config.base, config.photos, config.held_out) == ("here", "base", "photos", "hub:me/photos")
    assert (sent / "photos" / "a.jpg").read_bytes() == b"photo"
    assert (sent / "base" / "adapter" / "adapter_model.safetensors").is_file()
    assert RunConfig.from_json((sent / "base" / "config.json").read_bytes()).base == "moondream-tiny"
    assert str(tmp_path) not in (sent / "config.json").read_text() + (sent / "base" / "config.json").read_text()
    assert (hub.files / "code" / "training" / "in_job.py").is_file()


def test_the_prices_are_those_of_today(hub: HubServer) -> None:
    large, small = hardware()
    assert (large.name, large.words) == ("l4x1", "1 x L4 24 GB, 8 vCPU, 30 GB")
    assert large.hourly == pytest.approx(0.8, abs=0.001) and small.hourly == pytest.approx(0.01, abs=0.0005)
