"""Named API endpoints for training runs, with the same handlers as the Fine-tune tab."""

from __future__ import annotations

from typing import Any

import gradio as gr

from access.permissions import AccessDenied
from access.roles import Visitor
from inference.types import MAX_SEED
from rewards import RewardFunction, RewardFunctionError
from training.runs.adapters import model_name
from training.runs.run import MAX_STEPS, Run, RunError
from ui.finetune import tab as finetune
from ui.finetune.estimate import DEFAULT_STEPS
from ui.finetune.permissions import is_mine, owner_label, shows_log, shows_photos
from ui.messages import as_gradio_error
from ui.permissions import visitor_of
from ui.services import AppServices

PUBLIC_ALARM_FIELDS = ("kind", "title", "message", "advice", "step", "last_step")  # without the photo and its recipe


def retrain(
    services: AppServices,
    visitor: Visitor,
    reward: Any,
    base: str,
    photos: str,
    steps: int,
    seed: int,
    name: str = "",
) -> dict[str, Any]:
    """Start a training run.

    Args:
        services: The application's services.
        visitor: The sender of the request, who owns the run.
        reward: Weight of each reward by name, such as {"sharpness": 1}.
        base: Name of the model to start from.
        photos: "bundled" or "hub:owner/dataset".
        steps: Number of steps.
        seed: Seed of the random number generators.
        name: Display name; empty to derive it from the reward.

    Returns:
        The run's status; see `run_status`.
    """
    with as_gradio_error(RunError, AccessDenied, title=finetune.TITLE):
        try:
            weights = dict(RewardFunction.from_json(reward).weights)
        except RewardFunctionError as error:
            raise RunError(str(error)) from None
        source = "bundled" if (photos or "bundled") == "bundled" else finetune.hub_dataset(photos)
        if steps is None or seed is None:
            raise RunError("Send `steps` and `seed`.")
        run = finetune.submit(services, visitor, base, weights, photos=source, steps=steps, seed=seed, name=name or "")
        services.worker.run_inline(run)
    return run_status(services, visitor, run.id)


def run_status(services: AppServices, visitor: Visitor, run: str) -> dict[str, Any]:
    """Return a run's state, step, time left, queue position, latest metrics and probe answer, alarms, and result."""
    with as_gradio_error(RunError, title=finetune.TITLE):
        selected = services.runs.get(run)
        metrics, probes, result = selected.metrics(), selected.probes(), selected.result()
        alarms = selected.alarms()
        if not shows_photos(visitor, selected, selected.config()):  # names of photos, and answers to them
            probes, alarms = [], [{key: alarm.get(key) for key in PUBLIC_ALARM_FIELDS} for alarm in alarms]
            result = result and {key: value for key, value in result.items() if key != "pairs"}
        result = result and {**result, "alarms": alarms}
        return {
            **_summary(services, visitor, selected),
            "metrics": metrics[-1] if metrics else None,
            "probe": probes[-1] if probes else None,
            "alarms": alarms,
            "result": result,
        }


def cancel_run(services: AppServices, visitor: Visitor, run: str) -> dict[str, Any]:
    """Cancel a run at its next step; its latest checkpoint is kept."""
    with as_gradio_error(RunError, AccessDenied, title=finetune.TITLE):
        finetune.cancel(services, visitor, services.runs.get(run))
    return run_status(services, visitor, run)


def runs(services: AppServices, visitor: Visitor) -> list[dict[str, Any]]:
    """List all runs, oldest first."""
    with as_gradio_error(RunError, title=finetune.TITLE):
        return [_summary(services, visitor, run) for run in services.runs.list()]


def use_run(services: AppServices, visitor: Visitor, run: str) -> dict[str, Any]:
    """Offer a run's model beside its base in the Playground of the run's owner."""
    with as_gradio_error(RunError, AccessDenied, title=finetune.TITLE):
        finetune.use(services, visitor, services.runs.get(run))
    return {"models": services.adapters.newest_with_base(visitor.id)}


def revert(services: AppServices, visitor: Visitor, run: str) -> dict[str, Any]:
    """Remove a run's model from the Playground."""
    with as_gradio_error(RunError, AccessDenied, title=finetune.TITLE):
        finetune.revert(services, visitor, services.runs.get(run))
    return {"models": services.adapters.newest_with_base(visitor.id)}


def _summary(services: AppServices, visitor: Visitor, run: Run) -> dict[str, Any]:
    status, config = run.status(), run.config()
    base_run = services.adapters.find_run(config.base)
    base = model_name(base_run.id) if base_run else config.base
    seconds_left = status.seconds_left()
    return {
        "run": run.id,
        "name": config.name,
        "reward": config.reward,
        "base": base if base_run or base in services.adapters.models else "an earlier run",
        "seed": config.seed,
        "state": status.state,
        "phase": status.phase,
        "step": status.step,
        "steps": status.steps,
        "seconds_left": None if seconds_left is None else round(seconds_left, 1),
        "position": None if status.finished else services.worker.position(run),
        "message": status.message if shows_log(visitor, run, config) else "",
        "in_use": services.adapters.is_enabled(run.id),
        "shared": services.adapters.is_shared(run.id),
        "owner": owner_label(services.access, visitor, run),
        "mine": is_mine(visitor, run),
    }


def build(services: AppServices) -> None:
    """Add the endpoints to the page. Their input components are not visible."""
    hidden: dict[str, Any] = {"visible": False}
    inputs = [
        gr.JSON(label="reward", **hidden),
        gr.Textbox("moondream-tiny", label="base", **hidden),
        gr.Textbox("bundled", label="photos", **hidden),
        gr.Number(DEFAULT_STEPS, precision=0, minimum=1, maximum=MAX_STEPS, label="steps", **hidden),
        gr.Number(1, precision=0, minimum=0, maximum=MAX_SEED, label="seed", **hidden),
        gr.Textbox("", label="name", **hidden),
    ]
    run, answer = gr.Textbox(label="run", **hidden), gr.JSON(label="answer", **hidden)
    add_endpoint = gr.Button(**hidden).click

    def visitor(request: gr.Request) -> Visitor:
        return visitor_of(services.access, request)

    def retrain_requested(
        reward: Any, base: str, photos: str, steps: int, seed: int, name: str, request: gr.Request
    ) -> dict[str, Any]:
        return retrain(services, visitor(request), reward, base, photos, steps, seed, name)

    def runs_requested(request: gr.Request) -> list[dict[str, Any]]:
        return runs(services, visitor(request))

    def run_status_requested(run: str, request: gr.Request) -> dict[str, Any]:
        return run_status(services, visitor(request), run)

    def cancel_run_requested(run: str, request: gr.Request) -> dict[str, Any]:
        return cancel_run(services, visitor(request), run)

    def use_run_requested(run: str, request: gr.Request) -> dict[str, Any]:
        return use_run(services, visitor(request), run)

    def revert_requested(run: str, request: gr.Request) -> dict[str, Any]:
        return revert(services, visitor(request), run)

    endpoints = {
        retrain: (retrain_requested, inputs),
        runs: (runs_requested, None),
        run_status: (run_status_requested, run),
        cancel_run: (cancel_run_requested, run),
        use_run: (use_run_requested, run),
        revert: (revert_requested, run),
    }
    for function, (handler, components) in endpoints.items():
        handler.__doc__ = function.__doc__
        add_endpoint(handler, components, answer, api_name=function.__name__)
