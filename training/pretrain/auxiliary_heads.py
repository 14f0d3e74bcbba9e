"""Auxiliary heads: dense supervision of the image features during pre-training, discarded afterwards.

A few tokens of text are a weak signal for a vision tower. Two small heads on the image features therefore predict what
is measured in the pixels: per token the colour, detail and areas of its patch, and per photo the degradation, the image
facts and the colours.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn.functional import smooth_l1_loss

from recipes import Recipe, shrink
from training.pretrain import image_facts

TOKEN_TARGETS = 6 + len(image_facts.AREAS)
IMAGE_TARGETS = 5 + 4 + len(image_facts.ATTRIBUTES) + len(image_facts.COLOUR_NAMES) + 2
# Centre and scale that standardise each attribute. A smaller scale gives it more weight.
SCALES = {
    "brightness": (50.0, 15.0),
    "contrast": (20.0, 6.0),
    "colours": (13.0, 9.0),
    "warmth": (2.0, 10.0),
    "sharpness": (0.66, 0.03),
    "orientation": (1.4, 0.3),
}


class AuxiliaryHeads(nn.Module):
    """Heads on image features [N, T, D]: per token, for the whole photo (on their mean), and for token positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens = nn.Linear(width, TOKEN_TARGETS)
        self.image = nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, IMAGE_TARGETS))
        self.positions = nn.Linear(width, 2)

    def forward(
        self, features: torch.Tensor, token_targets: torch.Tensor, image_targets: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Compute the losses `positions`, `tokens` and `image`.

        Args:
            features: Image features [N, T, D].
            token_targets: [N, T, TOKEN_TARGETS].
            image_targets: [N, IMAGE_TARGETS].
        """
        return {
            "positions": smooth_l1_loss(self.positions(features).float(), self.token_centres(features)),
            "tokens": smooth_l1_loss(self.tokens(features).float(), token_targets),
            "image": smooth_l1_loss(self.image(features.mean(1)).float(), image_targets),
        }

    def token_centres(self, features: torch.Tensor) -> torch.Tensor:
        """Return x and y, -2..2, of each token's patch for features [N, T, D] of a square grid: [N, T, 2]."""
        side = round(features.shape[1] ** 0.5)
        line = ((torch.arange(side) + 0.5) / side - 0.5) * 4
        centres = torch.stack([line.repeat(side), line.repeat_interleave(side)], -1)
        return centres[None].expand(len(features), -1, -1)


def token_targets(
    photo: np.ndarray, areas: dict[str, image_facts.Area], inverse_recipe: Recipe, grid: int
) -> np.ndarray:
    """Measure what the token head predicts: float32 [grid * grid, TOKEN_TARGETS].

    CIELAB, detail, local contrast, the level of each area, and whether the patch lies outside of the recipe's crop.

    Args:
        photo: The degraded photo, uint8 [H, W, 3] RGB.
        areas: The photo's areas by name.
        inverse_recipe: The recipe that restores the photo.
        grid: Tokens per side.
    """
    image = image_facts.to_lab(shrink(photo, image_facts.FACT_SIDE))
    light = image[..., 0]
    detail = np.log(np.abs(cv2.Laplacian(light, cv2.CV_32F)) + 0.5)
    maps = [(light - 50) / 20, image[..., 1] / 12, image[..., 2] / 15, detail, np.square((light - light.mean()) / 20)]
    left, top, right, bottom = inverse_recipe.crop
    y, x = ((np.arange(grid) + 0.5) * 100 / grid for _ in range(2))
    inside = ((y > top) & (y < bottom))[:, None] & ((x > left) & (x < right))[None]
    levels = [area.level / max(float(area.level.std()), 1e-3) for area in areas.values()]
    small = [cv2.resize(m.astype(np.float32), (grid, grid), interpolation=cv2.INTER_AREA) for m in (*maps, *levels)]
    return np.stack([*small, inside * 2.0 - 1], -1).reshape(grid * grid, -1).astype(np.float32)


def image_targets(facts: image_facts.ImageFacts, inverse_recipe: Recipe) -> np.ndarray:
    """Return what the image head predicts: levels, crop, attributes, colours and subject; float32 [IMAGE_TARGETS]."""
    recipe = inverse_recipe
    tone = [
        recipe.exposure / 40,
        recipe.contrast / 40,
        recipe.saturation / 40,
        recipe.warmth / 40,
        recipe.sharpening / 30 - 1.5,
    ]
    left, top, right, bottom = recipe.crop
    crop = [left / 10, top / 10, (100 - right) / 10, (100 - bottom) / 10]
    values = [(facts.values[name] - centre) / scale for name, (centre, scale) in SCALES.items()]
    shares = [3 * facts.shares[name] for name in image_facts.COLOUR_NAMES]
    subject = [4 * (value - 0.5) for value in facts.subject]
    return np.clip(np.array([*tone, *crop, *values, *shares, *subject], np.float32), -4, 4)
