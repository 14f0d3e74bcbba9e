"""A stand-in for kestrel, Photon's engine: its interface with simulated continuous batching, and no model."""

from __future__ import annotations

import asyncio
import sys
import types
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

STEP_SECONDS = 0.004  # one simulated decoding step of the batch
WORDS = 8  # of every answer, one for each step


@dataclass
class RuntimeConfig:
    """The options of the engine that this application sets."""

    model: str
    device: str
    max_batch_size: int = 4


@dataclass(eq=False)
class Sequence:
    """One simulated request."""

    words: deque[str]
    prompt: str
    updates: asyncio.Queue[str | Exception | None] = field(default_factory=asyncio.Queue)
    cancelled: bool = False


class SimulatedEngine:
    """Computes at most `max_batch_size` sequences at a time, one word per step, and admits waiting ones between steps.

    Attributes:
        batches: Number of sequences in the batch, and of all unfinished ones, at each step.
        questions: Arguments of every call.
        start_with: Number of requests to wait for before the next step, so that a test does not depend on time.
    """

    instances: list[SimulatedEngine]  # of the current `simulated_photon`
    start_error: Exception | None = None

    def __init__(self, config: RuntimeConfig) -> None:
        self.config = config
        self.waiting: deque[Sequence] = deque()
        self.active: list[Sequence] = []
        self.batches: list[tuple[int, int]] = []
        self.questions: list[dict[str, Any]] = []
        self.start_with = 0
        self.dead = False
        self.shut_down = False
        self.cancelled = 0
        self.worker = asyncio.get_running_loop().create_task(self._run())

    @classmethod
    async def create(cls, config: RuntimeConfig, api_key: str | None = None) -> SimulatedEngine:
        """Start an engine, as kestrel's function of this name does."""
        if SimulatedEngine.start_error:
            raise SimulatedEngine.start_error
        engine = cls(config)
        SimulatedEngine.instances.append(engine)
        return engine

    def model(self) -> SimulatedEngine:
        """Return the object with the skills."""
        return self

    async def shutdown(self) -> None:
        """Stop the batching."""
        self.shut_down = True
        self.worker.cancel()
        with suppress(asyncio.CancelledError):
            await self.worker

    async def query(self, *, question: str, stream: bool = False, **arguments: Any) -> Any:
        """Answer with the words of the question, repeated to `WORDS` words."""
        return await self._text("answer", question, stream, {"question": question, **arguments})

    async def caption(self, *, length: str, stream: bool = False, **arguments: Any) -> Any:
        """Answer with the length."""
        return await self._text("caption", length, stream, {"length": length, **arguments})

    async def detect(self, *, object: str, **arguments: Any) -> Any:
        """Return one box."""
        await self._text("answer", object, False, {"object": object, **arguments})
        return result({"objects": [{"x_min": 0, "y_min": 0, "x_max": 1, "y_max": 1}]})

    async def point(self, *, object: str, **arguments: Any) -> Any:
        """Return one point."""
        await self._text("answer", object, False, {"object": object, **arguments})
        return result({"points": [{"x": 0.5, "y": 0.5}]})

    async def segment(self, *, object: str, **arguments: Any) -> Any:
        """Return one outline."""
        await self._text("answer", object, False, {"object": object, **arguments})
        box = {"x_min": 0.1, "y_min": 0.1, "x_max": 0.9, "y_max": 0.9}
        return result({"segments": [{"svg_path": "M 0.1 0.1 H 0.9 V 0.9 Z", "bbox": box}]})

    async def _text(self, key: str, prompt: str, stream: bool, arguments: dict[str, Any]) -> Any:
        if self.dead:
            raise RuntimeError("the engine is dead")
        self.questions.append(arguments)
        words = (prompt.split() * WORDS)[:WORDS]
        sequence = Sequence(deque(words), prompt)
        self.waiting.append(sequence)
        opened = Stream(self, sequence, key)
        if stream:
            return opened
        async for _ in opened:
            pass
        return await opened.result()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(STEP_SECONDS)
            self.active = [sequence for sequence in self.active if not sequence.cancelled]
            self.waiting = deque(sequence for sequence in self.waiting if not sequence.cancelled)
            if len(self.active) + len(self.waiting) < self.start_with:
                continue
            self.start_with = 0
            while self.waiting and len(self.active) < self.config.max_batch_size:
                self.active.append(self.waiting.popleft())
            if self.active:
                self.batches.append((len(self.active), len(self.active) + len(self.waiting)))
            for sequence in list(self.active):
                if "explode" in sequence.prompt or self.dead:
                    sequence.updates.put_nowait(RuntimeError("a simulated failure"))
                elif sequence.words:
                    sequence.updates.put_nowait(f"{sequence.words.popleft()} ")
                    continue
                else:
                    sequence.updates.put_nowait(None)
                self.active.remove(sequence)


@dataclass(frozen=True)
class Update:
    """A part of a text."""

    text: str


class Stream:
    """The stream of one request."""

    def __init__(self, engine: SimulatedEngine, sequence: Sequence, key: str) -> None:
        self.engine, self.sequence, self.key = engine, sequence, key
        self.text, self.finished = "", False

    def __aiter__(self) -> AsyncIterator[Update]:
        return self

    async def __anext__(self) -> Update:
        if self.finished:
            raise StopAsyncIteration
        item = await self.sequence.updates.get()
        if item is None:
            self.finished = True
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        self.text += item
        return Update(item)

    async def result(self) -> Any:
        """Return the complete answer."""
        output: dict[str, Any] = {self.key: self.text.strip()}
        return result(output)

    async def aclose(self) -> None:
        """Cancel the request if it is not finished."""
        if not self.finished:
            self.sequence.cancelled = True
            self.engine.cancelled += 1


def result(output: dict[str, Any]) -> Any:
    """Return an engine's result with metrics."""
    metrics = SimpleNamespace(
        input_tokens=738, output_tokens=WORDS, prefill_time_ms=4.0, decode_time_ms=32.0, ttft_ms=5.0, cached_tokens=0
    )
    return SimpleNamespace(output=output, metrics=metrics, finish_reason="stop")


@contextmanager
def simulated_photon() -> Iterator[type[SimulatedEngine]]:
    """Install the stand-in as `kestrel`, on a machine that Photon supports. Yields the class with its instances."""
    from inference import availability, photon

    kestrel, config = types.ModuleType("kestrel"), types.ModuleType("kestrel.config")
    vars(kestrel)["InferenceEngine"], vars(config)["RuntimeConfig"] = SimulatedEngine, RuntimeConfig
    SimulatedEngine.instances, SimulatedEngine.start_error = [], None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "kestrel", kestrel)
        patch.setitem(sys.modules, "kestrel.config", config)
        patch.setattr(availability, "photon_unavailable", lambda: None)
        patch.setattr(photon, "_engines", {})
        yield SimulatedEngine
        for engine in photon._engines.values():
            engine.stop()
