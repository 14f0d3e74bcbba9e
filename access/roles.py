"""Roles and visitors."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Role(IntEnum):
    """What a visitor may do. Each role includes the rights of the lower ones."""

    GUEST = 0
    USER = 1
    ADMIN = 2


@dataclass(frozen=True)
class Visitor:
    """The sender of a request.

    Attributes:
        role: The role.
        id: Identifies the owner of runs and reward functions: "" for the deployment's own administrator (on localhost,
            or signed in with the admin link), "hf:<id>" for a Hugging Face account, "key:<digest>" for an API key, and
            "guest:<hash>" for a guest.
        name: Name to display, such as the user name on Hugging Face.
        hash: Salted hash of the browser's secret, for usage events; "" if the request has no secret.
    """

    role: Role = Role.GUEST
    id: str = "guest:"
    name: str = ""
    hash: str = ""

    def may_change(self, owner: str) -> bool:
        """Whether the visitor may change what `owner` owns. A guest without a browser secret owns nothing."""
        return self.role == Role.ADMIN or (owner == self.id and owner not in ("", "guest:"))


LOCAL_ADMIN = Visitor(Role.ADMIN, "", "This computer")
