"""The recorded answers of the original implementation, as the Moondream tests read them."""

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
    """One folder: a model, its images as uint8 [H, W, 3], and what was answered about them."""

    folder: Path

    @cached_property
    def expected(self) -> dict:
        return json.loads((self.folder / "expected.json").read_text())

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "expected.safetensors")

    @cached_property
    def model(self) -> MoondreamForConditionalGeneration:
        return AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32).eval()

    @cached_property
    def images(self) -> list[torch.Tensor]:
        return [self.tensors[f"image{i}"] for i in range(len(self.expected["images"]))]

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        """pixel_values and image_sizes of all images."""
        processor = MoondreamImageProcessor.from_config(self.model.config)
        return dict(processor([image.numpy() for image in self.images]))

    @cached_property
    def features(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model.model.get_image_features(**self.inputs)

    @cached_property
    def cases(self) -> list[tuple[int, str]]:
        """Every (image, prompt name), so that a batch of all of them needs padding and has several tilings."""
        return [(i, name) for i in range(len(self.images)) for name in self.expected["prompts"]]

    def ids(self, name: str) -> list[int]:
        """A prompt with BOS and the image placeholders before it."""
        config = self.model.config
        return [config.bos_id, *[config.image_token_id] * config.image_tokens, *self.expected["prompts"][name]]

    def batch(self, cases: list[tuple[int, str]], features: bool = True) -> dict[str, torch.Tensor]:
        """Model inputs for these cases, padded at the left; from cached features or from the pixels."""
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
    """The reference of that name, loaded once per test run. Tests that change a model load their own."""
    return Reference(DATA / name)


def fresh_small() -> MoondreamForConditionalGeneration:
    """A small model of one's own, for tests that change it."""
    return AutoModelForImageTextToText.from_pretrained(SMALL, dtype=torch.float32)
