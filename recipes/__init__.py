"""Recipes: photo edits as text. Parse them, render them with OpenCV, load and save photos."""

from recipes.grammar import LOOKS, OPERATIONS, Operation, Slot, grammar_segments
from recipes.parsing import Parsed, parse
from recipes.photo_io import (
    MAX_BYTES,
    MAX_PIXELS,
    MIN_SIDE,
    PhotoError,
    data_url_content,
    encode_jpeg,
    jpeg_data_url,
    load_photo,
    read_recipe,
    save_picture,
)
from recipes.recipe import Recipe, describe, random_recipe
from recipes.render import PREVIEW_SIDE, crop_box, render, render_all, shrink

__all__ = [
    "LOOKS",
    "MAX_BYTES",
    "MAX_PIXELS",
    "MIN_SIDE",
    "OPERATIONS",
    "PREVIEW_SIDE",
    "Operation",
    "Parsed",
    "PhotoError",
    "Recipe",
    "Slot",
    "crop_box",
    "data_url_content",
    "describe",
    "encode_jpeg",
    "grammar_segments",
    "jpeg_data_url",
    "load_photo",
    "parse",
    "random_recipe",
    "read_recipe",
    "render",
    "render_all",
    "save_picture",
    "shrink",
]
