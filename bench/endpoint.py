"""The API under load: 1, 8 and 32 clients at once on moondream-tiny, against the model called in a loop; its memory."""

from __future__ import annotations

import base64
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from inference.registry import answer
from inference.types import Request
from recipes import load_photo

ROOT = Path(__file__).resolve().parent.parent
PHOTO = ROOT / "assets" / "photos" / "chelsea.jpg"
QUESTION, TOKENS = "Is the photo bright or dark?", 24
CLIENTS, SECONDS, ROUNDS = (1, 8, 32), 6.0, 3
MANY = 2000
SERVE = "import sys, pathlib, uvicorn, app; from settings import Settings; uvicorn.run(app.create_app(Settings(\
data_dir=pathlib.Path(sys.argv[1]))), host='127.0.0.1', port=int(sys.argv[2]), log_level='error')"


def rows() -> list[dict[str, Any]]:
    """The server is a process of its own; every request asks the same of the same photo, at temperature 0."""
    direct = _direct()
    with _served() as (address, process):
        body = _body()
        _load(address, body, 4, 1.0)  # loads the model
        rounds = {clients: [_load(address, body, clients, SECONDS) for _ in range(ROUNDS)] for clients in CLIENTS}
        memory = _memory(address, body, process)
    rates = {clients: statistics.median(len(times) / SECONDS for times in found) for clients, found in rounds.items()}
    found = [_row(clients, rates, rounds[clients], direct) for clients in CLIENTS]
    return [*found, *memory]


def _row(clients: int, rates: dict[int, float], rounds: list[list[float]], direct: float) -> dict[str, Any]:
    most = clients == max(CLIENTS)
    p50, p95, p99 = (1000 * statistics.median(np.percentile(times, p) for times in rounds) for p in (50, 95, 99))
    against = "one client" if most else "the model in a loop"
    base = rates[min(CLIENTS)] if most else direct
    return {
        "name": f"endpoint: requests a second, {clients} client{'s' * (clients > 1)}",
        "value": round(rates[clients], 1),
        "unit": "/s",
        "baseline": round(base, 1),
        "ratio": round(rates[clients] / base, 2),
        "target": "ratio >= 3" if most else None,
        "note": f"against {against}; p50 {p50:.0f}, p95 {p95:.0f}, p99 {p99:.0f} ms; the loop alone: {direct:.1f} /s",
    }


def _direct() -> float:
    """Answers a second of the model called in a loop, in this process."""
    asked = Request(load_photo(PHOTO), "query", QUESTION, temperature=0, max_tokens=TOKENS)
    list(answer("moondream-tiny", asked))
    end, count = time.perf_counter() + SECONDS, 0
    while time.perf_counter() < end:
        list(answer("moondream-tiny", asked))
        count += 1
    return count / SECONDS


def _body() -> bytes:
    url = f"data:image/jpeg;base64,{base64.b64encode(PHOTO.read_bytes()).decode()}"
    settings = {"temperature": 0, "max_tokens": TOKENS}
    return json.dumps({"image_url": url, "question": QUESTION, "settings": settings}).encode()


def _load(address: str, body: bytes, clients: int, seconds: float, count: int | None = None) -> list[float]:
    """The seconds that each request took, of clients that ask again as soon as they are answered."""
    times: list[float] = []
    end = time.perf_counter() + seconds

    def ask() -> None:
        with httpx.Client(timeout=60, headers={"Content-Type": "application/json"}) as client:
            while time.perf_counter() < end if count is None else len(times) < count:
                start = time.perf_counter()
                client.post(f"{address}/v1/query", content=body).raise_for_status()
                times.append(time.perf_counter() - start)

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def _memory(address: str, body: bytes, process: psutil.Process) -> list[dict[str, Any]]:
    """What the process holds after a quarter of MANY requests, and after all of them."""
    held = []
    for _ in range(4):
        _load(address, body, 32, 0, MANY // 4)
        held.append(process.memory_info().rss / 2**20)
    return [
        {
            "name": f"endpoint: memory after {MANY} requests",
            "value": round(held[-1]),
            "unit": "MB",
            "baseline": round(held[0]),
            "ratio": round(held[-1] / held[0], 3),
            "target": "ratio <= 1.05",
            "note": f"resident, against after {MANY // 4}; 32 clients: {', '.join(f'{one:.0f}' for one in held)} MB",
        }
    ]


@contextmanager
def _served() -> Iterator[tuple[str, psutil.Process]]:
    from socket import create_server

    with create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", SERVE, folder, str(port)]
        running = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            while True:
                try:
                    httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=5).raise_for_status()
                    break
                except httpx.TransportError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}", psutil.Process(running.pid)
        finally:
            running.terminate()
            running.wait(20)
