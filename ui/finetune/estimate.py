"""Estimates of a run's duration and cost, shown in the form before the run starts."""

from __future__ import annotations

from contextlib import suppress
from statistics import median

from inference.types import DEFAULT_RATE
from training.data.bundled import bundled_photos
from training.hosted.client import BASE
from training.hosted.cost import CostTracker
from training.runs import hf_jobs
from training.runs.run import PROBE_PHOTOS, Run, RunConfig, RunError
from ui.finetune.run_view import format_duration
from ui.services import AppServices

DEFAULT_STEPS = RunConfig.model_fields["steps"].default
DEFAULT_ROLLOUTS = RunConfig.model_fields["rollouts"].default
DEFAULT_HARDWARE = RunConfig.model_fields["hardware"].default
LENGTHS = {"Smoke test": 10, "Short run": DEFAULT_STEPS, "Custom": 0}
BACKENDS = {"This machine": "here", "Hugging Face Jobs": "jobs", "Moondream's tuning API": "hosted"}
STARTUP_SECONDS, SECONDS_PER_STEP = 20.0, 0.65  # assumed until a run has been timed; a step of DEFAULT_ROLLOUTS
RECENT_RUNS = 5  # earlier runs that the estimate is based on


def estimate(
    services: AppServices,
    length: str,
    steps: float | None,
    rollouts: float | None,
    backend: str = "This machine",
    hardware: str | None = None,
    hourly_prices: dict[str, float | None] | None = None,
    budget: float | None = None,
    sft_steps: float | None = None,
) -> str:
    """Estimate the duration and the cost of a run.

    Args:
        services: The application's services, whose finished runs the estimate is based on.
        length: A key of LENGTHS.
        steps: Number of steps; used if `length` is "Custom".
        rollouts: Answers sampled per photo.
        backend: A key of BACKENDS.
        hardware: Hardware flavor on Hugging Face Jobs.
        hourly_prices: US dollars per hour by hardware flavor.
        budget: Maximum cost on the tuning API, in US dollars.
        sft_steps: Supervised steps on the tuning API before GRPO.

    Returns:
        One or two sentences in Markdown.
    """
    step_count, rollout_count = step_count_of(length, steps), rollouts or DEFAULT_ROLLOUTS
    backend_id, flavor = BACKENDS.get(backend, "here"), hardware or DEFAULT_HARDWARE
    waiting = len(services.worker.unfinished())
    queue = f" It waits for {waiting} other run{'s' if waiting > 1 else ''} first." if waiting else ""
    if backend_id == "hosted":
        return _hosted_estimate(step_count, int(rollout_count), budget, int(sft_steps or 0)) + queue
    factors = [_duration_factor(run, backend_id, flavor) for run in services.runs.list()]
    known = [factor for factor in factors if factor is not None][-RECENT_RUNS:]
    duration = format_duration(assumed_seconds(step_count, rollout_count) * (median(known) if known else 1.0))
    if backend_id == "jobs":
        if known:
            time = f"about {duration} once the job runs, based on earlier runs on this hardware"
        else:
            time = "an unknown time: no earlier run used this hardware"
        return f"{step_count:,} steps on {flavor} take {time}. {_job_cost(hourly_prices, flavor)}{queue}"
    source = "based on earlier runs on this machine" if known else "a first guess, refined by each finished run"
    return f"{step_count:,} steps take about {duration} ({source}) and cost nothing.{queue}"


def _job_cost(hourly_prices: dict[str, float | None] | None, hardware: str) -> str:
    hourly = (hourly_prices or {}).get(hardware)
    if hourly is None:
        return f"The price is not known. The job is stopped after {hf_jobs.MAX_HOURS} hours at the latest."
    maximum = format_price(hourly * hf_jobs.MAX_HOURS)
    return f"It costs {format_price(hourly)} an hour, {maximum} at most: the job stops after {hf_jobs.MAX_HOURS} hours."


def _hosted_estimate(steps: int, rollouts: int, budget: float | None, sft_steps: int) -> str:
    """Estimate the maximum cost on the tuning API, and the minimum duration at its request rate."""
    held_out = len(bundled_photos("held-out"))
    config = RunConfig.create(
        base=BASE, reward={"colour": 1.0}, seed=0, steps=steps, rollouts=max(2, rollouts), sft_steps=sft_steps
    )
    tracker = CostTracker(BASE)
    maximum = tracker.max_cost(config, held_out)
    probes = (steps // config.probe_every + 1) * PROBE_PHOTOS
    requests = steps * (config.photos_per_step + 1) + sft_steps + probes + 2 * held_out
    cost = "The cost is not known" if maximum is None else f"It costs {format_price(maximum)} at most"
    stop = f", and stops at your budget of {format_price(budget)}" if budget else ""
    time = f"at least {format_duration(requests / DEFAULT_RATE)} at {DEFAULT_RATE:g} requests per second"
    return (
        f"{steps:,} steps take {time}. {cost}{stop} "
        f"(prices of {tracker.prices.as_of}; tuned models are assumed to cost as much as {BASE})."
    )


def _duration_factor(run: Run, backend: str, hardware: str) -> float | None:
    """Return a finished run's duration relative to `assumed_seconds`; None if unknown or run on another backend."""
    result = run.result() or {}
    seconds, steps = result.get("seconds"), result.get("steps")
    if not (isinstance(seconds, (int, float)) and isinstance(steps, (int, float)) and seconds > 0 and steps > 0):
        return None
    with suppress(RunError):
        config = run.config()
        if config.backend == backend and (backend == "here" or config.hardware == hardware):
            return seconds / assumed_seconds(steps, config.rollouts)
    return None


def assumed_seconds(steps: float, rollouts: float) -> float:
    """Return the duration that is assumed for a run until runs have been timed, in seconds."""
    return STARTUP_SECONDS + SECONDS_PER_STEP * steps * rollouts / DEFAULT_ROLLOUTS


def step_count_of(length: str, steps: float | None) -> int:
    """Return the number of steps of a length; `steps` counts if the length is "Custom"."""
    return LENGTHS.get(length) or int(steps or DEFAULT_STEPS)


def format_price(dollars: float | None) -> str:
    """Format US dollars with two decimals."""
    return "unknown price" if dollars is None else f"${dollars:.2f}"
