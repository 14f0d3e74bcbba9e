"""The last stage of pre-training: recipes are drawn, rendered, and judged by what they do to the picture.

Until here a recipe is a row of tokens, each as important as the next. But a wrong crop ruins a picture that three wrong
levels would not, and where light and contrast are in doubt a careful pair of them beats the likeliest of each. So the
expected error itself is lowered: minimum risk training (Shen et al. 2016), with a photo's other drawn recipes as the
baseline. The vision tower stays as it is, and the other lessons go on, so that nothing is forgotten.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from inference.local.constraint import RecipeConstraint
from inference.moondream import MoondreamForConditionalGeneration, MoondreamImageProcessor
from inference.types import RECIPE_QUESTION
from recipes import grammar_segments, parse, render, shrink
from training.pretrain.dataset import IGNORE, Example, PretrainDataset
from training.pretrain.degradation import ERROR_SIDE, error
from training.pretrain.losses import pack, recipe_loss, recipe_segments, region_loss

WEIGHTS = {"risk": 1.0, "recipe": 0.02, "text": 2.0, "end": 0.3, "region": 0.3}
SCALE = 5.0  # CIELAB units of error that count as one
LEVEL_WIDTH = 1.5


@dataclass(frozen=True)
class Refinement:
    """steps of batch photos with `drawn` recipes each, over a pool of `batches` made once; peak learning rate."""

    steps: int = 300
    batch: int = 12
    batches: int = 100
    drawn: int = 6
    learning_rate: float = 4e-4


@dataclass
class Batch:
    """A batch of lessons with the features of its photos [N, T, D], and what judges a recipe: spoilt and original."""

    features: torch.Tensor
    lessons: dict
    pairs: list[tuple[np.ndarray, np.ndarray]]


def refine(
    model: MoondreamForConditionalGeneration,
    image_processor: MoondreamImageProcessor,
    tokenizer: PreTrainedTokenizerFast,
    photos: list[np.ndarray],
    seed: int,
    how: Refinement = Refinement(),
) -> float:
    """Refines the model in place; returns the seconds that it took."""
    started = time.monotonic()
    cv2.setNumThreads(1)
    torch.manual_seed(seed)
    grid = model.config.vision_config.grid
    # Another seed than that of the lessons before: photos that are damaged as no photo was.
    lessons = PretrainDataset(photos, tokenizer, model.config.templates, how.batch, seed + 1, how.batches, grid)
    pool = [_batch(model, image_processor, lessons[at]) for at in tqdm(range(how.batches), "looking", file=sys.stdout)]
    constraint = RecipeConstraint(tokenizer, grammar_segments(), end_id=model.config.eos_id)
    segments = recipe_segments(tokenizer, LEVEL_WIDTH)
    learning = [p for name, p in model.named_parameters() if ".vision." not in name and p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=how.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    progress = tqdm(range(how.steps), "refining", file=sys.stdout, mininterval=5)
    lowered = 0.0
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = how.learning_rate * _rate(step, how.steps)
        batch = pool[step % how.batches]
        texts, ids = draw(model, constraint, tokenizer, lessons.query(RECIPE_QUESTION, ""), batch.features, how.drawn)
        gains, share = advantages(texts, batch.pairs, how.drawn)
        losses = step_losses(model, constraint, batch, ids, gains, segments)
        optimizer.zero_grad()
        sum(WEIGHTS[name] * loss for name, loss in losses.items()).backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        lowered += 0.05 * (share - lowered) if step else share
        progress.set_postfix(lowered=round(lowered, 3), text=round(losses["text"].item(), 3))
    return time.monotonic() - started


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 20) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


@torch.no_grad()
def _batch(model: MoondreamForConditionalGeneration, image_processor: MoondreamImageProcessor, lessons: dict) -> Batch:
    seen = image_processor(lessons["images"])
    features = model.get_image_features(seen["pixel_values"], seen["image_sizes"])
    pairs = [
        (shrink(spoilt, ERROR_SIDE), original)
        for spoilt, original in zip(lessons["images"], lessons["originals"], strict=True)
    ]
    kept = {name: lessons[name] for name in ("recipe", "text", "region")}
    return Batch(features, kept, pairs)


@torch.no_grad()
def draw(
    model: MoondreamForConditionalGeneration,
    constraint: RecipeConstraint,
    tokenizer: PreTrainedTokenizerFast,
    question: Example,
    features: torch.Tensor,
    count: int,
) -> tuple[list[str], torch.Tensor]:
    """`count` recipes per photo, photo by photo: as texts, and as ids [N * count, K] with their end."""
    head = [0] + [model.config.image_token_id] * features.shape[1] + question.prompt
    ids = torch.tensor([head] * (len(features) * count))
    out = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        image_features=features.repeat_interleave(count, 0),
        do_sample=True,
        top_k=0,
        max_new_tokens=constraint.max_tokens,
        logits_processor=[constraint.processor(len(head))],
    )[:, len(head) :]
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in out], out


def advantages(texts: list[str], pairs: list[tuple[np.ndarray, np.ndarray]], count: int) -> tuple[torch.Tensor, float]:
    """How much better each recipe is than the photo's others [N * count], in units of SCALE; and the share of error
    that all of them lower on average."""
    before = np.array([error(spoilt, original) for spoilt, original in pairs])
    blocks = [texts[start : start + count] for start in range(0, len(texts), count)]
    after = np.array(
        [
            [error(render(spoilt, parse(text).recipe), original) for text in block]
            for (spoilt, original), block in zip(pairs, blocks, strict=True)
        ]
    )
    gains = (after.mean(1, keepdims=True) - after) / SCALE
    return torch.from_numpy(gains.ravel()).float().clamp(-3, 3), float(1 - after.mean() / before.mean())


def step_losses(
    model: MoondreamForConditionalGeneration,
    constraint: RecipeConstraint,
    batch: Batch,
    ids: torch.Tensor,
    gains: torch.Tensor,
    segments: list,
) -> dict[str, torch.Tensor]:
    """The risk of the drawn recipes, and what the other lessons lose, all behind one computation of each photo."""
    many = len(ids) // len(batch.features)
    rows = []
    for at, taught in enumerate(zip(*(batch.lessons[name] for name in ("recipe", "text", "region")), strict=True)):
        drawn = [Example(taught[0].prompt, row.tolist()) for row in ids[at * many : (at + 1) * many]]
        rows.append([*taught, *drawn])
    with torch.autocast("cpu", torch.bfloat16):
        packed = pack(model, batch.features, rows)
        out = model.model.text(packed.embeds, attention_mask=packed.mask, position_ids=packed.positions)
        kept = packed.labels != IGNORE
        logits, labels = model.lm_head(out.last_hidden_state[kept]).float(), packed.labels[kept]
        regions = region_loss(model, out.pre_norm_hidden_state, packed.spots)
    kinds = torch.tensor([min(kind, 3) for row in rows for kind, lesson in enumerate(row) for _ in lesson.answer])
    recipes = [part[kinds == 0].unflatten(0, (len(rows), -1)) for part in (logits, labels)]
    said = labels[kinds == 3].unflatten(0, (len(ids), -1))
    likely = constraint.apply(logits[kinds == 3].unflatten(0, (len(ids), -1)), said).log_softmax(-1)
    chosen = likely.gather(-1, said[..., None]).squeeze(-1).sum(-1)
    return {
        "risk": -(gains * chosen).mean(),
        "recipe": recipe_loss(recipes[0], recipes[1], segments),
        "text": F.cross_entropy(logits[kinds == 1], labels[kinds == 1]),
        "end": F.cross_entropy(logits[kinds == 2], labels[kinds == 2]),
        "region": regions,
    }
