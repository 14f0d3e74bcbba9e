"""The models that a visitor may use, with the key that pays for them."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pydantic import SecretStr

from access.roles import Role, Visitor
from inference.availability import unavailable
from inference.registry import MODELS, answer
from inference.types import AnswerEvent, InferenceError, ModelSpec, Request
from training.runs.adapters import AdapterRegistry
from ui.messages import user_error
from usage.events import Payer

OWN_KEY_NEEDED = (
    "it needs a Moondream API key. Enter your own under “Moondream API key”; only an administrator may use this "
    "deployment's key."
)


@dataclass(frozen=True)
class VisitorModels:
    """The models that a visitor may use.

    Attributes:
        specs: The models by name, in the order of MODELS. Those of Moondream Cloud have the visitor's own key; without
            one, an administrator's have the deployment's key and the others none.
        role: The visitor's role.
        payer: Who pays for the calls of models that need a key.
    """

    specs: dict[str, ModelSpec]
    role: Role
    payer: Payer

    def unavailable(self, name: str) -> str | None:
        """Return why a model cannot be used and what to do about it, or None if it can be used."""
        spec = self.specs[name]
        if self.role < Role.ADMIN and spec.needs_key and spec.key is None:
            return OWN_KEY_NEEDED
        return unavailable(spec)

    def answer(self, name: str, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
        """Run a model as `inference.registry.answer` does, with the visitor's rights.

        Raises:
            InferenceError: If the visitor may not use the model, or it is unavailable or fails.
        """
        spec = self.specs.get(name)
        if spec is None:
            raise InferenceError("unknown_model", f"There is no model called {name!r}. Choose one from the list.")
        reason = self.unavailable(name)
        if reason:
            raise InferenceError("unavailable", f"{spec.title} cannot be used: {reason}")
        yield from answer(spec, request, cancel)


def visitor_models(adapters: AdapterRegistry, visitor: Visitor, key: SecretStr | None = None) -> VisitorModels:
    """Return the models that a visitor may use.

    Args:
        adapters: Decides which tuned models the visitor sees.
        visitor: The visitor.
        key: The visitor's own Moondream API key.
    """
    return _with_rights(adapters.visible_models(visitor.id), visitor.role, key)


def public_models() -> VisitorModels:
    """Return the models that every visitor may use: no tuned ones, and none with the deployment's key."""
    specs = {name: spec for name, spec in list(MODELS.items()) if not name.startswith("run-")}
    return _with_rights(specs, Role.GUEST, None)


def _with_rights(specs: dict[str, ModelSpec], role: Role, key: SecretStr | None) -> VisitorModels:
    allowed = {}
    for name, spec in specs.items():
        if key is not None:
            allowed[name] = spec.with_key(key)
        else:
            allowed[name] = replace(spec, key=None) if spec.needs_key and role < Role.ADMIN else spec
    return VisitorModels(allowed, role, "deployment" if key is None else "visitor")


def parse_key(text: str | None) -> SecretStr | None:
    """Validate the visitor's Moondream API key. Raises gr.Error, whose message does not contain the key."""
    text = (text or "").strip()
    if not text:
        return None
    if not re.fullmatch(r"[!-~]{1,500}", text):
        raise user_error("The key contains invalid characters. Copy it again.", "Moondream API key")
    return SecretStr(text)
