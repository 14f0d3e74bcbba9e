"""PretrainDataset: batches of images with recipe, text and region examples, as a function of photos, seed and step."""

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
from training.pretrain import image_facts
from training.pretrain.auxiliary_heads import image_targets, token_targets
from training.pretrain.degradation import ERROR_SIDE, random_degradation, slight_degradation
from training.pretrain.photos import PretrainPhotos

IGNORE = -100
EXAMPLES = ("recipe", "region", "question", "caption")  # of each image, in the order of packed rows
ASPECTS = (2.0, 1.5, 1.33, 1.0, 0.75, 0.67)
GOOD_SHARE = 0.15  # of the lessons: photos in their own tones, undamaged or slightly damaged
VARIED_SHARE = 0.5  # of the other lessons: photos in random tones and hues


@dataclass
class Example:
    """One text sequence after an image.

    Attributes:
        prompt: Token ids of the prompt.
        answer: Token ids after the prompt, including the end token. With a region, the answer is [coord, end], and the
            coordinates are fed between the two.
        region: None, or (x, y) or (x, y, w, h), 0..1.
    """

    prompt: list[int]
    answer: list[int]
    region: tuple[float, ...] | None = None


class PretrainDataset(Dataset):
    """Batches by step number. The same photos, seed and step give the same batch in any process.

    Each item is a dict of lists with one entry per image: `images` (uint8 [H, W, 3], degraded), `originals` (not
    degraded, at ERROR_SIDE), an `Example` for each of `EXAMPLES`, `regions` (a list of further region examples),
    `token_targets` and `image_targets` (of the auxiliary heads).

    Args:
        photos: The training photos.
        tokenizer: The model's tokenizer.
        templates: The model's prompt templates.
        batch_size: Images per step.
        seed: Seed of all random choices.
        steps: Length of the dataset.
        grid: Image tokens per side.
        varied: Share of the lessons, other than those of good photos, whose photos have random tones and hues.
        good: Share of the lessons with good photos.
        regions: Number of further region examples per image.
    """

    def __init__(
        self,
        photos: PretrainPhotos,
        tokenizer: PreTrainedTokenizerFast,
        templates: dict,
        batch_size: int,
        seed: int,
        steps: int,
        grid: int,
        varied: float = VARIED_SHARE,
        good: float = GOOD_SHARE,
        regions: int = 0,
    ) -> None:
        self.photos, self.templates = photos, templates
        self.tokenizer: Any = tokenizer
        self.batch_size, self.seed, self.steps, self.grid = batch_size, seed, steps, grid
        self.varied, self.good, self.regions = varied, good, regions

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict:
        cv2.setNumThreads(1)
        names = ("images", "originals", *EXAMPLES, "regions", "token_targets", "image_targets")
        batch: dict[str, list] = {name: [] for name in names}
        for row in range(self.batch_size):
            rng = np.random.default_rng([self.seed, step, row])
            photo, other = (random_view(self.photos.draw(rng), rng) for _ in range(2))
            if rng.random() < self.good:
                item = slight_degradation(photo, rng)
            else:
                item = random_degradation(augment(photo, other, rng, self.varied), rng)
            recipe = item.inverse_recipe
            if rng.random() < 0.15:  # a look is no degradation; included so that the model samples looks at all
                recipe = recipe.replace(look=str(rng.choice(LOOKS[1:])))
            areas = image_facts.areas(item.degraded)
            facts = image_facts.measure(item.degraded, areas["main subject"])
            batch["images"].append(item.degraded)
            batch["originals"].append(shrink(item.original, ERROR_SIDE))
            batch["recipe"].append(self.query(RECIPE_QUESTION, str(recipe)))
            batch["region"].append(self.region_example(areas, rng))
            batch["question"].append(self.query(*image_facts.question_and_answer(facts, rng)))
            batch["caption"].append(self.caption(facts, rng))
            batch["regions"].append([self.region_example(areas, rng) for _ in range(self.regions)])
            batch["token_targets"].append(token_targets(item.degraded, areas, item.inverse_recipe, self.grid))
            batch["image_targets"].append(image_targets(facts, item.inverse_recipe))
        return batch

    def encode(self, text: str) -> list[int]:
        """Tokenize plain text."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def query(self, question: str, answer: str) -> Example:
        """Build an example of a question and its answer in the query skill's template, which repeats its suffix."""
        template = self.templates["query"]
        prompt = template["prefix"] + self.encode(question) + 2 * template["suffix"]
        return Example(prompt, [*self.encode(answer), self.tokenizer.eos_token_id])

    def caption(self, facts: image_facts.ImageFacts, rng: np.random.Generator) -> Example:
        """Build an example of a caption of random length."""
        length = str(rng.choice(LENGTHS, p=(0.2, 0.3, 0.5)))
        answer = [*self.encode(image_facts.caption(facts, length)), self.tokenizer.eos_token_id]
        return Example(list(self.templates["caption"][length]), answer)

    def region_example(self, areas: dict[str, image_facts.Area], rng: np.random.Generator) -> Example:
        """Build a detect or point example of one of the areas, or, with probability 0.1, of an unknown object."""
        skill = "detect" if rng.random() < 0.6 else "point"
        template, end = self.templates[skill], self.tokenizer.eos_token_id
        if rng.random() < 0.1:
            name, region = str(rng.choice(image_facts.UNKNOWN_OBJECTS)), None
        else:
            name = str(rng.choice(image_facts.AREAS))
            area = areas[name]
            x0, y0, x1, y1 = area.box
            region = area.point if skill == "point" else ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0)
        if rng.random() < 0.6:
            name = "the " + name
        prompt = template["prefix"] + self.encode(" " + name) + template["suffix"]
        answer = [end] if region is None else [self.tokenizer.convert_tokens_to_ids("<|coord|>"), end]
        return Example(prompt, answer, region)


def random_view(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Crop a random part of a photo (uint8 [H, W, 3]) at a random aspect ratio, mirror it at random, and shrink it."""
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


def augment(photo: np.ndarray, other: np.ndarray, rng: np.random.Generator, varied: float = VARIED_SHARE) -> np.ndarray:
    """Create a new undegraded photo out of two (uint8 RGB), in the shape of the first.

    A hundred photos can be memorised. Random hues, tones, black and white, and composites of two photos make the model
    depend on the pixels instead. What is a cast or a pale colour, on the other hand, can only be learned from photos in
    their own tones: only a share `varied` gets random ones.
    """
    if rng.random() < 0.4:
        other = cv2.resize(other, photo.shape[1::-1], interpolation=cv2.INTER_AREA)
        part = [slice(None), slice(None)]
        axis = int(rng.integers(2))
        part[axis] = slice(int(photo.shape[axis] * rng.uniform(0.25, 0.75)), None)
        photo = photo.copy()
        photo[tuple(part)] = other[tuple(part)]
    if rng.random() >= varied:
        return photo
    kind = rng.random()
    if kind < 0.06:
        return render(photo, Recipe(look="mono"))
    if kind < 0.5:
        photo = rotate_hues(photo, rng.normal(0, 1.0))
    names, deviations = ("exposure", "contrast", "saturation", "warmth"), (30, 30, 30, 20)
    levels: dict[str, Any] = {
        name: np.clip(rng.normal(0, deviation), -100, 100) for name, deviation in zip(names, deviations, strict=True)
    }
    return render(photo, Recipe(**levels))


def rotate_hues(photo: np.ndarray, angle: float) -> np.ndarray:
    """Rotate the hues of a photo (uint8 RGB) by an angle in radians, in CIELAB."""
    matrix = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]], np.float32)
    rotated = cv2.cvtColor(cv2.transform(image_facts.to_lab(photo), matrix), cv2.COLOR_LAB2RGB)
    return np.clip(np.rint(rotated * 255), 0, 255).astype(np.uint8)


def tokenizer_texts(photos: Sequence[np.ndarray], seed: int = 0) -> list[str]:
    """Return the tokenizer's training texts: all questions, many captions, and the licence as plain English."""
    texts = (Path(__file__).resolve().parents[2] / "LICENSE").read_text(encoding="utf-8").lower().split("\n\n")
    texts += [RECIPE_QUESTION, image_facts.UNKNOWN_ANSWER, *image_facts.UNKNOWN_QUESTIONS]
    texts += [*image_facts.COLOUR_QUESTIONS, *image_facts.SUBJECT_QUESTIONS]
    texts += [question for attribute in image_facts.ATTRIBUTES.values() for question in attribute.questions]
    texts += [f" the {name}" for name in (*image_facts.AREAS, *image_facts.UNKNOWN_OBJECTS)]
    texts += [f" {name}" for name in (*image_facts.AREAS, *image_facts.UNKNOWN_OBJECTS)]
    for index, photo in enumerate(photos):
        rng = np.random.default_rng([seed, index])
        for _ in range(4):
            facts = image_facts.measure(random_degradation(random_view(photo, rng), rng).degraded)
            texts.append(image_facts.caption(facts, "long"))
    texts += [f"It is mostly {name}, with {name}." for name in image_facts.COLOUR_NAMES] * 3
    texts += [
        f"The subject is at the {row} {column}." for row in image_facts.ROWS for column in image_facts.COLUMNS
    ] * 3
    texts += [a.sentence.format(word) for a in image_facts.ATTRIBUTES.values() for word, _, _ in a.classes] * 3
    return texts


def pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Pad rows of ids on the right to one length: int64 [N, T]."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *([value] * (longest - len(row)))] for row in rows])
