"""The tools for agents. Each works with the same functions and rules as the named endpoints of the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from mcp.server.fastmcp import Image
from pydantic import Field

from access.permissions import AccessDenied
from access.roles import Visitor
from inference.types import MAX_CANDIDATES, MAX_SEED, MAX_TEMPERATURE
from recipes import Recipe, encode_jpeg, parse, render, shrink
from rewards import EQUAL_WEIGHTS, RewardFunction, RewardFunctionError
from training.evaluations.evaluation import DEFAULT_CANDIDATES, DEFAULT_PHOTOS, MAX_MODELS
from training.runs.run import MAX_PHOTOS, MAX_STEPS
from ui.api import compare as api
from ui.api import evaluations as api_evaluations
from ui.api import runs as api_runs
from ui.finetune.estimate import DEFAULT_STEPS
from ui.mcp.photos import PhotoStore
from ui.messages import as_gradio_error, user_error
from ui.playground.limits import LimitError
from ui.services import AppServices

MAX_JPEG = 150_000  # bytes of a picture in an answer; agents fail on larger ones
JPEG_SIDE = 1024  # pixels
QUALITIES = (88, 75, 60, 45, 30)

Photo = Annotated[str, Field(description="Data URL, id of an uploaded photo, or name of a sample photo")]
Model = Annotated[str, Field(description="Name of a model; the tool `models` lists them")]
Count = Annotated[int, Field(ge=1, le=MAX_CANDIDATES, description="Number of candidates per model")]
Temperature = Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Weights = Annotated[
    dict[str, float], Field(description='Weight of each reward by name, such as {"sharpness": 0.7, "colour": 0.3}')
]


@dataclass(frozen=True)
class Caller:
    """The sender of a tool call.

    Attributes:
        visitor: The visitor.
        base_url: Address of this server as the caller knows it, with a slash at the end.
    """

    visitor: Visitor
    base_url: str


def create_tools(
    services: AppServices, photos: PhotoStore, caller: Callable[[], Caller]
) -> dict[str, Callable[..., Any]]:
    """Return the tools by name. They raise gr.Error, PhotoError, AccessDenied or OSError.

    Args:
        services: The application's services.
        photos: The uploaded photos.
        caller: Returns the sender of the current call.
    """

    def run(photo: np.ndarray, models: list[str], skill: str, prompt: str, **sampling: Any) -> dict[str, Any]:
        visitor = caller().visitor
        with as_gradio_error(LimitError, title="Too many comparisons"), services.comparisons.admit(visitor):
            return api.run_comparison(services, visitor, photo, models, skill, prompt, **sampling)

    def models() -> list[dict[str, Any]]:
        """List the models, with the reason why a model is unavailable or null."""
        return api.list_models(services, caller().visitor)

    def compare(
        photo: Photo,
        models: Annotated[list[str], Field(min_length=1)],
        skill: Annotated[str, Field(description="recipe, query, caption, detect, point or segment")] = "recipe",
        prompt: str = "",
        n: Count = 4,
        temperature: Temperature = 1.0,
        seed: Seed = 1,
    ) -> dict[str, Any]:
        """Run vision-language models on a photo. The skill `recipe` gives edits of the photo, with their scores."""
        return run(photos.load(photo), models, skill, prompt, n=n, temperature=temperature, seed=seed)

    def score(photo: Photo, recipes: Annotated[list[str], Field(min_length=1)]) -> list[dict[str, Any]]:
        """Render edit recipes on a photo and score the pictures. A recipe is a text such as "exposure +20"."""
        return api.score_photo(photos.load(photo), recipes)

    def finish_photo(
        photo: Photo, reward: Weights | None = None, model: Model = "moondream-tiny", n: Count = 8, seed: Seed = 1
    ) -> list[Any]:
        """Finish a photo: a model proposes edits, and the one with the highest reward is applied.

        Returns the picture as a JPEG of at most 150 kB, and its recipe, its scores, and a link to the full size, which
        is valid for a day. Without `reward` all rewards have the same weight.
        """
        with as_gradio_error(RewardFunctionError, title="Reward function"):
            function = EQUAL_WEIGHTS if reward is None else RewardFunction.from_json(reward)
        original = photos.load(photo)
        (column,) = run(original, [model], "recipe", "", n=n, temperature=1.0, seed=seed)["models"]
        ranked = sorted(
            (candidate for candidate in column["candidates"] if candidate["recipe"]),
            key=lambda candidate: function.total(candidate["scores"]) or 0.0,
        )
        if not ranked:
            raise user_error(column["error"] or "The model proposed no edit. Try another seed.", "Finish photo")
        best = ranked[-1]
        picture = render(original, parse_recipe(best["recipe"]))
        photo_id = photos.save(picture)
        details = {
            "recipe": best["recipe"],
            "words": best["words"],
            "scores": best["scores"],
            "reward": function.total(best["scores"]),
            "photo": photo_id,
            "link": f"{caller().base_url}photos/{photo_id}.jpg",
        }
        return [Image(data=small_jpeg(picture), format="jpeg"), details]

    def retrain(
        reward: Weights,
        base: Model = "moondream-tiny",
        photos: Annotated[str, Field(description='"bundled" or "hub:owner/dataset"')] = "bundled",
        steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = DEFAULT_STEPS,
        seed: Seed = 1,
        name: str = "",
    ) -> dict[str, Any]:
        """Fine-tune a model with GRPO on a reward. Returns the status of the new run, whose id is `run`."""
        with as_gradio_error(AccessDenied, title="Not allowed"):
            return api_runs.retrain(services, caller().visitor, reward, base, photos, steps, seed, name)

    def run_status(run: Annotated[str, Field(description="Id of the run")]) -> dict[str, Any]:
        """Return the state, progress, alarms and result of a fine-tuning run."""
        return api_runs.run_status(services, caller().visitor, run)

    def evaluate(
        models: Annotated[list[str], Field(min_length=1, max_length=MAX_MODELS)],
        reward: Weights | None = None,
        photos: Annotated[str, Field(description='"bundled" or "hub:owner/dataset"')] = "bundled",
        skill: Annotated[str, Field(description="recipe, query, caption, detect, point or segment")] = "recipe",
        prompt: str = "",
        n: Count = DEFAULT_CANDIDATES,
        max_photos: Annotated[int, Field(ge=1, le=MAX_PHOTOS)] = DEFAULT_PHOTOS,
        seed: Seed = 1,
    ) -> dict[str, Any]:
        """Rank models on a set of photos. Returns the status of the new evaluation, whose id is `evaluation`."""
        visitor = caller().visitor
        return api_evaluations.evaluate(services, visitor, models, photos, reward, skill, prompt, n, max_photos, seed)

    def evaluation(
        evaluation: Annotated[str, Field(description="Id of the evaluation")], reward: Weights | None = None
    ) -> dict[str, Any]:
        """Return the state, progress and leaderboard of an evaluation, for other weights if `reward` is given."""
        return api_evaluations.evaluation(services, caller().visitor, evaluation, reward)

    tools = (models, compare, score, finish_photo, retrain, run_status, evaluate, evaluation)
    return {tool.__name__: tool for tool in tools}


def parse_recipe(text: str) -> Recipe:
    """Return the recipe in a canonical text."""
    return parse(text).recipe


def small_jpeg(picture: np.ndarray) -> bytes:
    """Encode a picture as a JPEG of at most `MAX_JPEG` bytes, scaled down if necessary."""
    side = JPEG_SIDE
    while True:
        for quality in QUALITIES:
            data = encode_jpeg(shrink(picture, side), quality)
            if len(data) <= MAX_JPEG:
                return data
        side //= 2
