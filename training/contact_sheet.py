"""Contact sheets: photos as edited by several models, with the recipe and the reward below each picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from recipes import PhotoError, Recipe, describe, render, save_picture, shrink

SHEET_PHOTOS = 24
PHOTOS_PER_PAGE = 8
PAGE_COLUMNS = 6  # pictures side by side: two photos with three pictures each
CELL, PICTURE = (330, 300), (320, 220)  # px, width and height
HEADER, MARGIN, LINE = 26, 10, 16  # px
FONT_SIZE, CAPTION_CHARACTERS, CAPTION_LINES = 13, 48, 4
BACKGROUND, INK, FAINT = "white", "black", "#666666"


@dataclass(frozen=True)
class SheetColumn:
    """The pictures of one model.

    Attributes:
        title: The model's name.
        recipes: One recipe per photo; None for an answer that is not a recipe, whose photo is shown untouched.
        totals: The reward of each picture, 0..1; None where no reward applies.
    """

    title: str
    recipes: Sequence[Recipe | None]
    totals: Sequence[float | None]


def draw_sheets(
    photos: Sequence[np.ndarray], names: Sequence[str], columns: Sequence[SheetColumn], limit: int = SHEET_PHOTOS
) -> list[Image.Image]:
    """Draw contact sheets of PHOTOS_PER_PAGE photos each, at most about 2,000 px wide for up to six columns.

    Args:
        photos: uint8 RGB.
        names: The photos' names, which are written below the first column.
        columns: The columns, from left to right.
        limit: Maximum number of photos.
    """
    indices = range(min(limit, len(photos)))
    starts = range(0, len(indices), PHOTOS_PER_PAGE)
    return [_draw_page(photos, names, columns, indices[start : start + PHOTOS_PER_PAGE]) for start in starts]


def write_sheets(sheets: Sequence[Image.Image], path: Path) -> list[Path]:
    """Write sheets as PNG files, numbered from 1 before the suffix of a path. Raises PhotoError."""
    files = [path.with_stem(f"{path.stem}-{number}") for number in range(1, len(sheets) + 1)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PhotoError(
            f"The folder {path.parent} cannot be created ({error.strerror}). Choose another one."
        ) from None
    for sheet, file in zip(sheets, files, strict=True):
        save_picture(np.asarray(sheet), Recipe(), file)
    return files


def _draw_page(
    photos: Sequence[np.ndarray], names: Sequence[str], columns: Sequence[SheetColumn], indices: Sequence[int]
) -> Image.Image:
    across = min(max(1, PAGE_COLUMNS // len(columns)), len(indices))  # photos side by side
    down = -(-len(indices) // across)
    width = across * len(columns) * CELL[0] + MARGIN + (across - 1) * 2 * MARGIN
    page = Image.new("RGB", (width, HEADER + down * CELL[1] + MARGIN), BACKGROUND)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(FONT_SIZE)
    for position, index in enumerate(indices):
        row, block = divmod(position, across)
        for number, column in enumerate(columns):
            left = MARGIN + block * (len(columns) * CELL[0] + 2 * MARGIN) + number * CELL[0]
            top = HEADER + row * CELL[1]
            if row == 0:
                draw.text((left, 6), column.title[:CAPTION_CHARACTERS], INK, font)
            recipe = column.recipes[index]
            edited = shrink(photos[index] if recipe is None else render(photos[index], recipe), max(PICTURE))
            picture = Image.fromarray(edited)
            picture.thumbnail(PICTURE)
            page.paste(picture, (left, top))
            for line, text in enumerate(_caption(column, index, names[index] if number == 0 else "")):
                place = (left, top + PICTURE[1] + 4 + line * LINE)
                draw.text(place, text, FAINT if line else INK, font)
    return page


def _caption(column: SheetColumn, index: int, name: str) -> list[str]:
    """Return the lines below a picture: the reward with the photo's name in the first column, then the recipe."""
    total, recipe = column.totals[index], column.recipes[index]
    reward = "no reward applies" if total is None else f"total {total:.3f}"
    text = "not a recipe" if recipe is None else describe(recipe)
    lines = [" · ".join(filter(None, [reward, name]))[:CAPTION_CHARACTERS]]
    return (lines + textwrap.wrap(text, CAPTION_CHARACTERS))[:CAPTION_LINES]
