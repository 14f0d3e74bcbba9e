"""Named API endpoints for evaluations, with the same handlers as the Evaluate tab."""

from __future__ import annotations

from typing import Any

import gradio as gr

from access.permissions import AccessDenied
from access.roles import Visitor
from inference.types import MAX_CANDIDATES, MAX_SEED, SKILLS
from rewards import EQUAL_WEIGHTS, RewardFunction, RewardFunctionError
from training.evaluations.evaluation import DEFAULT_CANDIDATES, DEFAULT_PHOTOS
from training.evaluations.leaderboard import leaderboard
from training.runs.run import MAX_PHOTOS, RunError
from ui.evaluate import tab
from ui.evaluate.permissions import get_evaluation
from ui.finetune.tab import hub_dataset
from ui.messages import as_gradio_error
from ui.permissions import visitor_of
from ui.playground.models import visitor_models
from ui.services import AppServices


def evaluate(
    services: AppServices,
    visitor: Visitor,
    models: Any,
    photos: str = "bundled",
    reward: Any = None,
    skill: str = "recipe",
    prompt: str = "",
    candidates: int = DEFAULT_CANDIDATES,
    max_photos: int = DEFAULT_PHOTOS,
    seed: int = 1,
    name: str = "",
) -> dict[str, Any]:
    """Start an evaluation of models on a set of photos.

    Args:
        services: The application's services.
        visitor: The sender of the request, who owns the evaluation.
        models: List of one to six names, or of objects with `name` and `temperature` (1 by default).
        photos: "bundled" (the held-out ones) or "hub:owner/dataset".
        reward: Weight of each reward by name, such as {"sharpness": 1}; null for equal weights.
        skill: Name of the skill. Only recipes are scored.
        prompt: The prompt.
        candidates: Answers per photo and model.
        max_photos: Maximum number of photos.
        seed: Seed of the answers.
        name: Display name; empty for the names of the models.

    Returns:
        The evaluation's status; see `evaluation`.
    """
    with as_gradio_error(RunError, AccessDenied, title=tab.TITLE):
        function = _parse_reward(reward) or EQUAL_WEIGHTS
        if skill not in SKILLS:
            raise RunError(f"Unknown skill. Choose one of {', '.join(SKILLS)}.")
        source = "bundled" if (photos or "bundled") == "bundled" else hub_dataset(photos)
        started = tab.submit(
            services,
            visitor,
            visitor_models(services.adapters, visitor),
            _parse_models(models),
            dict(function.weights),
            photos=source,
            skill=skill,
            prompt=prompt or SKILLS[skill].default_prompt,
            candidates=candidates,
            max_photos=max_photos,
            seed=seed,
            name=name or "",
        )
    return evaluation(services, visitor, started.id)


def evaluation(services: AppServices, visitor: Visitor, evaluation: str, reward: Any = None) -> dict[str, Any]:
    """Return the state, progress and leaderboard of an evaluation.

    Args:
        services: The application's services.
        visitor: The sender of the request.
        evaluation: Its id.
        reward: Weights of the leaderboard; null for those that the evaluation was started with. The stored scores are
            weighted anew, nothing is rendered.

    Returns:
        `evaluation` (the id), `name`, `state`, `phase`, `step`, `steps`, `seconds_left`, `message` and `leaderboard`.
    """
    with as_gradio_error(RunError, AccessDenied, title=tab.TITLE):
        item = get_evaluation(services, visitor, evaluation)
        config, status = item.config(), item.status()
        function = _parse_reward(reward) or config.function
        return {
            "evaluation": item.id,
            "name": config.name,
            "state": status.state,
            "phase": status.phase,
            "step": status.step,
            "steps": status.steps,
            "seconds_left": status.seconds_left(),
            "message": status.message,
            "leaderboard": leaderboard(item.results(), function),
        }


def _parse_reward(reward: Any) -> RewardFunction | None:
    if reward is None:
        return None
    try:
        return RewardFunction.from_json(reward)
    except RewardFunctionError as error:
        raise RunError(str(error)) from None


def _parse_models(models: Any) -> list[tuple[str, float]]:
    """Parse names, or objects with a name and a temperature. Raises RunError."""
    chosen = []
    for entry in models if isinstance(models, list) else [None]:
        entry = {"name": entry} if isinstance(entry, str) else entry
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("name"), str)
            or set(entry) - {"name", "temperature"}
        ):
            raise RunError('Send `models` as a list such as ["moondream-tiny", {"name": ..., "temperature": 0.4}].')
        chosen.append((entry["name"], entry.get("temperature", 1.0)))
    return chosen


def build(services: AppServices) -> None:
    """Add the endpoints to the page. Their input components are not visible."""
    hidden: dict[str, Any] = {"visible": False}
    inputs = [
        gr.JSON(label="models", **hidden),
        gr.Textbox("bundled", label="photos", **hidden),
        gr.JSON(label="reward", **hidden),
        gr.Dropdown(list(SKILLS), value="recipe", label="skill", **hidden),
        gr.Textbox("", label="prompt", **hidden),
        gr.Number(DEFAULT_CANDIDATES, precision=0, minimum=1, maximum=MAX_CANDIDATES, label="candidates", **hidden),
        gr.Number(DEFAULT_PHOTOS, precision=0, minimum=1, maximum=MAX_PHOTOS, label="max_photos", **hidden),
        gr.Number(1, precision=0, minimum=0, maximum=MAX_SEED, label="seed", **hidden),
        gr.Textbox("", label="name", **hidden),
    ]
    chosen, weights = gr.Textbox(label="evaluation", **hidden), gr.JSON(label="reward", **hidden)
    answer = gr.JSON(label="answer", **hidden)
    add_endpoint = gr.Button(**hidden).click

    def evaluate_requested(
        models: Any,
        photos: str,
        reward: Any,
        skill: str,
        prompt: str,
        candidates: int,
        max_photos: int,
        seed: int,
        name: str,
        request: gr.Request,
    ) -> dict[str, Any]:
        visitor = visitor_of(services.access, request)
        return evaluate(services, visitor, models, photos, reward, skill, prompt, candidates, max_photos, seed, name)

    def evaluation_requested(evaluation_id: str, reward: Any, request: gr.Request) -> dict[str, Any]:
        return evaluation(services, visitor_of(services.access, request), evaluation_id, reward)

    evaluate_requested.__doc__, evaluation_requested.__doc__ = evaluate.__doc__, evaluation.__doc__
    add_endpoint(evaluate_requested, inputs, answer, api_name="evaluate")
    add_endpoint(evaluation_requested, [chosen, weights], answer, api_name="evaluation")
