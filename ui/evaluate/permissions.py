"""Who may start, see and change evaluations. Every handler checks it; see `ui.finetune.permissions` for runs."""

from __future__ import annotations

from access.control import AccessControl
from access.permissions import NO_SESSION, AccessDenied
from access.roles import Role, Visitor
from training.evaluations.evaluation import Evaluation, EvaluationConfig
from training.runs.run import GUEST_PREFIX, RunError
from ui.finetune.permissions import sign_in_hint
from ui.services import AppServices

MAX_UNFINISHED: dict[Role, int | None] = {Role.GUEST: 1, Role.USER: 2, Role.ADMIN: None}
MAX_GUEST_PHOTOS = 50
OWNERS_ONLY = "Only its owner and administrators can see this evaluation."


def evaluation_refusal(access: AccessControl, visitor: Visitor, max_photos: float) -> str:
    """Return why a visitor may not start or resume an evaluation of up to `max_photos` photos; "" if allowed."""
    if visitor.role > Role.GUEST:
        return ""
    if not access.guest_runs:
        return f"Guests cannot evaluate models here. {sign_in_hint(access)}"
    if visitor.id == GUEST_PREFIX:
        return NO_SESSION
    if max_photos > MAX_GUEST_PHOTOS:
        return f"Guests can evaluate on at most {MAX_GUEST_PHOTOS} photos. Choose fewer."
    return ""


def check_may_evaluate(access: AccessControl, visitor: Visitor, config: EvaluationConfig) -> None:
    """Raise AccessDenied if a visitor may not start or resume such an evaluation."""
    refusal = evaluation_refusal(access, visitor, config.max_photos)
    if refusal:
        raise AccessDenied(refusal)


def visible(services: AppServices, visitor: Visitor) -> list[Evaluation]:
    """Return the evaluations that a visitor sees, newest first: own ones, and for administrators all."""
    return [item for item in reversed(services.evaluations.list()) if visitor.may_change(item.owner)]


def get_evaluation(services: AppServices, visitor: Visitor, name: object) -> Evaluation:
    """Return an evaluation of a visitor.

    Raises:
        RunError: There is no such evaluation.
        AccessDenied: It belongs to another visitor.
    """
    if not isinstance(name, str):
        raise RunError("Choose an evaluation first.")
    evaluation = services.evaluations.get(name)
    if not visitor.may_change(evaluation.owner):
        raise AccessDenied(OWNERS_ONLY)
    return evaluation
