"""The benchmark of guests: a short run against the real server, and how it classifies and reports comparisons."""

from __future__ import annotations

import asyncio
from pathlib import Path

import gradio as gr
import pytest

from bench import guests
from bench.__main__ import validate
from bench.guests import Guest, Load, Outcome
from inference import registry
from tests.support.app_server import app_server
from tests.support.fake_backend import fake_spec
from training.data.bundled import bundled_photos

PHOTO = bundled_photos()[0].path


def replace_model(monkeypatch: pytest.MonkeyPatch, behaviour: str) -> None:
    monkeypatch.setitem(registry.MODELS, "moondream-tiny", fake_spec("moondream-tiny", behaviour))


def compare_once(folder: Path) -> Outcome:
    """Return the outcome of a guest's comparison, with the server in this process."""

    async def compare(address: str) -> Outcome:
        async with Guest(address, 0, PHOTO) as guest:
            return await guest.compare()

    with app_server(folder, host="0.0.0.0") as address:
        return asyncio.run(compare(address))


@pytest.mark.slow
def test_guests_compare_at_the_same_time_without_failures() -> None:
    load = guests.measure(3, 6.0)
    assert [outcome for outcome in load.outcomes if outcome.kind != "completed"] == []
    assert len(load.outcomes) >= 3 and load.sequential > 0
    assert all(0 < (outcome.feedback or 0) <= outcome.seconds for outcome in load.outcomes)
    assert len(load.memory) >= 2 and min(load.memory) > 100
    failures, *others = [validate(row) for row in guests.to_rows(load)]
    assert failures["value"] == 0 and failures["met"] is True and len(others) == 4


@pytest.mark.slow
def test_a_comparison_above_the_visitors_limit_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_model(monkeypatch, "slow")

    async def first_of_three(address: str) -> Outcome:
        pages = [Guest(address, index, PHOTO) for index in range(3)]  # of one browser
        for page in pages:
            page.client.cookies = pages[0].client.cookies
            await page.open()
        tasks = [asyncio.create_task(page.compare()) for page in pages]
        ended, running = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in running:
            task.cancel()
        for page in pages:
            await page.client.aclose()
        return ended.pop().result()

    with app_server(tmp_path, host="0.0.0.0") as address:
        outcome = asyncio.run(first_of_three(address))
    assert outcome.kind == "busy" and "You have 2 comparisons running" in outcome.message


def test_a_full_queue_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_queue = gr.Blocks.queue
    monkeypatch.setattr(gr.Blocks, "queue", lambda page, max_size=None: create_queue(page, max_size=0))
    outcome = compare_once(tmp_path)
    assert outcome.kind == "busy" and "Queue is full" in outcome.message


@pytest.mark.parametrize(
    ("behaviour", "message"), [("broken", "The fake model is broken"), ("bug", "unexpected TypeError")]
)
def test_a_model_that_fails_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str, message: str
) -> None:
    replace_model(monkeypatch, behaviour)
    outcome = compare_once(tmp_path)
    assert outcome.kind == "failed" and message in outcome.message


def test_an_unreachable_server_is_a_failure(tmp_path: Path) -> None:
    async def compare() -> Outcome:
        with app_server(tmp_path, host="0.0.0.0") as address:
            guest = Guest(address, 0, PHOTO)
            await guest.open()
        outcome = await guest.compare()
        await guest.client.aclose()
        return outcome

    outcome = asyncio.run(compare())
    assert outcome.kind == "failed" and "ConnectError" in outcome.message


def test_the_rows_report_failures_latency_and_memory() -> None:
    outcomes = [Outcome("completed", 1.0, 2.0, 0.1, queued=True)] * 19
    outcomes += [
        Outcome("completed", 1.0, 4.0, 0.1),
        Outcome("busy", 1.0, 0.5),
        Outcome("failed", 1.0, 1.0, message="x"),
    ]
    memory = (100.0, 150.0, 200.0, 200.0, 200.0, 200.0, 212.0, 212.0)
    load = Load(2, 8.0, sequential=4.0, rate=2.0, outcomes=tuple(outcomes), memory=memory)
    failures, rate, latency, feedback, resident = [validate(row) for row in guests.to_rows(load)]
    assert failures["value"] == 1 and failures["met"] is False
    assert "of 22 comparisons" in failures["note"] and "1 refused as busy, 19 waited" in failures["note"]
    assert failures["note"].endswith("1 × x")
    assert (rate["value"], rate["baseline"], rate["ratio"], rate["met"]) == (2.0, 4.0, 0.5, False)
    assert latency["value"] == pytest.approx(2.1) and latency["baseline"] == 0.5 and latency["met"] is False
    assert feedback["value"] == pytest.approx(0.1)
    assert (resident["value"], resident["baseline"], resident["ratio"]) == (212.0, 200.0, 1.06)
    assert resident["met"] is False and "+6.0 %" in resident["note"]
