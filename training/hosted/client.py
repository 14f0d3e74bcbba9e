"""Client for the tuning API of Moondream Cloud and of this app's own /v1/tuning: finetunes, rollouts, training steps.

Undocumented fields of responses are treated as optional.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from inference.hosted.client import CloudError, MoondreamClient, Timeouts

BASE = "moondream3-preview"  # the only model that Moondream's tuning API trains
RANKS = (8, 16, 24, 32)
MAX_ROLLOUTS = 16
MIN_REWARD_RANGE = 1e-6  # a group whose rewards differ by less carries no learning signal
STEP_TIMEOUTS = Timeouts(read=600.0, attempt=900.0, total=1_800.0)  # a step with large groups takes minutes
STEP_ATTEMPTS = 3


@dataclass(frozen=True)
class Rollouts:
    """Sampled answers to one request.

    Attributes:
        request: The request as echoed by the server, to be sent back in a training step.
        raw: The rollouts as received, to be sent back in a training step.
        texts: The answers.
        tokens_out: Number of generated tokens, None if the server does not report it.
    """

    request: dict[str, Any]
    raw: tuple[dict[str, Any], ...]
    texts: tuple[str, ...]
    tokens_out: int | None = None


@dataclass(frozen=True)
class TrainStepResult:
    """Outcome of a training step.

    Attributes:
        step: The finetune's step afterwards.
        applied: Whether the server updated the weights.
        kl: KL divergence from the base model, None if unknown.
        sft_loss: Supervised loss, None if unknown.
        response_lost: Whether the response was lost, in which case only `step` is known.
        extra_steps: Steps applied, and charged, in excess, because a seemingly failed attempt had succeeded.
    """

    step: int
    applied: bool = True
    kl: float | None = None
    sft_loss: float | None = None
    response_lost: bool = False
    extra_steps: int = 0


@dataclass(frozen=True)
class TuningClient:
    """One finetune on a server. Every method raises CloudError.

    Attributes:
        server: HTTP client, whose address includes /v1.
        finetune_id: The finetune's id.
    """

    server: MoondreamClient
    finetune_id: str

    @classmethod
    def create(cls, server: MoondreamClient, name: str, rank: int) -> TuningClient:
        """Create a finetune, or open the existing one of the same name.

        Args:
            server: HTTP client.
            name: Name, of the characters A-Z a-z 0-9 . _ -
            rank: LoRA rank, one of RANKS.
        """
        return cls(server, _parse_finetune_id(server.post("tuning/finetunes", {"name": name, "rank": rank}).data))

    @classmethod
    def open(cls, server: MoondreamClient, finetune_id: str) -> TuningClient:
        """Open an existing finetune."""
        data = server.get(f"tuning/finetunes/{finetune_id}").data
        return cls(server, _parse_finetune_id(data.get("finetune", data)))

    def rollouts(self, photo_url: str, question: str, count: int, temperature: float, max_tokens: int) -> Rollouts:
        """Sample `count` answers (1 to 16) to a question about a photo from the current weights."""
        request = {
            "skill": "query",
            "question": question,
            "image_url": photo_url,
            "reasoning": False,
            "settings": {"temperature": temperature, "top_p": 1.0, "max_tokens": max_tokens},
        }
        payload = {"finetune_id": self.finetune_id, "num_rollouts": count, "request": request}
        data = self.server.post("tuning/rollouts", payload).data
        raw = data.get("rollouts")
        if not isinstance(raw, list) or not all(isinstance(item, dict) for item in raw) or len(raw) != count:
            raise CloudError("provider", f"{self.server.host} did not return {count} rollouts.")
        token_counts = [len(item["answer_tokens"]) for item in raw if isinstance(item.get("answer_tokens"), list)]
        tokens_out = sum(token_counts) if len(token_counts) == count else None
        echoed = data.get("request")
        texts = tuple(_answer_text(item) for item in raw)
        return Rollouts(echoed if isinstance(echoed, dict) else request, tuple(raw), texts, tokens_out)

    def train_step(self, groups: Sequence[dict[str, Any]], lr: float, current_step: int) -> TrainStepResult:
        """Update the weights once.

        The API has no idempotency key. If a response is lost, the finetune's step is read, and the groups are sent
        again only if it has not advanced.

        Args:
            groups: Groups made by `rl_group` or `sft_group`.
            lr: Learning rate.
            current_step: The finetune's step before the update.
        """
        server = replace(self.server, timeouts=STEP_TIMEOUTS)
        payload = {"finetune_id": self.finetune_id, "groups": list(groups), "lr": lr}
        for attempt in range(STEP_ATTEMPTS):
            try:
                data = server.post("tuning/train_step", payload, repeatable=False).data
            except CloudError as error:
                if not error.uncertain or attempt == STEP_ATTEMPTS - 1:
                    raise
                step = self.step()
                if step > current_step:
                    return TrainStepResult(step, response_lost=True, extra_steps=step - current_step - 1)
                continue
            number = data.get("step")
            step = int(number) if isinstance(number, int | float) else current_step + 1
            applied = data.get("applied") is not False
            extra_steps = max(0, step - current_step - int(applied))
            kl, sft_loss = _number(data.get("kl")), _number(data.get("sft_loss"))
            return TrainStepResult(step, applied, kl, sft_loss, extra_steps=extra_steps)
        raise AssertionError("the last attempt returns or raises")

    def step(self) -> int:
        """Return the number of steps applied so far.

        If the finetune does not report its step, a checkpoint is saved, which is free and reports it.
        """
        data = self.server.get(f"tuning/finetunes/{self.finetune_id}").data
        finetune = data.get("finetune", data)
        for name in ("step", "current_step", "latest_step"):
            if isinstance(finetune, dict) and isinstance(finetune.get(name), int):
                return finetune[name]
        try:
            return self.save()
        except CloudError as error:
            if error.status == 404:
                return 0
            raise

    def save(self) -> int:
        """Save the current weights as a checkpoint and return its step. The server answers 404 before step 1."""
        data = self.server.post(f"tuning/finetunes/{self.finetune_id}/checkpoints/save", None).data
        step = data.get("checkpoint", data).get("step")
        if not isinstance(step, int):
            raise CloudError("provider", f"{self.server.host} did not return the step of the saved checkpoint.")
        return step

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send metrics to the provider's dashboard."""
        self.server.post(f"tuning/finetunes/{self.finetune_id}/metrics", {"step": step, "metrics": metrics})

    def model(self, step: int, base: str = BASE) -> str:
        """Return the model id of a saved checkpoint, for inference requests."""
        return f"{base}/{self.finetune_id}@{step}"


def rl_group(rollouts: Rollouts, rewards: Sequence[float]) -> dict[str, Any]:
    """Build a reinforcement-learning group for `train_step`, with one reward per rollout."""
    return {"mode": "rl", "request": rollouts.request, "rollouts": list(rollouts.raw), "rewards": list(rewards)}


def sft_group(photo_url: str, question: str, answer: str) -> dict[str, Any]:
    """Build a supervised group for `train_step` from an example answer."""
    request = {"skill": "query", "question": question, "image_url": photo_url, "reasoning": False}
    return {"mode": "sft", "request": request, "target": {"answer": answer}}


def _parse_finetune_id(data: Any) -> str:
    finetune_id = data.get("finetune_id") if isinstance(data, dict) else None
    if not isinstance(finetune_id, str) or not finetune_id.isalnum() or len(finetune_id) > 64:
        raise CloudError("provider", "The server did not return a valid finetune id.")
    return finetune_id


def _answer_text(rollout: dict[str, Any]) -> str:
    output = rollout.get("output")
    answer = output.get("answer") if isinstance(output, dict) else output
    return answer if isinstance(answer, str) else ""


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
