"""Usage metering: records one usage event per model call, whatever its outcome."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from uuid import uuid4

from inference.registry import MODELS
from inference.types import SKILLS, Answer, AnswerEvent, CandidateFailed, InferenceError, Queued, Request
from storage.database import StoreError
from usage.budgets import BudgetExceededError, Budgets
from usage.events import Basis, Payer, UsageEvent
from usage.machine import MachinePrice
from usage.prices import Prices
from usage.recorder import Recorder

AnswerFunction = Callable[[str, Request, threading.Event], Iterator[AnswerEvent]]
"""The signature of `registry.answer` for a model's name."""


@dataclass(frozen=True)
class UsageMeter:
    """Records the usage of model calls.

    Attributes:
        recorder: Receives the events.
        prices: Prices of paid calls and of this machine's hardware.
        hardware: Hardware of this machine, None if unknown.
        budgets: Checked before each call that the deployment pays.
        machine: What this machine costs an hour; by default the price of `hardware`.
    """

    recorder: Recorder
    prices: Prices
    hardware: str | None = None
    budgets: Budgets | None = None
    machine: MachinePrice | None = None

    def machine_cost(self, seconds: float) -> float | None:
        """Return the cost of `seconds` seconds of this machine in US dollars; None if unknown."""
        return self.machine.cost(seconds) if self.machine else self.prices.machine(self.hardware, seconds)

    def answer(
        self,
        name: str,
        request: Request,
        cancel: threading.Event,
        answer: AnswerFunction,
        source: str,
        request_id: str = "",
        payer: Payer = "deployment",
    ) -> Iterator[AnswerEvent]:
        """Run one model with `answer` and record its usage event at the end.

        Args:
            name: Name of the model.
            request: What to generate.
            cancel: Set by the caller to cancel.
            answer: Function that runs the model.
            source: Origin of the call, for the usage event.
            request_id: Id of the request. Default: a new id.
            payer: Who pays if the model needs a key: "visitor" if `answer` uses the visitor's own key.

        Yields:
            The events of `answer`.

        Raises:
            InferenceError: If the model fails or the budget is exceeded.
        """
        tracker = CallTracker(self, request, answer, source, "", request_id, payer)
        tracker.close()
        yield from tracker.answer(name, request, cancel)


class CallTracker:
    """Tracks the calls of one request to several models.

    The usage event of a call is held back until `record_reward` or `close`.
    """

    def __init__(
        self,
        meter: UsageMeter,
        request: Request,
        answer: AnswerFunction,
        source: str,
        session: str,
        request_id: str = "",
        payer: Payer = "deployment",
    ) -> None:
        """Create a tracker.

        Args:
            meter: Records the events.
            request: What to generate.
            answer: Function that runs a model.
            source: Origin of the calls.
            session: Hash of the visitor; see `UsageEvent`.
            request_id: Id of the request. Default: a new id.
            payer: Who pays for the models that need a key: "visitor" if `answer` uses the visitor's own key.
        """
        self.meter, self.request, self._answer = meter, request, answer
        self._payer: Payer = payer
        self.common_fields = {"source": source, "session": session, "request_id": request_id or uuid4().hex}
        self._lock = threading.Lock()
        self._pending: dict[str, UsageEvent] = {}
        self._closed = False

    def answer(self, name: str, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
        """Run a model and yield its events. Creates its usage event at the end.

        The outcome is "cancelled" only if the caller sets `cancel` or closes the generator before the last answer.
        """
        start, answers, queue_seconds = time.perf_counter(), [], 0.0
        pending, payer = 1 if _is_single_call(name, request) else request.n, self._payer_of(name)
        outcome, error_kind = "cancelled", ""
        try:
            self._check_budget(name)
            for event in self._answer(name, request, cancel):
                if isinstance(event, Answer):
                    answers.append(event)
                elif isinstance(event, Queued):
                    queue_seconds = time.perf_counter() - start
                pending -= isinstance(event, Answer | CandidateFailed)
                yield event
            outcome = "cancelled" if cancel.is_set() and pending > 0 else "ok"
        except GeneratorExit:
            outcome = "cancelled" if pending > 0 else "ok"
            raise
        except InferenceError as error:
            if error.kind == "cancelled" or cancel.is_set():
                outcome = "cancelled" if pending > 0 else "ok"
            else:
                outcome, error_kind = "error", error.kind
            raise
        except Exception as error:
            outcome, error_kind = "error", type(error).__name__
            raise
        finally:
            seconds = time.perf_counter() - start
            usage = _usage_event(self.meter, name, request, answers, seconds, queue_seconds)
            usage = replace(usage, outcome=outcome, error=error_kind, payer=payer, **self.common_fields)
            self._hold_or_record(name, usage)

    def record_reward(self, name: str, reward: float | None) -> None:
        """Record the held-back event of a model with its reward. Does nothing before the call has ended."""
        with self._lock:
            event = self._pending.pop(name, None)
        if event:
            self.meter.recorder.record(replace(event, reward=reward))

    def usage(self, name: str) -> UsageEvent | None:
        """Return the held-back event of a model, None before its call has ended."""
        with self._lock:
            return self._pending.get(name)

    def close(self) -> None:
        """Record all held-back events; later events are recorded at once."""
        with self._lock:
            self._closed = True
            pending, self._pending = self._pending, {}
        for event in pending.values():
            self.meter.recorder.record(event)

    def _payer_of(self, name: str) -> Payer:
        """Return who pays for a model's calls. Models that need no key use the deployment's machine."""
        spec = MODELS.get(name)
        return self._payer if spec is not None and spec.needs_key else "deployment"

    def _check_budget(self, name: str) -> None:
        """Raise InferenceError if the deployment pays for the model and the budget of its branch is exceeded."""
        spec = MODELS.get(name)
        if self.meter.budgets and spec is not None and spec.needs_key and self._payer == "deployment":
            try:
                self.meter.budgets.check(self.meter.recorder.deployment.branch)
            except (BudgetExceededError, StoreError) as error:
                raise InferenceError("budget", str(error)) from None

    def _hold_or_record(self, name: str, event: UsageEvent) -> None:
        with self._lock:
            if not self._closed:
                self._pending[name] = event
                return
        self.meter.recorder.record(event)


def _is_single_call(name: str, request: Request) -> bool:
    """Check whether one call answers all candidates: those of regions, or of temperature 0, are equal."""
    spec = MODELS.get(name)
    temperature = request.temperature * (spec.temperature if spec else 1.0)
    return SKILLS[request.skill].output == "regions" or temperature == 0


def _usage_event(
    meter: UsageMeter, name: str, request: Request, answers: list[Answer], seconds: float, queue_seconds: float
) -> UsageEvent:
    """Build the usage event of a call from its answers, or from the elapsed time if there are none.

    Local candidates share one batch: the prompt counts once, and the cost is the machine's time. Each call of a hosted
    model counts and is charged separately. An answer that stands for all candidates (temperature 0, regions) counts
    once.

    Args:
        meter: Prices, hardware and deployment.
        name: Name of the model.
        request: The request.
        answers: The answers received.
        seconds: Duration of the call.
        queue_seconds: Part of it spent in the queue; used if there are no answers.
    """
    spec = MODELS.get(name)
    hosted = spec is not None and spec.backend == "hosted"
    billed = answers[:1] if _is_single_call(name, request) else answers
    tokens_in = sum(answer.tokens_in for answer in (billed if hosted else answers[:1]))
    tokens_out = sum(answer.tokens_out for answer in billed)
    latency = max(answer.seconds for answer in answers) if answers else max(0.0, seconds - queue_seconds)
    basis: Basis = "estimated" if any(answer.estimated for answer in answers) else "reported"
    cost = None
    if answers and spec is not None and hosted:
        cost = meter.prices.call(spec.remote_id or spec.name, tokens_in, tokens_out) if spec.needs_key else None
    elif answers:
        cost = meter.machine_cost(latency)
    return UsageEvent(
        time=datetime.now(timezone.utc),
        model=name,
        skill=request.skill,
        latency=latency,
        first_token=min(answer.first_token_seconds for answer in answers) if answers else None,
        queue=answers[0].queue_seconds if answers else queue_seconds,
        cold_start=answers[0].cold_start_seconds if answers else None,
        tokens_in=tokens_in if answers else None,
        tokens_out=tokens_out if answers else None,
        tokens_basis=basis if answers else "unknown",
        cost=cost,
        cost_basis="unknown" if cost is None else "estimated",
        candidates=request.n,
        adapter=name if spec is not None and spec.adapter else "",
    ).with_deployment(meter.recorder.deployment)
