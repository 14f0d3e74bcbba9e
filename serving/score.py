"""POST /v1/score: renders recipes on a photo and scores them, with the code of the page and of training."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import BaseModel, Field

from recipes import describe, parse
from rewards import EQUAL_WEIGHTS, RewardFunction, RewardFunctionError, ScoredRecipe, score_recipes
from serving.errors import ApiError
from serving.json_body import JsonRoute
from serving.request_slots import RequestSlots
from serving.schemas import DATA_URL_ONLY, decode_photo

MAX_RECIPES = 64
RecipeText = Annotated[str, Field(max_length=2_000)]


class ScoreRequest(BaseModel):
    """Recipes of one photo, scored as one group. Without `reward` all rewards have the same weight."""

    image_url: str = Field(description=DATA_URL_ONLY)
    recipes: Annotated[list[RecipeText], Field(min_length=1, max_length=MAX_RECIPES)]
    reward: dict[str, float] | None = Field(None, description='Weights from 0 to 1, such as {"sharpness": 0.7}.')


class RecipeScore(BaseModel):
    """A recipe with its scores from 0 to 1. Without a recipe in the text it is null and has no scores."""

    recipe: str | None = None
    words: str = ""
    scores: dict[str, float | None] = {}
    reward: float | None = None


class ScoreResponse(BaseModel):
    """The scores, in the order of the recipes."""

    request_id: str
    scores: list[RecipeScore]


def router(slots: RequestSlots) -> APIRouter:
    """Create the route.

    Args:
        slots: Limits the requests that run or wait.
    """
    routes = APIRouter(route_class=JsonRoute)

    @routes.post("/score")
    async def score(body: ScoreRequest, http_request: HttpRequest) -> ScoreResponse:
        scores = await slots.run(partial(score_texts, body))
        return ScoreResponse(request_id=http_request.state.request_id, scores=scores)

    return routes


def score_texts(body: ScoreRequest) -> list[RecipeScore]:
    """Score the recipes of a request. Raises ApiError (400)."""
    try:
        function = EQUAL_WEIGHTS if body.reward is None else RewardFunction.from_json(body.reward)
    except RewardFunctionError as error:
        raise ApiError(400, f"reward: {error}", param="reward") from None
    parsed = [parse(text) for text in body.recipes]
    photo, recipes = decode_photo(body.image_url), [result.recipe for result in parsed if result.ok]
    scored = iter(score_recipes(photo, recipes) if recipes else [])
    return [_score(next(scored), function) if result.ok else RecipeScore() for result in parsed]


def _score(scored: ScoredRecipe, function: RewardFunction) -> RecipeScore:
    total = function.total(scored.scores)
    return RecipeScore(recipe=str(scored.recipe), words=describe(scored.recipe), scores=scored.scores, reward=total)
