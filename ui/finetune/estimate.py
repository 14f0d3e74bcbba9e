"""What a run will take and cost, in words, before it is started."""

from __future__ import annotations

from contextlib import suppress
from statistics import median
from typing import Any

from inference.places import RATE
from training.data.bundled import bundled
from training.hosted.client import BASE
from training.hosted.cost import WATCHED, Spend
from training.runs import hf_jobs as jobs
from training.runs.run import Run, RunConfig, RunError
from ui.finetune.run_view import duration
from ui.services import AppServices

SHORT = RunConfig.model_fields["steps"].default
LENGTHS = {"Smoke test": 10, "Short run": SHORT, "Custom": 0}
PLACES = {"This machine": "here", "Hugging Face Jobs": "jobs", "Moondream's tuning API": "hosted"}
DEFAULT_HARDWARE = RunConfig.model_fields["hardware"].default
START, PER_STEP = 20.0, 0.5  # seconds to start with and per step, before any run has been timed


def estimate(
    services: AppServices,
    length: str,
    steps: float | None,
    rollouts: float | None,
    place: str = "This machine",
    hardware: str | None = None,
    hourly: dict[str, float | None] | None = None,
    budget: float | None = None,
    examples: float | None = None,
) -> str:
    """How long it will take and what it costs, in words; from earlier runs where there are any."""
    wanted = steps_of(length, steps)
    there = PLACES.get(place, "here"), hardware or DEFAULT_HARDWARE
    past = [pace for run in services.runs.list() if (pace := _pace(run, *there)) is not None]
    seconds = guess(wanted, rollouts or 8) * (median(past[-5:]) if past else 1.0)
    waiting = len(services.worker.waiting())
    queue = f" It waits for {waiting} other run{'s' if waiting > 1 else ''} first." if waiting else ""
    if there[0] == "hosted":
        return _hosted(wanted, int(rollouts or 8), budget, int(examples or 0)) + queue
    if there[0] == "jobs":
        took = f"about {duration(seconds)}, as earlier ones there took," if past else "a time not known yet"
        return f"{wanted:,} steps on {there[1]} take {took} once the job runs. {_bound(hourly, there[1])}{queue}"
    source = "as earlier runs on this machine took" if past else "a first guess; it gets better with each run"
    return f"{wanted:,} steps take about {duration(seconds)} ({source}) and cost nothing.{queue}"


def _bound(hourly: dict[str, float | None] | None, hardware: str) -> str:
    """What a job can cost at most."""
    hour = (hourly or {}).get(hardware)
    if hour is None:
        return f"Its price is not known. The job is ended after {jobs.HOURS} hours at the latest."
    most = price(hour * jobs.HOURS)
    return f"It costs {price(hour)} an hour, and is ended after {jobs.HOURS} hours: {most} at most."


def _hosted(steps: int, rollouts: int, budget: float | None, examples: int) -> str:
    """What a run on the tuning API costs at most, and how long its requests take at least."""
    held_out = len(bundled("held-out"))
    asked: dict[str, Any] = {
        "base": BASE,
        "reward": {"colour": 1.0},
        "seed": 0,
        "steps": steps,
        "rollouts": max(2, rollouts),
    }
    config = RunConfig.make(**asked, sft_steps=examples)
    spend = Spend(BASE)
    most = spend.bound(config, held_out)
    probes = (steps // config.probe_every + 1) * WATCHED
    requests = steps * (config.photos_per_step + 1) + examples + probes + 2 * held_out
    bound = "The cost is not known" if most is None else f"It costs {price(most)} at most"
    stop = "" if not budget else f", and stops at your budget of {price(budget)}"
    return (
        f"{steps:,} steps take at least {duration(requests / RATE)} at {RATE:g} requests a second. {bound}{stop} "
        f"(estimated with prices of {spend.prices.as_of}; for answers those of {BASE} are assumed)."
    )


def _pace(run: Run, where: str, hardware: str) -> float | None:
    """How much longer than guessed a run took in that place, as a factor; None where it is not known."""
    result = run.result() or {}
    seconds, steps = (result.get(key) for key in ("seconds", "steps"))
    if not (isinstance(seconds, (int, float)) and isinstance(steps, (int, float)) and seconds > 0 and steps > 0):
        return None
    with suppress(RunError):
        config = run.config()
        if config.where == where and (where == "here" or config.hardware == hardware):
            return seconds / guess(steps, config.rollouts)
    return None


def guess(steps: float, rollouts: float) -> float:
    """Seconds that a run takes, before any was timed."""
    return START + PER_STEP * steps * rollouts / 8


def steps_of(length: str, steps: float | None) -> int:
    """The number of steps of a length."""
    return LENGTHS.get(length) or int(steps or SHORT)


def price(dollars: float | None) -> str:
    return "unknown price" if dollars is None else f"${dollars:.2f}"
