"""What is recorded of one model call: numbers and names, never a prompt, an image, an answer or a key."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Literal

Outcome = Literal["ok", "error", "cancelled"]
Basis = Literal["reported", "estimated", "unknown"]
OUTCOMES: tuple[Outcome, ...] = ("ok", "error", "cancelled")
MAX_WORD = 10_000  # characters that are kept of a branch or any other name
MAX_ID = 64
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")  # PostgreSQL takes no NUL, and no encoding takes half a character


@dataclass(frozen=True)
class Deployment:
    """Where a call was made: the git branch and commit, and the Space (owner/name), "" outside of one."""

    branch: str = "local"
    commit: str = ""
    space: str = ""


@dataclass(frozen=True)
class Event:
    """One model call. Durations in seconds, cost in US dollars; None is unknown, which is not zero.

    source: who asked: "playground", "api", "v1", "fine-tune", "hosted-rl" or "demonstration".
    adapter: the tuned run on the model, or "". error: the class of an error, or "".
    latency: from the start of the computing to the last token; queue: the wait before it; first_token: from the start
    of the computing to the first token.
    tokens_basis, cost_basis: "reported" by who computed it, "estimated", or "unknown" exactly where the value is None.
    candidates: answers asked for. reward: the mean over them, 0..1, where they were scored.
    request_id, session: random names, the session's one per browser tab; no person can be read from them.
    """

    time: datetime
    model: str
    skill: str
    outcome: Outcome = "ok"
    latency: float = 0.0
    source: str = "playground"
    branch: str = "local"
    commit: str = ""
    space: str = ""
    adapter: str = ""
    error: str = ""
    first_token: float | None = None
    queue: float | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    tokens_basis: Basis = "unknown"
    cost: float | None = None
    cost_basis: Basis = "unknown"
    candidates: int = 1
    reward: float | None = None
    request_id: str = ""
    session: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        """Names are cut and cleaned so that every database takes them. Raises ValueError for what makes no sense."""
        if self.time.tzinfo is None or self.outcome not in OUTCOMES:
            raise ValueError("An event has a time with a zone, and an outcome of ok, error or cancelled.")
        if (self.tokens_in is None or self.tokens_out is None) != (self.tokens_basis == "unknown"):
            raise ValueError("Tokens are unknown exactly where they are None.")
        if (self.cost is None) != (self.cost_basis == "unknown"):
            raise ValueError("The cost is unknown exactly where it is None.")
        for name in ("source", "branch", "commit", "space", "model", "adapter", "skill", "error"):
            object.__setattr__(self, name, storable(getattr(self, name), MAX_WORD))
        for name in ("request_id", "session"):
            object.__setattr__(self, name, storable(getattr(self, name), MAX_ID))
        object.__setattr__(self, "time", self.time.astimezone(timezone.utc))

    def at(self, deployment: Deployment) -> Event:
        """The same event, made by this deployment."""
        return replace(self, branch=deployment.branch, commit=deployment.commit, space=deployment.space)


def storable(text: str, limit: int) -> str:
    """The text as it is kept: what no database takes is replaced by U+FFFD, and what is beyond the limit is cut."""
    return _UNSTORABLE.sub("\ufffd", text[:limit])
