"""The photo input: what arrives is a file's path; recipes.load_photo alone decodes it, once and carefully."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.data_classes import ImageData
from gradio.image_utils import decode_base64_to_file

from recipes import PhotoError, load_photo
from ui.messages import refusal

TITLE = "This photo cannot be used"


def photo_input(**settings: Any) -> gr.Image:
    """The component: upload, paste and webcam. What it hands to a handler is the path of the untouched file.

    Left alone, gr.Image opens every file with Pillow before a handler sees it, so that a corrupt file or a
    decompression bomb ends in an exception instead of a message. Its `preprocess` is replaced on the component, for
    Gradio writes a .pyi file beside the source of every subclass. An update of the component's properties would undo
    this (it makes a new component): handlers return plain values for it.
    """
    image = gr.Image(
        type="filepath", image_mode=None, sources=["upload", "clipboard", "webcam"], buttons=[], **settings
    )
    vars(image)["preprocess"] = partial(_path, image)
    return image


def _path(image: gr.Image, payload: ImageData | None) -> str | None:
    """The path of the file, or None. A data URL (from an API client) is written to the cache first."""
    if payload is None:
        return None
    if payload.url and payload.url.startswith("data:"):
        try:
            return str(decode_base64_to_file(payload.url, image.GRADIO_CACHE, "png"))
        except Exception:
            raise refusal("The photo's data could not be read. Upload it as a file.", TITLE) from None
    return payload.path


def read_photo(path: str | None) -> np.ndarray:
    """The photo, uint8 [H, W, 3], RGB. gr.Error with what to do when there is none or it cannot be used."""
    if not path:
        raise refusal("There is no photo yet. Upload one or choose a sample.", "Choose a photo")
    try:
        return load_photo(Path(path))
    except PhotoError as error:
        raise refusal(str(error), TITLE) from None
    except OSError:
        raise refusal("The photo is no longer here. Choose it again.", "Choose a photo") from None
