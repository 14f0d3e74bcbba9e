"""The tuning API of Moondream Cloud (and of this app's own /v1/tuning) as methods: finetunes, rollouts, steps,
checkpoints. What it does not document is read defensively."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from inference.hosted.client import CloudError, MoondreamClient, Timeouts

BASE = "moondream3-preview"  # the one model that Moondream's tuning API trains
RANKS = (8, 16, 24, 32)
MAX_ROLLOUTS = 16
STEP_TIMEOUTS = Timeouts(read=600.0, one=900.0, all=1_800.0)  # a step of large groups takes minutes
STEP_TRIES = 3


@dataclass(frozen=True)
class Rollouts:
    """Answers to one request: `request` and each of `raw` go back to the server as they came. texts: what was said."""

    request: dict[str, Any]
    raw: tuple[dict[str, Any], ...]
    texts: tuple[str, ...]
    tokens_out: int | None = None


@dataclass(frozen=True)
class Step:
    """What a training step came to. lost: its answer was lost, so all but `step` is unknown. extra: steps more than
    were asked for, which were applied, and charged, because a try that seemed lost was not."""

    step: int
    applied: bool = True
    kl: float | None = None
    sft_loss: float | None = None
    lost: bool = False
    extra: int = 0


@dataclass(frozen=True)
class Tuning:
    """One finetune on a server. Every method raises CloudError; `server.url` goes up to /v1."""

    server: MoondreamClient
    finetune_id: str

    @classmethod
    def create(cls, server: MoondreamClient, name: str, rank: int) -> Tuning:
        """The finetune of that name, made if there is none yet. name: of A-Z a-z 0-9 . _ -; rank: one of RANKS."""
        data = server.post("tuning/finetunes", {"name": name, "rank": rank}).data
        return cls(server, _id(data))

    @classmethod
    def open(cls, server: MoondreamClient, finetune_id: str) -> Tuning:
        """One that exists."""
        data = server.get(f"tuning/finetunes/{finetune_id}").data
        return cls(server, _id(data.get("finetune", data)))

    def rollouts(self, photo_url: str, question: str, count: int, temperature: float, max_tokens: int) -> Rollouts:
        """`count` answers (1..16) of the present weights to a question about a photo."""
        request = {
            "skill": "query",
            "question": question,
            "image_url": photo_url,
            "reasoning": False,
            "settings": {"temperature": temperature, "top_p": 1.0, "max_tokens": max_tokens},
        }
        asked = {"finetune_id": self.finetune_id, "num_rollouts": count, "request": request}
        data = self.server.post("tuning/rollouts", asked).data
        raw = data.get("rollouts")
        if not isinstance(raw, list) or not all(isinstance(one, dict) for one in raw) or len(raw) != count:
            raise CloudError("provider", f"{self.server.host} did not give {count} rollouts.")
        tokens = [len(one["answer_tokens"]) for one in raw if isinstance(one.get("answer_tokens"), list)]
        known = sum(tokens) if len(tokens) == count else None
        echoed = data.get("request")
        return Rollouts(echoed if isinstance(echoed, dict) else request, tuple(raw), tuple(map(_answer, raw)), known)

    def train_step(self, groups: Sequence[dict[str, Any]], lr: float, before: int) -> Step:
        """One update. before: the step that the finetune is at.

        The API has no idempotency key. So when an answer is lost, the present step is asked for, and the groups are
        sent again only if it has not moved; what was applied once too often is told in `extra`.
        """
        patient = replace(self.server, timeouts=STEP_TIMEOUTS)
        for attempt in range(STEP_TRIES):
            asked = {"finetune_id": self.finetune_id, "groups": list(groups), "lr": lr}
            try:
                data = patient.post("tuning/train_step", asked, repeatable=False).data
            except CloudError as error:
                if not error.uncertain or attempt == STEP_TRIES - 1:
                    raise
                now = self.step()
                if now > before:
                    return Step(now, lost=True, extra=now - before - 1)
                continue
            number = data.get("step")
            step = int(number) if isinstance(number, int | float) else before + 1
            applied = data.get("applied") is not False
            extra = max(0, step - before - int(applied))
            return Step(step, applied, _number(data.get("kl")), _number(data.get("sft_loss")), extra=extra)
        raise AssertionError("the last try returns or raises")

    def step(self) -> int:
        """How many steps have been applied, 0 before the first.

        The finetune itself may say so. Where it does not, its checkpoint is saved, which tells its step and is free.
        """
        data = self.server.get(f"tuning/finetunes/{self.finetune_id}").data
        told = data.get("finetune", data)
        for name in ("step", "current_step", "latest_step"):
            if isinstance(told, dict) and isinstance(told.get(name), int):
                return told[name]
        try:
            return self.save()
        except CloudError as error:
            if error.status == 404:
                return 0
            raise

    def save(self) -> int:
        """Keeps the present weights as a checkpoint that can be asked; returns its step. 404 before the first step."""
        data = self.server.post(f"tuning/finetunes/{self.finetune_id}/checkpoints/save", None).data
        step = data.get("checkpoint", data).get("step")
        if not isinstance(step, int):
            raise CloudError("provider", f"{self.server.host} did not say which step it saved.")
        return step

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics for the provider's own page."""
        self.server.post(f"tuning/finetunes/{self.finetune_id}/metrics", {"step": step, "metrics": metrics})

    def model(self, step: int, base: str = BASE) -> str:
        """The id under which a saved step is asked."""
        return f"{base}/{self.finetune_id}@{step}"


def rl_group(rollouts: Rollouts, rewards: Sequence[float]) -> dict[str, Any]:
    """Rollouts with their rewards, as train_step takes them."""
    return {"mode": "rl", "request": rollouts.request, "rollouts": list(rollouts.raw), "rewards": list(rewards)}


def sft_group(photo_url: str, question: str, answer: str) -> dict[str, Any]:
    """An example to imitate, as train_step takes it."""
    request = {"skill": "query", "question": question, "image_url": photo_url, "reasoning": False}
    return {"mode": "sft", "request": request, "target": {"answer": answer}}


def _id(data: Any) -> str:
    found = data.get("finetune_id") if isinstance(data, dict) else None
    if not isinstance(found, str) or not found.isalnum() or len(found) > 64:
        raise CloudError("provider", "The server did not say which finetune it made.")
    return found


def _answer(rollout: dict[str, Any]) -> str:
    output = rollout.get("output")
    answer = output.get("answer") if isinstance(output, dict) else output
    return answer if isinstance(answer, str) else ""


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
