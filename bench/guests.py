"""Guests: 64 visitors compare for a minute on two cores. Failures, throughput, latency and resident memory.

The server is `python app.py` on all addresses, where every visitor without the administrator's link is a guest. Each
guest has a cookie jar, a session hash and a photo of its own, and sends what the page sends for a click on Run.
"""

from __future__ import annotations

import asyncio
import random
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import orjson
import psutil

from bench.app import free_port, start, stop, wait_for_page
from training.data.bundled import bundled_photos

GUESTS, SECONDS = 64, 60.0
CORES = 2
CANDIDATES = 4
THINKING = (1.0, 3.0)  # seconds between an answer and the next click
TIMEOUT = 120.0  # seconds without any message of the server
# Refusals that say that the server is busy: by Gradio's queue, and by the limits per visitor.
BUSY = re.compile(r'HTTP 503: {"detail":"Queue is full|Too many comparisons: ')


@dataclass(frozen=True)
class Outcome:
    """How one comparison ended.

    Attributes:
        kind: "completed", "busy" if the server refused it with a clear message, or "failed".
        finished: Time of its end, by `time.perf_counter()`.
        seconds: From the click to the last candidate, or to the refusal.
        feedback: From the click to the first message that the page displays; None without one.
        queued: Whether the comparison waited in the server's queue behind others, which the page displays.
        message: Why it was refused or failed.
    """

    kind: Literal["completed", "busy", "failed"]
    finished: float
    seconds: float
    feedback: float | None = None
    queued: bool = False
    message: str = ""


@dataclass(frozen=True)
class Load:
    """The measurement.

    Attributes:
        guests: Number of guests.
        seconds: Duration of the load.
        sequential: Comparisons per second of the same guests one after the other.
        rate: Comparisons per second that completed within the duration.
        outcomes: All comparisons under load, including those that ended after the duration.
        memory: Resident memory of the server's processes in MB, sampled once a second.
    """

    guests: int
    seconds: float
    sequential: float
    rate: float
    outcomes: tuple[Outcome, ...]
    memory: tuple[float, ...]


def rows() -> list[dict[str, Any]]:
    """Measure 64 guests for a minute."""
    return to_rows(measure(GUESTS, SECONDS))


def to_rows(load: Load) -> list[dict[str, Any]]:
    """Return the rows of a measurement."""
    count, messages = Counter(outcome.kind for outcome in load.outcomes), Counter[str]()
    messages.update(outcome.message for outcome in load.outcomes if outcome.kind == "failed")
    latencies = [outcome.seconds for outcome in load.outcomes if outcome.kind == "completed"] or [float("inf")]
    feedback = [outcome.feedback for outcome in load.outcomes if outcome.feedback is not None] or [float("inf")]
    queued = sum(outcome.queued for outcome in load.outcomes)
    quarter = max(1, len(load.memory) // 4)
    before, after = (
        statistics.median(load.memory[part]) for part in (slice(-2 * quarter, -quarter), slice(-quarter, None))
    )
    fair_share = load.guests / load.sequential
    p50, p95 = np.percentile(latencies, (50, 95))
    who = f"{load.guests} guests"
    failures = "; ".join(f"{number} × {message}" for message, number in messages.most_common(3))
    return [
        {
            "name": f"{who}: failures",
            "value": count["failed"],
            "unit": "",
            "target": "<= 0",
            "note": f"of {len(load.outcomes)} comparisons in {load.seconds:.0f} s on {CORES} cores; {count['busy']} "
            f"refused as busy, {queued} waited with a position" + (f"; {failures}" if failures else ""),
        },
        {
            "name": f"{who}: comparisons a second",
            "value": load.rate,
            "unit": "/s",
            "baseline": load.sequential,
            "ratio": load.rate / load.sequential,
            "target": "ratio >= 1",
            "note": "moondream-tiny, 4 recipes, scored; against the same guests one after the other",
        },
        {
            "name": f"{who}: click to last candidate, p95",
            "value": float(p95),
            "unit": "s",
            "baseline": fair_share,
            "ratio": float(p95) / fair_share,
            "target": "ratio <= 1.5",
            "note": f"p50 {p50:.2f} s; against one comparison of every guest, one after the other",
        },
        {
            "name": f"{who}: click to first feedback, p95",
            "value": float(np.percentile(feedback, 95)),
            "unit": "s",
            "note": "position in the queue, or the first state of the comparison",
        },
        {
            "name": f"{who}: resident memory",
            "value": after,
            "unit": "MB",
            "baseline": before,
            "ratio": after / before,
            "target": "ratio <= 1.05",
            "note": f"last quarter against the third, medians: {100 * (after / before - 1):+.1f} %; "
            f"first sample {load.memory[0]:.0f} MB",
        },
    ]


def measure(guests: int, seconds: float) -> Load:
    """Start the server and let guests compare, one after the other and then all at once.

    Raises:
        RuntimeError: If a comparison fails before the load.
    """
    with served() as (address, process):
        return asyncio.run(_measure(address, process, guests, seconds))


@contextmanager
def served() -> Iterator[tuple[str, psutil.Process]]:
    """Run the app on all addresses and on CORES cores; yield its address and process, and stop it at the end."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        environment = {"DATA_DIR": folder, "GRADIO_TEMP_DIR": f"{folder}/uploads", "GRADIO_SERVER_NAME": "0.0.0.0"}
        server = start(["app.py"], port, environment)
        try:
            process = psutil.Process(server.pid)
            if hasattr(process, "cpu_affinity"):  # not on macOS
                process.cpu_affinity(process.cpu_affinity()[:CORES])
            wait_for_page(server, port)
            yield f"http://127.0.0.1:{port}", process
        finally:
            stop(server)


async def _measure(address: str, process: psutil.Process, count: int, seconds: float) -> Load:
    photos = [photo.path for photo in bundled_photos()]
    async with AsyncExitStack() as stack:
        guests = [
            await stack.enter_async_context(Guest(address, index, photos[index % len(photos)]))
            for index in range(count)
        ]
        await _required(guests[0])  # warm-up: loads the model
        started = time.perf_counter()
        for guest in guests:
            await _required(guest)
        sequential = count / (time.perf_counter() - started)
        started = time.perf_counter()
        sampling = asyncio.create_task(_sample_memory(process, started + seconds))
        outcomes = await asyncio.gather(*(guest.visit(started + seconds) for guest in guests))
        memory = await sampling
    flat = tuple(outcome for visit in outcomes for outcome in visit)
    completed = sum(outcome.kind == "completed" and outcome.finished <= started + seconds for outcome in flat)
    return Load(count, seconds, sequential, completed / seconds, flat, tuple(memory))


async def _required(guest: Guest) -> None:
    outcome = await guest.compare()
    if outcome.kind != "completed":
        raise RuntimeError(f"a comparison without load {outcome.kind}: {outcome.message}")


async def _sample_memory(process: psutil.Process, end: float) -> list[float]:
    samples = []
    while (now := time.perf_counter()) < end:
        samples.append(_resident(process))
        await asyncio.sleep(max(0.0, min(now + 1, end) - time.perf_counter()))
    return samples


def _resident(process: psutil.Process) -> float:
    """Return the resident memory of a process and its children in MB."""
    total = 0
    for member in (process, *process.children(recursive=True)):
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:  # a child that has ended meanwhile
            continue
    return total / 2**20


class Guest:
    """A visitor with a browser of its own, over plain HTTP.

    Attributes:
        client: The browser, with its cookies.
    """

    def __init__(self, address: str, seed: int, photo: Path) -> None:
        """Create a guest.

        Args:
            address: Address of the server.
            seed: Seed of the guest's pauses and comparisons.
            photo: The photo that the guest uploads.
        """
        self._random = random.Random(seed)
        self._session = f"{self._random.getrandbits(64):016x}"
        self._photo = photo
        self.client = httpx.AsyncClient(base_url=address, timeout=TIMEOUT)
        self._body: dict[str, Any] = {}
        self._seed_index = self._grid_index = 0

    async def __aenter__(self) -> Guest:
        """Open the page."""
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self.client.aclose()

    async def open(self) -> None:
        """Open the page, which sets the cookie, and upload the photo."""
        (await self.client.get("/")).raise_for_status()
        config = (await self.client.get("/config")).raise_for_status().json()
        name, photo = self._photo.name, self._photo.read_bytes()
        uploaded = await self.client.post("/gradio_api/upload", files={"files": (name, photo, "image/jpeg")})
        path = uploaded.raise_for_status().json()[0]
        values = {
            "photo": {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}},
            "models": ["moondream-tiny"],
            "skill": "recipe",
            "n": CANDIDATES,
        }
        components = {component["id"]: component["props"] for component in config["components"]}
        run = next(number for number, props in components.items() if props.get("elem_id") == "run")
        event = next(
            event for event in config["dependencies"] if [run, "click"] in event["targets"] and event["backend_fn"]
        )
        inputs = [components[number] for number in event["inputs"]]
        self._seed_index = next(index for index, props in enumerate(inputs) if props.get("elem_id") == "seed")
        outputs = [components[number].get("elem_id") for number in event["outputs"]]
        self._grid_index = outputs.index("candidates")
        data = [values.get(props.get("elem_id"), props.get("value")) for props in inputs]
        self._body = {"data": data, "fn_index": event["id"], "trigger_id": run, "session_hash": self._session}

    async def visit(self, end: float) -> list[Outcome]:
        """Compare again and again, with pauses, until a time by `time.perf_counter()`."""
        outcomes = []
        await asyncio.sleep(self._random.uniform(0, THINKING[1]))
        while time.perf_counter() < end:
            outcomes.append(await self.compare())
            await asyncio.sleep(self._random.uniform(*THINKING))
        return outcomes

    async def compare(self) -> Outcome:
        """Click on Run and read the messages until the comparison has ended."""
        self._body["data"][self._seed_index] = self._random.randrange(10_000)
        started, feedback, queued = time.perf_counter(), None, False
        try:
            headers = {"Content-Type": "application/json"}
            joined = await self.client.post("/gradio_api/queue/join", content=orjson.dumps(self._body), headers=headers)
            if joined.is_error:
                return _ended(started, f"HTTP {joined.status_code}: {joined.text[:200]}")
            result, seconds = {}, 0.0
            async for message in self._messages():
                if message["msg"] in ("estimation", "process_starts", "process_generating"):
                    feedback = feedback or time.perf_counter() - started
                    queued = queued or bool(message.get("rank"))
                elif message["msg"] == "process_completed":
                    result, seconds = message, time.perf_counter() - started
                elif message["msg"] == "unexpected_error":
                    return _ended(started, message["message"] or "unexpected error", feedback, queued)
        except httpx.HTTPError as error:
            return _ended(started, f"{type(error).__name__} {error}", feedback, queued)
        if not result:
            return _ended(started, "the stream of messages ended without a result", feedback, queued)
        if not result["success"]:
            return _ended(started, "{title}: {error}".format_map(result["output"]), feedback, queued)
        problem = _problem(result["output"]["data"][self._grid_index])
        if problem:
            return _ended(started, problem, feedback, queued)
        return Outcome("completed", started + seconds, seconds, feedback, queued)

    async def _messages(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the messages of the session until the server closes the stream."""
        async with self.client.stream(
            "GET", "/gradio_api/queue/data", params={"session_hash": self._session}
        ) as stream:
            stream.raise_for_status()
            async for line in stream.aiter_lines():
                if line.startswith("data: "):
                    yield orjson.loads(line[6:])


def _problem(grid: dict[str, Any]) -> str:
    """Return what the final grid lacks, or an empty string."""
    column = grid["columns"][0]
    if column["error"]:
        return column["error"]
    ready = sum(candidate["done"] and not candidate.get("error") for candidate in column["candidates"])
    return "" if column["status"] == "done" and ready == CANDIDATES else f"{column['status']} with {ready} candidates"


def _ended(started: float, message: str, feedback: float | None = None, queued: bool = False) -> Outcome:
    """Return the outcome of a comparison that was refused or failed."""
    now = time.perf_counter()
    return Outcome("busy" if BUSY.search(message) else "failed", now, now - started, feedback, queued, message)
