"""Tests of runs on Hugging Face Jobs: production code over HTTP against a fake Hub that executes jobs as processes."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from tests.support.fake_run import write_adapter
from tests.support.hub_server import TOKEN, HubServer
from tests.support.runs import make_config, until
from training.grpo.alarms import Alarm
from training.runs import hf_jobs
from training.runs.hf_jobs import CODE_PACKAGES, LOG_MARKER, JobInfo, list_hardware, run_on_jobs, submit
from training.runs.run import Run, RunConfig, RunError, RunStore

pytestmark = pytest.mark.slow

OWNER = {"owner": "hf:4711-the-owner", "owner_name": "Ada Owner"}
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return RunStore(tmp_path / "runs").create(make_config(backend="jobs"))


def follow(run: Run) -> dict[str, Any] | None:
    return run_on_jobs(run, run.config(), lambda phase: None)


def marked(kind: str, **row: Any) -> str:
    return LOG_MARKER + json.dumps([kind, row])


def start(run: Run, hub: HubServer) -> subprocess.Popen[str]:
    """Start the training command as a user does."""
    env = os.environ | {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "training.grpo", str(run.folder), "--where", "jobs"]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_job_completes_although_its_follower_was_killed(hub: HubServer, tmp_path: Path) -> None:
    """Train for real: submit, follow, kill the follower, resume, and download the outputs."""
    small = {"steps": 2, "photos_per_step": 1, "rollouts": 2, "max_photos": 3, "probe_every": 1}
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    (run.folder / "config.json").write_text(make_config(**small).model_dump_json())
    follower = start(run, hub)
    until(lambda: JobInfo.load(run))
    follower.send_signal(signal.SIGKILL)
    follower.wait()
    assert run.status().state == "interrupted"
    hub.dropped_streams = 2
    output, _ = start(run, hub).communicate(timeout=240)
    summary = json.loads(output.splitlines()[-1])
    assert summary["state"] == "done" and summary["wins"] in (True, False), output
    assert len(hub.jobs) == 1, "the follower found the running job"
    assert run.status().state == "done" and run.status().step == 2
    assert [row["step"] for row in run.metrics()] == [1, 2]
    assert [row["step"] for row in run.probes()] == [0, 1, 2]
    assert run.has_adapter and (run.folder / "reward.png").is_file() and (run.folder / "pair-0.png").is_file()
    rollouts = run.rollouts(2)
    assert rollouts and rollouts["step"] == 2 and len(rollouts["groups"][0]["rollouts"]) == 2
    assert run.rollout_photo(rollouts["groups"][0]["photo"]).is_file()
    spec = hub.job_specs[0]
    assert spec["flavor"] == "l4x1" and spec["timeoutSeconds"] == 7200 and spec["secrets"] == {"HF_TOKEN": TOKEN}
    assert TOKEN not in output and hub.tokens <= {f"Bearer {TOKEN}", ""}
    assert all(TOKEN.encode() not in file.read_bytes() for file in run.folder.rglob("*") if file.is_file())


def test_marked_log_lines_are_written_to_the_run_folder(
    hub: HubServer, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    alarm = asdict(Alarm("cut_subject", "Cut", "Why", "What to do", 1, 1, 0, "a.jpg", "crop 40 40 100 100"))
    hub.job_log = [
        "loading",
        marked("status", state="running", phase="training", step=0, steps=3),
        marked("metrics", step=1, reward=0.5),
        marked("probes", step=1, recipe="crop 0 0 100 100"),
        LOG_MARKER + json.dumps(["alarms", [alarm, {"kind": "../../escape"}, 3]]),
        LOG_MARKER + json.dumps(["alarms", {"kind": "cut_subject"}]),
        marked("metrics", step=2, reward=0.6),
        LOG_MARKER + "no JSON",
        LOG_MARKER + '["metrics", 3]',
        marked("status", state="failed", phase="", step=2, steps=3, message="A reward gave nan."),
    ]
    hub.job_stage = "ERROR"
    hub.dropped_streams = 1
    with pytest.raises(RunError, match=r"A reward gave nan\."):
        follow(run)
    assert [line["reward"] for line in run.metrics()] == [0.5, 0.6], "no row is duplicated after the stream broke off"
    assert run.probes()[0]["recipe"].startswith("crop") and run.status().step == 2
    assert run.alarms() == [alarm]
    assert all(path.is_file() for path in run.alarm_pictures("cut_subject")), "drawn here, from the same photos"
    printed = capsys.readouterr().out
    assert "loading" in printed and LOG_MARKER not in printed
    assert JobInfo.load(run) is None, "resuming starts a new job"


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("/api/whoami", 401, "does not recognize this token"),
        ("/api/jobs/me", 402, "no credit"),
        ("/api/jobs/me", 403, "may not run Jobs"),
        ("/api/jobs/me", 429, "limiting requests"),
        ("/api/datasets", 403, "may not run Jobs"),
    ],
)
def test_refused_request_names_a_remedy_but_not_the_token(
    hub: HubServer, run: Run, path: str, code: int, message: str
) -> None:
    hub.refuse[path] = code
    with pytest.raises(RunError, match=message) as error:
        follow(run)
    assert TOKEN not in str(error.value) and JobInfo.load(run) is None


def test_job_that_ends_without_a_status_fails_the_run(hub: HubServer, run: Run) -> None:
    hub.job_log, hub.job_stage = ["Killed"], "ERROR"
    with pytest.raises(RunError, match=r"ended as ERROR \(Out of memory\)"):
        follow(run)


def test_missing_token_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_jobs, "get_token", lambda: None)
    with pytest.raises(RunError, match="token is needed"):
        follow(run)


def test_unreachable_hub_fails_the_run(run: Run, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match="could not be reached"):
        follow(run)


def test_missing_local_photos_are_reported_as_what_they_are(hub: HubServer, tmp_path: Path) -> None:
    run = RunStore(tmp_path / "runs").create(make_config(backend="jobs", photos=str(tmp_path / "gone.zip")))
    with pytest.raises(RunError, match=r"gone\.zip.*No such file") as error:
        follow(run)
    assert "Hub" not in str(error.value) and str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_local_disk_error_is_reported_as_what_it_is(
    hub: HubServer, run: Run, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(path: Path, content: str) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(hf_jobs, "write_atomically", fail)
    with pytest.raises((RunError, OSError)) as error:
        follow(run)
    assert os.strerror(code) in str(error.value) and "Hub" not in str(error.value)
    assert isinstance(error.value, OSError) == (code == errno.ENOSPC), "the caller explains a full disk"


def test_internal_error_is_not_reported_as_an_unreachable_hub(
    hub: HubServer, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(hf_jobs, "_write_inputs", fail)
    with pytest.raises(ValueError, match="a bug"):
        follow(run)


def test_dropped_connection_is_an_unreachable_hub() -> None:
    for error in (ConnectionResetError(104, "Connection reset by peer"), TimeoutError("timed out"), ssl.SSLError()):
        with pytest.raises(RunError, match="could not be reached"), hf_jobs._hub_errors():
            raise error


def test_cancelled_job_is_ended_if_it_does_not_stop(hub: HubServer, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_jobs, "CANCEL_GRACE_SECONDS", 0.3)
    monkeypatch.setattr(hf_jobs, "COMMAND", "sleep 600")
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(follow(run)))
    thread.start()
    until(lambda: JobInfo.load(run))
    run.cancel()
    thread.join(60)
    assert results == [None] and hub.jobs["job0"].stage == "CANCELED"
    assert (hub.files / "runs" / run.id / "cancel").is_file()


def test_local_photos_base_and_code_are_uploaded(hub: HubServer, tmp_path: Path) -> None:
    parent = RunStore(tmp_path / "runs").create(make_config(reward={"colour": 1}), **OWNER)
    write_adapter(parent)
    photos = tmp_path / "mine"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"photo")
    config = make_config(backend="jobs", base=str(parent.folder), photos=str(photos), held_out="hub:me/photos")
    run = RunStore(tmp_path / "runs").create(config, **OWNER)
    hub.job_log = []
    submit(run, run.config(), huggingface_hub.HfApi(token=TOKEN))
    inputs = hub.files / "runs" / run.id
    config = RunConfig.from_json((inputs / "config.json").read_bytes())
    assert (config.backend, config.base, config.photos, config.held_out) == ("here", "base", "photos", "hub:me/photos")
    assert (inputs / "photos" / "a.jpg").read_bytes() == b"photo"
    assert (inputs / "base" / "adapter" / "adapter_model.safetensors").is_file()
    assert RunConfig.from_json((inputs / "base" / "config.json").read_bytes()).base == "moondream-tiny"
    files = [file for file in inputs.rglob("*") if file.is_file()]
    assert "owner.json" not in {file.name for file in files}
    assert not any(value.encode() in file.read_bytes() for file in files for value in OWNER.values())
    assert str(tmp_path) not in (inputs / "config.json").read_text() + (inputs / "base" / "config.json").read_text()
    assert (hub.files / "code" / "training" / "runs" / "job_entrypoint.py").is_file()


def test_hardware_is_listed_with_prices_per_hour(hub: HubServer) -> None:
    large, small = list_hardware()
    assert (large.name, large.description) == ("l4x1", "1 x L4 24 GB, 8 vCPU, 30 GB")
    assert large.hourly == pytest.approx(0.8, abs=0.001) and small.hourly == pytest.approx(0.01, abs=0.0005)


def test_uploaded_packages_contain_all_first_party_imports() -> None:
    packages = {folder.name for folder in ROOT.iterdir() if (folder / "__init__.py").is_file()} - {"tests"}
    imported = {
        name
        for package in set(CODE_PACKAGES) & packages
        for file in (ROOT / package).rglob("*.py")
        for name in re.findall(r"^\s*(?:from|import) (\w+)", file.read_text(), re.MULTILINE)
    }
    assert imported & packages <= set(CODE_PACKAGES)
