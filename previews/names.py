"""What a branch's Space is called: readable, short enough for hot reload's host, and never another branch's."""

from __future__ import annotations

import hashlib
import re
import unicodedata

# A Space answers at <owner>-<name>.hf.space and hot reload at <owner>-<name>--7887.hf.space; a label of a host has at
# most 63 characters.
LONGEST = 57
DIGITS = 8  # 32 bits; should two branches agree in them, the deployer sees it by the Space's variable


class NameTooLong(ValueError):
    """Owner and application leave no room for a branch; the message says how much is too much."""


def space_name(owner: str, app: str, branch: str) -> str:
    """The name of a branch's Space: `<app>-<slug>-<hash of the exact branch>`, or without the slug if it has no room.

    Raises NameTooLong when owner and app alone are too long.
    """
    digest = hashlib.sha256(branch.encode("utf-8", "surrogateescape")).hexdigest()[:DIGITS]
    stem = slug(app)
    room = LONGEST - len(f"{owner}-{stem}--{digest}")
    if not stem or room < -1:
        raise NameTooLong(
            f"{owner}/{app} leaves no room for a branch: together they may have {LONGEST - DIGITS - 2} characters."
        )
    part = slug(branch)[: max(room, 0)].strip("-")
    return "-".join(filter(None, (stem, part, digest)))


def is_preview(name: str, app: str) -> bool:
    """Whether a Space's name is one that `space_name` gives for this application."""
    return re.fullmatch(rf"{re.escape(slug(app))}-(?:[a-z0-9-]*-)?[0-9a-f]{{{DIGITS}}}", name) is not None


def slug(text: str) -> str:
    """The text in lower-case ASCII letters, digits and single hyphens; empty where it has none of them."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
