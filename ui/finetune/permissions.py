"""Who may start, change and see training runs. The page shows the reasons, and every handler checks them again.

A refusal is a text that says why and what to do, or "" if the visitor may do it.
"""

from __future__ import annotations

from access.control import AccessControl
from access.permissions import NO_SESSION, AccessDenied
from access.roles import Role, Visitor
from training.runs.adapters import AdapterRegistry
from training.runs.run import GUEST_PREFIX, Run, RunConfig
from ui.services import AppServices

MAX_UNFINISHED: dict[Role, int | None] = {Role.GUEST: 1, Role.USER: 3, Role.ADMIN: None}
MAX_GUEST_RUNS = 8  # unfinished runs of all guests together, so that they cannot fill the queue with new sessions
MAX_GUEST_STEPS = RunConfig.model_fields["steps"].default
MAX_GUEST_ROLLOUTS = RunConfig.model_fields["rollouts"].default
LOCKED_WHEN_SHARED = ("revert", "rename", "delete", "resume")  # these change what everyone uses
ADMIN_SHARES = "Only administrators can offer a model to everyone."
SHARED_LOCK = "This model is in use for everyone. Only administrators can change that."


def training_refusal(access: AccessControl, visitor: Visitor, backend: str, steps: float, rollouts: float) -> str:
    """Return why a visitor may not start or resume a run.

    Args:
        access: The deployment's access control.
        visitor: The visitor.
        backend: See `RunConfig.backend`.
        steps: Number of steps of the run.
        rollouts: Answers sampled per photo.
    """
    if visitor.role > Role.GUEST:
        return ""
    sign_in = sign_in_hint(access)
    if not access.guest_runs:
        return f"Guests cannot train models here. {sign_in}"
    if visitor.id == GUEST_PREFIX:
        return NO_SESSION
    if backend != "here":
        return f"Guests can train on this machine only. {sign_in}"
    if steps > MAX_GUEST_STEPS:
        return f"Guests can train for at most {MAX_GUEST_STEPS} steps. Choose a shorter run."
    if rollouts > MAX_GUEST_ROLLOUTS:
        return f"Guests can sample at most {MAX_GUEST_ROLLOUTS} rollouts per photo. Choose fewer."
    return ""


def sign_in_hint(access: AccessControl) -> str:
    """Return how a guest gets the rights of a user or an administrator."""
    if access.mode == "space":
        return "Sign in with Hugging Face first."
    return "That needs the administrator link, which the server prints at its start, or an API key."


def action_refusal(services: AppServices, visitor: Visitor, run: Run, action: str) -> str:
    """Return why a visitor may not execute an action on a run.

    Args:
        services: The application's services.
        visitor: The visitor.
        run: The run.
        action: "cancel", "resume", "use", "revert", "share", "unshare", "rename", "delete", "download", "push" or
            "run" (execute inside the request).
    """
    if visitor.role == Role.ADMIN:
        return ""
    if not visitor.may_change(run.owner):
        return f"Only {owner_title(run)} and administrators can change or download this run."
    if action in ("share", "unshare"):
        return ADMIN_SHARES
    if action == "push" and visitor.role == Role.GUEST:
        return f"Guests cannot push to the Hub. Download the zip file. {sign_in_hint(services.access)}"
    if action in LOCKED_WHEN_SHARED and services.adapters.is_shared(run.id):
        return SHARED_LOCK
    if action == "resume":
        config = run.config()
        return training_refusal(services.access, visitor, config.backend, config.steps, config.rollouts)
    return ""


def check_action(services: AppServices, visitor: Visitor, run: Run, action: str) -> None:
    """Raise AccessDenied if a visitor may not execute an action on a run; see `action_refusal`."""
    refusal = action_refusal(services, visitor, run, action)
    if refusal:
        raise AccessDenied(refusal)


def is_usable_base(adapters: AdapterRegistry, visitor: Visitor, run: Run) -> bool:
    """Whether a visitor may start a new run from the model of a run: an own one, or one that is offered to everyone."""
    return visitor.may_change(run.owner) or adapters.is_shared(run.id)


def is_mine(visitor: Visitor, run: Run) -> bool:
    """Whether a visitor started a run. Administrators may change the runs of others, but do not own them."""
    return run.owner == visitor.id and run.owner != GUEST_PREFIX


def shows_log(visitor: Visitor, run: Run, config: RunConfig) -> bool:
    """Whether a visitor sees a run's log and messages. Those of own photos contain file names, others account names."""
    bundled = config.photos == config.held_out == "bundled" and config.backend == "here"
    return bundled or visitor.may_change(run.owner)


def shows_photos(visitor: Visitor, run: Run, config: RunConfig) -> bool:
    """Whether a visitor sees the held-out photos that a run shows."""
    return config.held_out == "bundled" or visitor.may_change(run.owner)


def shows_training_photos(visitor: Visitor, run: Run, config: RunConfig) -> bool:
    """Whether a visitor sees the photos that a run trains on: the bundled ones, and those of the visitor's own runs."""
    return config.photos == "bundled" or visitor.may_change(run.owner)


def owner_title(run: Run) -> str:
    """Return the owner of a run for display in a sentence."""
    ownership = run.ownership
    if ownership.owner.startswith(GUEST_PREFIX):
        return "the guest who started it"
    return ownership.owner_name or "its owner"


def owner_label(access: AccessControl, visitor: Visitor, run: Run) -> str:
    """Return the owner of a run for display in a list; "" where there is one user only."""
    if is_mine(visitor, run):
        return "" if access.mode == "local" else "You"
    ownership = run.ownership
    if ownership.owner.startswith(GUEST_PREFIX):
        return "Guest"
    return ownership.owner_name or "Administrator"
