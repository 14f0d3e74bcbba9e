"""The probe: what a photo's image tokens must tell, place by place and as a whole, while the model is pre-trained.

A few tokens of text are a thin signal to learn seeing from. So two small heads on the image features have to name what
is measured in the pixels: per token the light, colour, detail and areas of its place, and for the whole photo the
damage, the facts and the colours. The heads are thrown away after training; what they taught the vision tower stays.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from recipes import Recipe, shrink
from training.pretrain import image_facts as facts

PLACE_TARGETS = 6 + len(facts.AREAS)
WHOLE_TARGETS = 5 + 4 + len(facts.ATTRIBUTES) + len(facts.COLOUR_NAMES) + 2
# Middle and spread of each attribute, to bring them to one scale; a smaller spread weighs more (they are hard to see).
SCALES = {
    "brightness": (50.0, 15.0),
    "contrast": (20.0, 6.0),
    "colours": (13.0, 9.0),
    "warmth": (2.0, 10.0),
    "sharpness": (0.66, 0.03),
    "orientation": (1.4, 0.3),
}


class AuxiliaryHeads(nn.Module):
    """Two heads on image features [N, T, D]: per place, and on their mean for the whole photo."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.places = nn.Linear(width, PLACE_TARGETS)
        self.whole = nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, WHOLE_TARGETS))
        self.spots = nn.Linear(width, 2)

    def forward(self, features: torch.Tensor, places: torch.Tensor, whole: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses against the targets [N, T, PLACE_TARGETS] and [N, WHOLE_TARGETS], and of where each token lies."""
        return {
            "spots": F.smooth_l1_loss(self.spots(features).float(), self.centres(features)),
            "places": F.smooth_l1_loss(self.places(features).float(), places),
            "whole": F.smooth_l1_loss(self.whole(features.mean(1)).float(), whole),
        }

    def centres(self, features: torch.Tensor) -> torch.Tensor:
        """x and y of each token's place, -2..2, for features [N, T, D] of a square grid: [N, T, 2]."""
        side = round(features.shape[1] ** 0.5)
        line = ((torch.arange(side) + 0.5) / side - 0.5) * 4
        spots = torch.stack([line.repeat(side), line.repeat_interleave(side)], -1)
        return spots[None].expand(len(features), -1, -1)


def place_targets(photo: np.ndarray, areas: dict[str, facts.Area], undo: Recipe, grid: int) -> np.ndarray:
    """What is to be known of each place of an RGB uint8 photo: float32 [grid * grid, PLACE_TARGETS].

    CIELAB, detail, whether it lies in the frame that the recipe cuts away, local contrast, and the level of its areas.
    """
    image = facts.lab(shrink(photo, facts.FACT_SIDE))
    light = image[..., 0]
    detail = np.log(np.abs(cv2.Laplacian(light, cv2.CV_32F)) + 0.5)
    maps = [(light - 50) / 20, image[..., 1] / 12, image[..., 2] / 15, detail, np.square((light - light.mean()) / 20)]
    left, top, right, bottom = undo.crop
    y, x = ((np.arange(grid) + 0.5) * 100 / grid for _ in range(2))
    inside = ((y > top) & (y < bottom))[:, None] & ((x > left) & (x < right))[None]
    levels = [area.level / max(float(area.level.std()), 1e-3) for area in areas.values()]
    small = [cv2.resize(m.astype(np.float32), (grid, grid), interpolation=cv2.INTER_AREA) for m in (*maps, *levels)]
    return np.stack([*small, inside * 2.0 - 1], -1).reshape(grid * grid, -1).astype(np.float32)


def whole_targets(measured: facts.Facts, undo: Recipe) -> np.ndarray:
    """What is to be known of the photo: damage, crop, facts, colours, subject; float32 [WHOLE_TARGETS]."""
    tone = [undo.exposure / 40, undo.contrast / 40, undo.saturation / 40, undo.warmth / 40, undo.sharpening / 30 - 1.5]
    left, top, right, bottom = undo.crop
    crop = [left / 10, top / 10, (100 - right) / 10, (100 - bottom) / 10]
    values = [(measured.values[name] - middle) / spread for name, (middle, spread) in SCALES.items()]
    shares = [3 * measured.shares[name] for name in facts.COLOUR_NAMES]
    subject = [4 * (value - 0.5) for value in measured.subject]
    return np.clip(np.array([*tone, *crop, *values, *shares, *subject], np.float32), -4, 4)
