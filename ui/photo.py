"""The photo input: what arrives is a file's path, so that recipes.load_photo alone decodes it, once and carefully."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import numpy as np
from gradio.data_classes import ImageData
from gradio.image_utils import decode_base64_to_file

from recipes import PhotoError, load_photo
from ui.messages import refusal

TITLE = "This photo cannot be used"


class PhotoInput(gr.Image):
    """gr.Image for uploads, the clipboard and the webcam that hands over the file untouched.

    gr.Image itself opens every file with Pillow before a handler sees it: a corrupt one or a decompression bomb
    would end in an exception instead of a message, and orientation, CMYK and 16 bit would be decided there.
    It has no `__init__` of its own: Gradio reads a component's settings off the constructor's signature.
    """

    is_template = True  # the page draws it as an ordinary image input

    def preprocess(self, payload: ImageData | None) -> str | None:
        """The path of the file, or None. A data URL (from an API client) is written to the cache first."""
        if payload is None:
            return None
        if payload.url and payload.url.startswith("data:"):
            try:
                return str(decode_base64_to_file(payload.url, self.GRADIO_CACHE, "png"))
            except Exception:
                raise refusal("The photo's data could not be read. Upload it as a file.", TITLE) from None
        return payload.path


def photo_input() -> PhotoInput:
    """The component: upload, paste and webcam; its value is the path of a file."""
    return PhotoInput(
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard", "webcam"],
        label="Photo",
        height=260,
        buttons=[],
        elem_id="photo",
    )


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
