"""Tests of the Photon backend against a stand-in engine with kestrel's interface, whose batching is simulated."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from inference import photon
from inference.availability import unavailable
from inference.registry import MODELS, answer
from inference.types import (
    NO_PHOTO,
    Answer,
    AnswerEvent,
    Box,
    CandidateFailed,
    InferenceError,
    Point,
    Request,
    TextUpdate,
)
from tests.support.api_client import PHOTO_URL
from tests.support.app_server import app_server
from tests.support.photon_engine import WORDS, SimulatedEngine, simulated_photon

NAME = "moondream2-photon"
SPEC = MODELS[NAME]


@pytest.fixture
def engines() -> Iterator[type[SimulatedEngine]]:
    """Install the stand-in engine."""
    with simulated_photon() as simulated:
        yield simulated


def ask(photo: np.ndarray, prompt: str = "one two", skill: str = "query", **fields: Any) -> list[AnswerEvent]:
    """Return the events of a request."""
    return list(answer(NAME, Request(photo, skill, prompt, **fields)))


def answers(events: list[AnswerEvent]) -> list[Answer]:
    return [event for event in events if isinstance(event, Answer)]


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, at most ten seconds."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("the condition did not become true")


def test_candidates_are_computed_together_and_streamed(engines: type[SimulatedEngine], photo: np.ndarray) -> None:
    events = ask(photo, n=8)
    texts = [candidate.text for candidate in answers(events)]
    assert texts == [" ".join(["one two"] * (WORDS // 2))] * 8
    (engine,) = engines.instances
    assert engine.config.max_batch_size == 16 and engine.config.model == "moondream2"
    assert max(active for active, _ in engine.batches) == 8
    first = [event.text for event in events if isinstance(event, TextUpdate) and event.index == 3]
    assert first[0] == "one" and first[-1] == texts[3]
    (answered,) = {(each.tokens_in, each.tokens_out, each.first_token_seconds) for each in answers(events)}
    assert answered == (738, WORDS, 0.004)
    assert all(each.queue_seconds >= 0 and each.seconds == pytest.approx(0.036) for each in answers(events))


def test_regions_and_greedy_texts_are_computed_once(engines: type[SimulatedEngine], photo: np.ndarray) -> None:
    assert [each.boxes for each in answers(ask(photo, "cat", "detect", n=3))] == [(Box(0, 0, 1, 1),)] * 3
    assert [each.points for each in answers(ask(photo, "cat", "point"))] == [(Point(0.5, 0.5),)]
    assert len(answers(ask(photo, n=3, temperature=0))) == 3
    assert len(engines.instances[0].questions) == 3


def test_every_argument_reaches_the_engine(engines: type[SimulatedEngine], photo: np.ndarray) -> None:
    ask(photo, "Who?", temperature=0.8, max_tokens=20, reasoning=True, spatial_refs=((0.5, 0.5),))
    ask(NO_PHOTO, "Why?")
    ask(photo, "", "caption", length="long")
    ask(photo, "", "recipe")
    who, why, caption, recipe = engines.instances[0].questions
    assert who["settings"] == {"temperature": 0.4, "top_p": 0.9, "max_tokens": 20}
    assert who["reasoning"] is True and who["spatial_refs"] == [[0.5, 0.5]] and who["image"][:2] == b"\xff\xd8"
    assert why["image"] is None and caption["length"] == "long" and "photo editor" in recipe["question"]
    assert answers(ask(photo, "one two", stop=("two",)))[0].text == "one"


def test_many_requests_fill_the_batch(engines: type[SimulatedEngine], photo: np.ndarray) -> None:
    ask(photo)  # starts the engine
    engines.instances[0].start_with = 32
    with ThreadPoolExecutor(32) as pool:
        results = list(pool.map(lambda number: answers(ask(photo, f"number {number}")), range(32)))
    assert all(result[0].text.startswith(f"number {number}") for number, result in enumerate(results))
    batches = engines.instances[0].batches
    assert max(unfinished for _, unfinished in batches) == 32
    assert {active for active, unfinished in batches if unfinished >= 16} == {16}


def test_slow_consumer_blocks_nobody(engines: type[SimulatedEngine], photo: np.ndarray) -> None:
    with closing(answer(NAME, Request(photo, "query", "slow reader"))) as slow:  # type: ignore[type-var]
        next(slow)
        next(slow)  # one update is read, then no more
        assert len(answers(ask(photo, n=8))) == 8
        assert answers(list(slow))


def test_failure_fails_one_request_alone(engines: type[SimulatedEngine], photo: np.ndarray) -> None:
    with ThreadPoolExecutor(8) as pool:
        pending = [pool.submit(ask, photo, "explode" if number == 3 else "fine") for number in range(8)]
        errors = [future.exception() for future in pending]
    assert [error is not None for error in errors] == [number == 3 for number in range(8)]
    assert isinstance(errors[3], InferenceError) and errors[3].kind == "failed"
    assert unavailable(SPEC) is None and len(engines.instances) == 1


def test_closing_and_cancelling_end_the_request_in_the_engine(
    engines: type[SimulatedEngine], photo: np.ndarray
) -> None:
    with closing(answer(NAME, Request(photo, "query", "word", n=2))) as stream:  # type: ignore[type-var]
        next(stream)
        next(stream)
    wait_until(lambda: engines.instances[0].cancelled == 2)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(InferenceError, match="Cancelled"):
        list(answer(NAME, Request(photo, "query", "word"), cancel))
    wait_until(lambda: photon.engine_of("moondream2").pending == 0)


def test_dead_engine_is_reported_and_restarts_with_back_off(
    engines: type[SimulatedEngine], photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(photon, "_engines", {"moondream2": photon.PhotonEngine("moondream2", lambda: now[0])})
    ask(photo)
    engine = photon.engine_of("moondream2")
    assert engine.state() == "running"
    engines.instances[0].dead = True
    for _ in range(photon.FAILURES_OF_A_DEAD_ENGINE):
        with pytest.raises(InferenceError, match="RuntimeError"):
            ask(photo)
    assert "failed (RuntimeError)" in engine.state() and "Try again in 1 s" in str(unavailable(SPEC))
    with pytest.raises(InferenceError, match="has failed") as refused:
        ask(photo)
    assert refused.value.kind == "unavailable"
    wait_until(lambda: engines.instances[0].shut_down)
    now[0] += 1.1
    SimulatedEngine.start_error = MemoryError("no room")
    with pytest.raises(InferenceError, match="MemoryError"):
        ask(photo)
    assert "in 2 s" in str(engine.problem())
    now[0] += 1.1
    assert unavailable(SPEC)  # the second pause is twice as long
    now[0] += 1.1
    SimulatedEngine.start_error = None
    assert answers(ask(photo)) and engine.state() == "running" and len(engines.instances) == 2


def test_one_failed_candidate_leaves_the_others(
    engines: type[SimulatedEngine], photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, count = SimulatedEngine.query, iter(range(9))

    async def query(self: SimulatedEngine, **arguments: Any) -> Any:
        if next(count) == 1:
            raise RuntimeError("once")
        return await original(self, **arguments)

    monkeypatch.setattr(SimulatedEngine, "query", query)
    events = ask(photo, n=3)
    assert len(answers(events)) == 2 and [event.index for event in events if isinstance(event, CandidateFailed)] == [1]


@pytest.mark.slow
def test_photon_behind_v1(engines: type[SimulatedEngine], tmp_path: Path) -> None:
    """32 clients stream over HTTP at the same time; /healthz reports the engine."""
    with app_server(tmp_path) as address:

        def send(number: int) -> str:
            body = {"model": NAME, "stream": True, "messages": [{"role": "user", "content": f"number {number}"}]}
            response = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
            lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
            assert lines.pop() == "[DONE]"
            deltas = [choice["delta"] for line in lines for choice in json.loads(line)["choices"]]
            return "".join(delta.get("content", "") for delta in deltas)

        send(0)
        engines.instances[0].start_with = 32
        with ThreadPoolExecutor(32) as pool:
            texts = list(pool.map(send, range(32)))
        assert all(text.startswith(f"number {number} number") for number, text in enumerate(texts))
        assert max(active for active, _ in engines.instances[0].batches) == 16
        health = httpx.get(f"{address}/healthz").json()
        assert health["engines"] == {"moondream2": "running"} and health["status"] == "ok"
        query = {"model": NAME, "image_url": PHOTO_URL, "question": "Who?", "reasoning": True}
        response = httpx.post(f"{address}/v1/query", json=query, timeout=60)
        assert response.json()["metrics"]["input_tokens"] == 738
        engines.instances[0].dead = True
        statuses = [httpx.post(f"{address}/v1/query", json=query, timeout=60).status_code for _ in range(4)]
        assert statuses == [500, 500, 500, 503]
        health = httpx.get(f"{address}/healthz").json()
        assert health["status"] == "degraded" and health["engines"]["moondream2"].startswith("failed")
        assert NAME not in [card["id"] for card in httpx.get(f"{address}/v1/models").json()["data"]]
