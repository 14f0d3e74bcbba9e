"""Named API endpoints for choices between candidates: store one, fit the reward to them, export and delete them."""

from __future__ import annotations

from typing import Any

import gradio as gr

from access.roles import Visitor
from recipes import Recipe, parse
from rewards import EQUAL_WEIGHTS, RewardFunction, RewardFunctionError, score_recipes
from storage.database import StoreError
from storage.preferences import OUTCOMES, JudgedCandidate
from training.preferences.export import to_rows
from ui.messages import as_gradio_error, user_error
from ui.permissions import visitor_of
from ui.playground.photo import photo_input, read_photo
from ui.playground.preferences import SAMPLE_FILES, fit_choices, fit_json, save_choice, write_zip
from ui.services import AppServices

TITLE = "Choices"
API_MODEL = "api"  # model of recipes that a program sends without one
MAX_NAME = 200


def add_choice(
    services: AppServices,
    visitor: Visitor,
    photo: str | None,
    recipes: tuple[Any, Any],
    outcome: str,
    weights: Any = None,
    keep_photo: bool = False,
    models: tuple[str, str] = (API_MODEL, API_MODEL),
) -> dict[str, Any]:
    """Score two recipes on a photo as one group and store which one the caller prefers.

    Args:
        services: The application's services.
        visitor: The caller, who owns the choice.
        photo: Path of the photo.
        recipes: The left and the right recipe, each as canonical text or as a JSON object.
        outcome: "left", "right" or "equal".
        weights: Reward weights from which the fit starts; equal weights by default.
        keep_photo: Whether a small copy of the photo is kept with the choice.
        models: Names of the models that wrote the recipes.

    Returns:
        The fit to all choices of the caller; see `fit_json`.

    Raises:
        gr.Error: An argument is invalid, or the choice cannot be stored.
    """
    if outcome not in OUTCOMES:
        raise user_error(f"A choice is one of {', '.join(OUTCOMES)}.", TITLE)
    parsed = [parse(recipe) for recipe in recipes]
    if not all(result.ok for result in parsed):
        raise user_error(f"A recipe is invalid. Write recipes like: {Recipe(exposure=20)}", TITLE)
    if parsed[0].recipe == parsed[1].recipe:
        raise user_error("Both recipes are the same. Choose between two different ones.", TITLE)
    picture, start = read_photo(photo), _weights(weights)
    scored = score_recipes(picture, [result.recipe for result in parsed])
    left, right = (
        JudgedCandidate(name[:MAX_NAME] or API_MODEL, str(candidate.recipe), candidate.scores)
        for name, candidate in zip(models, scored, strict=True)
    )
    with as_gradio_error(StoreError, title=TITLE):
        save_choice(services.preferences, visitor, (left, right), outcome, start, photo=picture if keep_photo else None)
    return fit(services, visitor, weights)


def fit(services: AppServices, visitor: Visitor, weights: Any = None) -> dict[str, Any]:
    """Fit the reward to the caller's choices; see `fit_json`. `weights` count if there is no choice yet."""
    with as_gradio_error(StoreError, title=TITLE):
        return fit_json(fit_choices(services.preferences.list(visitor.id), _weights(weights)))


def export_choices(services: AppServices, visitor: Visitor) -> tuple[list[dict[str, Any]], str]:
    """Return the caller's choices as rows of TRL's preference format, and the path of a zip file with the photos."""
    with as_gradio_error(StoreError, title=TITLE):
        preferences = services.preferences.list(visitor.id, photos=True)
    return to_rows(preferences, SAMPLE_FILES)[0], write_zip(preferences)


def _weights(weights: Any) -> RewardFunction:
    with as_gradio_error(RewardFunctionError, title=TITLE):
        return EQUAL_WEIGHTS if weights is None else RewardFunction.from_json(weights)


def build(services: AppServices) -> None:
    """Register the endpoints. Their inputs are invisible components, so that Gradio validates incoming files."""
    hidden: dict[str, Any] = {"visible": False}
    weights, answer = gr.JSON(label="weights", **hidden), gr.JSON(label="answer", **hidden)
    inputs = [
        photo_input(label="photo", **hidden),
        gr.JSON(label="left", **hidden),
        gr.JSON(label="right", **hidden),
        gr.Dropdown(list(OUTCOMES), value="left", label="choice", **hidden),
        weights,
        gr.Checkbox(False, label="keep_photo", **hidden),
        gr.Textbox(API_MODEL, label="left_model", **hidden),
        gr.Textbox(API_MODEL, label="right_model", **hidden),
    ]
    rows, file = gr.JSON(label="rows", **hidden), gr.File(label="file", **hidden)

    def prefer(
        photo: str | None,
        left: Any,
        right: Any,
        choice: str,
        weights: Any,
        keep_photo: bool,
        left_model: str,
        right_model: str,
        request: gr.Request,
    ) -> dict[str, Any]:
        """Store which of two recipes for a photo is preferred, and return the reward fitted to all choices.

        Args:
            photo: The photo.
            left: The first recipe, as text or as a JSON object.
            right: The second recipe.
            choice: "left", "right" or "equal".
            weights: Reward weights from which the fit starts, such as {"sharpness": 1}; null for equal weights.
            keep_photo: Whether a copy of the photo (512 px) is kept with the choice. Only its owner may agree to that.
            left_model: Name of the model that wrote the first recipe.
            right_model: Name of the model that wrote the second recipe.
            request: The HTTP request.

        Returns:
            Number of choices, agreement before and after, weights with 90 % intervals, and a message.
        """
        models = (left_model or "", right_model or "")
        visitor = visitor_of(services.access, request)
        return add_choice(services, visitor, photo, (left, right), choice, weights, bool(keep_photo), models)

    def fit_reward(weights: Any, request: gr.Request) -> dict[str, Any]:
        """Fit the reward to the caller's choices, starting from the weights of the first one.

        Args:
            weights: Start weights if there is no choice yet; null for equal weights.
            request: The HTTP request.

        Returns:
            Number of choices, agreement before and after, weights with 90 % intervals, and a message.
        """
        return fit(services, visitor_of(services.access, request), weights)

    def preferences(request: gr.Request) -> tuple[list[dict[str, Any]], str]:
        """Return the caller's choices in TRL's preference format: as rows, and as a zip file with the photos."""
        return export_choices(services, visitor_of(services.access, request))

    def delete_preferences(request: gr.Request) -> dict[str, int]:
        """Delete all choices of the caller, with the photos, and return how many there were."""
        with as_gradio_error(StoreError, title=TITLE):
            return {"deleted": services.preferences.delete_all(visitor_of(services.access, request).id)}

    on_call = gr.Button(**hidden).click
    on_call(prefer, inputs, answer, api_name="prefer", concurrency_limit=2)
    on_call(fit_reward, [weights], answer, api_name="fit_reward", concurrency_limit=2)
    on_call(preferences, None, [rows, file], api_name="preferences", concurrency_limit=2)
    on_call(delete_preferences, None, answer, api_name="delete_preferences")
