"""Names of preview Spaces: readable, unique per branch, and short enough for the hot-reload host name."""

from __future__ import annotations

import hashlib
import re
import unicodedata

# A Space is served at <owner>-<name>.hf.space and hot reload at <owner>-<name>--7887.hf.space; a DNS label has at most
# 63 characters.
MAX_LENGTH = 57
HASH_DIGITS = 8  # 32 bits; the deployer detects a collision by the Space's branch variable


class NameTooLong(ValueError):  # noqa: N818 - the message is shown to the user as it stands
    """Raised when owner and application names leave no room for a branch."""


def space_name(owner: str, app: str, branch: str) -> str:
    """Return the Space name of a branch: `<app>-<branch slug>-<hash of the exact branch name>`.

    The slug is truncated or omitted where the name would be too long.

    Raises:
        NameTooLong: If owner and app alone exceed the limit.
    """
    digest = hashlib.sha256(branch.encode("utf-8", "surrogateescape")).hexdigest()[:HASH_DIGITS]
    prefix = slug(app)
    room = MAX_LENGTH - len(f"{owner}-{prefix}--{digest}")
    if not prefix or room < -1:
        limit = MAX_LENGTH - HASH_DIGITS - 2
        raise NameTooLong(f"{owner}/{app} leaves no room for a branch name: use at most {limit} characters in total.")
    branch_slug = slug(branch)[: max(room, 0)].strip("-")
    return "-".join(filter(None, (prefix, branch_slug, digest)))


def is_preview(name: str, app: str) -> bool:
    """Return whether a Space name has the form that `space_name` produces for this application."""
    return re.fullmatch(rf"{re.escape(slug(app))}-(?:[a-z0-9-]*-)?[0-9a-f]{{{HASH_DIGITS}}}", name) is not None


def slug(text: str) -> str:
    """Convert text to lower-case ASCII letters, digits and single hyphens; may be empty."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")
