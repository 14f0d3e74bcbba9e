"""Minimum risk training, the last stage of pre-training: sampled recipes are rendered and weighted by their error.

Before this stage every token of a recipe counts alike. But a wrong crop damages a picture more than three wrong levels,
and where exposure and contrast are ambiguous, a moderate pair of levels beats the most likely value of each. This stage
minimises the expected cost itself (Shen et al. 2016), with the photo's other samples as the baseline: the CIELAB error,
and the faults of framing and tone of the rewards, so that a crop through the subject or a grey veil costs what it costs
a person. The vision tower is frozen, and the other losses continue, so that nothing is forgotten.

It starts from the first stage, as `text_stage` does, and the weights of both are averaged (Wortsman et al. 2022, "Model
soups"): one after the other, each undid what the other had learned.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from inference.local.constraint import RecipeConstraint
from inference.moondream import MoondreamForConditionalGeneration
from recipes import grammar_segments, parse, render
from rewards.comparison import compare
from rewards.guard import framing_fault
from rewards.measures import measure
from rewards.naturalness import tone_fault
from training.pretrain.dataset import Example
from training.pretrain.degradation import lab_error
from training.pretrain.losses import (
    Segments,
    answer_losses,
    example_kinds,
    mixed_precision,
    packed_forward,
    recipe_segments,
)
from training.pretrain.text_stage import CachedBatch, text_parameters, warmup_cosine

LOSS_WEIGHTS = {"risk": 1.0, "recipe": 0.1, "text": 2.0, "end": 0.3, "region": 1.0}
MIN_RISK_SHARE = 0.25  # of this model in the average with that of the text stage
ERROR_SCALE = 5.0  # CIELAB units of error per unit of advantage
FAULT_COST = 1.0  # CIELAB units per unit of the faults of framing and tone


@dataclass(frozen=True)
class MinRiskConfig:
    """Settings of minimum risk training.

    Attributes:
        steps: Optimisation steps.
        warmup_steps: Steps of linear warm-up.
        samples: Recipes sampled per photo and step.
        learning_rate: Peak learning rate.
    """

    steps: int = 300
    warmup_steps: int = 20
    samples: int = 6
    learning_rate: float = 8e-4


def train_min_risk(
    model: MoondreamForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    batches: list[CachedBatch],
    seed: int,
    config: MinRiskConfig = MinRiskConfig(),
) -> float:
    """Train the model in place on batches of its image features. Returns the duration in seconds."""
    started = time.monotonic()
    torch.manual_seed(seed)
    constraint = RecipeConstraint(tokenizer, grammar_segments(), end_id=model.config.eos_id)
    segments = recipe_segments(tokenizer)
    question = Example(batches[0].examples["recipe"][0].prompt, [])
    parameters = [p for _, p in text_parameters(model)]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    progress = tqdm(range(config.steps), "minimum risk", file=sys.stdout, mininterval=5)
    average_reduction = 0.0
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * warmup_cosine(step, config.steps, config.warmup_steps)
        batch = batches[step % len(batches)]
        texts, ids = sample_recipes(model, constraint, tokenizer, question, batch.features, config.samples)
        advantages, reduction = compute_advantages(texts, batch.pairs, config.samples)
        losses = min_risk_losses(model, constraint, batch, ids, advantages, segments)
        optimizer.zero_grad()
        sum(LOSS_WEIGHTS[name] * loss for name, loss in losses.items()).backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average_reduction += 0.05 * (reduction - average_reduction) if step else reduction
        progress.set_postfix(error_reduction=round(average_reduction, 3), text=round(losses["text"].item(), 3))
    return time.monotonic() - started


@torch.no_grad()
def average_weights(model: nn.Module, other: nn.Module, share: float) -> None:
    """Replace the weights of a model by the average with those of another, which has `share` of it."""
    others = other.state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.lerp_(others[name], share)


@torch.no_grad()
def sample_recipes(
    model: MoondreamForConditionalGeneration,
    constraint: RecipeConstraint,
    tokenizer: PreTrainedTokenizerFast,
    question: Example,
    features: torch.Tensor,
    count: int,
) -> tuple[list[str], torch.Tensor]:
    """Sample `count` recipes for each photo.

    Returns:
        The texts, photo by photo, and their token ids [N * count, K] including the end token.
    """
    prefix = [0] + [model.config.image_token_id] * features.shape[1] + question.prompt
    ids = torch.tensor([prefix] * (len(features) * count))
    output = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        image_features=features.repeat_interleave(count, 0),
        do_sample=True,
        top_k=0,
        max_new_tokens=constraint.max_tokens,
        logits_processor=[constraint.processor(len(prefix))],
    )[:, len(prefix) :]
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in output], output


def compute_advantages(
    texts: list[str], pairs: list[tuple[np.ndarray, np.ndarray]], count: int
) -> tuple[torch.Tensor, float]:
    """Compare the cost of each recipe with that of the photo's other samples; see `recipe_costs`.

    Returns:
        Advantages [N * count] in units of ERROR_SCALE, and the mean share of the error that the recipes remove.
    """
    before = np.array([lab_error(degraded, original) for degraded, original in pairs])
    groups = [texts[start : start + count] for start in range(0, len(texts), count)]
    errors, costs = np.array(
        [recipe_costs(degraded, original, group) for (degraded, original), group in zip(pairs, groups, strict=True)]
    ).swapaxes(0, 1)
    advantages = (costs.mean(1, keepdims=True) - costs) / ERROR_SCALE
    return torch.from_numpy(advantages.ravel()).float().clamp(-3, 3), float(1 - errors.mean() / before.mean())


def recipe_costs(degraded: np.ndarray, original: np.ndarray, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the CIELAB error of each recipe, and its cost: the error plus the faults of framing and tone.

    The fault of the tones is what exceeds that of the original. The guard as a whole would compare the picture with the
    degraded photo, and charge for whites and colours that the restoration brings back.
    """
    pictures = [render(degraded, parse(text).recipe) for text in texts]
    errors = np.array([lab_error(picture, original) for picture in pictures])
    accepted = tone_fault(measure(original))
    faults = [
        framing_fault(comparison.framing) + max(0.0, tone_fault(comparison.measures) - accepted)
        for comparison in compare(degraded, pictures)
    ]
    return errors, errors + FAULT_COST * np.array(faults)


def min_risk_losses(
    model: MoondreamForConditionalGeneration,
    constraint: RecipeConstraint,
    batch: CachedBatch,
    ids: torch.Tensor,
    advantages: torch.Tensor,
    segments: Segments,
) -> dict[str, torch.Tensor]:
    """Compute the risk of the sampled recipes `ids` [N * count, K] and the supervised losses, packed per photo."""
    count = len(ids) // len(batch.features)
    rows = []
    for index, examples in enumerate(batch.rows()):
        samples = [Example(examples[0].prompt, row.tolist()) for row in ids[index * count : (index + 1) * count]]
        rows.append([*examples, *samples])
    with mixed_precision():
        logits, labels, region = packed_forward(model, batch.features, rows)
    regions = len(batch.regions[0])
    kinds = example_kinds(rows, regions)
    sampled = labels[kinds == 3].unflatten(0, (len(ids), -1))
    log_probs = constraint.apply(logits[kinds == 3].unflatten(0, (len(ids), -1)), sampled).log_softmax(-1)
    sequence_log_probs = log_probs.gather(-1, sampled[..., None]).squeeze(-1).sum(-1)
    return {
        "risk": -(advantages * sequence_log_probs).mean(),
        **answer_losses(rows, logits, labels, segments, regions),
        "region": region,
    }
