"""Usage events: the metadata of one model call, without prompts, images, answers or keys."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import uuid
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Literal

Outcome = Literal["ok", "error", "cancelled"]
Basis = Literal["reported", "estimated", "unknown"]
Payer = Literal["deployment", "visitor"]
OUTCOMES: tuple[Outcome, ...] = ("ok", "error", "cancelled")
PAYERS: tuple[Payer, ...] = ("deployment", "visitor")
MAX_NAME_LENGTH = 10_000  # characters of a branch or any other name; longer ones are truncated
MAX_ID_LENGTH = 64
VISITOR_HASH = re.compile("v1-[0-9a-f]{24}")
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")  # PostgreSQL rejects NUL; UTF-8 cannot encode lone surrogates
_PROCESS_SALT = secrets.token_bytes(32)


@dataclass(frozen=True)
class Deployment:
    """The running version of the application.

    Attributes:
        branch: Git branch.
        commit: Git commit, or "" if unknown.
        space: Hugging Face Space as owner/name, or "" outside of one.
    """

    branch: str = "local"
    commit: str = ""
    space: str = ""


@dataclass(frozen=True)
class UsageEvent:
    """One model call. Unknown numbers are None, which is not zero.

    Attributes:
        time: Time of the call, with a time zone; stored in UTC.
        model: Name of the model in the registry.
        skill: Name of the skill, or of the training step.
        outcome: "ok", "error" or "cancelled".
        latency: Seconds from the start of the computation to the last token.
        source: Caller: "playground", "api", "v1", "v1-tuning", "evaluate", "fine-tune",
            "hosted-rl" or "demonstration".
        branch: Git branch of the deployment; `commit` and `space` likewise, see `Deployment`.
        adapter: Name of the tuned run, or "".
        error: Class of the error, or "".
        first_token: Seconds from the start of the computation to the first token.
        queue: Seconds waited before the computation.
        cold_start: Seconds of loading the model before the computation; None if it was loaded already, or unknown.
        tokens_in: Input tokens; `tokens_out` likewise.
        tokens_basis: "reported" by the backend, "estimated", or "unknown" if and only if the counts are None.
        cost: Cost in US dollars; `cost_basis` as for tokens.
        payer: "visitor" if the call was made with the visitor's own API key; such calls do not count against budgets.
        candidates: Number of requested answers.
        reward: Mean reward over the candidates, 0..1, if they were scored.
        request_id: Random id of the request.
        session: Salted hash of the visitor's browser secret ("v1-" and 24 hexadecimal digits), or "" if unknown. Any
            other text, such as the Gradio session hash that older versions recorded, gives access to a visitor's
            session: it is replaced by a hash whose salt is lost when the process ends.
        id: Unique id; an event is stored once per id.

    Raises:
        ValueError: The time has no zone, the outcome or payer is unknown, or a basis contradicts its value.
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
    cold_start: float | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    tokens_basis: Basis = "unknown"
    cost: float | None = None
    cost_basis: Basis = "unknown"
    payer: Payer = "deployment"
    candidates: int = 1
    reward: float | None = None
    request_id: str = ""
    session: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        if self.time.tzinfo is None or self.outcome not in OUTCOMES:
            raise ValueError("An event needs a time with a time zone, and one of the outcomes ok, error or cancelled.")
        if self.payer not in PAYERS:
            raise ValueError("The payer of an event must be deployment or visitor.")
        if (self.tokens_in is None or self.tokens_out is None) != (self.tokens_basis == "unknown"):
            raise ValueError('tokens_basis must be "unknown" if and only if a token count is None.')
        if (self.cost is None) != (self.cost_basis == "unknown"):
            raise ValueError('cost_basis must be "unknown" if and only if the cost is None.')
        for name in ("source", "branch", "commit", "space", "model", "adapter", "skill", "error"):
            object.__setattr__(self, name, sanitize(getattr(self, name), MAX_NAME_LENGTH))
        object.__setattr__(self, "request_id", sanitize(self.request_id, MAX_ID_LENGTH))
        object.__setattr__(self, "session", hide_session(self.session))
        object.__setattr__(self, "time", self.time.astimezone(timezone.utc))

    def with_deployment(self, deployment: Deployment) -> UsageEvent:
        """Return a copy with the branch, commit and Space of a deployment."""
        return replace(self, branch=deployment.branch, commit=deployment.commit, space=deployment.space)


def sanitize(text: str, max_length: int) -> str:
    """Truncate text and replace characters that PostgreSQL or UTF-8 cannot store by U+FFFD."""
    return _UNSTORABLE.sub("\ufffd", text[:max_length])


def hide_session(session: str) -> str:
    """Replace a session id that is not a visitor hash by a hash that cannot be traced back to it.

    Equal ids give equal hashes within this process.
    """
    if not session or VISITOR_HASH.fullmatch(session):
        return session
    return "v1-" + hmac.new(_PROCESS_SALT, session.encode("utf-8", "replace"), "sha256").hexdigest()[:24]


def name_digest(*names: str) -> str:
    """Return a SHA-256 digest of names in hexadecimal: a key of fixed length for names of any length."""
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()
