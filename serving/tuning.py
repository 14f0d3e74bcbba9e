"""/v1/tuning: a tuning server for moondream-tiny that speaks Moondream's tuning API, for its SDK and for this app's own
hosted runs: questions (the skill `query`), point and detect."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import cached_property, partial
from pathlib import Path as Folder
from typing import TYPE_CHECKING, Annotated, Any, Literal

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Path
from fastapi import Request as Http
from pydantic import BaseModel, Field

from inference.registry import ModelSpec
from inference.types import MAX_OBJECTS, MAX_TEMPERATURE, clean
from serving.errors import ApiError
from serving.schemas import PointModel, Region, Words, photo_of
from training.hosted.client import MAX_ROLLOUTS

if TYPE_CHECKING:
    from training.server import trainer
    from training.server.finetunes import Finetune, FinetuneStore

MAX_GROUPS = 64
Id = Annotated[str, Path(pattern=r"^[0-9A-Za-z]{1,64}$")]
Bin = Annotated[int, Field(ge=0, lt=2**31)]
RATE = 2e-4  # learning rate where none is sent, as on Moondream's server
COORDINATE, SIZE = 5, 6  # the tokens that stand for a coordinate and for a size
AT_ONCE = 8  # requests that compute or wait
Number = Annotated[float, Field(allow_inf_nan=False)]


class Create(BaseModel):
    """A finetune by its name."""

    name: str
    rank: int


class Drawing(BaseModel):
    """How rollouts are drawn. top_p must be 1: what is learned are the probabilities that were drawn from."""

    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(ge=1, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    max_objects: Annotated[int, Field(ge=1, le=MAX_OBJECTS)] = MAX_OBJECTS


class Question(BaseModel):
    """A request: of `query` its question, of point and detect the object. What else is sent comes back as it was."""

    skill: Literal["query", "point", "detect"]
    question: Words | None = None
    object: Words | None = None
    image_url: str
    settings: Drawing | None = None

    @property
    def words(self) -> str:
        """What is asked. Raises ApiError (400) where it is missing."""
        name = "question" if self.skill == "query" else "object"
        words = clean(getattr(self, name) or "")
        if not words:
            raise ApiError(400, f"request.{name}: the skill {self.skill} needs it.")
        return words


class GroundTruth(BaseModel):
    """What is really there: points or boxes in shares of the photo."""

    points: list[PointModel] | None = None
    boxes: list[Region] | None = None

    def regions(self) -> tuple[dict[str, float], ...]:
        """All of it."""
        return tuple(one.model_dump() for one in [*(self.points or []), *(self.boxes or [])])


class Rollouts(BaseModel):
    """So many answers to a request."""

    finetune_id: str
    num_rollouts: Annotated[int, Field(ge=1, le=MAX_ROLLOUTS)] = 1
    request: dict[str, Any]
    ground_truth: GroundTruth | None = Field(
        None, description="Of point and detect; then rewards come with the rollouts."
    )


class Output(BaseModel):
    """What was said."""

    answer: str = ""


class Rollout(BaseModel):
    """An answer, as it was given out."""

    skill: str | None = None
    finish_reason: Literal["stop", "length"] = "stop"
    answer_tokens: Annotated[list[Bin], Field(max_length=2048)]
    coords: Annotated[list[Bin], Field(max_length=2 * MAX_OBJECTS)] = []
    sizes: Annotated[list[Annotated[list[Bin], Field(min_length=2, max_length=2)]], Field(max_length=MAX_OBJECTS)] = []
    output: Output = Output()


class Target(BaseModel):
    """An answer to imitate; of point and detect what is there."""

    answer: Words | None = None
    points: list[PointModel] | None = None
    boxes: list[Region] | None = None


class Group(BaseModel):
    """mode "rl": rollouts with their rewards; mode "sft": a target."""

    mode: Literal["rl", "sft"]
    request: dict[str, Any]
    rollouts: Annotated[list[Rollout], Field(max_length=MAX_ROLLOUTS)] = []
    rewards: Annotated[list[Number], Field(max_length=MAX_ROLLOUTS)] = []
    target: Target | None = None


class Train(BaseModel):
    """One step."""

    finetune_id: str
    groups: Annotated[list[Group], Field(min_length=1, max_length=MAX_GROUPS)]
    lr: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = RATE


class Metrics(BaseModel):
    """Numbers of the user's own."""

    step: Annotated[int, Field(ge=0)]
    metrics: Annotated[
        dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_/-]{1,100}$")], Number], Field(min_length=1, max_length=100)
    ]


class TuningService:
    """Where finetunes are worked on; the learner is loaded when it is first needed."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._limiter = CapacityLimiter(AT_ONCE)

    @cached_property
    def tuner(self) -> FinetuneStore:
        """The learner; the first call imports torch."""
        from training.server.finetunes import FinetuneStore

        return FinetuneStore(self.folder)

    async def do(self, work: Callable[[FinetuneStore], Any]) -> Any:
        """Something in a thread, its refusals as answers. Raises ApiError."""
        if self._limiter.available_tokens < 1:
            raise ApiError(503, "Too many requests wait here. Try again in a few seconds.", {"Retry-After": "2"})
        return await to_thread.run_sync(partial(self._done, work), limiter=self._limiter)

    def _done(self, work: Callable[[FinetuneStore], Any]) -> Any:
        from training.server.finetunes import FinetuneError

        try:
            return work(self.tuner)
        except FinetuneError as error:
            raise ApiError(error.status, str(error)) from None
        except OSError as error:
            raise ApiError(503, f"The finetune cannot be kept ({error.strerror}). Nothing was changed.") from None

    def checkpoint(self, tenant: str, name: str) -> ModelSpec:
        """The model of a saved step. Raises ApiError (404)."""
        return self._done(lambda work: work.checkpoint_spec(tenant, name))


def router(bench: TuningService) -> APIRouter:
    """The routes below /v1/tuning."""
    routes = APIRouter(prefix="/tuning")
    do: Callable[[Callable[[Any], Any]], Awaitable[Any]] = bench.do

    @routes.post("/finetunes")
    async def create(asked: Create, http: Http) -> dict[str, Any]:
        made = await do(lambda work: work.create(http.state.tenant, asked.name, asked.rank))
        return {"finetune_id": made.finetune_id}

    @routes.get("/finetunes")
    async def listed(http: Http, limit: int = 20, cursor: str = "") -> dict[str, Any]:
        every = await do(lambda work: [_shown(one) for one in work.list(http.state.tenant)])
        return _page("finetunes", every, "finetune_id", limit, cursor)

    @routes.get("/finetunes/{finetune_id}")
    async def one(finetune_id: Id, http: Http) -> dict[str, Any]:
        return {"finetune": _shown(await do(lambda work: work.get(http.state.tenant, finetune_id)))}

    @routes.delete("/finetunes/{finetune_id}")
    async def delete(finetune_id: Id, http: Http) -> dict[str, Any]:
        await do(lambda work: work.delete(http.state.tenant, finetune_id))
        return {"ok": True}

    @routes.post("/rollouts")
    async def rollouts(asked: Rollouts, http: Http) -> dict[str, Any]:
        question = _question(asked.request)

        def write(work: FinetuneStore) -> Any:
            return work.rollouts(http.state.tenant, asked.finetune_id, _asked(question), asked.num_rollouts)

        if asked.ground_truth and question.skill == "query":
            raise ApiError(400, "ground_truth: a question has none. Score its answers yourself.")
        said = await do(write)
        rewards = _rewards(said, asked.ground_truth) if asked.ground_truth else None
        told = [_rollout(one, question.skill) for one in said]
        return {"request": asked.request, "rollouts": told, "rewards": rewards}

    @routes.post("/train_step")
    async def train_step(asked: Train, http: Http) -> dict[str, Any]:
        learned = await do(
            lambda work: work.train_step(http.state.tenant, asked.finetune_id, [_group(g) for g in asked.groups], asked.lr)
        )
        return {**vars(learned), "router_kl": None}

    @routes.post("/finetunes/{finetune_id}/metrics")
    async def metrics(finetune_id: Id, asked: Metrics, http: Http) -> dict[str, Any]:
        await do(lambda work: work.log_metrics(http.state.tenant, finetune_id, asked.step, asked.metrics))
        return {"ok": True, "step": asked.step, "logged_count": len(asked.metrics)}

    @routes.get("/finetunes/{finetune_id}/checkpoints")
    async def checkpoints(finetune_id: Id, http: Http, limit: int = 50, cursor: str = "") -> dict[str, Any]:
        found = await do(lambda work: work.get(http.state.tenant, finetune_id))
        every = [_checkpoint(found, step) for step in sorted(found.saved, key=int)]
        return _page("checkpoints", every, "checkpoint_id", limit, cursor)

    @routes.post("/finetunes/{finetune_id}/checkpoints/save")
    async def save(finetune_id: Id, http: Http) -> dict[str, Any]:
        found = await do(lambda work: work.save_checkpoint(http.state.tenant, finetune_id))
        return {"ok": True, "checkpoint": _checkpoint(found, str(found.step))}

    @routes.delete("/finetunes/{finetune_id}/checkpoints/{step}")
    async def forget(finetune_id: Id, step: int, http: Http) -> dict[str, Any]:
        await do(lambda work: work.delete_checkpoint(http.state.tenant, finetune_id, step))
        return {"ok": True}

    return routes


def _question(request: dict[str, Any]) -> Question:
    """A request as it is understood. Raises ApiError (400)."""
    try:
        return Question.model_validate(request)
    except ValueError as error:
        problems = getattr(error, "errors", list)()
        said = "; ".join(f"request.{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in problems[:3])
        raise ApiError(400, f"{said or 'The request cannot be read'}.") from None


def _asked(question: Question) -> trainer.Prompt:
    from training.server.trainer import Prompt

    drawing = question.settings or Drawing()
    photo = photo_of(question.image_url)
    how = (drawing.temperature, drawing.max_tokens, question.skill, drawing.max_objects)
    return Prompt(photo, question.words, *how)


def _rewards(said: list[trainer.Completion], truth: GroundTruth) -> list[float]:
    from training.server.regions import region_reward

    return [region_reward(one.regions, truth.regions()) for one in said]


def _group(group: Group) -> trainer.Group:
    from training.server import trainer

    asked = _asked(_question(group.request))
    if group.mode == "sft":
        return trainer.Group(asked, (_target(group.target, asked.skill),))
    if not group.rollouts or len(group.rollouts) != len(group.rewards):
        raise ApiError(400, "A group of mode rl needs as many rewards as rollouts, at least one.")
    if any(one.skill not in (None, asked.skill) for one in group.rollouts):
        raise ApiError(400, f"These rollouts are of another skill than their request, which is {asked.skill}.")
    return trainer.Group(asked, tuple(map(_said, group.rollouts)), tuple(group.rewards))


def _target(target: Target | None, skill: str) -> trainer.Completion:
    from training.server.trainer import Completion

    name = {"query": "answer", "point": "points", "detect": "boxes"}[skill]
    if target is None or getattr(target, name) is None:
        raise ApiError(400, f"target.{name}: a group of mode sft needs it for the skill {skill}.")
    truth = GroundTruth(points=target.points, boxes=target.boxes) if skill != "query" else GroundTruth()
    return Completion(target.answer or "", (), True, regions=truth.regions())


def _said(rollout: Rollout) -> trainer.Completion:
    from training.server.trainer import Completion

    pairs = list(zip(rollout.coords[::2], rollout.coords[1::2]))
    if 2 * len(pairs) != len(rollout.coords) or (rollout.sizes and len(rollout.sizes) != len(pairs)):
        raise ApiError(400, "coords and sizes do not go together. Send rollouts back as they came.")
    sizes = rollout.sizes or [[]] * len(pairs)
    objects = tuple((*pair, *size) for pair, size in zip(pairs, sizes))
    return Completion(rollout.output.answer, tuple(rollout.answer_tokens), rollout.finish_reason == "stop", objects)


def _rollout(said: trainer.Completion, skill: str) -> dict[str, Any]:
    outputs: dict[str, Any] = {"query": {"answer": said.text, "reasoning": None}}
    outputs |= {"point": {"points": said.regions}, "detect": {"objects": said.regions}}
    each = [COORDINATE, COORDINATE, *([SIZE] if skill == "detect" else [])]
    return {
        "skill": skill,
        "finish_reason": "stop" if said.finished else "length",
        "output": outputs[skill],
        "answer_tokens": list(said.tokens) if skill == "query" else each * len(said.objects),
        "thinking_tokens": [],
        "has_answer_separator": False,
        "coords": [place for bins in said.objects for place in bins[:2]],
        "sizes": [list(bins[2:]) for bins in said.objects] if skill == "detect" else [],
    }


def _shown(found: Finetune) -> dict[str, Any]:
    return {name: value for name, value in vars(found).items() if name != "saved"}


def _checkpoint(found: Finetune, step: str) -> dict[str, Any]:
    when = found.saved[step]
    return {
        "checkpoint_id": f"{found.finetune_id}-{int(step):06d}",
        "finetune_id": found.finetune_id,
        "step": int(step),
        "expires_at_ms": None,
        "created_at_ms": when,
        "updated_at_ms": when,
    }


def _page(name: str, every: list[dict[str, Any]], key: str, limit: int, cursor: str) -> dict[str, Any]:
    """So many from behind the cursor, which is the last one's id."""
    start = next((place + 1 for place, one in enumerate(every) if one[key] == cursor), 0)
    limit = min(max(limit, 1), 100)
    some, more = every[start : start + limit], start + limit < len(every)
    return {name: some, "next_cursor": some[-1][key] if more else None, "has_more": more}
