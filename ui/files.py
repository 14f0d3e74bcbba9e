"""Files that are made for a download: in Gradio's own cache, which it empties by age."""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from gradio.utils import get_upload_folder

from ui.messages import refusal


def new_file(name: str) -> Path:
    """A path in a new folder, under a name that every file system takes; gr.Error when there is no room for it."""
    folder = Path(get_upload_folder()) / secrets.token_hex(16)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise refusal(f"The file could not be written ({error.strerror}). Try again later.", "Download") from None
    return folder / (re.sub(r"[^\w.-]+", "-", name)[-80:].strip("-.") or "file")
