"""Image processor of Moondream: cuts images into the crops of the vision encoder."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .configuration_moondream import MoondreamConfig


def select_tiling(height: int, width: int, window: int, max_crops: int) -> tuple[int, int]:
    """Select the tiling of an image, as the original implementation does.

    An image that fits into one window on either side is a single tile. Others get enough tiles to cover them, fewer if
    that exceeds `max_crops`, more if there is room for detail. Differs from the original only for aspect ratios above
    about 12, for which the original exceeds its own limit.

    Args:
        height: Height in pixels, without margins.
        width: Width in pixels, without margins.
        window: Stride of the tiles in pixels.
        max_crops: Maximum number of tiles.

    Returns:
        Rows and columns of tiles.
    """
    if height <= window or width <= window:
        return 1, 1
    least_rows, least_columns = math.ceil(height / window), math.ceil(width / window)
    if least_rows * least_columns > max_crops:
        shrink = math.sqrt(max_crops / (least_rows * least_columns))
        rows, columns = max(1, math.floor(least_rows * shrink)), max(1, math.floor(least_columns * shrink))
        return min(rows, max_crops), min(columns, max_crops)
    rows = max(math.floor(math.sqrt(max_crops * height / width)), least_rows)
    columns = max(math.floor(math.sqrt(max_crops * width / height)), least_columns)
    if rows * columns > max_crops:
        if columns > rows:
            columns = math.floor(max_crops / rows)
        else:
            rows = math.floor(max_crops / columns)
    return max(1, rows), max(1, columns)


class MoondreamImageProcessor(BaseImageProcessor):
    """Cuts images into crops: the whole image first, then overlapping tiles from top left to bottom right.

    Args:
        crop_size: Side of a crop in pixels.
        patch_size: Side of a patch in pixels.
        max_crops: Maximum number of tiles per image.
        overlap_margin: Overlap at each inner edge, in patches.

    Raises:
        ValueError: If the crop size is not a multiple of the patch size or too small for the margins.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values", "image_sizes"]

    def __init__(
        self,
        crop_size: int = 378,
        patch_size: int = 14,
        max_crops: int = 12,
        overlap_margin: int = 4,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.crop_size = crop_size
        self.patch_size = patch_size
        self.max_crops = max_crops
        self.overlap_margin = overlap_margin
        if crop_size % patch_size or self.window <= 0:
            raise ValueError(
                f"crop_size {crop_size} must be a multiple of patch_size {patch_size} and larger than the margins."
            )

    @classmethod
    def from_config(cls, config: MoondreamConfig) -> MoondreamImageProcessor:
        """Create the image processor of a model."""
        vision = config.vision_config
        return cls(vision.crop_size, vision.enc_patch_size, vision.max_crops, vision.overlap_margin)

    @property
    def margin(self) -> int:
        """Width in pixels of the margin at each inner edge of a tile."""
        return self.overlap_margin * self.patch_size

    @property
    def window(self) -> int:
        """Stride of the tiles in pixels."""
        return self.crop_size - 2 * self.margin

    @property
    def image_tokens(self) -> int:
        """Number of tokens of an image."""
        return (self.crop_size // self.patch_size) ** 2

    def tiling(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of tiles for an image of this size in pixels."""
        return select_tiling(height - 2 * self.margin, width - 2 * self.margin, self.window, self.max_crops)

    def crops(self, photo: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """Cut an image uint8 [H, W, 3] into crops uint8 [1 + rows * columns, S, S, 3]. Returns them and the tiling."""
        image = Image.fromarray(photo)
        rows, columns = self.tiling(*photo.shape[:2])
        side, step = self.crop_size, self.window
        whole = _resize(image, side, side)
        if (rows, columns) == (1, 1):
            return np.stack([whole, whole]), (1, 1)
        large = _resize(image, rows * step + 2 * self.margin, columns * step + 2 * self.margin)
        tiles = [
            large[i * step : i * step + side, j * step : j * step + side] for i in range(rows) for j in range(columns)
        ]
        return np.stack([whole, *tiles]), (rows, columns)

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Process one image or a list of N.

        Args:
            images: PIL images, or uint8 arrays or tensors [H, W, 3] or [3, H, W].
            **kwargs: Ignored.

        Returns:
            `pixel_values`, uint8 [N, max_crops + 1, 3, S, S], where unused crops are zero, and `image_sizes`, int64
            [N, 2], the tilings.

        Raises:
            ValueError: If an item is not an image.
        """
        return self.preprocess(images, **kwargs)

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """See `__call__`."""
        photos = [to_rgb_array(image) for image in _flatten(images)]
        shape = (len(photos), self.max_crops + 1, 3, self.crop_size, self.crop_size)
        pixel_values = torch.zeros(shape, dtype=torch.uint8)
        image_sizes = torch.ones((len(photos), 2), dtype=torch.long)
        for i, photo in enumerate(photos):
            crops, tiling = self.crops(photo)
            pixel_values[i, : len(crops)] = torch.from_numpy(crops).permute(0, 3, 1, 2)
            image_sizes[i] = torch.tensor(tiling)
        return BatchFeature({"pixel_values": pixel_values, "image_sizes": image_sizes})


def to_rgb_array(image: Any) -> np.ndarray:
    """Convert a PIL image, or a uint8 array or tensor [H, W, 3], [3, H, W] or [H, W], to uint8 [H, W, 3]."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    array = np.asarray(image)
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    if array.ndim == 3 and array.shape[2] != 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        raise ValueError(f"A photo must be uint8 [H, W, 3] (RGB), got {array.dtype} {list(array.shape)}.")
    return np.ascontiguousarray(array)


def _flatten(images: Any) -> list[Any]:
    if isinstance(images, Image.Image) or (hasattr(images, "ndim") and images.ndim <= 3):
        return [images]
    if isinstance(images, (list, tuple)) or hasattr(images, "ndim"):
        return [photo for item in images for photo in _flatten(item)]
    raise ValueError(f"Not a photo: {type(images).__name__}.")


def _resize(image: Image.Image, height: int, width: int) -> np.ndarray:
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
