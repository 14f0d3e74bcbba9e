"""Atomic file writes."""

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file through a temporary file beside it, so that readers see the old or the new content, never a part.

    Args:
        path: The file to replace or create. Its folder must exist.
        content: Text, which is encoded as UTF-8, or bytes.

    Raises:
        OSError: The file could not be written. The old content is kept.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
