"""Quality figures of moondream-tiny on held-out photos: restoration, stated facts, detect and point.

`python -m training.pretrain.quality [MODEL] [--photos FOLDER]` measures a model on the bundled held-out photos or
on any folder of photos. Pre-training writes the figures into the model card.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

from inference.local.constraint import RecipeConstraint
from inference.moondream import MoondreamForConditionalGeneration, MoondreamImageProcessor
from inference.types import LENGTHS, RECIPE_QUESTION
from recipes import Recipe, grammar_segments, load_photo, parse, render, shrink
from rewards.comparison import compare
from rewards.image_metrics import box_iou
from rewards.subject import find_subject
from training.data.bundled import bundled_photos
from training.data.sources import PhotoSourceError, load_photos
from training.pretrain import image_facts
from training.pretrain.degradation import (
    ERROR_SIDE,
    DegradedPhoto,
    lab_error,
    random_degradation,
    random_inverse_recipe,
)

SIDE = 400  # px: long side of the evaluated photos
BATCH = 64  # photos that are answered at once
MAX_PHOTOS = 10_000
SUBJECT_SPARED = 0.1  # share of the subject that a crop may remove
HEAD_SPARED = 0.05  # share of a head's box
SHEET_PHOTOS = 12
SHEET_CELL = (190, 150)  # px, width and height of a picture on a contact sheet
GREY_CHROMA = 5.0  # mean chroma of a photo without colours
QUESTIONS = (
    *(attribute.questions[0] for attribute in image_facts.ATTRIBUTES.values()),
    image_facts.COLOUR_QUESTIONS[0],
    image_facts.SUBJECT_QUESTIONS[0],
)


class ModelEvaluator:
    """Greedy answers of a model to batches of photos.

    Args:
        model: The model.
        image_processor: Its image processor.
        tokenizer: Its tokenizer.
    """

    def __init__(
        self,
        model: MoondreamForConditionalGeneration,
        image_processor: MoondreamImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        self.model, self.image_processor, self.tokenizer = model.eval(), image_processor, tokenizer
        self.templates = model.config.templates
        self.constraint = RecipeConstraint(tokenizer, grammar_segments())

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelEvaluator:
        """Load a saved model folder in float32. Raises OSError if files are missing."""
        processor = AutoProcessor.from_pretrained(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        return cls(model, processor.image_processor, processor.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Tokenize plain text."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def inputs(self, photos: Sequence[np.ndarray], prompts: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """Build model inputs of photos and prompts (token ids), padded on the left."""
        images = self.image_processor(list(photos), return_tensors="pt")
        prefix = [0] + [self.model.config.image_token_id] * self.model.config.image_tokens
        longest = max(map(len, prompts))
        ids = [[0] * (longest - len(p)) + prefix + p for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * (len(prefix) + len(p)) for p in prompts]
        return {**images, "input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    @torch.inference_mode()
    def generate(
        self, photos: Sequence[np.ndarray], prompts: Sequence[list[int]], grammar_constrained: bool = False
    ) -> list[str]:
        """Generate the greedy answer to each photo's prompt."""
        batches = _batches(photos, prompts)
        return [text for batch in batches for text in self._generate(*batch, grammar_constrained)]

    def _generate(
        self, photos: Sequence[np.ndarray], prompts: Sequence[list[int]], grammar_constrained: bool
    ) -> list[str]:
        inputs = self.inputs(photos, prompts)
        length = inputs["input_ids"].shape[1]
        processors = [self.constraint.processor(length)] if grammar_constrained else None
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=120, logits_processor=processors)
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in output[:, length:]]

    def query(self, photos: Sequence[np.ndarray], question: str, grammar_constrained: bool = False) -> list[str]:
        """Answer one question about each photo."""
        template = self.templates["query"]
        prompt = template["prefix"] + self.encode(question) + 2 * template["suffix"]
        return self.generate(photos, [prompt] * len(photos), grammar_constrained)

    def recipes(self, photos: Sequence[np.ndarray]) -> list[Recipe]:
        """Generate a recipe for each photo."""
        return [parse(text).recipe for text in self.query(photos, RECIPE_QUESTION, grammar_constrained=True)]

    def captions(self, photos: Sequence[np.ndarray], length: str) -> list[str]:
        """Generate a caption of each photo."""
        return self.generate(photos, [list(self.templates["caption"][length])] * len(photos))

    @torch.inference_mode()
    def regions(self, photos: Sequence[np.ndarray], skill: str, name: str) -> list[list[dict]]:
        """Run `detect` or `point` for an object name on each photo."""
        template = self.templates[skill]
        prompt = template["prefix"] + self.encode(" " + name) + template["suffix"]
        batches = _batches(photos, [prompt] * len(photos))
        return [row for batch in batches for row in getattr(self.model, skill)(**self.inputs(*batch), max_objects=4)]


def _batches(
    photos: Sequence[np.ndarray], prompts: Sequence[list[int]]
) -> Iterator[tuple[Sequence[np.ndarray], Sequence[list[int]]]]:
    """Yield photos and prompts, at most `BATCH` at once, so that memory does not grow with their number."""
    for start in range(0, len(photos), BATCH):
        yield photos[start : start + BATCH], prompts[start : start + BATCH]


def evaluate_restoration(
    evaluator: ModelEvaluator, examples: Sequence[DegradedPhoto], seed: int = 0
) -> dict[str, float]:
    """Compare mean CIELAB errors: degraded, restored, with the best single recipe of 256, and with the true recipe."""
    before = np.array([lab_error(e.degraded, e.original) for e in examples])
    recipes = evaluator.recipes([e.degraded for e in examples])
    after = np.array([lab_error(render(e.degraded, r), e.original) for e, r in zip(examples, recipes, strict=True)])
    true = np.array([lab_error(render(e.degraded, e.inverse_recipe), e.original) for e in examples])
    rng = np.random.default_rng(seed)
    small = [(shrink(e.degraded, ERROR_SIDE), shrink(e.original, ERROR_SIDE)) for e in examples]
    best_single = min(
        float(np.mean([lab_error(render(degraded, recipe), original) for degraded, original in small]))
        for recipe in [Recipe(), *(random_inverse_recipe(rng) for _ in range(255))]
    )
    return {
        "cases": len(examples),
        "error_degraded": float(before.mean()),
        "error_restored": float(after.mean()),
        "error_best_single_recipe": best_single,
        "error_true_recipe": float(true.mean()),
        "error_lowered_by": float(1 - after.mean() / before.mean()),
        "share_lowered": float((after < before).mean()),
        "share_lowered_by_30_percent": float((after <= 0.7 * before).mean()),
    }


def evaluate_undamaged(evaluator: ModelEvaluator, photos: Sequence[np.ndarray]) -> dict[str, float]:
    """Measure what the greedy recipe does to photos that need nothing: mean CIELAB change, and what its crop cuts."""
    changes, cut_subjects, cut_heads, untouched = [], 0, 0, 0
    small = [shrink(photo, SIDE) for photo in photos]
    for photo, recipe in zip(small, evaluator.recipes(small), strict=True):
        picture = render(photo, recipe)
        framing = compare(photo, [picture])[0].framing
        toned = render(photo, recipe.replace(crop=Recipe().crop))  # the change where photo and picture overlap
        changes.append(lab_error(toned, photo))
        cut_subjects += framing.subject_lost > SUBJECT_SPARED
        cut_heads += framing.head_lost > HEAD_SPARED
        untouched += recipe == Recipe()
    return {
        "photos": len(photos),
        "change": float(np.mean(changes)),
        "share_untouched": untouched / len(photos),
        "share_cut_subject": cut_subjects / len(photos),
        "share_cut_head": cut_heads / len(photos),
    }


def photo_kind(photo: np.ndarray) -> str:
    """Return "people" for a photo (uint8 RGB) with a face, "grey" for one without colours, else "other"."""
    if find_subject(shrink(photo, SIDE)).heads:
        return "people"
    return "grey" if image_facts.measure(photo).values["colours"] < GREY_CHROMA else "other"


def evaluate_kinds(
    evaluator: ModelEvaluator, photos: Sequence[np.ndarray], degraded: Sequence[DegradedPhoto]
) -> dict[str, dict[str, float]]:
    """Compute the main figures by kind of photo; `degraded` has the same number of copies of each photo, in order."""
    kinds, copies = [photo_kind(photo) for photo in photos], len(degraded) // len(photos)
    result: dict[str, dict[str, float]] = {}
    for kind in sorted(set(kinds)):
        members = [index for index, value in enumerate(kinds) if value == kind]
        examples = [degraded[index * copies + copy] for index in members for copy in range(copies)]
        recipes = evaluator.recipes([e.degraded for e in examples])
        before = sum(lab_error(e.degraded, e.original) for e in examples)
        after = sum(lab_error(render(e.degraded, r), e.original) for e, r in zip(examples, recipes, strict=True))
        undamaged = evaluate_undamaged(evaluator, [photos[index] for index in members])
        lowered = float(1 - after / before)
        result[kind] = {"photos": len(members), "error_lowered_by": lowered, "undamaged_change": undamaged["change"]}
    return result


def evaluate_levels(evaluator: ModelEvaluator, examples: Sequence[DegradedPhoto]) -> dict[str, float]:
    """Correlate the predicted with the true level of each operation, and count crops within 5 percent."""
    recipes = evaluator.recipes([e.degraded for e in examples])
    pairs = [(recipe, e.inverse_recipe) for recipe, e in zip(recipes, examples, strict=True)]
    result = {}
    for name in ("exposure", "contrast", "saturation", "warmth", "sharpening"):
        predicted, true = np.array([[getattr(recipe, name) for recipe in pair] for pair in pairs], float).T
        result[name] = float(np.corrcoef(predicted, true)[0, 1]) if predicted.std() and true.std() else 0.0
    crops = np.array([[recipe.crop for recipe in pair] for pair in pairs], float)
    result["crop_within_5"] = float((np.abs(crops[:, 0] - crops[:, 1]) <= 5).all(1).mean())
    return result


def evaluate_statements(evaluator: ModelEvaluator, photos: Sequence[np.ndarray]) -> dict[str, float]:
    """Return the share of true statements in captions, in answers, and per attribute."""
    facts = [image_facts.measure(photo) for photo in photos]
    statements: dict[str, list[tuple[str, bool]]] = {"captions": [], "answers": []}
    empty = 0
    texts = [("captions", evaluator.captions(photos, length)) for length in LENGTHS]
    texts += [("answers", evaluator.query(photos, question)) for question in QUESTIONS]
    for kind, answers in texts:
        for answer, fact in zip(answers, facts, strict=True):
            checked = image_facts.check_statements(answer, fact)
            statements[kind] += checked
            empty += not checked
    combined = statements["captions"] + statements["answers"]
    result = {f"true_{kind}": float(np.mean([ok for _, ok in rows])) for kind, rows in statements.items()}
    result |= {"true": float(np.mean([ok for _, ok in combined])), "facts": len(combined), "without_a_fact": empty}
    for name in sorted({fact.split(":")[0] for fact, _ in combined}):
        result[f"true_{name}"] = float(np.mean([ok for fact, ok in combined if fact.split(":")[0] == name]))
    return result


def evaluate_regions(evaluator: ModelEvaluator, photos: Sequence[np.ndarray]) -> dict[str, float]:
    """Return, per area, the mean IoU of `detect` (0 without a box) and the share of `point` inside the true box."""
    truth = [image_facts.areas(photo) for photo in photos]
    result: dict[str, float] = {}
    for name in image_facts.AREAS:
        boxes = evaluator.regions(photos, "detect", "the " + name)
        points = evaluator.regions(photos, "point", "the " + name)
        overlaps = [detection_iou(b, t[name].box) for b, t in zip(boxes, truth, strict=True)]
        result[f"iou_{name}"] = float(np.mean(overlaps))
        result[f"hit_{name}"] = float(np.mean([is_hit(p, t[name].box) for p, t in zip(points, truth, strict=True)]))
    for kind in ("iou", "hit"):
        result[kind] = float(np.mean([result[f"{kind}_{name}"] for name in image_facts.AREAS]))
    unknown = [evaluator.regions(photos, "detect", name) for name in image_facts.UNKNOWN_OBJECTS[:4]]
    result["nothing_found_for_unknown"] = float(np.mean([not boxes for batch in unknown for boxes in batch]))
    return result


def detection_iou(boxes: list[dict], truth: tuple[float, float, float, float]) -> float:
    """Return the IoU of the first detected box with the true one, 0 if nothing was detected."""
    return box_iou(tuple(boxes[0][key] for key in ("x_min", "y_min", "x_max", "y_max")), truth) if boxes else 0.0


def is_hit(points: list[dict], box: tuple[float, float, float, float]) -> bool:
    """Return whether the first point lies in the box."""
    return bool(points) and box[0] <= points[0]["x"] <= box[2] and box[1] <= points[0]["y"] <= box[3]


def degraded_photos(photos: Sequence[np.ndarray], copies: int, seed: int) -> list[DegradedPhoto]:
    """Degrade each photo `copies` times, at `SIDE`."""
    return [
        random_degradation(shrink(photo, SIDE), np.random.default_rng([seed, index, copy]), probability=1.0)
        for index, photo in enumerate(photos)
        for copy in range(copies)
    ]


def held_out_photos() -> list[np.ndarray]:
    """Load the held-out photos."""
    return [load_photo(info.path) for info in bundled_photos("held-out")]


def evaluate(
    evaluator: ModelEvaluator, photos: Sequence[np.ndarray], copies: int = 4, seed: int = 1234
) -> dict[str, dict]:
    """Compute all figures on photos that were not trained on.

    Args:
        evaluator: The model.
        photos: uint8 [H, W, 3] RGB each. Facts and regions are evaluated on these and on one degraded copy of each.
        copies: Degraded copies of each photo for restoration and levels.
        seed: Seed of the degradations.
    """
    degraded = degraded_photos(photos, copies, seed)
    mixed = [shrink(photo, SIDE) for photo in photos] + [e.degraded for e in degraded[::copies]]
    return {
        "recipe": evaluate_restoration(evaluator, degraded, seed),
        "levels": evaluate_levels(evaluator, degraded),
        "facts": evaluate_statements(evaluator, mixed),
        "regions": evaluate_regions(evaluator, mixed),
        "undamaged": evaluate_undamaged(evaluator, photos),
        "kinds": evaluate_kinds(evaluator, photos, degraded),
    }


def draw_sheet(
    evaluator: ModelEvaluator, photos: Sequence[np.ndarray], count: int = SHEET_PHOTOS, seed: int = 1234
) -> Image.Image:
    """Draw a contact sheet to look at: per photo a degraded copy, the same restored, the photo, and the photo finished.

    Args:
        evaluator: The model.
        photos: uint8 RGB.
        count: Maximum number of photos.
        seed: Seed of the degradations.
    """
    degraded = degraded_photos(photos[:count], 1, seed)
    untouched = [shrink(photo, SIDE) for photo in photos[:count]]
    restored = zip(degraded, evaluator.recipes([pair.degraded for pair in degraded]), strict=True)
    finished = zip(untouched, evaluator.recipes(untouched), strict=True)
    columns = [
        [pair.degraded for pair in degraded],
        [render(pair.degraded, recipe) for pair, recipe in restored],
        untouched,
        [render(photo, recipe) for photo, recipe in finished],
    ]
    across = 2  # photos side by side
    page = Image.new("RGB", (across * 4 * SHEET_CELL[0], -(-len(untouched) // across) * SHEET_CELL[1]), "white")
    for index in range(len(untouched)):
        row, block = divmod(index, across)
        for number, pictures in enumerate(columns):
            picture = Image.fromarray(pictures[index])
            picture.thumbnail((SHEET_CELL[0] - 8, SHEET_CELL[1] - 8))
            page.paste(picture, ((block * 4 + number) * SHEET_CELL[0] + 4, row * SHEET_CELL[1] + 4))
    return page


def summary(figures: dict[str, dict]) -> str:
    """Format the main figures as text, one line each."""
    recipe, facts, regions, undamaged = (figures[name] for name in ("recipe", "facts", "regions", "undamaged"))
    levels = ", ".join(f"{name} {value:.2f}" for name, value in figures["levels"].items() if name != "crop_within_5")
    return "\n".join(
        [
            f"degraded photos  {recipe['cases']}",
            f"CIELAB error     {recipe['error_lowered_by']:.1%} lower; lower in {recipe['share_lowered']:.0%} of cases",
            f"correlations     {levels}",
            f"stated facts     {facts['true']:.1%} true of {facts['facts']}",
            f"point, detect    {regions['hit']:.0%} inside, mean IoU {regions['iou']:.3f}",
            f"undamaged photos change {undamaged['change']:.1f} CIELAB; {undamaged['share_untouched']:.0%} left alone; "
            f"subject cut in {undamaged['share_cut_subject']:.0%}, a head in {undamaged['share_cut_head']:.0%}",
            *(f"{kind:16} {describe_kind(kinds)}" for kind, kinds in figures["kinds"].items()),
        ]
    )


def describe_kind(figures: dict[str, float]) -> str:
    """Format the figures of a kind of photo."""
    lowered, change = figures["error_lowered_by"], figures["undamaged_change"]
    return f"{figures['photos']} photos: CIELAB error {lowered:.1%} lower; undamaged photos change {change:.1f}"


def main() -> None:
    """Print the figures of a model folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="assets/moondream-tiny", help="the model's folder")
    parser.add_argument("--photos", metavar="FOLDER", help="folder or zip file of photos (default: bundled held-out)")
    parser.add_argument("--copies", type=int, default=4, help="degraded copies of each photo")
    parser.add_argument(
        "--sheet", metavar="FILE", help="also write a contact sheet: degraded, restored, photo, finished"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    args = parser.parse_args()
    if args.copies < 1:
        parser.error("--copies must be 1 or more")
    try:
        photos = load_photos(args.photos, limit=MAX_PHOTOS).photos if args.photos else held_out_photos()
        evaluator = ModelEvaluator.from_folder(args.folder)
    except (OSError, PhotoSourceError) as error:
        sys.exit(str(error))
    if args.sheet:
        try:
            draw_sheet(evaluator, photos).save(args.sheet, quality=85)
        except (OSError, ValueError) as error:
            sys.exit(f"The contact sheet cannot be written: {error}")
    figures = evaluate(evaluator, photos, args.copies)
    print(json.dumps(figures, indent=1) if args.json else summary(figures))


if __name__ == "__main__":
    main()
