"""The /v1/tuning API: a tuning server for moondream-tiny with Moondream's protocol.

It serves Moondream's SDK and this application's own hosted runs. Supported skills: query, point and detect.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

import fastapi
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import BaseModel, Field, ValidationError

from inference.metering import UsageMeter
from inference.types import MAX_OBJECTS, MAX_TEMPERATURE, Box, ModelSpec, Point, clean
from serving.disconnect import cancel_on_disconnect
from serving.errors import ApiError, error_type
from serving.json_body import JsonRoute
from serving.request_slots import RequestSlots
from serving.schemas import Text, decode_photo
from training.hosted.client import MAX_ROLLOUTS
from usage.events import Basis, UsageEvent

if TYPE_CHECKING:
    from training.server import trainer
    from training.server.finetunes import Finetune, FinetuneStore

BASE_MODEL = "moondream-tiny"
SOURCE = "v1-tuning"  # of the usage events
FINETUNE_ID = re.compile(r"[0-9a-f]{26}")
MAX_GROUPS = 64
POLL_SECONDS = 0.1  # poll interval for cancellation
MAX_REQUESTS = 8  # running and waiting; further requests are rejected
MAX_PAGE_SIZE = 100
DEFAULT_LEARNING_RATE = 2e-4  # as on Moondream's server
COORDINATE_TOKEN, SIZE_TOKEN = 5, 6  # placeholders in `answer_tokens` for a coordinate and a size
FinetuneId = Annotated[str, fastapi.Path(pattern=r"^[0-9A-Za-z]{1,64}$")]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
T = TypeVar("T")


class CreateFinetuneRequest(BaseModel):
    """The name of a new finetune and the rank of its LoRA adapter."""

    name: str
    rank: int


class RolloutSettings(BaseModel):
    """Sampling settings of rollouts. top_p must be 1: training uses the probabilities of the full distribution."""

    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(ge=1, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    max_objects: Annotated[int, Field(ge=1, le=MAX_OBJECTS)] = MAX_OBJECTS


class PromptRequest(BaseModel):
    """A prompt: the question of `query`, or the object of `point` and `detect`. Other fields are returned unchanged."""

    skill: Literal["query", "point", "detect"]
    question: Text | None = None
    object: Text | None = None
    image_url: str
    settings: RolloutSettings | None = None

    @property
    def prompt(self) -> str:
        """The question or object. Raises ApiError (400) if it is missing."""
        field = "question" if self.skill == "query" else "object"
        prompt = clean(getattr(self, field) or "")
        if not prompt:
            raise ApiError(400, f"request.{field} is required for the skill {self.skill}.")
        return prompt


class GroundTruth(BaseModel):
    """True points or boxes, in fractions of the photo's width and height."""

    points: list[Point] | None = None
    boxes: list[Box] | None = None

    def regions(self) -> tuple[dict[str, float], ...]:
        """Return all points and boxes as JSON."""
        return tuple(asdict(region) for region in [*(self.points or []), *(self.boxes or [])])


class RolloutsRequest(BaseModel):
    """A request for rollouts of a prompt."""

    finetune_id: str
    num_rollouts: Annotated[int, Field(ge=1, le=MAX_ROLLOUTS)] = 1
    request: dict[str, Any]
    ground_truth: GroundTruth | None = Field(
        None, description="For point and detect. The response then includes rewards."
    )


class RolloutOutput(BaseModel):
    """The text of a rollout."""

    answer: str = ""


class Rollout(BaseModel):
    """A rollout as returned by POST /rollouts."""

    skill: str | None = None
    finish_reason: Literal["stop", "length"] = "stop"
    answer_tokens: Annotated[list[TokenId], Field(max_length=2048, fail_fast=True)]
    coords: Annotated[list[TokenId], Field(max_length=2 * MAX_OBJECTS, fail_fast=True)] = []
    sizes: Annotated[
        list[Annotated[list[TokenId], Field(min_length=2, max_length=2)]], Field(max_length=MAX_OBJECTS)
    ] = []
    output: RolloutOutput = RolloutOutput()


class SftTarget(BaseModel):
    """The answer to imitate: text, points or boxes."""

    answer: Text | None = None
    points: list[Point] | None = None
    boxes: list[Box] | None = None


class TrainGroup(BaseModel):
    """A prompt with rollouts and their rewards (mode "rl"), or with a target (mode "sft")."""

    mode: Literal["rl", "sft"]
    request: dict[str, Any]
    rollouts: Annotated[list[Rollout], Field(max_length=MAX_ROLLOUTS)] = []
    rewards: Annotated[list[FiniteFloat], Field(max_length=MAX_ROLLOUTS)] = []
    target: SftTarget | None = None


class TrainStepRequest(BaseModel):
    """One training step."""

    finetune_id: str
    groups: Annotated[list[TrainGroup], Field(min_length=1, max_length=MAX_GROUPS)]
    lr: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = DEFAULT_LEARNING_RATE


class LogMetricsRequest(BaseModel):
    """Metrics to store with a finetune."""

    step: Annotated[int, Field(ge=0)]
    metrics: Annotated[
        dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_/-]{1,100}$")], FiniteFloat],
        Field(min_length=1, max_length=100),
    ]


class TuningService:
    """Runs operations on finetunes in threads. The model is loaded on first use."""

    def __init__(self, folder: Path, meter: UsageMeter) -> None:
        self.folder, self.meter = folder, meter
        self._slots = RequestSlots(MAX_REQUESTS)
        self._finetunes: FinetuneStore | None = None
        self._finetunes_lock = threading.Lock()
        self._turn = threading.Lock()  # held by the one model call that computes

    @property
    def finetunes(self) -> FinetuneStore:
        """The finetunes. The first access imports torch, so it belongs into a thread."""
        with self._finetunes_lock:
            if self._finetunes is None:
                from training.server.finetunes import FinetuneStore

                self._finetunes = FinetuneStore(self.folder)
            return self._finetunes

    async def run(self, operation: Callable[[FinetuneStore], T]) -> T:
        """Run an operation in a thread.

        Raises:
            ApiError: The operation failed, or too many requests are waiting (503).
        """
        return await self._slots.run(partial(self._run, operation))

    async def run_model(
        self, http_request: HttpRequest, event: UsageEvent, operation: Callable[[FinetuneStore], ModelResult[T]]
    ) -> T:
        """Run an operation that uses the model in a thread, and record it, whatever its outcome.

        It is cancelled if the client disconnects while it waits for others. Once begun it is completed.

        Args:
            http_request: The HTTP request.
            event: The usage event, without the fields that are known only at the end.
            operation: Runs the model.

        Raises:
            ApiError: The operation failed, or too many requests are waiting (503), which is not recorded.
        """
        cancel = threading.Event()
        async with cancel_on_disconnect(http_request, cancel):
            return await self._slots.run(partial(self._run_recorded, event, cancel, operation))

    def _run(self, operation: Callable[[FinetuneStore], T]) -> T:
        from training.server.finetunes import FinetuneError

        try:
            return operation(self.finetunes)
        except FinetuneError as error:
            raise ApiError(error.status, str(error)) from None
        except OSError as error:
            raise ApiError(503, f"The finetune cannot be saved ({error.strerror}). Nothing was changed.") from None

    def _run_recorded(
        self, event: UsageEvent, cancel: threading.Event, operation: Callable[[FinetuneStore], ModelResult[T]]
    ) -> T:
        start, begin = time.perf_counter(), None
        event = replace(event, outcome="cancelled")
        try:
            with self._wait_for_turn(cancel):
                begin = time.perf_counter()
                result = self._run(operation)
            event = replace(event, outcome="ok", **result.usage)
            return result.value
        except _Cancelled:
            raise ApiError(503, "The client disconnected.") from None
        except ApiError as error:
            event = replace(event, outcome="error", error=error_type(error))
            raise
        except Exception as error:
            event = replace(event, outcome="error", error=type(error).__name__)
            raise
        finally:
            end, meter = time.perf_counter(), self.meter
            begin = end if begin is None else begin
            latency = end - begin
            cost = meter.machine_cost(latency) if event.outcome == "ok" else None
            cost_basis: Basis = "unknown" if cost is None else "estimated"
            event = replace(event, latency=latency, queue=begin - start, cost=cost, cost_basis=cost_basis)
            meter.recorder.record(event.with_deployment(meter.recorder.deployment))

    @contextmanager
    def _wait_for_turn(self, cancel: threading.Event) -> Iterator[None]:
        """Wait until no other model call computes. Raises _Cancelled."""
        while not self._turn.acquire(timeout=POLL_SECONDS):
            if cancel.is_set():
                raise _Cancelled
        try:
            if cancel.is_set():
                raise _Cancelled
            yield
        finally:
            self._turn.release()

    def checkpoint_spec(self, tenant: str, name: str) -> ModelSpec:
        """Return the model of a saved checkpoint. The first call imports torch. Raises ApiError (404)."""
        return self._run(lambda finetunes: finetunes.checkpoint_spec(tenant, name))


class _Cancelled(Exception):  # noqa: N818
    """Raised when the client disconnects."""


@dataclass(frozen=True)
class ModelResult(Generic[T]):
    """The result of a model call of the tuning API, and fields of its usage event."""

    value: T
    usage: dict[str, Any]  # tokens, reward


def router(service: TuningService) -> APIRouter:
    """Create the routes."""
    routes = APIRouter(prefix="/tuning", route_class=JsonRoute)

    @routes.post("/finetunes")
    async def create_finetune(body: CreateFinetuneRequest, http_request: HttpRequest) -> dict[str, Any]:
        tenant = http_request.state.tenant
        finetune = await service.run(lambda finetunes: finetunes.create(tenant, body.name, body.rank))
        return {"finetune_id": finetune.finetune_id}

    @routes.get("/finetunes")
    async def list_finetunes(http_request: HttpRequest, limit: int = 20, cursor: str = "") -> dict[str, Any]:
        tenant = http_request.state.tenant
        finetunes = await service.run(lambda finetunes: finetunes.list(tenant))
        items = [_finetune_json(finetune) for finetune in finetunes]
        return _page("finetunes", items, "finetune_id", limit, cursor)

    @routes.get("/finetunes/{finetune_id}")
    async def get_finetune(finetune_id: FinetuneId, http_request: HttpRequest) -> dict[str, Any]:
        tenant = http_request.state.tenant
        finetune = await service.run(lambda finetunes: finetunes.get(tenant, finetune_id))
        return {"finetune": _finetune_json(finetune)}

    @routes.delete("/finetunes/{finetune_id}")
    async def delete_finetune(finetune_id: FinetuneId, http_request: HttpRequest) -> dict[str, Any]:
        tenant = http_request.state.tenant
        await service.run(lambda finetunes: finetunes.delete(tenant, finetune_id))
        return {"ok": True}

    @routes.post("/rollouts")
    async def create_rollouts(body: RolloutsRequest, http_request: HttpRequest) -> dict[str, Any]:
        tenant, request = http_request.state.tenant, _parse_prompt_request(body.request)
        if body.ground_truth and request.skill == "query":
            raise ApiError(400, "ground_truth is not supported for the skill query. Compute the rewards yourself.")

        def generate(finetunes: FinetuneStore) -> ModelResult[dict[str, Any]]:
            from training.server.regions import region_reward
            from training.server.trainer import Group

            prompt = _to_prompt(request)
            completions = finetunes.rollouts(tenant, body.finetune_id, prompt, body.num_rollouts)
            truth = body.ground_truth.regions() if body.ground_truth else None
            rewards = None if truth is None else [region_reward(item.regions, truth) for item in completions]
            rollouts = [_rollout_json(completion, request.skill) for completion in completions]
            response = {"request": body.request, "rollouts": rollouts, "rewards": rewards}
            reward = sum(rewards) / len(rewards) if rewards else None
            tokens = finetunes.count_tokens(tenant, body.finetune_id, [Group(prompt, tuple(completions))])
            return ModelResult(response, _usage(tokens, reward))

        event = _usage_event(http_request, body.finetune_id, request.skill, body.num_rollouts)
        return await service.run_model(http_request, event, generate)

    @routes.post("/train_step")
    async def train_step(body: TrainStepRequest, http_request: HttpRequest) -> dict[str, Any]:
        tenant = http_request.state.tenant

        def train(finetunes: FinetuneStore) -> ModelResult[dict[str, Any]]:
            groups = [_to_group(group) for group in body.groups]
            result = finetunes.train_step(tenant, body.finetune_id, groups, body.lr)
            tokens = finetunes.count_tokens(tenant, body.finetune_id, groups)
            return ModelResult({**vars(result), "router_kl": None}, _usage(tokens, result.reward_mean))

        completions = sum(max(1, len(group.rollouts)) for group in body.groups)
        event = _usage_event(http_request, body.finetune_id, "train_step", completions)
        return await service.run_model(http_request, event, train)

    @routes.post("/finetunes/{finetune_id}/metrics")
    async def log_metrics(
        finetune_id: FinetuneId, body: LogMetricsRequest, http_request: HttpRequest
    ) -> dict[str, Any]:
        tenant = http_request.state.tenant
        await service.run(lambda finetunes: finetunes.log_metrics(tenant, finetune_id, body.step, body.metrics))
        return {"ok": True, "step": body.step, "logged_count": len(body.metrics)}

    @routes.get("/finetunes/{finetune_id}/checkpoints")
    async def list_checkpoints(
        finetune_id: FinetuneId, http_request: HttpRequest, limit: int = 50, cursor: str = ""
    ) -> dict[str, Any]:
        tenant = http_request.state.tenant
        finetune = await service.run(lambda finetunes: finetunes.get(tenant, finetune_id))
        items = [_checkpoint_json(finetune, step) for step in sorted(finetune.saved, key=int)]
        return _page("checkpoints", items, "checkpoint_id", limit, cursor)

    @routes.post("/finetunes/{finetune_id}/checkpoints/save")
    async def save_checkpoint(finetune_id: FinetuneId, http_request: HttpRequest) -> dict[str, Any]:
        tenant = http_request.state.tenant
        finetune = await service.run(lambda finetunes: finetunes.save_checkpoint(tenant, finetune_id))
        return {"ok": True, "checkpoint": _checkpoint_json(finetune, str(finetune.step))}

    @routes.delete("/finetunes/{finetune_id}/checkpoints/{step}")
    async def delete_checkpoint(finetune_id: FinetuneId, step: int, http_request: HttpRequest) -> dict[str, Any]:
        tenant = http_request.state.tenant
        await service.run(lambda finetunes: finetunes.delete_checkpoint(tenant, finetune_id, step))
        return {"ok": True}

    return routes


def _usage_event(http_request: HttpRequest, finetune_id: str, skill: str, candidates: int) -> UsageEvent:
    """Create the usage event of a model call that begins now."""
    return UsageEvent(
        datetime.now(timezone.utc),
        BASE_MODEL,
        skill,
        source=SOURCE,
        adapter=finetune_id if FINETUNE_ID.fullmatch(finetune_id) else "",  # any other text is an invalid request
        candidates=candidates,
        request_id=http_request.state.request_id,
    )


def _usage(tokens: tuple[int, int], reward: float | None) -> dict[str, Any]:
    """Return fields of a usage event. A mean reward outside of 0..1 is not recorded."""
    valid = reward is not None and 0 <= reward <= 1
    return {"tokens_in": tokens[0], "tokens_out": tokens[1], "tokens_basis": "reported"} | (
        {"reward": reward} if valid else {}
    )


# ── Requests ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _parse_prompt_request(request: dict[str, Any]) -> PromptRequest:
    """Validate a prompt request. Raises ApiError (400)."""
    try:
        return PromptRequest.model_validate(request)
    except ValidationError as error:
        problems = [f"request.{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors()[:3]]
        raise ApiError(400, f"{'; '.join(problems)}.") from None


def _to_prompt(request: PromptRequest) -> trainer.Prompt:
    from training.server.trainer import Prompt

    settings = request.settings or RolloutSettings()
    return Prompt(
        decode_photo(request.image_url),
        request.prompt,
        settings.temperature,
        settings.max_tokens,
        request.skill,
        settings.max_objects,
    )


def _to_group(group: TrainGroup) -> trainer.Group:
    from training.server import trainer

    prompt = _to_prompt(_parse_prompt_request(group.request))
    if group.mode == "sft":
        return trainer.Group(prompt, (_target_completion(group.target, prompt.skill),))
    if not group.rollouts or len(group.rollouts) != len(group.rewards):
        raise ApiError(400, "A group of mode rl needs one reward for each rollout, and at least one rollout.")
    if any(rollout.skill not in (None, prompt.skill) for rollout in group.rollouts):
        raise ApiError(400, f"The skill of a rollout differs from its request's, which is {prompt.skill}.")
    return trainer.Group(prompt, tuple(map(_rollout_completion, group.rollouts)), tuple(group.rewards))


def _target_completion(target: SftTarget | None, skill: str) -> trainer.Completion:
    from training.server.trainer import Completion

    field = {"query": "answer", "point": "points", "detect": "boxes"}[skill]
    if target is None or getattr(target, field) is None:
        raise ApiError(400, f"target.{field} is required in a group of mode sft for the skill {skill}.")
    truth = GroundTruth(points=target.points, boxes=target.boxes) if skill != "query" else GroundTruth()
    return Completion(target.answer or "", (), True, regions=truth.regions())


def _rollout_completion(rollout: Rollout) -> trainer.Completion:
    from training.server.trainer import Completion

    centers = list(zip(rollout.coords[::2], rollout.coords[1::2]))
    if 2 * len(centers) != len(rollout.coords) or (rollout.sizes and len(rollout.sizes) != len(centers)):
        raise ApiError(400, "coords and sizes have different lengths. Send rollouts back unchanged.")
    sizes = rollout.sizes or [[]] * len(centers)
    objects = tuple((*center, *size) for center, size in zip(centers, sizes))
    return Completion(rollout.output.answer, tuple(rollout.answer_tokens), rollout.finish_reason == "stop", objects)


# ── Responses ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _rollout_json(completion: trainer.Completion, skill: str) -> dict[str, Any]:
    outputs: dict[str, Any] = {
        "query": {"answer": completion.text, "reasoning": None},
        "point": {"points": completion.regions},
        "detect": {"objects": completion.regions},
    }
    object_tokens = [COORDINATE_TOKEN, COORDINATE_TOKEN, *([SIZE_TOKEN] if skill == "detect" else [])]
    return {
        "skill": skill,
        "finish_reason": "stop" if completion.finished else "length",
        "output": outputs[skill],
        "answer_tokens": list(completion.tokens) if skill == "query" else object_tokens * len(completion.objects),
        "thinking_tokens": [],
        "has_answer_separator": False,
        "coords": [coordinate for bins in completion.objects for coordinate in bins[:2]],
        "sizes": [list(bins[2:]) for bins in completion.objects] if skill == "detect" else [],
    }


def _finetune_json(finetune: Finetune) -> dict[str, Any]:
    return {name: value for name, value in vars(finetune).items() if name != "saved"}


def _checkpoint_json(finetune: Finetune, step: str) -> dict[str, Any]:
    saved_at = finetune.saved[step]
    return {
        "checkpoint_id": f"{finetune.finetune_id}-{int(step):06d}",
        "finetune_id": finetune.finetune_id,
        "step": int(step),
        "expires_at_ms": None,
        "created_at_ms": saved_at,
        "updated_at_ms": saved_at,
    }


def _page(name: str, items: list[dict[str, Any]], key: str, limit: int, cursor: str) -> dict[str, Any]:
    """Return the page of items after the cursor, which is the `key` of the previous page's last item."""
    start = next((index + 1 for index, item in enumerate(items) if item[key] == cursor), 0)
    limit = min(max(limit, 1), MAX_PAGE_SIZE)
    page, has_more = items[start : start + limit], start + limit < len(items)
    return {name: page, "next_cursor": page[-1][key] if has_more else None, "has_more": has_more}
