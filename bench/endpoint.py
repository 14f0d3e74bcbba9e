"""HTTP API under load: throughput and memory with 1, 8 and 32 clients, against the model called in a loop."""

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
from typing import Any

import httpx
import numpy as np
import psutil

from bench.app import ROOT, free_port
from inference.registry import answer
from inference.types import Request
from recipes import load_photo

PHOTO = ROOT / "assets" / "photos" / "chelsea.jpg"
QUESTION, TOKENS = "Is the photo bright or dark?", 24
CLIENTS, SECONDS, ROUNDS = (1, 8, 32), 6.0, 3
MEMORY_REQUESTS = 2000
SERVER = "import sys, pathlib, uvicorn, app; from settings import Settings; uvicorn.run(app.create_app(Settings(\
data_dir=pathlib.Path(sys.argv[1]))), host='127.0.0.1', port=int(sys.argv[2]), log_level='error')"


def rows() -> list[dict[str, Any]]:
    """Run the server in a separate process and send the same request at temperature 0 from several clients."""
    direct = _direct()
    with _served() as (address, process):
        url, chat_url = f"{address}/v1/query", f"{address}/v1/chat/completions"
        _load(url, _body(), 4, 1.0)  # warm-up: loads the model
        query = _rounds(url, _body(), CLIENTS)
        chat = _rounds(chat_url, _chat_body(), (min(CLIENTS), max(CLIENTS)))
        memory = _memory(url, _body(), process)
    return [
        *(_row("requests", clients, query, direct) for clients in query),
        *(_row("chat completions", clients, chat, direct) for clients in chat),
        *memory,
    ]


def _rounds(url: str, body: bytes, all_clients: tuple[int, ...]) -> dict[int, list[list[float]]]:
    """Return the durations of the requests of each round, by number of clients."""
    return {clients: [_load(url, body, clients, SECONDS) for _ in range(ROUNDS)] for clients in all_clients}


def _row(kind: str, clients: int, all_rounds: dict[int, list[list[float]]], direct: float) -> dict[str, Any]:
    rates = {
        count: statistics.median(len(times) / SECONDS for times in results) for count, results in all_rounds.items()
    }
    rounds = all_rounds[clients]
    is_maximum = clients == max(CLIENTS)
    p50, p95, p99 = (1000 * statistics.median(np.percentile(times, p) for times in rounds) for p in (50, 95, 99))
    reference = "one client" if is_maximum else "the model in a loop"
    baseline = rates[min(CLIENTS)] if is_maximum else direct
    return {
        "name": f"endpoint: {kind} a second, {clients} client{'s' * (clients > 1)}",
        "value": round(rates[clients], 1),
        "unit": "/s",
        "baseline": round(baseline, 1),
        "ratio": round(rates[clients] / baseline, 2),
        "target": "ratio >= 3" if is_maximum else None,
        "note": f"against {reference}; p50 {p50:.0f}, p95 {p95:.0f}, p99 {p99:.0f} ms; the loop alone: {direct:.1f} /s",
    }


def _direct() -> float:
    """Return the answers per second of the model called in a loop in this process."""
    request = Request(load_photo(PHOTO), "query", QUESTION, temperature=0, max_tokens=TOKENS)
    list(answer("moondream-tiny", request))
    end, count = time.perf_counter() + SECONDS, 0
    while time.perf_counter() < end:
        list(answer("moondream-tiny", request))
        count += 1
    return count / SECONDS


def _body() -> bytes:
    url = f"data:image/jpeg;base64,{base64.b64encode(PHOTO.read_bytes()).decode()}"
    settings = {"temperature": 0, "max_tokens": TOKENS}
    return json.dumps({"image_url": url, "question": QUESTION, "settings": settings}).encode()


def _chat_body() -> bytes:
    url = f"data:image/jpeg;base64,{base64.b64encode(PHOTO.read_bytes()).decode()}"
    content = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": url}}]
    return json.dumps(
        {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": TOKENS}
    ).encode()


def _load(url: str, body: bytes, clients: int, seconds: float, count: int | None = None) -> list[float]:
    """Return the duration of each request, in seconds, of clients that send one request after the other."""
    times: list[float] = []
    end = time.perf_counter() + seconds

    def send() -> None:
        with httpx.Client(timeout=60, headers={"Content-Type": "application/json"}) as client:
            while time.perf_counter() < end if count is None else len(times) < count:
                start = time.perf_counter()
                client.post(url, content=body).raise_for_status()
                times.append(time.perf_counter() - start)

    threads = [threading.Thread(target=send) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def _memory(url: str, body: bytes, process: psutil.Process) -> list[dict[str, Any]]:
    """Measure the resident memory after each quarter of MEMORY_REQUESTS requests."""
    megabytes = []
    for _ in range(4):
        _load(url, body, 32, 0, MEMORY_REQUESTS // 4)
        megabytes.append(process.memory_info().rss / 2**20)
    quarters = [f"{value:.0f}" for value in megabytes]
    return [
        {
            "name": f"endpoint: memory after {MEMORY_REQUESTS} requests",
            "value": round(megabytes[-1]),
            "unit": "MB",
            "baseline": round(megabytes[0]),
            "ratio": round(megabytes[-1] / megabytes[0], 3),
            "target": "ratio <= 1.05",
            "note": f"resident, against after {MEMORY_REQUESTS // 4}; 32 clients: {', '.join(quarters)} MB",
        }
    ]


@contextmanager
def _served() -> Iterator[tuple[str, psutil.Process]]:
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", SERVER, folder, str(port)]
        server = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            while True:
                try:
                    httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=5).raise_for_status()
                    break
                except httpx.TransportError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}", psutil.Process(server.pid)
        finally:
            server.terminate()
            server.wait(20)
