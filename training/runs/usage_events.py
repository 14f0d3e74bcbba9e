"""A run's generation steps as usage events, read from what the run wrote down; the training process records nothing.

A call is here one step: the batch of answers that was drawn, scored and learned from. Its tokens are not written down
by the run and so are unknown; its time is the whole step's. An event's id comes from the run and the step, so that a
run that is read twice counts once.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from math import isfinite
from typing import Any

from training.runs.run import Run, RunError
from usage.events import Event

_SPACE = uuid.UUID("8a0bfa5c-5d4e-4a52-9d0b-1b8f7b6c7a11")


def run_events(run: Run, price: Callable[[float], float | None]) -> list[Event]:
    """One event per logged step, oldest first. price: what so many seconds of this machine cost, None if not known.

    Steps are dated back from the run's end by the run's own clock, which starts anew when a run is resumed.
    """
    try:
        config = run.config()
    except RunError:
        return []
    lines = [line for line in run.metrics() if isinstance(line.get("seconds"), int | float)]
    ended = datetime.fromtimestamp(run.status().ended or run.status().started, timezone.utc)
    events: list[Event] = []
    after = ended
    for place in range(len(lines) - 1, -1, -1):
        line, before = lines[place], lines[place - 1]["seconds"] if place else 0.0
        seconds = line["seconds"] - before if line["seconds"] > before else line["seconds"]
        reward = line.get("reward")
        cost = _paid(lines, place) if config.backend == "hosted" else price(seconds)
        events.append(
            Event(
                id=uuid.uuid5(_SPACE, f"{run.id}/{line.get('step')}").hex,
                time=after,
                source="hosted-rl" if config.backend == "hosted" else "fine-tune",
                model=config.base,
                adapter=run.id,
                skill="recipe",
                latency=seconds,
                candidates=config.photos_per_step * config.rollouts,
                reward=min(1.0, max(0.0, reward)) if isinstance(reward, int | float) and isfinite(reward) else None,
                cost=cost,
                cost_basis="unknown" if cost is None else "estimated",
                request_id=run.id,
            )
        )
        after -= timedelta(seconds=seconds)
    return events[::-1]


def _paid(lines: list[dict[str, Any]], place: int) -> float | None:
    """What a step on the tuning API cost, by the running sum; with the first one what came before it."""
    now, before = lines[place].get("dollars"), lines[place - 1].get("dollars") if place else 0.0
    if not isinstance(now, int | float) or not isinstance(before, int | float):
        return None
    return max(0.0, now - before)
