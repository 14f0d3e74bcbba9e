"""Files that are made for a download: in Gradio's own cache, which it empties by age; and how a browser gets them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from ui.messages import refusal

DELIVER_JS = """file => {
  const link = document.createElement('a');
  link.href = file.url; link.download = file.orig_name || '';
  document.body.append(link); link.click(); link.remove();
  return [];
}"""


def new_file(name: str) -> Path:
    """A path in a new folder, under a name that every file system takes. Raises OSError."""
    folder = Path(get_upload_folder()) / secrets.token_hex(16)
    folder.mkdir(parents=True)
    return folder / (re.sub(r"[^\w.-]+", "-", name)[-80:].strip("-.") or "file")


@contextmanager
def writing() -> Iterator[None]:
    """What goes wrong with a file inside is a gr.Error that says so: a full disk is no reason to lose the page."""
    try:
        yield
    except OSError as error:
        words = f"The file could not be written ({error.strerror}). Try again later."
        raise refusal(words, "Download") from None


def deliver(event: Any, handler: Any, inputs: list[Any], delivery: gr.File) -> None:
    """After the event the browser downloads the file whose path the handler returns; `delivery` is not shown."""
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    event(handler, inputs, delivery, **private).success(None, delivery, None, js=DELIVER_JS, **private)
