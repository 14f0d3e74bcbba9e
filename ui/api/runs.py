"""The named endpoints for training runs: the same handlers as the Fine-tune tab, for a program."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from inference.types import MAX_SEED
from rewards import RewardFunction, RewardFunctionError
from training.runs.run import MAX_STEPS, Run, RunError
from ui.finetune import tab as finetune
from ui.finetune.estimate import SHORT
from ui.finetune.tab import plainly
from ui.services import AppServices


def retrain(
    services: AppServices, reward: Any, base: str, photos: str, steps: int, seed: int, name: str = ""
) -> dict[str, Any]:
    """Tune a model for a reward ({"sharpness": 1}). photos: "bundled", or "hub:owner/dataset"."""
    with plainly():
        try:
            weights = dict(RewardFunction.from_json(reward).weights)
        except RewardFunctionError as error:
            raise RunError(str(error)) from None
        source = "bundled" if (photos or "bundled") == "bundled" else finetune.hub_photos(photos)
        if steps is None or seed is None:
            raise RunError("Send the number of steps and a seed.")
        run = finetune.submit(services, base, weights, photos=source, steps=steps, seed=seed, name=name or "")
        services.worker.do_inside(run)
    return run_status(services, run.id)


def run_status(services: AppServices, run: str) -> dict[str, Any]:
    """Where a run stands: state, step, time left, place in the queue, its last metrics and probe answer, its result."""
    with plainly():
        found = services.runs.get(run)
        metrics, probes = found.metrics(), found.probes()
        return {
            **_summary(services, found),
            "metrics": metrics[-1] if metrics else None,
            "probe": probes[-1] if probes else None,
            "result": found.result(),
        }


def cancel_run(services: AppServices, run: str) -> dict[str, Any]:
    """Stop a run at its next step; what it has learned is kept."""
    with plainly():
        finetune.cancel(services, services.runs.get(run))
    return run_status(services, run)


def runs(services: AppServices) -> list[dict[str, Any]]:
    """Every run that is kept, oldest first."""
    with plainly():
        return [_summary(services, run) for run in services.runs.list()]


def use_run(services: AppServices, run: str) -> dict[str, Any]:
    """Put a run's model beside its base in the playground."""
    with plainly():
        finetune.use(services, services.runs.get(run))
    return {"models": services.adapters.front()}


def revert(services: AppServices, run: str) -> dict[str, Any]:
    """Take a run's model out of the playground again."""
    with plainly():
        finetune.revert(services, services.runs.get(run))
    return {"models": services.adapters.front()}


def _summary(services: AppServices, run: Run) -> dict[str, Any]:
    status, config = run.status(), run.config()
    earlier = services.adapters.earlier(config.base)
    left = status.seconds_left()
    return {
        "run": run.id,
        "name": config.name,
        "reward": config.reward,
        "base": finetune.model_name(earlier.id) if earlier else config.base,
        "seed": config.seed,
        "state": status.state,
        "phase": status.phase,
        "step": status.step,
        "steps": status.steps,
        "seconds_left": None if left is None else round(left, 1),
        "position": services.worker.position(run) if not status.over else None,
        "message": status.message,
        "in_use": services.adapters.uses(run.id),
    }


def build(services: AppServices) -> None:
    """The endpoints, with inputs that no page shows."""
    hidden: dict[str, Any] = {"visible": False}
    asked = [
        gr.JSON(label="reward", **hidden),
        gr.Textbox("moondream-tiny", label="base", **hidden),
        gr.Textbox("bundled", label="photos", **hidden),
        gr.Number(SHORT, precision=0, minimum=1, maximum=MAX_STEPS, label="steps", **hidden),
        gr.Number(1, precision=0, minimum=0, maximum=MAX_SEED, label="seed", **hidden),
        gr.Textbox("", label="name", **hidden),
    ]
    run, answer = gr.Textbox(label="run", **hidden), gr.JSON(label="answer", **hidden)
    call = gr.Button(**hidden).click
    call(partial(retrain, services), asked, answer, api_name="retrain")
    call(partial(runs, services), None, answer, api_name="runs")
    for handler in (run_status, cancel_run, use_run, revert):
        call(partial(handler, services), run, answer, api_name=handler.__name__)
