"""Recorded outputs of the original Moondream implementation, for parity tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from inference.moondream import MoondreamForConditionalGeneration, MoondreamImageProcessor

DATA = Path(__file__).parent.parent / "data"
NAMES = sorted(folder.name for folder in DATA.glob("moondream2-*"))
SMALL = DATA / "moondream2-small"


@dataclass(frozen=True)
class Reference:
    """A folder with a small model, images (uint8 [H, W, 3]) and the recorded outputs."""

    folder: Path

    @cached_property
    def expected(self) -> dict:
        """Recorded texts, regions and prompts."""
        return json.loads((self.folder / "expected.json").read_text())

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Images and recorded tensors."""
        return load_file(self.folder / "expected.safetensors")

    @cached_property
    def model(self) -> MoondreamForConditionalGeneration:
        """The model in float32."""
        return AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32).eval()

    @cached_property
    def images(self) -> list[torch.Tensor]:
        """The images, uint8 [H, W, 3]."""
        return [self.tensors[f"image{i}"] for i in range(len(self.expected["images"]))]

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        """`pixel_values` and `image_sizes` of all images."""
        processor = MoondreamImageProcessor.from_config(self.model.config)
        return dict(processor([image.numpy() for image in self.images]))

    @cached_property
    def features(self) -> torch.Tensor:
        """Image features [N, T, D]."""
        with torch.no_grad():
            return self.model.model.get_image_features(**self.inputs)

    @cached_property
    def cases(self) -> list[tuple[int, str]]:
        """All pairs of image index and prompt name; as a batch they need padding and have several tilings."""
        return [(i, name) for i in range(len(self.images)) for name in self.expected["prompts"]]

    def ids(self, name: str) -> list[int]:
        """Return the ids of a prompt with BOS and the image placeholders."""
        config = self.model.config
        return [config.bos_id, *[config.image_token_id] * config.image_tokens, *self.expected["prompts"][name]]

    def batch(self, cases: list[tuple[int, str]], features: bool = True) -> dict[str, torch.Tensor]:
        """Return model inputs for cases, padded at the left, with cached features or with pixels."""
        rows = [self.ids(name) for _, name in cases]
        images = [i for i, _ in cases]
        longest = max(map(len, rows))
        batch = {
            "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        }
        if features:
            return {**batch, "image_features": self.features[images]}
        return {**batch, **{name: value[images] for name, value in self.inputs.items()}}


@lru_cache
def reference(name: str) -> Reference:
    """Load a reference, cached per test run. Tests must not modify its model."""
    return Reference(DATA / name)


def load_small_model() -> MoondreamForConditionalGeneration:
    """Load a new copy of the small model, which tests may modify."""
    return AutoModelForImageTextToText.from_pretrained(SMALL, dtype=torch.float32)
