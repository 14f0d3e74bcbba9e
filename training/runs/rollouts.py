"""The record of a training step's rollouts: rows of rollouts.jsonl, checked when they come from a job."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from storage.files import write_atomically

MAX_GROUPS = 8  # groups recorded per step
MAX_TEXT = 300  # characters recorded of a rollout; a recipe has at most 110
MAX_RECORD_BYTES = 50_000_000  # of a job's rollouts.jsonl


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RolloutRow(_Row):
    """A sampled answer.

    Attributes:
        text: The answer, at most MAX_TEXT characters.
        scores: Score by reward name, 0..1; empty for an answer that is not a recipe.
        total: The reward; None for an answer that was not scored.
        advantage: Its difference from the group's mean, in standard deviations.
    """

    text: str = Field(max_length=MAX_TEXT)
    scores: dict[str, float | None] = Field(max_length=32)
    total: float | None
    advantage: float | None


class GroupRow(_Row):
    """The rollouts of one photo.

    Attributes:
        photo: Index of the training photo.
        no_signal: Whether all rewards are equal, so that the group has no gradient.
        rollouts: The sampled answers.
    """

    photo: StrictInt = Field(ge=0, lt=1_000_000)
    no_signal: StrictBool
    rollouts: list[RolloutRow] = Field(max_length=32)


class StepRow(_Row):
    """The rollouts of a step, a line of rollouts.jsonl."""

    step: StrictInt = Field(ge=0)
    groups: list[GroupRow] = Field(max_length=MAX_GROUPS)


def drop_invalid_rollouts(file: Path) -> None:
    """Rewrite a rollouts.jsonl with its valid lines only; all are dropped if it exceeds MAX_RECORD_BYTES.

    A job writes it on another machine, and anyone who may write to its repository can change it.
    """
    lines = []
    if file.stat().st_size <= MAX_RECORD_BYTES:
        for line in file.read_bytes().splitlines():
            try:
                lines.append(json.dumps(StepRow.model_validate_json(line).model_dump()) + "\n")
            except ValidationError:
                continue
    write_atomically(file, "".join(lines))
