"""Counts model calls: every call becomes one event, whatever way it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from uuid import uuid4

from inference.registry import MODELS
from inference.types import Answer, InferenceError, Queued, Request
from inference.types import Event as Said
from storage.database import StoreError
from usage.budgets import BudgetExceeded, Budgets
from usage.events import Basis, Event
from usage.prices import Prices
from usage.recorder import Recorder

Ask = Callable[[str, Request, threading.Event], Iterator[Said]]


@dataclass(frozen=True)
class UsageMeter:
    """Where calls are recorded, and what a second of this machine costs: `hardware` is None where it is not known.

    budgets: asked before each paid call.
    """

    recorder: Recorder
    prices: Prices
    hardware: str | None = None
    budgets: Budgets | None = None

    def ask(
        self, name: str, request: Request, cancel: threading.Event, ask: Ask, source: str, request_id: str = ""
    ) -> Iterator[Said]:
        """What `ask` says of one model, its event recorded when it ends."""
        calls = CallTracker(self, request, ask, source, "", request_id)
        calls.close()
        yield from calls.ask(name, request, cancel)


class CallTracker:
    """The calls of one question: an event waits for its scores, but not for a page that has gone."""

    def __init__(
        self, meter: UsageMeter, request: Request, ask: Ask, source: str, session: str, request_id: str = ""
    ) -> None:
        self.meter, self.request, self._ask = meter, request, ask
        self.common = {"source": source, "session": session, "request_id": request_id or uuid4().hex}
        self._lock = threading.Lock()
        self._waiting: dict[str, Event] = {}
        self._closed = False

    def ask(self, name: str, request: Request, cancel: threading.Event) -> Iterator[Said]:
        """What the model says; its event is made when it ends."""
        began, answers, wait = time.perf_counter(), [], 0.0
        outcome, error = "cancelled", ""
        try:
            self._check_budget(name)
            for said in self._ask(name, request, cancel):
                if isinstance(said, Answer):
                    answers.append(said)
                elif isinstance(said, Queued):
                    wait = time.perf_counter() - began
                yield said
            outcome = "cancelled" if cancel.is_set() and len(answers) < request.n else "ok"
        except InferenceError as failure:
            stopped = failure.kind == "cancelled" or cancel.is_set()
            outcome, error = ("cancelled", "") if stopped else ("error", failure.kind)
            raise
        except Exception as failure:
            outcome, error = "error", type(failure).__name__
            raise
        finally:
            event = _event(self.meter, name, request, answers, time.perf_counter() - began, wait)
            self._end(name, replace(event, outcome=outcome, error=error, **self.common))

    def _check_budget(self, name: str) -> None:
        """Raises InferenceError where a paid call would be beyond the budget of this branch."""
        entry = MODELS.get(name)
        if self.meter.budgets and entry is not None and entry.needs_key:
            try:
                self.meter.budgets.check(self.meter.recorder.deployment.branch)
            except (BudgetExceeded, StoreError) as error:
                raise InferenceError("budget", str(error)) from None

    def settle(self, name: str, reward: float | None) -> None:
        """Records a model's event, once it is there, with its reward."""
        with self._lock:
            event = self._waiting.pop(name, None)
        if event:
            self.meter.recorder.record(replace(event, reward=reward))

    def close(self) -> None:
        """Records what waits; what ends later is recorded at once."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, {}
        for event in waiting.values():
            self.meter.recorder.record(event)

    def _end(self, name: str, event: Event) -> None:
        with self._lock:
            if not self._closed:
                self._waiting[name] = event
                return
        self.meter.recorder.record(event)


def _event(meter: UsageMeter, name: str, request: Request, answers: list[Answer], seconds: float, wait: float) -> Event:
    """The call's numbers: as the answers report them, else (nothing was answered) the time that passed.

    Local candidates are answered in one batch: the prompt is computed once for all. An answer that stands for several
    candidates (temperature 0, boxes, points) was computed once. A hosted model computes, and charges, each call. The
    device's time is the cost of a local model.
    """
    entry = MODELS.get(name)
    queue = answers[0].queue_seconds if answers else wait
    latency = max(answer.seconds for answer in answers) if answers else max(0.0, seconds - wait)
    once = answers[:1] if answers and _computed_once(request, name) else answers
    hosted = entry if entry is not None and entry.backend == "hosted" else None
    came = sum(answer.tokens_in for answer in once) if hosted else answers[0].tokens_in if answers else None
    went = sum(answer.tokens_out for answer in once)
    basis: Basis = "estimated" if any(answer.estimated for answer in answers) else "reported"
    if hosted:
        paid = bool(answers) and hosted.needs_key
        cost = meter.prices.call(hosted.remote_id or hosted.name, came, went) if paid else None
    else:
        cost = meter.prices.machine(meter.hardware, latency) if answers else None
    return Event(
        time=datetime.now(timezone.utc),
        model=name,
        skill=request.skill,
        latency=latency,
        first_token=min(answer.first_token_seconds for answer in answers) if answers else None,
        queue=queue,
        tokens_in=came if answers else None,
        tokens_out=went if answers else None,
        tokens_basis=basis if answers else "unknown",
        cost=cost,
        cost_basis="unknown" if cost is None else "estimated",
        candidates=request.n,
        adapter=name if entry is not None and entry.adapter else "",
    ).at(meter.recorder.deployment)


def _computed_once(request: Request, name: str) -> bool:
    entry = MODELS.get(name)
    return request.skill in ("detect", "point") or request.temperature * (entry.temperature if entry else 1.0) == 0
