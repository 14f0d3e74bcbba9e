"""The photo input. It passes the path of the uploaded file on; `recipes.load_photo` validates and decodes it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.data_classes import ImageData
from gradio.image_utils import decode_base64_to_file

from recipes import PhotoError, load_photo
from ui.messages import user_error

TITLE = "Photo"


def photo_input(**settings: Any) -> gr.Image:
    """Create a gr.Image with upload, paste and webcam whose handlers receive the path of the original file.

    By default gr.Image opens every file with Pillow before a handler runs, so a corrupt file or a decompression bomb
    would end in an exception instead of a message. Its `preprocess` is replaced on the instance, because Gradio writes
    a .pyi file next to the source of every subclass. Updating the component's properties would create a new component
    without this replacement: handlers must return plain values.
    """
    image = gr.Image(
        type="filepath", image_mode=None, sources=["upload", "clipboard", "webcam"], buttons=[], **settings
    )
    vars(image)["preprocess"] = partial(_path, image)
    return image


def _path(image: gr.Image, payload: ImageData | None) -> str | None:
    """Return the path of the file, or None. A data URL from an API client is first written to the cache."""
    if payload is None:
        return None
    if payload.url and payload.url.startswith("data:"):
        try:
            return str(decode_base64_to_file(payload.url, image.GRADIO_CACHE, "png"))
        except Exception:
            raise user_error("The photo's data URL is invalid. Upload the photo as a file.", TITLE) from None
    return payload.path


def read_photo(path: str | None) -> np.ndarray:
    """Load a photo.

    Returns:
        RGB image, uint8 [height, width, 3].

    Raises:
        gr.Error: There is no photo, or it cannot be used.
    """
    if not path:
        raise user_error("There is no photo yet. Upload a photo or choose a sample.", TITLE)
    try:
        return load_photo(Path(path))
    except PhotoError as error:
        raise user_error(str(error), TITLE) from None
    except OSError:
        raise user_error("The photo is no longer available. Choose it again.", TITLE) from None
