"""Recipes: what an edit is, how a text becomes one, how one becomes a picture, and photos in and out."""

from recipes.parsing import Parsed, parse
from recipes.photo_io import MAX_BYTES, MAX_PIXELS, MIN_SIDE, PhotoError, load_photo, read_recipe, save_picture
from recipes.recipe import LOOKS, OPERATIONS, Operation, Recipe, Slot, describe, grammar, random_recipe
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
    "describe",
    "grammar",
    "load_photo",
    "parse",
    "random_recipe",
    "read_recipe",
    "render",
    "render_all",
    "save_picture",
    "shrink",
]
