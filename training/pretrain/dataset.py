"""Lessons: what the embedded model is shown in pre-training, drawn from photos and a seed, one batch per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from inference.types import LENGTHS, RECIPE_QUESTION
from recipes import LOOKS, Recipe, render, shrink
from training.pretrain import image_facts as facts
from training.pretrain.auxiliary_heads import place_targets, whole_targets
from training.pretrain.degradation import ERROR_SIDE, spoil

COORD_BINS, SIZE_BINS = 1024, 1024
IGNORE = -100
ASPECTS = (2.0, 1.5, 1.33, 1.0, 0.75, 0.67)


@dataclass
class Example:
    """One text sequence after an image: prompt, then an answer of tokens or of a region.

    answer: token ids after the prompt, end included. region: None, or (x, y) or (x, y, w, h) in 0..1; with a region
    the answer is [coord, end] and the coordinates are fed between the two.
    """

    prompt: list[int]
    answer: list[int]
    region: tuple[float, ...] | None = None


class PretrainDataset(Dataset):
    """Batches by step number: the same seed, step and photos give the same batch, in whatever process.

    Each item is a dict: `images` (uint8 [H, W, 3] each), `originals` (undamaged, at ERROR_SIDE),
    `recipe`, `text`, `region` (a `Example` per image each), and
    `places`, `whole` (the probe's targets per image).
    """

    def __init__(
        self,
        photos: Sequence[np.ndarray],
        tokenizer: PreTrainedTokenizerFast,
        templates: dict,
        batch: int,
        seed: int,
        steps: int,
        grid: int,
    ) -> None:
        self.photos, self.templates = photos, templates
        self.tokenizer: Any = tokenizer
        self.batch, self.seed, self.steps, self.grid = batch, seed, steps, grid

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict:
        cv2.setNumThreads(1)
        names = ("images", "originals", "recipe", "text", "region", "places", "whole")
        lessons: dict[str, list] = {name: [] for name in names}
        for row in range(self.batch):
            rng = np.random.default_rng([self.seed, step, row])
            photo, other = (random_view(self.photos[int(rng.integers(len(self.photos)))], rng) for _ in range(2))
            example = spoil(vary(photo, other, rng), rng)
            recipe = example.recipe
            if rng.random() < 0.15:  # looks are taste, not damage: seen now and then, so that sampling knows them
                recipe = recipe.replace(look=str(rng.choice(LOOKS[1:])))
            lessons["images"].append(example.spoilt)
            lessons["originals"].append(shrink(example.original, ERROR_SIDE))
            lessons["recipe"].append(self.query(RECIPE_QUESTION, str(recipe)))
            areas = facts.areas(example.spoilt)
            measured = facts.measure(example.spoilt, areas["main subject"])
            lessons["text"].append(self.text_lesson(measured, rng))
            lessons["region"].append(self.region_lesson(areas, rng))
            lessons["places"].append(place_targets(example.spoilt, areas, example.recipe, self.grid))
            lessons["whole"].append(whole_targets(measured, example.recipe))
        return lessons

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def query(self, question: str, answer: str) -> Example:
        """A question and its answer, in the query skill's template (its suffix is given twice)."""
        around = self.templates["query"]
        prompt = around["prefix"] + self.encode(question) + 2 * around["suffix"]
        return Example(prompt, [*self.encode(answer), self.tokenizer.eos_token_id])

    def text_lesson(self, measured: facts.Facts, rng: np.random.Generator) -> Example:
        """A caption of random length, or a question."""
        if rng.random() < 0.5:
            return self.query(*facts.question_and_answer(measured, rng))
        length = str(rng.choice(LENGTHS, p=(0.2, 0.3, 0.5)))
        answer = [*self.encode(facts.caption(measured, length)), self.tokenizer.eos_token_id]
        return Example(list(self.templates["caption"][length]), answer)

    def region_lesson(self, areas: dict[str, facts.Area], rng: np.random.Generator) -> Example:
        """Detect or point: one of the areas, or, one time in ten, an object that the model cannot know."""
        skill = "detect" if rng.random() < 0.6 else "point"
        around, end = self.templates[skill], self.tokenizer.eos_token_id
        if rng.random() < 0.1:
            name, region = str(rng.choice(facts.UNKNOWN_OBJECTS)), None
        else:
            name = str(rng.choice(facts.AREAS))
            area = areas[name]
            x0, y0, x1, y1 = area.box
            region = area.point if skill == "point" else ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0)
        if rng.random() < 0.6:
            name = "the " + name
        prompt = around["prefix"] + self.encode(" " + name) + around["suffix"]
        answer = [end] if region is None else [self.tokenizer.convert_tokens_to_ids("<|coord|>"), end]
        return Example(prompt, answer, region)


def random_view(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random part of a photo (uint8 [H, W, 3]) of a random shape, mirrored half the time, 300 to 420 px long."""
    height, width = photo.shape[:2]
    aspect = width / height if rng.random() < 0.35 else float(rng.choice(ASPECTS)) * float(np.exp(rng.normal(0, 0.06)))
    scale = np.sqrt(rng.uniform(0.4, 1.0))
    crop_width, crop_height = (width, width / aspect) if width / height < aspect else (height * aspect, height)
    crop_width, crop_height = max(8, int(crop_width * scale)), max(8, int(crop_height * scale))
    x, y = rng.integers(width - crop_width + 1), rng.integers(height - crop_height + 1)
    view = photo[y : y + crop_height, x : x + crop_width]
    if rng.random() < 0.5:
        view = view[:, ::-1]
    return np.ascontiguousarray(shrink(view, int(rng.integers(300, 421))))


def vary(photo: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another photo made of two (uint8 RGB), of the first one's shape: what counts as undamaged.

    With a hundred photos a model learns by heart how each is meant to look. So hues are turned, light and colour are
    moved, some photos are made grey, and in some a part is another photo: then it has to go by what it sees.
    """
    if rng.random() < 0.4:
        other = cv2.resize(other, photo.shape[1::-1], interpolation=cv2.INTER_AREA)
        part = [slice(None), slice(None)]
        axis = int(rng.integers(2))
        part[axis] = slice(int(photo.shape[axis] * rng.uniform(0.25, 0.75)), None)
        photo = photo.copy()
        photo[tuple(part)] = other[tuple(part)]
    kind = rng.random()
    if kind < 0.06:
        return render(photo, Recipe(look="mono"))
    if kind < 0.5:
        photo = turn_hues(photo, rng.normal(0, 1.0))
    names, spreads = ("exposure", "contrast", "saturation", "warmth"), (30, 30, 30, 20)
    moved: dict[str, Any] = {name: np.clip(rng.normal(0, s), -100, 100) for name, s in zip(names, spreads, strict=True)}
    return render(photo, Recipe(**moved))


def turn_hues(photo: np.ndarray, angle: float) -> np.ndarray:
    """The photo (uint8 RGB) with its hues turned by an angle in radians, in CIELAB."""
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]], np.float32)
    turned = cv2.cvtColor(cv2.transform(facts.lab(photo), turn), cv2.COLOR_LAB2RGB)
    return np.clip(np.rint(turned * 255), 0, 255).astype(np.uint8)


def every_text(photos: Sequence[np.ndarray], seed: int = 0) -> list[str]:
    """What the tokenizer is trained on: every question, many captions, and the licence as a piece of plain English."""
    texts = (Path(__file__).resolve().parents[2] / "LICENSE").read_text(encoding="utf-8").lower().split("\n\n")
    texts += [RECIPE_QUESTION, facts.UNKNOWN_ANSWER, *facts.UNKNOWN_QUESTIONS, *facts.COLOUR_QUESTIONS]
    texts += [*facts.SUBJECT_QUESTIONS, *(q for a in facts.ATTRIBUTES.values() for q in a.questions)]
    texts += [f" the {name}" for name in (*facts.AREAS, *facts.UNKNOWN_OBJECTS)]
    texts += [f" {name}" for name in (*facts.AREAS, *facts.UNKNOWN_OBJECTS)]
    for index, photo in enumerate(photos):
        rng = np.random.default_rng([seed, index])
        for _ in range(4):
            texts.append(facts.caption(facts.measure(spoil(random_view(photo, rng), rng).spoilt), "long"))
    texts += [f"It is mostly {name}, with {name}." for name in facts.COLOUR_NAMES] * 3
    texts += [f"The subject is at the {row} {column}." for row in facts.ROWS for column in facts.COLUMNS] * 3
    texts += [a.sentence.format(word) for a in facts.ATTRIBUTES.values() for word, _, _ in a.classes] * 3
    return texts


def pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Rows of ids padded on the right to one length, int64 [N, T]."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *([value] * (longest - len(row)))] for row in rows])
