"""The second stage of pre-training: the text model and the region heads learn on, with a frozen vision tower.

The image features are computed once, so a step costs a fraction of one of the first stage, and each photo carries
several region examples. The same batches serve the last stage (`min_risk`), whose weights are averaged with these.
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
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from inference.moondream import MoondreamForConditionalGeneration, MoondreamImageProcessor
from recipes import shrink
from training.pretrain.dataset import EXAMPLES, Example, PretrainDataset
from training.pretrain.degradation import ERROR_SIDE
from training.pretrain.losses import answer_losses, mixed_precision, packed_forward, recipe_segments
from training.pretrain.photos import PretrainPhotos
from training.pretrain.train import split_block_matrices

LOSS_WEIGHTS = {"recipe": 0.25, "end": 0.3, "text": 3.0, "region": 3.0}
BATCH_SIZE = 12
BATCHES = 300
GOOD_SHARE = 0.12  # of the lessons; with more, ambiguous photos are left alone
REGIONS = 4  # further region examples per photo: they cost little, since the image is encoded once


@dataclass(frozen=True)
class TextStageConfig:
    """Settings of the stage.

    Attributes:
        steps: Optimisation steps.
        warmup_steps: Steps of linear warm-up.
        learning_rate: Peak learning rate.
    """

    steps: int = 800
    warmup_steps: int = 30
    learning_rate: float = 2e-3


@dataclass
class CachedBatch:
    """A batch with the image features of its photos.

    Attributes:
        features: Image features [N, T, D].
        examples: The examples of each of `EXAMPLES`.
        regions: Further region examples of each photo.
        pairs: Degraded and original photo at ERROR_SIDE, uint8 RGB.
    """

    features: torch.Tensor
    examples: dict[str, list[Example]]
    regions: list[list[Example]]
    pairs: list[tuple[np.ndarray, np.ndarray]]

    def rows(self) -> list[list[Example]]:
        """Return the examples to pack after each image."""
        return [
            [*examples, *regions]
            for *examples, regions in zip(*(self.examples[name] for name in EXAMPLES), self.regions, strict=True)
        ]


@torch.no_grad()
def cache_batch(
    model: MoondreamForConditionalGeneration, image_processor: MoondreamImageProcessor, batch: dict
) -> CachedBatch:
    """Compute the image features of an item of `PretrainDataset`."""
    images = image_processor(batch["images"])
    features = model.get_image_features(images["pixel_values"], images["image_sizes"])
    pairs = [
        (shrink(degraded, ERROR_SIDE), original)
        for degraded, original in zip(batch["images"], batch["originals"], strict=True)
    ]
    return CachedBatch(features, {name: batch[name] for name in EXAMPLES}, batch["regions"], pairs)


def cache_batches(
    model: MoondreamForConditionalGeneration,
    image_processor: MoondreamImageProcessor,
    tokenizer: PreTrainedTokenizerFast,
    photos: PretrainPhotos,
    seed: int,
    count: int = BATCHES,
) -> list[CachedBatch]:
    """Prepare the batches of the last stages. They differ from those of the first stage with the same seed."""
    cv2.setNumThreads(1)
    dataset = PretrainDataset(
        photos,
        tokenizer,
        model.config.templates,
        BATCH_SIZE,
        seed + 1,
        count,
        model.config.vision_config.grid,
        varied=0,
        good=GOOD_SHARE,
        regions=REGIONS,
    )
    indices = tqdm(range(count), "encoding images", file=sys.stdout, mininterval=5)
    return [cache_batch(model, image_processor, dataset[index]) for index in indices]


def warmup_cosine(step: int, steps: int, warmup_steps: int) -> float:
    """Return the share of the peak learning rate: linear warm-up times a cosine down to 2 %."""
    return min(1.0, (step + 1) / warmup_steps) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def text_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the names and parameters of all but the vision tower."""
    return [(name, p) for name, p in model.named_parameters() if ".vision." not in name and p.requires_grad]


def train_text(
    model: MoondreamForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    batches: list[CachedBatch],
    config: TextStageConfig = TextStageConfig(),
) -> float:
    """Train text model and region heads in place. Returns the duration in seconds."""
    started = time.monotonic()
    segments = recipe_segments(tokenizer)
    named = text_parameters(model)
    hidden, others = split_block_matrices(named)
    rate = config.learning_rate
    optimizers = [
        torch.optim.Muon(hidden, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    progress = tqdm(range(config.steps), "text and regions", file=sys.stdout, mininterval=5)
    for step in progress:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate * warmup_cosine(step, config.steps, config.warmup_steps)
        batch = batches[step % len(batches)]
        rows = batch.rows()
        with mixed_precision():
            logits, labels, regions = packed_forward(model, batch.features, rows)
        losses = answer_losses(rows, logits, labels, segments, len(batch.regions[0])) | {"region": regions}
        model.zero_grad()
        sum(weight * losses[name] for name, weight in LOSS_WEIGHTS.items()).backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        progress.set_postfix({name: round(loss.item(), 3) for name, loss in losses.items()})
    return time.monotonic() - started
