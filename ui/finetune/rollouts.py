"""Rollouts of a run: the candidates of one training step as pictures, with their scores and advantages.

A gr.HTML whose value is JSON, drawn by rollouts.js. The template contains no placeholders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from access.roles import Visitor
from recipes import PhotoError, describe, jpeg_data_url, load_photo, parse, render_all
from rewards import REWARDS
from training.runs.run import Run
from ui.components import template_component
from ui.finetune.permissions import shows_training_photos
from ui.playground.compare import PICTURE_QUALITY

HERE = Path(__file__).resolve().parent


def rollouts_view() -> gr.HTML:
    """Create the component. It fires `choose` with {run, step} when the user moves the step slider."""
    return template_component(HERE, "rollouts", "rollouts")


def rollout_range(visitor: Visitor, run: Run | None) -> dict[str, Any] | None:
    """Return the run and its last recorded step; None if it has no rollouts, or none that the visitor may see."""
    if run is None or not run.has_rollouts or not shows_training_photos(visitor, run, run.config()):
        return None
    metrics = run.metrics()
    last = metrics[-1].get("step") if metrics else None
    return {"run": run.id, "last": last} if isinstance(last, int) and last > 0 else None


def rollout_snapshot(visitor: Visitor, run: Run, step: int) -> dict[str, Any] | None:
    """Return the rollouts of a step for the page; those of the step recorded before, if it has none."""
    bounds = rollout_range(visitor, run)
    row = run.rollouts(step) if bounds else None
    if not bounds or not row:
        return bounds
    groups = [_group(run, group) for group in row.get("groups") or []]
    return bounds | {"step": row["step"], "groups": groups}


def _group(run: Run, group: dict[str, Any]) -> dict[str, Any]:
    rollouts = sorted(group["rollouts"], key=lambda rollout: -(rollout["total"] or 0.0))
    rollouts.sort(key=lambda rollout: rollout["total"] is None)
    parsed = [parse(rollout["text"]) for rollout in rollouts]
    try:
        photo = load_photo(run.rollout_photo(group["photo"]))
    except (OSError, PhotoError):
        photo = None
    recipes = [result.recipe for result in parsed if result.ok]
    pictures = iter(render_all(photo, recipes) if photo is not None else [])
    return {
        "title": f"Photo {group['photo'] + 1}",
        "no_signal": bool(group["no_signal"]),
        "before": jpeg_data_url(photo, PICTURE_QUALITY) if photo is not None else "",
        "rollouts": [
            {
                "src": jpeg_data_url(next(pictures), PICTURE_QUALITY) if result.ok and photo is not None else "",
                "text": describe(result.recipe) if result.ok else f"Not a valid recipe: {rollout['text']}",
                "total": rollout["total"],
                "advantage": rollout["advantage"],
                "scores": [
                    {"name": name, "value": rollout["scores"].get(name)}
                    for name in REWARDS
                    if name in rollout["scores"]
                ],
            }
            for rollout, result in zip(rollouts, parsed, strict=True)
        ],
    }
