"""Named API endpoints that compare models, score recipes and save reward functions."""

from __future__ import annotations

import threading
from typing import Any

import gradio as gr
import numpy as np

from access.roles import Visitor
from inference.types import LENGTHS, MAX_CANDIDATES, MAX_SEED, MAX_TEMPERATURE, SKILLS, Request, RequestError
from recipes import Recipe, describe, parse
from rewards import RewardFunction, RewardFunctionError, score_recipes
from storage.reward_functions import StoreError
from ui.api import evaluations as api_evaluations
from ui.api import preferences as api_preferences
from ui.api import runs as api_runs
from ui.api import usage as api_usage
from ui.messages import as_gradio_error, user_error
from ui.permissions import visitor_of
from ui.playground.limits import LimitError
from ui.playground.models import visitor_models
from ui.playground.photo import photo_input, read_photo
from ui.playground.picker import check_models
from ui.playground.report import candidate_json
from ui.playground.saved_functions import SavedFunctions
from ui.services import AppServices

MAX_RECIPES = 64


def run_comparison(
    services: AppServices, visitor: Visitor, photo: np.ndarray, names: Any, skill: str, prompt: str, **sampling: Any
) -> dict[str, Any]:
    """Run models on a photo.

    Args:
        services: The application's services.
        visitor: The caller.
        photo: RGB image, uint8 [height, width, 3].
        names: List of model names.
        skill: Key of the skill in SKILLS.
        prompt: The prompt.
        **sampling: Further fields of `Request`.

    Returns:
        Seconds, and per model its candidates (text, recipe, scores, seconds) and the error if it failed.

    Raises:
        gr.Error: An argument is invalid.
    """
    models = visitor_models(services.adapters, visitor)
    names = check_models(names, models.specs)
    with as_gradio_error(RequestError, title="Invalid input"):
        request = Request(photo, skill, prompt, **sampling)
    snapshots = services.meter.compare(
        names, request, threading.Event(), "api", visitor.hash, models.answer, payer=models.payer
    )
    *_, last = snapshots
    return {
        "seconds": round(last.seconds, 4),
        "models": [
            {
                "model": column.name,
                "error": column.error or None,
                "candidates": [candidate_json(candidate, skill) for candidate in column.candidates if candidate.done],
            }
            for column in last.columns
        ],
    }


def list_models(services: AppServices, visitor: Visitor) -> list[dict[str, Any]]:
    """List the models that a visitor may see, with the reason why a model is unavailable or null."""
    models = visitor_models(services.adapters, visitor)
    return [
        {"name": name, "title": spec.title, "note": spec.note, "unavailable": models.unavailable(name)}
        for name, spec in models.specs.items()
    ]


def score(photo: str | None, recipes: Any) -> list[dict[str, Any]]:
    """Render recipes on a photo and score them as one group.

    Args:
        photo: Path of the photo.
        recipes: List of recipes, each as canonical text or as a JSON object.

    Returns:
        Recipe, description, problems, scores and fidelity (mean CIEDE2000) of each.
    """
    return score_photo(read_photo(photo), recipes)


def score_photo(photo: np.ndarray, recipes: Any) -> list[dict[str, Any]]:
    """Render recipes on a photo and score them as one group.

    Args:
        photo: RGB image, uint8 [height, width, 3].
        recipes: List of recipes, each as canonical text or as a JSON object.

    Returns:
        Recipe, description, problems, scores and fidelity (mean CIEDE2000) of each.
    """
    if not isinstance(recipes, list) or not 1 <= len(recipes) <= MAX_RECIPES:
        raise user_error(f"Send a list of 1 to {MAX_RECIPES} recipes.", "Recipes")
    parsed = [parse(recipe) for recipe in recipes]
    invalid = [str(number) for number, result in enumerate(parsed, 1) if not result.ok]
    if invalid:
        example = str(Recipe(exposure=20))
        raise user_error(f"Invalid recipe: number {', '.join(invalid)}. Write recipes like: {example}", "Recipes")
    scored = score_recipes(photo, [result.recipe for result in parsed])
    return [
        {
            "recipe": str(candidate.recipe),
            "words": describe(candidate.recipe),
            "problems": list(result.problems),
            "scores": candidate.scores,
            "fidelity": candidate.fidelity,
        }
        for candidate, result in zip(scored, parsed, strict=True)
    ]


def build(services: AppServices) -> None:
    """Register the endpoints. Their inputs are invisible components, so that Gradio validates incoming files."""
    hidden: dict[str, Any] = {"visible": False}
    photo = photo_input(label="photo", **hidden)
    inputs = [
        photo,
        gr.JSON(label="models", **hidden),
        gr.Dropdown(list(SKILLS), value="recipe", label="skill", **hidden),
        gr.Textbox("", label="prompt", **hidden),
        gr.Number(4, precision=0, minimum=1, maximum=MAX_CANDIDATES, label="n", **hidden),
        gr.Number(1.0, minimum=0, maximum=MAX_TEMPERATURE, label="temperature", **hidden),
        gr.Number(1, precision=0, minimum=0, maximum=MAX_SEED, label="seed", **hidden),
        gr.Dropdown(list(LENGTHS), value="normal", label="length", **hidden),
    ]
    answer, recipes, weights = (gr.JSON(label=label, **hidden) for label in ("answer", "recipes", "weights"))
    name = gr.Textbox(label="name", **hidden)

    def compare(
        photo: str | None,
        models: Any,
        skill: str,
        prompt: str,
        n: int,
        temperature: float,
        seed: int,
        length: str,
        request: gr.Request,
    ) -> dict[str, Any]:
        """Run models on a photo.

        Args:
            photo: The photo.
            models: List of model names.
            skill: Name of the skill.
            prompt: The prompt.
            n: Number of candidates per model.
            temperature: Sampling temperature.
            seed: Seed of the first candidate.
            length: Length of a caption.
            request: The HTTP request.

        Returns:
            Seconds, and per model its candidates (text, recipe, scores, seconds) and the error if it failed.
        """
        visitor = visitor_of(services.access, request)
        with as_gradio_error(LimitError, title="Too many comparisons"), services.comparisons.admit(visitor):
            sampling = {"n": n, "temperature": temperature, "seed": seed, "length": length}
            return run_comparison(services, visitor, read_photo(photo), models, skill, prompt, **sampling)

    def models(request: gr.Request) -> list[dict[str, Any]]:
        """List the models, with the reason why a model is unavailable or null."""
        return list_models(services, visitor_of(services.access, request))

    def reward_functions(request: gr.Request) -> dict[str, dict[str, float]]:
        """Return the weights of every saved reward function by name."""
        saved = SavedFunctions(services.store, visitor_of(services.access, request))
        with as_gradio_error(StoreError, title="Reward functions"):
            return saved.weights()

    def save_reward_function(name: str, weights: Any, request: gr.Request) -> dict[str, Any]:
        """Save weights, such as {"sharpness": 0.3}, under a new name."""
        saved = SavedFunctions(services.store, visitor_of(services.access, request))
        with as_gradio_error(StoreError, RewardFunctionError, title="Reward functions"):
            function = RewardFunction.from_json(weights)
            return {"name": saved.save(name or "", function), "weights": dict(function.weights)}

    on_call = gr.Button(**hidden).click
    on_call(compare, inputs, answer, api_name="compare", concurrency_limit=16)
    on_call(score, [photo, recipes], answer, api_name="score", concurrency_limit=2)
    on_call(models, None, answer, api_name="models", queue=False)
    on_call(reward_functions, None, answer, api_name="reward_functions")
    on_call(save_reward_function, [name, weights], answer, api_name="save_reward_function")
    api_preferences.build(services)
    api_evaluations.build(services)
    api_runs.build(services)
    api_usage.build(services)
