"""Usage events of training runs: one per paid call of a hosted run, one per logged step of any other run.

A step's latency covers sampling, scoring and the update; its tokens are those of its prompts and answers. Event ids are
those of the calls, or derived from run and step, so that a run read twice is counted once.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from math import isfinite
from typing import Any, TypeGuard

from training.runs.run import Run, RunError
from usage.events import UsageEvent

_NAMESPACE = uuid.UUID("8a0bfa5c-5d4e-4a52-9d0b-1b8f7b6c7a11")


def run_events(run: Run, price: Callable[[float], float | None]) -> list[UsageEvent]:
    """Build the usage events of a run.

    Steps are dated backwards from the run's end by the run's clock, which restarts when a run is resumed.

    Args:
        run: The run.
        price: Maps seconds of this machine to their cost in US dollars, None if unknown.

    Returns:
        One event per paid call or per logged step, oldest first; empty if the run has no valid config.
    """
    try:
        config = run.config()
    except RunError:
        return []
    if config.backend == "hosted" and (calls := run.calls()):  # runs of earlier versions have none
        return [event for row in calls if (event := call_event(run, row))]
    status, hosted = run.status(), config.backend == "hosted"
    time = datetime.fromtimestamp(status.ended or status.started, timezone.utc)
    rows = [row for row in run.metrics() if isinstance(row.get("seconds"), int | float)]
    start: dict[str, Any] = {"seconds": 0.0, "dollars": 0.0, "tokens": 0}
    events: list[UsageEvent] = []
    for previous, row in reversed(list(pairwise([start, *rows]))):
        resumed = row["seconds"] <= previous["seconds"]
        seconds = row["seconds"] if resumed else row["seconds"] - previous["seconds"]
        tokens = _step_tokens(row, previous, config.photos_per_step * config.rollouts)
        cost = _difference(row.get("dollars"), previous.get("dollars")) if hosted else price(seconds)
        events.append(
            UsageEvent(
                id=uuid.uuid5(_NAMESPACE, f"{run.id}/{row.get('step')}").hex,
                time=time,
                source="hosted-rl" if hosted else "fine-tune",
                model=config.base,
                adapter=run.id,
                skill="recipe",
                latency=seconds,
                candidates=config.photos_per_step * config.rollouts,
                reward=_clip_reward(row.get("reward")),
                tokens_in=tokens[0] if tokens else None,
                tokens_out=tokens[1] if tokens else None,
                tokens_basis="reported" if tokens else "unknown",
                cost=cost,
                cost_basis="unknown" if cost is None else "estimated",
                request_id=run.id,
            )
        )
        time -= timedelta(seconds=seconds)
    return events[::-1]


def call_event(run: Run, row: dict[str, Any]) -> UsageEvent | None:
    """Build the usage event of a row of a hosted run's calls.jsonl; None if the row or the run's config is invalid."""
    try:
        cost = row["cost"]
        return UsageEvent(
            id=row["id"],
            time=datetime.fromtimestamp(row["time"], timezone.utc),
            source="hosted-rl",
            model=run.config().base,
            adapter=run.id,
            skill=row["skill"],
            outcome=row["outcome"],
            error=row["error"],
            payer=row["payer"],
            latency=row["seconds"],
            candidates=row["candidates"],
            reward=_clip_reward(row["reward"]),
            tokens_in=row.get("tokens_in"),
            tokens_out=row.get("tokens_out"),
            tokens_basis="estimated" if "tokens_in" in row and "tokens_out" in row else "unknown",
            cost=cost,
            cost_basis="unknown" if cost is None else "estimated",
            request_id=run.id,
        )
    except (KeyError, TypeError, ValueError, RunError):
        return None


def _clip_reward(reward: Any) -> float | None:
    return min(1.0, max(0.0, reward)) if isinstance(reward, int | float) and isfinite(reward) else None


def _step_tokens(row: dict[str, Any], previous: dict[str, Any], answers: int) -> tuple[int, int] | None:
    """Return the input and output tokens of a step; None for runs of earlier versions, which did not log them."""
    total, before, length = row.get("tokens"), previous.get("tokens"), row.get("answer_tokens")
    if not (_is_number(total) and _is_number(before) and _is_number(length)):
        return None
    tokens_out = max(0, round(length * answers))
    return max(0, round(total - before) - tokens_out), tokens_out


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and isfinite(value)


def _difference(total: Any, previous: Any) -> float | None:
    """Return the cost of a step from the running totals; None if one is unknown."""
    if not isinstance(total, int | float) or not isinstance(previous, int | float):
        return None
    return max(0.0, total - previous)
