"""/v1/tuning: a tuning server for moondream-tiny that speaks Moondream's tuning API, for its SDK and for this app's own
hosted runs. Questions (the skill `query`) are what it trains; point and detect are refused."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter
from fastapi import Request as Http
from pydantic import BaseModel, Field

from inference.answers import MAX_TEMPERATURE, clean
from inference.models import ModelEntry
from serving.errors import ApiError
from serving.wire import Words, photo_of

if TYPE_CHECKING:
    from training import tuner

MAX_ROLLOUTS, MAX_GROUPS = 16, 64
RATE = 2e-4  # learning rate where none is sent, as on Moondream's server
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


class Question(BaseModel):
    """A request of the skill `query`. What else is sent comes back as it was."""

    skill: Literal["query"] = Field(description="Only questions are trained here.")
    question: Words
    image_url: str
    settings: Drawing | None = None


class Rollouts(BaseModel):
    """So many answers to a request."""

    finetune_id: str
    num_rollouts: Annotated[int, Field(ge=1, le=MAX_ROLLOUTS)] = 1
    request: dict[str, Any]
    ground_truth: None = Field(None, description="Questions have none: score them yourself.")


class Output(BaseModel):
    """What was said."""

    answer: str = ""


class Rollout(BaseModel):
    """An answer, as it was given out."""

    finish_reason: Literal["stop", "length"] = "stop"
    answer_tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=2048)]
    output: Output = Output()


class Target(BaseModel):
    """An answer to imitate."""

    answer: Words


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


class Bench:
    """Where finetunes are worked on; the learner is loaded when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._limiter = CapacityLimiter(AT_ONCE)

    @cached_property
    def tuner(self) -> tuner.Tuner:
        """The learner; the first call imports torch."""
        from training.tuner import Tuner

        return Tuner(self.folder)

    async def do(self, work: Callable[[tuner.Tuner], Any]) -> Any:
        """Something in a thread, its refusals as answers. Raises ApiError."""
        if self._limiter.available_tokens < 1:
            raise ApiError(503, "Too many requests wait here. Try again in a few seconds.", {"Retry-After": "2"})
        return await to_thread.run_sync(partial(self._done, work), limiter=self._limiter)

    def _done(self, work: Callable[[tuner.Tuner], Any]) -> Any:
        from training.tuner import TunerError

        try:
            return work(self.tuner)
        except TunerError as error:
            raise ApiError(error.status, str(error)) from None
        except OSError as error:
            raise ApiError(503, f"The finetune cannot be kept ({error.strerror}). Nothing was changed.") from None

    def checkpoint(self, tenant: str, name: str) -> ModelEntry:
        """The model of a saved step. Raises ApiError (404)."""
        return self._done(lambda work: work.checkpoint(tenant, name))


def router(bench: Bench) -> APIRouter:
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
    async def one(finetune_id: str, http: Http) -> dict[str, Any]:
        return {"finetune": _shown(await do(lambda work: work.get(http.state.tenant, finetune_id)))}

    @routes.delete("/finetunes/{finetune_id}")
    async def delete(finetune_id: str, http: Http) -> dict[str, Any]:
        await do(lambda work: work.delete(http.state.tenant, finetune_id))
        return {"ok": True}

    @routes.post("/rollouts")
    async def rollouts(asked: Rollouts, http: Http) -> dict[str, Any]:
        question = _question(asked.request)

        def write(work: tuner.Tuner) -> Any:
            return work.rollouts(http.state.tenant, asked.finetune_id, _asked(question), asked.num_rollouts)

        said = await do(write)
        return {"request": asked.request, "rollouts": [_rollout(one) for one in said], "rewards": None}

    @routes.post("/train_step")
    async def train_step(asked: Train, http: Http) -> dict[str, Any]:
        learned = await do(
            lambda work: work.learn(http.state.tenant, asked.finetune_id, [_group(g) for g in asked.groups], asked.lr)
        )
        return {**vars(learned), "router_kl": None}

    @routes.post("/finetunes/{finetune_id}/metrics")
    async def metrics(finetune_id: str, asked: Metrics, http: Http) -> dict[str, Any]:
        await do(lambda work: work.log(http.state.tenant, finetune_id, asked.step, asked.metrics))
        return {"ok": True, "step": asked.step, "logged_count": len(asked.metrics)}

    @routes.get("/finetunes/{finetune_id}/checkpoints")
    async def checkpoints(finetune_id: str, http: Http, limit: int = 50, cursor: str = "") -> dict[str, Any]:
        found = await do(lambda work: work.get(http.state.tenant, finetune_id))
        every = [_checkpoint(found, step) for step in sorted(found.saved, key=int)]
        return _page("checkpoints", every, "checkpoint_id", limit, cursor)

    @routes.post("/finetunes/{finetune_id}/checkpoints/save")
    async def save(finetune_id: str, http: Http) -> dict[str, Any]:
        found = await do(lambda work: work.save(http.state.tenant, finetune_id))
        return {"ok": True, "checkpoint": _checkpoint(found, str(found.step))}

    @routes.delete("/finetunes/{finetune_id}/checkpoints/{step}")
    async def forget(finetune_id: str, step: int, http: Http) -> dict[str, Any]:
        await do(lambda work: work.forget(http.state.tenant, finetune_id, step))
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


def _asked(question: Question) -> tuner.Asked:
    from training.tuner import Asked

    drawing = question.settings or Drawing()
    photo = photo_of(question.image_url)
    return Asked(photo, clean(question.question), drawing.temperature, drawing.max_tokens)


def _group(group: Group) -> tuner.Group:
    from training import tuner

    asked = _asked(_question(group.request))
    if group.mode == "sft":
        if group.target is None:
            raise ApiError(400, "A group of mode sft needs a target with an answer.")
        return tuner.Group(asked, (tuner.Said(group.target.answer, (), True),))
    if not group.rollouts or len(group.rollouts) != len(group.rewards):
        raise ApiError(400, "A group of mode rl needs as many rewards as rollouts, at least one.")
    return tuner.Group(asked, tuple(map(_said, group.rollouts)), tuple(group.rewards))


def _said(rollout: Rollout) -> tuner.Said:
    from training.tuner import Said

    return Said(rollout.output.answer, tuple(rollout.answer_tokens), rollout.finish_reason == "stop")


def _rollout(said: tuner.Said) -> dict[str, Any]:
    return {
        "skill": "query",
        "finish_reason": "stop" if said.ended else "length",
        "output": {"answer": said.text, "reasoning": None},
        "answer_tokens": list(said.tokens),
        "thinking_tokens": [],
        "has_answer_separator": False,
        "coords": [],
        "sizes": [],
    }


def _shown(found: tuner.Finetune) -> dict[str, Any]:
    return {name: value for name, value in vars(found).items() if name != "saved"}


def _checkpoint(found: tuner.Finetune, step: str) -> dict[str, Any]:
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
