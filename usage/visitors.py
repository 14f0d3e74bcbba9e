"""Visitor hashes: count visitors in usage events without identifying them."""

from __future__ import annotations

import hmac
import logging
import os
import secrets
from pathlib import Path

SALT_FILE = "visitor-salt"
SALT_SIZE = 32  # bytes
_log = logging.getLogger(__name__)


class VisitorHasher:
    """Hashes visitors' secrets with a random salt of this deployment.

    The salt is in a file that only this user can read. All processes that share the folder use the same salt. If the
    file cannot be read or created, the salt is kept in memory and lost when the process ends.
    """

    def __init__(self, folder: Path) -> None:
        """Read the salt, or create it.

        Args:
            folder: Folder of the salt, DATA_DIR. Created if missing.
        """
        self._salt = _read_salt(folder / SALT_FILE)

    def hash(self, secret: str) -> str:
        """Return "v1-" and 24 hexadecimal digits of the secret's HMAC-SHA256, or "" for an empty secret."""
        return f"v1-{hmac.new(self._salt, secret.encode(), 'sha256').hexdigest()[:24]}" if secret else ""


def _read_salt(path: Path) -> bytes:
    """Return the salt in a file, which is created if missing, or a new one if the file cannot be used."""
    try:
        if not path.exists():
            _create_file(path, secrets.token_bytes(SALT_SIZE))
        salt = path.read_bytes()
        if len(salt) == SALT_SIZE:
            return salt
        problem = "it is damaged; delete it"
    except OSError as error:
        problem = error.strerror
    _log.warning("%s cannot be used (%s). Visitors are counted again after a restart.", path, problem)
    return secrets.token_bytes(SALT_SIZE)


def _create_file(path: Path, content: bytes) -> None:
    """Create a file with mode 0600 unless another process does. Readers never see a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        pass  # created by another process meanwhile
    finally:
        temporary.unlink(missing_ok=True)
