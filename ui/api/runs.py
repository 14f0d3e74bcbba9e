"""Named API endpoints for training runs, with the same handlers as the Fine-tune tab."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from inference.types import MAX_SEED
from rewards import RewardFunction, RewardFunctionError
from training.runs.adapters import model_name
from training.runs.run import MAX_STEPS, Run, RunError
from ui.finetune import tab as finetune
from ui.finetune.estimate import DEFAULT_STEPS
from ui.messages import as_gradio_error
from ui.services import AppServices


def retrain(
    services: AppServices, reward: Any, base: str, photos: str, steps: int, seed: int, name: str = ""
) -> dict[str, Any]:
    """Start a training run.

    Args:
        services: The application's services.
        reward: Weight of each reward by name, such as {"sharpness": 1}.
        base: Name of the model to start from.
        photos: "bundled" or "hub:owner/dataset".
        steps: Number of steps.
        seed: Seed of the random number generators.
        name: Display name; empty to derive it from the reward.

    Returns:
        The run's status; see `run_status`.
    """
    with as_gradio_error(RunError, title=finetune.TITLE):
        try:
            weights = dict(RewardFunction.from_json(reward).weights)
        except RewardFunctionError as error:
            raise RunError(str(error)) from None
        source = "bundled" if (photos or "bundled") == "bundled" else finetune.hub_dataset(photos)
        if steps is None or seed is None:
            raise RunError("Send `steps` and `seed`.")
        run = finetune.submit(services, base, weights, photos=source, steps=steps, seed=seed, name=name or "")
        services.worker.run_inline(run)
    return run_status(services, run.id)


def run_status(services: AppServices, run: str) -> dict[str, Any]:
    """Return a run's state, step, time left, queue position, latest metrics and probe answer, and result."""
    with as_gradio_error(RunError, title=finetune.TITLE):
        selected = services.runs.get(run)
        metrics, probes = selected.metrics(), selected.probes()
        return {
            **_summary(services, selected),
            "metrics": metrics[-1] if metrics else None,
            "probe": probes[-1] if probes else None,
            "result": selected.result(),
        }


def cancel_run(services: AppServices, run: str) -> dict[str, Any]:
    """Cancel a run at its next step; its latest checkpoint is kept."""
    with as_gradio_error(RunError, title=finetune.TITLE):
        finetune.cancel(services, services.runs.get(run))
    return run_status(services, run)


def runs(services: AppServices) -> list[dict[str, Any]]:
    """List all runs, oldest first."""
    with as_gradio_error(RunError, title=finetune.TITLE):
        return [_summary(services, run) for run in services.runs.list()]


def use_run(services: AppServices, run: str) -> dict[str, Any]:
    """Offer a run's model beside its base in the Playground."""
    with as_gradio_error(RunError, title=finetune.TITLE):
        finetune.use(services, services.runs.get(run))
    return {"models": services.adapters.newest_with_base()}


def revert(services: AppServices, run: str) -> dict[str, Any]:
    """Remove a run's model from the Playground."""
    with as_gradio_error(RunError, title=finetune.TITLE):
        finetune.revert(services, services.runs.get(run))
    return {"models": services.adapters.newest_with_base()}


def _summary(services: AppServices, run: Run) -> dict[str, Any]:
    status, config = run.status(), run.config()
    base_run = services.adapters.find_run(config.base)
    seconds_left = status.seconds_left()
    return {
        "run": run.id,
        "name": config.name,
        "reward": config.reward,
        "base": model_name(base_run.id) if base_run else config.base,
        "seed": config.seed,
        "state": status.state,
        "phase": status.phase,
        "step": status.step,
        "steps": status.steps,
        "seconds_left": None if seconds_left is None else round(seconds_left, 1),
        "position": None if status.finished else services.worker.position(run),
        "message": status.message,
        "in_use": services.adapters.is_enabled(run.id),
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
    add_endpoint(partial(retrain, services), inputs, answer, api_name="retrain")
    add_endpoint(partial(runs, services), None, answer, api_name="runs")
    for handler in (run_status, cancel_run, use_run, revert):
        add_endpoint(partial(handler, services), run, answer, api_name=handler.__name__)
