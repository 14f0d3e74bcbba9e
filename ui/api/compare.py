"""The named endpoints for gradio_client: the same handlers as the page, with nothing of the page in between."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import gradio as gr

from inference.registry import MODELS
from inference.types import MAX_CANDIDATES, MAX_SEED, MAX_TEMPERATURE, SKILLS, Request, RequestError
from recipes import Recipe, describe, parse
from rewards import RewardFunction, RewardFunctionError, score_recipes
from storage.reward_functions import RewardFunctionStore, StoreError
from ui.api import runs as api_runs
from ui.api import usage as api_usage
from ui.messages import refusal
from ui.playground.compare import compare as snapshots
from ui.playground.metering import ComparisonMeter
from ui.playground.photo import photo_input, read_photo
from ui.playground.picker import check_choice
from ui.playground.report import candidate
from ui.services import AppServices

MAX_RECIPES = 64


def compare(
    photo: str | None,
    models: Any,
    skill: str,
    prompt: str,
    n: int,
    temperature: float,
    seed: int,
    meter: ComparisonMeter | None = None,
) -> dict[str, Any]:
    """Ask models about a photo: every candidate's text, recipe, scores and seconds; a failed model's error."""
    names = check_choice(models)
    try:
        request = Request(read_photo(photo), skill, prompt, n=n, temperature=temperature, seed=seed)
    except RequestError as error:
        raise refusal(str(error), "This cannot be asked") from None
    asked = (names, request, threading.Event())
    *_, last = meter.compare(*asked, "api") if meter else snapshots(*asked)
    return {
        "seconds": round(last.seconds, 4),
        "models": [
            {
                "model": column.name,
                "error": column.error or None,
                "candidates": [candidate(card, skill) for card in column.cards if card.done],
            }
            for column in last.columns
        ],
    }


def score(photo: str | None, recipes: Any) -> list[dict[str, Any]]:
    """Render recipes (canonical text or JSON) on a photo and score them as one group."""
    if not isinstance(recipes, list) or not 1 <= len(recipes) <= MAX_RECIPES:
        raise refusal(f"Send a list of 1 to {MAX_RECIPES} recipes.", "Recipes")
    parsed = [parse(text) for text in recipes]
    wrong = [str(place + 1) for place, reading in enumerate(parsed) if not reading.ok]
    if wrong:
        example = str(Recipe(exposure=20))
        raise refusal(f"No recipe could be read in number {', '.join(wrong)}. Write them like: {example}", "Recipes")
    scored = score_recipes(read_photo(photo), [reading.recipe for reading in parsed])
    return [
        {
            "recipe": str(one.recipe),
            "words": describe(one.recipe),
            "problems": list(reading.problems),
            "scores": one.scores,
            "fidelity": one.fidelity,
        }
        for one, reading in zip(scored, parsed, strict=True)
    ]


def models() -> list[dict[str, Any]]:
    """Every model on offer, and why one cannot be used."""
    return [
        {"name": entry.name, "title": entry.title, "note": entry.note, "unavailable": entry.unavailable()}
        for entry in list(MODELS.values())
    ]


def reward_functions(store: RewardFunctionStore) -> dict[str, dict[str, float]]:
    """The weights of every saved reward function by its name."""
    try:
        return {saved.name: dict(saved.function.weights) for saved in store.list()}
    except StoreError as error:
        raise refusal(str(error), "Reward functions") from None


def save_reward_function(store: RewardFunctionStore, name: str, weights: Any) -> dict[str, Any]:
    """Keep weights ({"sharpness": 0.3}) under a name that is not taken yet."""
    try:
        saved = store.save(name or "", RewardFunction.from_json(weights))
    except (StoreError, RewardFunctionError) as error:
        raise refusal(str(error), "Reward functions") from None
    return {"name": saved.name, "weights": dict(saved.function.weights)}


def build(services: AppServices) -> None:
    """The endpoints. Their inputs are components that no page shows: so Gradio checks every file that comes in."""
    hidden: dict[str, Any] = {"visible": False}
    photo = photo_input(label="photo", **hidden)
    asked = [
        photo,
        gr.JSON(label="models", **hidden),
        gr.Dropdown(list(SKILLS), value="recipe", label="skill", **hidden),
        gr.Textbox("", label="prompt", **hidden),
        gr.Number(4, precision=0, minimum=1, maximum=MAX_CANDIDATES, label="n", **hidden),
        gr.Number(1.0, minimum=0, maximum=MAX_TEMPERATURE, label="temperature", **hidden),
        gr.Number(1, precision=0, minimum=0, maximum=MAX_SEED, label="seed", **hidden),
    ]
    answer, recipes, weights = (gr.JSON(label=label, **hidden) for label in ("answer", "recipes", "weights"))
    name = gr.Textbox(label="name", **hidden)
    call = gr.Button(**hidden).click
    call(partial(compare, meter=services.meter), asked, answer, api_name="compare", concurrency_limit=16)
    call(score, [photo, recipes], answer, api_name="score", concurrency_limit=2)
    call(models, None, answer, api_name="models", queue=False)
    call(partial(reward_functions, services.store), None, answer, api_name="reward_functions")
    call(partial(save_reward_function, services.store), [name, weights], answer, api_name="save_reward_function")
    api_runs.build(services)
    api_usage.build(services)
