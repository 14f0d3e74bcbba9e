"""Request latency while a fine-tuning run trains in the background: p50 and p99, against the idle server."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bench.app import ROOT, free_port, start, stop, wait_for_page
from training.runs.run import Run, RunConfig

REQUESTS = 300
PAUSE = 0.02  # seconds between two requests


def rows() -> list[dict[str, Any]]:
    """Measure one server before and during a run of `training.grpo`."""
    port = free_port()
    server = start(["app.py"], port)
    try:
        wait_for_page(server, port)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            requests = {"/models": lambda: _models(client), "a page": lambda: client.get("/").raise_for_status()}
            for request in requests.values():
                _times(request, 40)
            idle = {name: _times(request) for name, request in requests.items()}
            with tempfile.TemporaryDirectory() as folder:
                child = _start_run(Path(folder))
                busy = {name: _times(request) for name, request in requests.items()}
                ended = child.poll()
                child.kill()
                child.wait()
                if ended is not None:
                    raise RuntimeError("the run ended before the measurement")
    finally:
        stop(server)
    return [_row(name, idle[name], busy[name]) for name in requests]


def _models(client: httpx.Client) -> None:
    client.post("/gradio_api/run/models", json={"data": []}).raise_for_status()


def _times(request: Any, count: int = REQUESTS) -> np.ndarray:
    """Return the milliseconds of each request."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        request()
        times.append(1000 * (time.perf_counter() - started))
        time.sleep(PAUSE)
    return np.array(times)


def _start_run(folder: Path) -> subprocess.Popen[bytes]:
    """Start a run and wait for its first step."""
    config = RunConfig.create(base="moondream-tiny", reward={"sharpness": 1.0}, seed=1, steps=1_000)
    (folder / "config.json").write_text(json.dumps(config.model_dump()))
    command = [sys.executable, "-m", "training.grpo", str(folder)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not Run(folder).metrics():
        if child.poll() is not None:
            raise RuntimeError("the run ended before its first step")
        time.sleep(0.2)
    return child


def _row(name: str, idle: np.ndarray, busy: np.ndarray) -> dict[str, Any]:
    before, during = (np.percentile(times, [50, 99]) for times in (idle, busy))
    return {
        "name": f"latency: {name} while a run trains, p99",
        "value": round(float(during[1]), 1),
        "unit": "ms",
        "baseline": round(float(before[1]), 1),
        "ratio": round(float(during[1] / before[1]), 2),
        "target": "ratio <= 2",
        "note": f"against the idle server; p50 {during[0]:.1f} and {before[0]:.1f} ms, {REQUESTS} requests each",
    }
