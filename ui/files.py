"""Files for download: created in Gradio's cache, which deletes them by age, and sent to the browser."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from ui.events import PRIVATE
from ui.messages import user_error

DOWNLOAD_JS = """file => {
  const link = document.createElement('a');
  link.href = file.url; link.download = file.orig_name || '';
  document.body.append(link); link.click(); link.remove();
  return [];
}"""


def new_file(name: str) -> Path:
    """Create a folder and return the path of a file in it.

    Args:
        name: File name; characters that a file system may reject are replaced.

    Raises:
        OSError: The folder cannot be created.
    """
    folder = Path(get_upload_folder()) / secrets.token_hex(16)
    folder.mkdir(parents=True)
    return folder / (re.sub(r"[^\w.-]+", "-", name)[-80:].strip("-.") or "file")


@contextmanager
def writing() -> Iterator[None]:
    """Convert an OSError, such as a full disk, to a gr.Error."""
    try:
        yield
    except OSError as error:
        message = f"The file could not be written ({error.strerror}). Try again later."
        raise user_error(message, "Download") from None


def download_on(event: Any, handler: Any, inputs: Any, file: gr.File) -> None:
    """On an event, download the file whose path the handler returns.

    Args:
        event: Event listener of a component, such as `button.click`.
        handler: Function of `inputs` that returns a path.
        inputs: Input components.
        file: Invisible component that passes the path to the browser.
    """
    event(handler, inputs, file, **PRIVATE).success(None, file, None, js=DOWNLOAD_JS, **PRIVATE)
