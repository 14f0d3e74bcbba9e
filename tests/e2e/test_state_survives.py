"""The application's process is killed and loses its disk; it starts again with the state from its bucket.

Simulated are the Hub with its bucket, the model, and the training. Real are the application's process, its database,
the HTTP requests to it, and the clients of Hub and Xet storage.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client

from bench.app import free_port
from settings import ROOT
from storage.state.remote import BucketClient
from tests.support.api_client import PHOTO_URL
from tests.support.bucket_server import TOKEN, BucketServer, run_bucket_server
from tests.support.runs import FAKE, until
from training.runs.queue import RunQueue
from training.runs.run import RunStore

pytestmark = pytest.mark.slow

BUCKET = "team/state"
SAVE_SECONDS = "1"
PAUSE = "0.2"  # seconds per step of a run
LONG_RUN = 400  # steps, more than the test waits for


class App:
    """The application's process, its disk, and a client of it.

    Attributes:
        data_dir: Its disk.
        output: What it printed.
    """

    def __init__(self, folder: Path, name: str, hub: BucketServer, **variables: str) -> None:
        self.data_dir, self.output = folder / name / "data", folder / f"{name}.log"
        self.address = f"http://127.0.0.1:{free_port()}"
        env = {"PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        env |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SERVER_PORT": self.address.rpartition(":")[2]}
        env |= {"DATA_DIR": str(self.data_dir), "HF_ENDPOINT": hub.address, "FAKE_RUN_PAUSE": PAUSE}
        env |= {"STATE_BUCKET": BUCKET, "STATE_BUCKET_TOKEN": TOKEN, "STATE_BUCKET_SECONDS": SAVE_SECONDS}
        env = {name: value for name, value in (env | variables).items() if value}
        with self.output.open("w") as output:
            command = [sys.executable, "-m", "tests.support.app_main"]
            self.process = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
        until(self._responds)

    def _responds(self) -> bool:
        assert self.process.poll() is None, self.output.read_text()
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self.address}/healthz", timeout=10).is_success
        return False

    def client(self) -> Client:
        """Return a client of the named endpoints."""
        return Client(self.address, verbose=False)

    def query(self) -> None:
        """Call the model once through /v1."""
        body = {"model": "one", "image_url": PHOTO_URL, "question": "What is this?"}
        httpx.post(f"{self.address}/v1/query", json=body, timeout=60).raise_for_status()

    def calls(self) -> int:
        """Return the number of recorded calls of the model."""
        text = httpx.get(f"{self.address}/v1/usage.csv", params={"model": "one"}, timeout=60).raise_for_status().text
        return len(text.splitlines()) - 1

    def page(self) -> str:
        """Return the status that the page shows to the administrator about its state; "" if all is well."""
        config = httpx.get(f"{self.address}/config", timeout=60).json()
        (note,) = (item["id"] for item in config["components"] if item["props"].get("elem_id") == "state-notice")
        (event,) = (item["id"] for item in config["dependencies"] if item["outputs"] == [note])
        session = f"state{event}"
        join = {"data": [], "fn_index": event, "session_hash": session}
        httpx.post(f"{self.address}/gradio_api/queue/join", json=join, timeout=60).raise_for_status()
        with httpx.stream("GET", f"{self.address}/gradio_api/queue/data?session_hash={session}", timeout=60) as stream:
            lines = [line for line in stream.iter_lines() if "process_completed" in line]
        return lines[0]

    def kill(self) -> None:
        """Kill the application and its training processes, as at the end of a container, and delete its disk."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for file in self.data_dir.glob("runs/*/pid"):
            with suppress(ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGKILL)
        shutil.rmtree(self.data_dir)

    def terminate(self) -> None:
        """End the application with SIGTERM."""
        self.process.terminate()
        assert self.process.wait(60) == 0, self.output.read_text()


@contextmanager
def started(folder: Path, name: str, hub: BucketServer, **variables: str) -> Iterator[App]:
    """Start an application with a disk of its own and more environment variables, and end what is left of it."""
    app = App(folder, name, hub, **variables)
    try:
        yield app
    finally:
        if app.process.poll() is None:
            app.kill()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketServer]:
    """Provide a simulated Hub with one empty bucket."""
    with run_bucket_server(BUCKET) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield server


def saved_paths(hub: BucketServer) -> str:
    """Return the last manifest as text."""
    return (BucketClient(BUCKET, TOKEN).read(hub.paths(BUCKET, "manifests/")[-1]) or b"").decode()


def wait_for_saves(hub: BucketServer, count: int) -> None:
    """Wait for complete saves; of two, the second has begun after this call."""
    generations = {hub.paths(BUCKET, "manifests/")[-1]} if hub.paths(BUCKET, "manifests/") else set()
    before = len(generations)

    def enough() -> bool:
        generations.update(hub.paths(BUCKET, "manifests/")[-1:])
        return len(generations) >= before + count

    until(enough)


def run_states(client: Client) -> dict[str, dict[str, Any]]:
    return {run["name"]: run for run in client.predict(api_name="/runs")}


def start_run(client: Client, name: str, steps: int) -> str:
    arguments = ({"sharpness": 1}, "moondream-tiny", "bundled", steps, 1, name)
    return client.predict(*arguments, api_name="/retrain")["run"]


def test_killed_application_continues_on_a_new_disk(hub: BucketServer, tmp_path: Path) -> None:
    stop = threading.Event()
    with started(tmp_path, "first", hub) as app:
        client = app.client()
        client.predict("my weights", {"sharpness": 0.3, "colour": 0.7}, api_name="/save_reward_function")
        finished = start_run(client, "finished", 6)
        until(lambda: run_states(client)["finished"]["state"] == "done")
        until(lambda: run_states(client)["finished"]["in_use"])
        interrupted = start_run(client, "interrupted", LONG_RUN)
        until(lambda: run_states(client)["interrupted"]["step"] >= 6)
        for _ in range(5):
            app.query()
        until(lambda: app.calls() == 5)

        def keep_calling() -> None:
            with suppress(httpx.HTTPError):
                while not stop.is_set():
                    app.query()

        caller = threading.Thread(target=keep_calling)
        caller.start()
        wait_for_saves(hub, 2)
        assert f"runs/{interrupted}/checkpoint-" in saved_paths(hub)
        assert app.page() and "not saved" not in app.page()
        app.kill()
        stop.set()
        caller.join()
    with started(tmp_path, "second", hub) as app:
        client = app.client()
        assert client.predict(api_name="/reward_functions")["my weights"] == {"sharpness": 0.3, "colour": 0.7}
        states = run_states(client)
        assert states["finished"]["state"] == "done" and states["finished"]["in_use"]
        assert client.predict(finished, api_name="/run_status")["result"]["wins"] is True
        assert f"run-{finished}" in {model["name"] for model in client.predict(api_name="/models")}
        assert states["interrupted"]["state"] == "interrupted" and states["interrupted"]["step"] >= 5
        until(lambda: app.calls() >= 5)
        calls = app.calls()
        for _ in range(3):
            app.query()
        app.terminate()  # saves a last time
        assert "lease.json" not in hub.paths(BUCKET)
        store = RunStore(app.data_dir / "runs")
        queue = RunQueue(store, FAKE)
        queue.resume(store.get(interrupted))
        until(lambda: store.get(interrupted).status().state == "done")
        queue.stop()
        log = store.get(interrupted).log(lines=10_000)
        first_step = int(log.rpartition("begins at step ")[2].split()[0])
        assert first_step >= 5 and first_step % 5 == 0
        steps = [row["step"] for row in store.get(interrupted).metrics()]
        assert steps == list(range(1, LONG_RUN + 1)), "no step is missing or repeated"
        shutil.rmtree(app.data_dir)
    with started(tmp_path, "third", hub) as app:
        until(lambda: app.calls() == calls + 3)
        assert (app.data_dir / "runs" / finished / "adapter" / "adapter_model.safetensors").is_file()


def test_failing_bucket_is_shown_and_its_state_is_kept(hub: BucketServer, tmp_path: Path) -> None:
    with started(tmp_path, "first", hub) as app:
        app.client().predict("kept", {"sharpness": 1}, api_name="/save_reward_function")
        app.terminate()
    before = hub.paths(BUCKET)
    hub.on_request = lambda _method, path: 500 if "/buckets/" in path else 0
    with started(tmp_path, "second", hub) as app:
        assert "started without its saved state" in app.page() and "status 500" in app.output.read_text()
        app.client().predict("lost", {"sharpness": 1}, api_name="/save_reward_function")
        hub.on_request = lambda _method, _path: 0
        until(lambda: "Restart the application" in app.page())
        app.terminate()
        assert TOKEN not in app.output.read_text()
    assert [path for path in hub.paths(BUCKET) if path != "lease.json"] == before
    with started(tmp_path, "third", hub) as app:
        functions = app.client().predict(api_name="/reward_functions")
        assert "kept" in functions and "lost" not in functions
        until(lambda: "not saved" not in app.page())


def test_second_replica_takes_over_and_the_first_one_reports_it(hub: BucketServer, tmp_path: Path) -> None:
    with started(tmp_path, "first", hub) as first:
        first.client().predict("shared", {"sharpness": 1}, api_name="/save_reward_function")
        until(lambda: '"playground.sqlite3"' in saved_paths(hub) if hub.paths(BUCKET, "manifests/") else False)
        with started(tmp_path, "second", hub) as second:
            first.client().predict("older", {"sharpness": 1}, api_name="/save_reward_function")
            second.client().predict("newer", {"sharpness": 1}, api_name="/save_reward_function")
            until(lambda: "a newer process of this deployment" in first.page())
            second.terminate()
            first.terminate()
    with started(tmp_path, "third", hub) as app:
        functions = app.client().predict(api_name="/reward_functions")
        assert "newer" in functions and "older" not in functions


def test_space_saves_at_sigterm_and_says_that_it_forgets_without_a_bucket(hub: BucketServer, tmp_path: Path) -> None:
    with started(tmp_path, "first", hub, SPACE_ID="team/space", STATE_BUCKET_SECONDS="3600") as app:
        app.terminate()
    assert '"playground.sqlite3"' in saved_paths(hub) and "lease.json" not in hub.paths(BUCKET)
    with started(tmp_path, "second", hub, SPACE_ID="team/space", STATE_BUCKET="") as app:
        assert "no lasting disk" in app.page() and "STATE_BUCKET" not in app.page()
