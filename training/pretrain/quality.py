"""How well the embedded model sees: restoration, stated facts, detect and point on the held-out photos.

`python -m training.quality [folder]` prints the figures as JSON; pre-training writes them into the model card.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

from inference.local.constraint import RecipeConstraint
from inference.moondream import MoondreamForConditionalGeneration, MoondreamImageProcessor
from inference.types import LENGTHS, RECIPE_QUESTION
from recipes import Recipe, grammar_segments, load_photo, parse, render, shrink
from rewards.image_metrics import box_iou
from training.data.bundled import bundled_photos
from training.pretrain import image_facts as facts
from training.pretrain.degradation import ERROR_SIDE, Degraded, error, random_undo, spoil

SIDE = 400  # px: the long side at which photos are judged
QUESTIONS = (
    *(attribute.questions[0] for attribute in facts.ATTRIBUTES.values()),
    facts.COLOUR_QUESTIONS[0],
    facts.SUBJECT_QUESTIONS[0],
)


class ModelEvaluator:
    """A model with its processor and templates, asked in batches of prompts given as token ids."""

    def __init__(
        self,
        model: MoondreamForConditionalGeneration,
        image_processor: MoondreamImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        self.model, self.image_processor, self.tokenizer = model.eval(), image_processor, tokenizer
        self.templates = model.config.templates
        self.constraint = RecipeConstraint(tokenizer, grammar_segments())

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def inputs(self, photos: Sequence[np.ndarray], prompts: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """Model inputs, padded on the left."""
        seen = self.image_processor(list(photos), return_tensors="pt")
        head = [0] + [self.model.config.image_token_id] * self.model.config.image_tokens
        longest = max(map(len, prompts))
        ids = [[0] * (longest - len(p)) + head + p for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * (len(head) + len(p)) for p in prompts]
        return {**seen, "input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    @torch.inference_mode()
    def write(
        self, photos: Sequence[np.ndarray], prompts: Sequence[list[int]], grammar_constrained: bool = False
    ) -> list[str]:
        """The greedy answers."""
        inputs = self.inputs(photos, prompts)
        length = inputs["input_ids"].shape[1]
        processors = [self.constraint.processor(length)] if grammar_constrained else None
        out = self.model.generate(**inputs, do_sample=False, max_new_tokens=120, logits_processor=processors)
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in out[:, length:]]

    def ask(self, photos: Sequence[np.ndarray], question: str, grammar_constrained: bool = False) -> list[str]:
        """The answers to one question (skill query)."""
        around = self.templates["query"]
        prompt = around["prefix"] + self.encode(question) + 2 * around["suffix"]
        return self.write(photos, [prompt] * len(photos), grammar_constrained)

    def recipes(self, photos: Sequence[np.ndarray]) -> list[Recipe]:
        """The greedy recipe of each photo."""
        return [parse(text).recipe for text in self.ask(photos, RECIPE_QUESTION, grammar_constrained=True)]

    def captions(self, photos: Sequence[np.ndarray], length: str) -> list[str]:
        """A caption of each photo."""
        return self.write(photos, [list(self.templates["caption"][length])] * len(photos))

    @torch.inference_mode()
    def regions(self, photos: Sequence[np.ndarray], skill: str, name: str) -> list[list[dict]]:
        """What `detect` or `point` finds on each photo."""
        around = self.templates[skill]
        prompt = around["prefix"] + self.encode(" " + name) + around["suffix"]
        return getattr(self.model, skill)(**self.inputs(photos, [prompt] * len(photos)), max_objects=4)


def restoration(reader: ModelEvaluator, examples: Sequence[Degraded], seed: int = 0) -> dict[str, float]:
    """Mean CIELAB errors: untouched, restored, with the best single recipe of 256 for all; and shares of the cases."""
    before = np.array([error(e.spoilt, e.original) for e in examples])
    recipes = reader.recipes([e.spoilt for e in examples])
    after = np.array([error(render(e.spoilt, r), e.original) for e, r in zip(examples, recipes, strict=True)])
    known = np.array([error(render(e.spoilt, e.recipe), e.original) for e in examples])
    rng = np.random.default_rng(seed)
    small = [(shrink(e.spoilt, ERROR_SIDE), shrink(e.original, ERROR_SIDE)) for e in examples]
    single = min(
        float(np.mean([error(render(spoilt, recipe), original) for spoilt, original in small]))
        for recipe in [Recipe(), *(random_undo(rng) for _ in range(255))]
    )
    return {
        "cases": len(examples),
        "error_degraded": float(before.mean()),
        "error_restored": float(after.mean()),
        "error_best_single_recipe": single,
        "error_true_recipe": float(known.mean()),
        "error_lowered_by": float(1 - after.mean() / before.mean()),
        "share_lowered": float((after < before).mean()),
        "share_lowered_by_30_percent": float((after <= 0.7 * before).mean()),
    }


def levels_seen(reader: ModelEvaluator, examples: Sequence[Degraded]) -> dict[str, float]:
    """Correlation of the answered with the true level, per operation."""
    recipes = reader.recipes([e.spoilt for e in examples])
    found = {}
    for name in ("exposure", "contrast", "saturation", "warmth", "sharpening"):
        said, true = (np.array([getattr(r, name) for r in rs], float) for rs in (recipes, [e.recipe for e in examples]))
        found[name] = float(np.corrcoef(said, true)[0, 1]) if said.std() and true.std() else 0.0
    said, true = (np.array([r.crop for r in rs], float) for rs in (recipes, [e.recipe for e in examples]))
    found["crop_within_5"] = float((np.abs(said - true) <= 5).all(1).mean())
    return found


def statements(reader: ModelEvaluator, photos: Sequence[np.ndarray]) -> dict[str, float]:
    """Share of the stated facts that are true: in captions, in answers, and per attribute."""
    measured = [facts.measure(photo) for photo in photos]
    judged: dict[str, list[tuple[str, bool]]] = {"captions": [], "answers": []}
    empty = 0
    texts = [("captions", reader.captions(photos, length)) for length in LENGTHS]
    texts += [("answers", reader.ask(photos, question)) for question in QUESTIONS]
    for kind, answers in texts:
        for answer, fact in zip(answers, measured, strict=True):
            judgements = facts.judge(answer, fact)
            judged[kind] += judgements
            empty += not judgements
    everything = judged["captions"] + judged["answers"]
    result = {f"true_{kind}": float(np.mean([ok for _, ok in rows])) for kind, rows in judged.items()}
    result |= {"true": float(np.mean([ok for _, ok in everything])), "facts": len(everything), "without_a_fact": empty}
    for name in sorted({fact.split(":")[0] for fact, _ in everything}):
        result[f"true_{name}"] = float(np.mean([ok for fact, ok in everything if fact.split(":")[0] == name]))
    return result


def regions(reader: ModelEvaluator, photos: Sequence[np.ndarray]) -> dict[str, float]:
    """Per area: mean IoU of `detect` (0 where nothing is found) and share of `point` inside the true box."""
    truth = [facts.areas(photo) for photo in photos]
    result: dict[str, float] = {}
    for name in facts.AREAS:
        boxes = reader.regions(photos, "detect", "the " + name)
        points = reader.regions(photos, "point", "the " + name)
        result[f"iou_{name}"] = float(
            np.mean(
                [
                    box_iou(tuple(b[0][side] for side in ("x_min", "y_min", "x_max", "y_max")), t[name].box)
                    if b
                    else 0.0
                    for b, t in zip(boxes, truth, strict=True)
                ]
            )
        )
        result[f"hit_{name}"] = float(np.mean([hit(p, t[name].box) for p, t in zip(points, truth, strict=True)]))
    for kind in ("iou", "hit"):
        result[kind] = float(np.mean([result[f"{kind}_{name}"] for name in facts.AREAS]))
    unknown = [reader.regions(photos, "detect", name) for name in facts.UNKNOWN_OBJECTS[:4]]
    result["nothing_found_for_unknown"] = float(np.mean([not found for row in unknown for found in row]))
    return result


def hit(points: list[dict], box: tuple[float, float, float, float]) -> bool:
    """Whether the first point lies in the box."""
    return bool(points) and box[0] <= points[0]["x"] <= box[2] and box[1] <= points[0]["y"] <= box[3]


def examples(photos: Sequence[np.ndarray], copies: int, seed: int) -> list[Degraded]:
    """Each photo degraded `copies` times, at `SIDE`."""
    return [
        spoil(shrink(photo, SIDE), np.random.default_rng([seed, index, copy]), share=1.0)
        for index, photo in enumerate(photos)
        for copy in range(copies)
    ]


def held_out() -> list[np.ndarray]:
    """The held-out photos."""
    return [load_photo(info.path) for info in bundled_photos("held-out")]


def evaluate(
    reader: ModelEvaluator, photos: Sequence[np.ndarray], copies: int = 4, seed: int = 1234
) -> dict[str, dict]:
    """All figures on photos (uint8 RGB) that were not trained on; facts and regions also on degraded ones."""
    spoilt = examples(photos, copies, seed)
    seen = [shrink(photo, SIDE) for photo in photos] + [e.spoilt for e in spoilt[::copies]]
    return {
        "recipe": restoration(reader, spoilt, seed),
        "levels": levels_seen(reader, spoilt),
        "facts": statements(reader, seen),
        "regions": regions(reader, seen),
    }


def load_evaluator(folder: str | Path) -> ModelEvaluator:
    """A `ModelEvaluator` of a saved model folder. Raises OSError when files are missing."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return ModelEvaluator(model, processor.image_processor, processor.tokenizer)


def main() -> None:
    """Prints the figures of a model folder as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="assets/moondream-tiny")
    parser.add_argument("--copies", type=int, default=4, help="degraded copies of each photo")
    args = parser.parse_args()
    print(json.dumps(evaluate(load_evaluator(args.folder), held_out(), args.copies), indent=1))


if __name__ == "__main__":
    main()
