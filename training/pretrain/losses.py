"""The objective of pre-training: several lessons packed behind one image, and what a step loses on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from inference.moondream import MoondreamForConditionalGeneration
from recipes import grammar_segments
from training.pretrain.auxiliary_heads import AuxiliaryHeads
from training.pretrain.dataset import IGNORE, Example, pad

WEIGHTS = {"recipe": 0.25, "text": 2.0, "end": 0.3, "region": 0.3, "places": 3.0, "spots": 3.0, "whole": 5.0}
CROP = 2.0  # a wrong crop costs a picture more than a wrong level


def bin_loss(logits: torch.Tensor, value: torch.Tensor, bins: int, width: float) -> torch.Tensor:
    """Cross-entropy of [N, bins] logits to a Gaussian of `width` bins around `value` [N]: near misses cost less."""
    target = torch.exp(-0.5 * ((torch.arange(bins)[None] - value[:, None]) / width) ** 2)
    return -(target / target.sum(-1, keepdim=True) * logits.float().log_softmax(-1)).sum(-1).mean()


def size_position(size: torch.Tensor, bins: int) -> torch.Tensor:
    """Where a size (0..1) lies on the logarithmic scale of the size bins, as a bin number with a fraction."""
    return (torch.log2(size.clamp(min=2**-10)) + 10) / 10 * (bins - 1)


@dataclass
class PackedBatch:
    """Rows of several lessons each after one image: embeddings, mask, positions, labels, and where regions are.

    embeds [N, T, D]; mask bool [N, 1, T, T]; positions [N, T]; labels [N, T] (of the next token);
    spots: (row, place of the first coordinate, coordinates) of each region.
    """

    embeds: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    spots: list[tuple[int, int, tuple[float, ...]]]


def pack(model: MoondreamForConditionalGeneration, features: torch.Tensor, rows: list[list[Example]]) -> PackedBatch:
    """Puts the lessons of an image one after the other behind its features [N, T, D].

    Each lesson sees the image and itself, never another lesson, and counts its positions from the image on: what it
    computes is what it would compute alone, and the image's part of the text is computed once.
    """
    prefix = 1 + features.shape[1]
    ids, labels, positions, owners, spots = [], [], [], [], []
    for row, lessons in enumerate(rows):
        ids.append([0] * prefix)
        labels.append([IGNORE] * prefix)
        positions.append(list(range(prefix)))
        owners.append([0] * prefix)
        for owner, lesson in enumerate(lessons, 1):
            fed = lesson.answer[:-1] if lesson.region is None else [0] * (len(lesson.region) // 2 + 1)
            said = lesson.answer
            if lesson.region is not None:
                spots.append((row, len(ids[row]) + len(lesson.prompt), lesson.region))
                said = [lesson.answer[0], *([IGNORE] * (len(fed) - 1)), lesson.answer[1]]
            length = len(lesson.prompt) + len(fed)
            ids[row] += lesson.prompt + fed
            labels[row] += [IGNORE] * (len(lesson.prompt) - 1) + said
            positions[row] += list(range(prefix, prefix + length))
            owners[row] += [owner] * length
    owner, order = pad(owners, -1), torch.arange(max(map(len, ids)))
    alone = (owner[:, :, None] == owner[:, None, :]) & (order[:, None] >= order[None, :])
    mask = (alone | (owner == 0)[:, None, :])[:, None]
    embeds = model.get_input_embeddings()(pad(ids, 0))
    embeds = torch.cat([embeds[:, :1], features.to(embeds.dtype), embeds[:, prefix:]], 1)
    return PackedBatch(feed_regions(model, embeds, spots), mask, pad(positions, 0), pad(labels, IGNORE), spots)


def feed_regions(model: MoondreamForConditionalGeneration, embeds: torch.Tensor, spots: list) -> torch.Tensor:
    """The embeddings with the regions' coordinates at their places: x, y, and for boxes width and height."""
    if not spots:
        return embeds
    region = model.model.region
    rows, starts = places(spots)
    for offset in range(2):
        value = torch.tensor([[spot[offset]] for _, _, spot in spots])
        embeds = embeds.index_put((rows, starts + offset), region.encode_coordinate(value).to(embeds.dtype))
    boxes = [index for index, (_, _, spot) in enumerate(spots) if len(spot) == 4]
    if boxes:
        size = torch.tensor([spots[i][2][2:] for i in boxes])
        embeds = embeds.index_put((rows[boxes], starts[boxes] + 2), region.encode_size(size).to(embeds.dtype))
    return embeds


def places(spots: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and first places of the regions."""
    return torch.tensor([row for row, _, _ in spots]).long(), torch.tensor([start for _, start, _ in spots]).long()


def region_loss(model: MoondreamForConditionalGeneration, hidden: torch.Tensor, spots: list) -> torch.Tensor:
    """Loss of the coordinate and size heads on hidden states before the last norm [N, T, D]."""
    if not spots:
        return torch.zeros(())
    region = model.model.region
    rows, starts = places(spots)
    bins = model.config.region_config.coord_out_dim
    loss = torch.zeros(())
    for offset in range(2):
        value = torch.tensor([spot[offset] for _, _, spot in spots])
        logits = region.decode_coordinate(hidden[rows, starts - 1 + offset])
        loss = loss + bin_loss(logits, value * bins, bins, bins * 0.02)
    boxes = [index for index, (_, _, spot) in enumerate(spots) if len(spot) == 4]
    if boxes:
        size = torch.tensor([spots[i][2][2:] for i in boxes])
        decoded = region.decode_size(hidden[rows[boxes], starts[boxes] + 1])
        bins = decoded.shape[-1]
        for axis in range(2):
            loss = loss + 0.5 * bin_loss(decoded[..., axis, :], size_position(size[:, axis], bins), bins, 15.0)
    return loss


def step_loss(
    model: MoondreamForConditionalGeneration, probe: AuxiliaryHeads, images: dict, lessons: dict, segments: Segments
) -> dict[str, torch.Tensor]:
    """All losses of a step: recipes, text tokens, whether there is a region and where, and the probe's."""
    rows = list(zip(lessons["recipe"], lessons["text"], lessons["region"], strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        features = model.model.get_image_features(images["pixel_values"], images["image_sizes"])
        seen = probe(features, *(torch.from_numpy(np.stack(lessons[name])) for name in ("places", "whole")))
        packed = pack(model, features, rows)
        out = model.model.text(packed.embeds, attention_mask=packed.mask, position_ids=packed.positions)
        kept = packed.labels != IGNORE
        logits, labels = model.lm_head(out.last_hidden_state[kept]).float(), packed.labels[kept]
        regions = region_loss(model, out.pre_norm_hidden_state, packed.spots)
    kinds = torch.tensor([kind for row in rows for kind, lesson in enumerate(row) for _ in lesson.answer])
    recipes = logits[kinds == 0].unflatten(0, (len(rows), -1)), labels[kinds == 0].unflatten(0, (len(rows), -1))
    return {
        "recipe": recipe_loss(*recipes, segments),
        "text": F.cross_entropy(logits[kinds == 1], labels[kinds == 1]),
        "end": F.cross_entropy(logits[kinds == 2], labels[kinds == 2]),
        "region": regions,
        **seen,
    }


Segments = list[tuple[torch.Tensor, torch.Tensor, float]]


def recipe_segments(tokenizer: PreTrainedTokenizerFast, width: float) -> Segments:
    """Per segment of the recipe's grammar: the ids of its alternatives [n], soft targets [n, n] and its weight.

    Levels of an operation are ordered: neighbours of the true one get a share of the target, falling as a Gaussian of
    `width` levels. Words (looks) are not.
    """
    segments = []
    crop = True
    for alternatives in grammar_segments():
        crop = crop and alternatives[0] != "; exposure"
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)[0] for text in alternatives])
        order = torch.arange(len(ids)).float()
        numbers = all(text.strip().lstrip("+-").isdigit() for text in alternatives)
        soft = torch.exp(-0.5 * ((order[:, None] - order[None]) / width) ** 2) if numbers else torch.eye(len(ids))
        segments.append((ids, soft / soft.sum(-1, keepdim=True), CROP if crop else 1.0))
    return segments


def recipe_loss(logits: torch.Tensor, labels: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Weighted cross-entropy, summed over a recipe's tokens, averaged over recipes: logits [N, segments + 1, V]."""
    likely = logits.log_softmax(-1)
    loss = -likely[:, -1].gather(1, labels[:, -1:]).mean()
    for place, (ids, soft, weight) in enumerate(segments):
        true = (labels[:, place, None] == ids[None]).int().argmax(1)
        loss = loss - weight * (soft[true] * likely[:, place, ids]).sum(-1).mean()
    return loss
