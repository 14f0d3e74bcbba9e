"""Backend for Photon, Moondream's own inference engine. It needs a supported GPU and sends telemetry to Moondream.

Candidates and concurrent requests are submitted to the engine together, which batches them as they come.

Tested only with a stand-in engine that has kestrel's interface and simulates its batching; not run on a real engine.
"""

from __future__ import annotations

import asyncio
import io
import logging
import platform
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from PIL import Image

from inference.hosted.backend import MAX_TOKENS, parse_answer
from inference.types import (
    MAX_OBJECTS,
    SKILLS,
    Answer,
    AnswerEvent,
    CandidateFailed,
    InferenceError,
    ModelSpec,
    Queued,
    Request,
    TextUpdate,
    clean,
    recipe_prompt,
)

MAX_BATCH = 16  # requests that the engine computes at the same time
FAILURES_OF_A_DEAD_ENGINE = 3  # requests in a row, without a success in between
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before a restart; doubled after every failure to start
START_SECONDS = 600.0  # maximum time to load the model
SHUTDOWN_SECONDS = 30.0
POLL_SECONDS = 0.1  # poll interval for cancellation
JPEG_QUALITY = 95
_log = logging.getLogger(__name__)


class PhotonEngine:
    """One engine with the event loop that it runs in. It starts on first use and restarts after a failure.

    Attributes:
        source: Name of the model in Photon.
        pending: Number of requests that are submitted and not answered.
    """

    def __init__(self, source: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Create the engine without starting it.

        Args:
            source: Name of the model in Photon.
            clock: Returns the time in seconds.
        """
        self.source, self.pending = source, 0
        self._clock = clock
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: Any = None
        self._problem = ""
        self._failures = 0
        self._pause, self._retry_at = FIRST_PAUSE, 0.0

    def state(self) -> str:
        """Return "running", "not started", or "failed" with the reason and the time to the next start."""
        if self._engine is not None:
            return "running"
        if not self._problem:
            return "not started"
        seconds = max(0, round(self._retry_at - self._clock()))
        return f"failed ({self._problem}); restarts with the first request after {seconds} s"

    def problem(self) -> str | None:
        """Return why requests are refused until the next start is due, or None if they are not."""
        if not self._problem or self._clock() >= self._retry_at:
            return None
        seconds = max(1, round(self._retry_at - self._clock()))
        return f"its engine has failed ({self._problem}). Try again in {seconds} s."

    def submit(self, call: Callable[[Any], Coroutine[Any, Any, None]]) -> Future[None]:
        """Start a call in the engine's loop. Starts the engine if it does not run.

        Args:
            call: Coroutine function that gets kestrel's engine.

        Returns:
            The running call.

        Raises:
            InferenceError: The engine cannot be started, or its next start is not due.
        """
        engine, loop = self._running()
        return asyncio.run_coroutine_threadsafe(self._counted(engine, call), loop)

    def succeeded(self) -> None:
        """Note that a request was answered."""
        with self._lock:
            self._failures, self._pause = 0, FIRST_PAUSE

    def failed(self, error: Exception) -> None:
        """Note that a request failed. After several in a row the engine counts as dead."""
        with self._lock:
            self._failures += 1
            if self._failures >= FAILURES_OF_A_DEAD_ENGINE and self._engine is not None:
                self._stop(type(error).__name__)

    def stop(self) -> None:
        """Stop the engine, if it runs."""
        with self._lock:
            self._stop("")

    async def _counted(self, engine: Any, call: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
        self.pending += 1
        try:
            await call(engine)
        finally:
            self.pending -= 1

    def _running(self) -> tuple[Any, asyncio.AbstractEventLoop]:
        with self._lock:
            if self._engine is not None and self._loop is not None:
                return self._engine, self._loop
            if problem := self.problem():
                raise InferenceError("unavailable", f"Photon cannot be used: {problem}")
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name=f"photon-{self.source}", daemon=True).start()
            try:
                engine = asyncio.run_coroutine_threadsafe(_create(self.source), loop).result(START_SECONDS)
            except Exception as error:
                _log.exception("Photon could not start")
                loop.call_soon_threadsafe(loop.stop)
                self._back_off(type(error).__name__)
                raise InferenceError("unavailable", f"Photon cannot be used: {self.problem()}") from None
            self._engine, self._loop, self._problem, self._failures = engine, loop, "", 0
            return engine, loop

    def _stop(self, problem: str) -> None:
        """Shut the engine down in its own loop. Requests that it still computes fail."""
        engine, loop = self._engine, self._loop
        self._engine = self._loop = None
        if problem:
            self._back_off(problem)
        if engine is not None and loop is not None:
            asyncio.run_coroutine_threadsafe(_shut_down(engine, loop), loop)

    def _back_off(self, problem: str) -> None:
        self._problem, self._retry_at = problem, self._clock() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)


async def _create(source: str) -> Any:
    """Load the model. Prefix caching, by which candidates share their photo, is on by default."""
    # optional, see requirements-gpu.txt
    from kestrel import InferenceEngine  # pyright: ignore[reportMissingImports]
    from kestrel.config import RuntimeConfig  # pyright: ignore[reportMissingImports]

    device = "mps" if platform.system() == "Darwin" else "cuda"
    return await InferenceEngine.create(RuntimeConfig(model=source, device=device, max_batch_size=MAX_BATCH))


async def _shut_down(engine: Any, loop: asyncio.AbstractEventLoop) -> None:
    try:
        await asyncio.wait_for(engine.shutdown(), SHUTDOWN_SECONDS)
    except Exception:
        _log.exception("Photon could not be shut down")
    tasks = [task for task in asyncio.all_tasks(loop) if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    loop.stop()


_engines: dict[str, PhotonEngine] = {}  # by name of the model in Photon
_engines_lock = threading.Lock()


def engine_of(source: str) -> PhotonEngine:
    """Return the engine of a model, which may not run yet."""
    with _engines_lock:
        return _engines.setdefault(source, PhotonEngine(source))


def engine_states() -> dict[str, str]:
    """Return the state of every engine that was needed, by name of the model in Photon."""
    with _engines_lock:
        return {engine.source: engine.state() for engine in _engines.values()}


@dataclass(frozen=True)
class _Failed:
    """A failed call and the indices of the candidates that it was for."""

    indices: list[int]
    error: Exception


def answer(spec: ModelSpec, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
    """Run a model on Photon.

    Regions, and everything at temperature 0, are deterministic: one call answers all candidates.

    Yields:
        Queued, TextUpdate and, per candidate, one Answer or CandidateFailed.

    Raises:
        InferenceError: If all candidates fail, the engine does not run, or the request is cancelled.
    """
    engine = engine_of(spec.source)
    yield Queued(engine.pending)
    single_call = SKILLS[request.skill].output == "regions" or request.temperature * spec.temperature == 0
    groups = [list(range(request.n))] if single_call else [[index] for index in range(request.n)]
    events: queue.SimpleQueue[AnswerEvent | _Failed] = queue.SimpleQueue()
    arguments = _arguments(spec, request)
    calls: list[Future[None]] = []
    try:
        for indices in groups:
            calls.append(engine.submit(_Call(engine, request, indices, arguments, events).run))
        yield from _events(request, calls, events, cancel)
    finally:
        for call in calls:
            call.cancel()


def _events(
    request: Request,
    calls: list[Future[None]],
    events: queue.SimpleQueue[AnswerEvent | _Failed],
    cancel: threading.Event,
) -> Iterator[AnswerEvent]:
    pending, failures = request.n, 0
    while pending:
        if cancel.is_set():
            raise InferenceError("cancelled", "Cancelled.")
        try:
            event = events.get(timeout=POLL_SECONDS)
        except queue.Empty:
            if all(call.done() for call in calls) and events.empty():  # the engine was stopped before they began
                raise InferenceError("failed", "Photon stopped. Try again in a few seconds.") from None
            continue
        if isinstance(event, _Failed):
            failures += 1
            error = _as_inference_error(event.error)
            if failures == len(calls):
                raise error
            pending -= len(event.indices)
            yield from (CandidateFailed(index, error.message) for index in event.indices)
        else:
            pending -= isinstance(event, Answer)
            yield event


class _Call:
    """One call of the engine, for one candidate or for several equal ones. Its events go to a queue without limit."""

    def __init__(
        self,
        engine: PhotonEngine,
        request: Request,
        indices: list[int],
        arguments: dict[str, Any],
        events: queue.SimpleQueue[AnswerEvent | _Failed],
    ) -> None:
        self.engine, self.request, self.indices = engine, request, indices
        self.arguments, self.events = arguments, events
        self.verb = "query" if request.skill == "recipe" else request.skill
        self.start = time.perf_counter()
        self.first_chunk = 0.0

    async def run(self, engine: Any) -> None:
        """Run the call to its end. Sends text updates, then the answers or the error."""
        streams = SKILLS[self.request.skill].output != "regions" and not self.request.reasoning
        try:
            arguments = {**self.arguments, "stream": streams} if self.verb in ("query", "caption") else self.arguments
            result = await getattr(engine.model(), self.verb)(**arguments)
            if streams:
                result = await self._read(result)
            fields = parse_answer(self.request, _public_output(self.verb, result.output))
        except Exception as error:
            if not isinstance(error, ValueError):  # a ValueError is about the request, not about the engine
                self.engine.failed(error)
            self.events.put(_Failed(self.indices, error))
            return
        except asyncio.CancelledError:
            self.events.put(_Failed(self.indices, InferenceError("cancelled", "Cancelled.")))
            raise
        self.engine.succeeded()
        text, _ = self.request.cut_at_stop(fields.pop("text"))
        for index in self.indices:
            self.events.put(Answer(index, text, **fields, **self._measurements(result)))

    async def _read(self, stream: Any) -> Any:
        """Send the text of a stream as it comes. Returns its result; ends it if the call is cancelled."""
        text = ""
        try:
            async for update in stream:
                self.first_chunk = self.first_chunk or time.perf_counter()
                text += update.text or ""
                for index in self.indices:
                    self.events.put(TextUpdate(index, self.request.cut_at_stop(clean(text))[0]))
            return await stream.result()
        finally:
            close = getattr(stream, "aclose", None)
            if close is not None:
                await close()

    def _measurements(self, result: Any) -> dict[str, Any]:
        """Return tokens and times. The queue is the time before the first token that is not the prefill's."""
        metrics, seconds = getattr(result, "metrics", None), time.perf_counter() - self.start
        prefill = getattr(metrics, "prefill_time_ms", 0.0) / 1000
        decode = getattr(metrics, "decode_time_ms", 0.0) / 1000
        computed = prefill + decode or seconds
        first = self.first_chunk - self.start if self.first_chunk else seconds - decode
        return {
            "tokens_in": getattr(metrics, "input_tokens", 0),
            "tokens_out": getattr(metrics, "output_tokens", 0),
            "seconds": computed,
            "first_token_seconds": prefill or first,
            "queue_seconds": max(0.0, first - prefill) if prefill else 0.0,
            "truncated": getattr(result, "finish_reason", "stop") == "length",
        }


def _arguments(spec: ModelSpec, request: Request) -> dict[str, Any]:
    """Return the arguments of kestrel's function of the skill, without `stream`."""
    skill = request.skill
    settings: dict[str, Any] = {"max_objects": min(request.max_objects, MAX_OBJECTS)}
    if skill in MAX_TOKENS:
        settings = {
            "temperature": request.temperature * spec.temperature,
            "top_p": spec.top_p,
            "max_tokens": min(request.max_tokens, MAX_TOKENS[skill]),
        }
    arguments: dict[str, Any] = {"image": _jpeg(request) if request.has_photo else None, "settings": settings}
    if request.spatial_refs and skill in ("query", "point", "segment"):
        arguments["spatial_refs"] = [list(ref) for ref in request.spatial_refs]
    match skill:
        case "recipe":
            return {**arguments, "question": recipe_prompt(request.prompt), "reasoning": False}
        case "query":
            return {**arguments, "question": request.prompt, "reasoning": request.reasoning}
        case "caption":
            return {**arguments, "length": request.length}
        case _:
            return {**arguments, "object": request.prompt}


def _jpeg(request: Request) -> bytes:
    file = io.BytesIO()
    Image.fromarray(request.photo).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def _public_output(verb: str, output: dict[str, Any]) -> dict[str, Any]:
    """Return a result in the form of Moondream's API, which differs for outlines only."""
    if verb != "segment":
        return output
    segment = next(iter(output.get("segments") or []), {})
    return {"path": segment.get("svg_path", ""), "bbox": segment.get("bbox")}


def _as_inference_error(error: Exception) -> InferenceError:
    if isinstance(error, InferenceError):
        return error
    _log.error("Photon failed", exc_info=error)
    return InferenceError("failed", f"Photon failed ({type(error).__name__}). See the log for details.")
