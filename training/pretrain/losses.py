"""Losses of pre-training: several examples packed after one image, and the loss of each part of the supervision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from inference.moondream import MoondreamForConditionalGeneration
from recipes import grammar_segments
from training.pretrain.auxiliary_heads import AuxiliaryHeads
from training.pretrain.dataset import EXAMPLES, IGNORE, Example, pad

LOSS_WEIGHTS = {"recipe": 0.25, "text": 2.0, "end": 0.3, "region": 0.3, "tokens": 3.0, "positions": 3.0, "image": 5.0}
CROP_WEIGHT = 2.0  # of a crop's tokens in the recipe loss: a wrong crop damages a picture more than a wrong level
LEVEL_WIDTH = 1.5  # levels: standard deviation of a recipe's soft targets

# A region's place in a packed row: row, index of the first coordinate, coordinates (x, y) or (x, y, w, h).
RegionSlot = tuple[int, int, tuple[float, ...]]


def soft_bin_loss(logits: torch.Tensor, value: torch.Tensor, bins: int, width: float) -> torch.Tensor:
    """Return the cross-entropy of logits [N, bins] to a Gaussian of `width` bins around `value` [N]."""
    target = torch.exp(-0.5 * ((torch.arange(bins)[None] - value[:, None]) / width) ** 2)
    return -(target / target.sum(-1, keepdim=True) * logits.float().log_softmax(-1)).sum(-1).mean()


def size_to_bin(size: torch.Tensor, bins: int) -> torch.Tensor:
    """Convert a size (0..1) to a fractional bin on the logarithmic scale of the size head."""
    return (torch.log2(size.clamp(min=2**-10)) + 10) / 10 * (bins - 1)


@dataclass
class PackedBatch:
    """Rows of several examples each after one image.

    Attributes:
        embeds: Input embeddings [N, T, D].
        mask: Attention mask, bool [N, 1, T, T].
        positions: Position ids [N, T].
        labels: Next-token labels [N, T], IGNORE where there is no loss.
        region_slots: Where regions are in the rows.
    """

    embeds: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    region_slots: list[RegionSlot]


def pack(model: MoondreamForConditionalGeneration, features: torch.Tensor, rows: list[list[Example]]) -> PackedBatch:
    """Concatenate the examples of each image after its features [N, T, D].

    Each example attends to the image and to itself only, and its positions start after the image. Its states therefore
    equal those of the example alone, while the image prefix is computed once.
    """
    prefix = 1 + features.shape[1]
    ids, labels, positions, owners, slots = [], [], [], [], []
    for row, examples in enumerate(rows):
        ids.append([0] * prefix)
        labels.append([IGNORE] * prefix)
        positions.append(list(range(prefix)))
        owners.append([0] * prefix)
        for owner, example in enumerate(examples, 1):
            inputs = example.answer[:-1] if example.region is None else [0] * (len(example.region) // 2 + 1)
            targets = example.answer
            if example.region is not None:
                slots.append((row, len(ids[row]) + len(example.prompt), example.region))
                targets = [example.answer[0], *([IGNORE] * (len(inputs) - 1)), example.answer[1]]
            length = len(example.prompt) + len(inputs)
            ids[row] += example.prompt + inputs
            labels[row] += [IGNORE] * (len(example.prompt) - 1) + targets
            positions[row] += list(range(prefix, prefix + length))
            owners[row] += [owner] * length
    owner, order = pad(owners, -1), torch.arange(max(map(len, ids)))
    same_example = (owner[:, :, None] == owner[:, None, :]) & (order[:, None] >= order[None, :])
    mask = (same_example | (owner == 0)[:, None, :])[:, None]
    embeds = model.get_input_embeddings()(pad(ids, 0))
    embeds = torch.cat([embeds[:, :1], features.to(embeds.dtype), embeds[:, prefix:]], 1)
    return PackedBatch(embed_regions(model, embeds, slots), mask, pad(positions, 0), pad(labels, IGNORE), slots)


def embed_regions(
    model: MoondreamForConditionalGeneration, embeds: torch.Tensor, slots: list[RegionSlot]
) -> torch.Tensor:
    """Insert the embeddings of coordinates and sizes at their slots in embeds [N, T, D]."""
    if not slots:
        return embeds
    region = model.model.region
    rows, starts = slot_indices(slots)
    for offset in range(2):
        value = torch.tensor([[coordinates[offset]] for _, _, coordinates in slots])
        embeds = embeds.index_put((rows, starts + offset), region.encode_coordinate(value).to(embeds.dtype))
    boxes = [index for index, (_, _, coordinates) in enumerate(slots) if len(coordinates) == 4]
    if boxes:
        size = torch.tensor([slots[index][2][2:] for index in boxes])
        embeds = embeds.index_put((rows[boxes], starts[boxes] + 2), region.encode_size(size).to(embeds.dtype))
    return embeds


def slot_indices(slots: list[RegionSlot]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows [S] and first positions [S] of the region slots."""
    return torch.tensor([row for row, _, _ in slots]).long(), torch.tensor([start for _, start, _ in slots]).long()


def region_loss(
    model: MoondreamForConditionalGeneration, hidden: torch.Tensor, slots: list[RegionSlot]
) -> torch.Tensor:
    """Return the loss of the coordinate and size heads on hidden states before the final norm [N, T, D]."""
    if not slots:
        return torch.zeros(())
    region = model.model.region
    rows, starts = slot_indices(slots)
    bins = model.config.region_config.coord_out_dim
    loss = torch.zeros(())
    for offset in range(2):
        value = torch.tensor([coordinates[offset] for _, _, coordinates in slots])
        logits = region.decode_coordinate(hidden[rows, starts - 1 + offset])
        loss = loss + soft_bin_loss(logits, value * bins, bins, bins * 0.02)
    boxes = [index for index, (_, _, coordinates) in enumerate(slots) if len(coordinates) == 4]
    if boxes:
        size = torch.tensor([slots[index][2][2:] for index in boxes])
        decoded = region.decode_size(hidden[rows[boxes], starts[boxes] + 1])
        bins = decoded.shape[-1]
        for axis in range(2):
            loss = loss + 0.5 * soft_bin_loss(decoded[..., axis, :], size_to_bin(size[:, axis], bins), bins, 15.0)
    return loss


def packed_forward(
    model: MoondreamForConditionalGeneration, features: torch.Tensor, rows: list[list[Example]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the text model on packed examples.

    Returns:
        Logits [L, V] and labels [L] of the answer tokens in order, and the region loss.
    """
    packed = pack(model, features, rows)
    output = model.model.text(packed.embeds, attention_mask=packed.mask, position_ids=packed.positions)
    answered = packed.labels != IGNORE
    logits = model.lm_head(output.last_hidden_state[answered]).float()
    return logits, packed.labels[answered], region_loss(model, output.pre_norm_hidden_state, packed.region_slots)


@contextmanager
def mixed_precision() -> Iterator[None]:
    """Compute in bfloat16 where it is safe, and attention by plain matrix products.

    At this width, the backward pass of PyTorch's fused attention takes 40 % of a step on a CPU.
    """
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def step_loss(
    model: MoondreamForConditionalGeneration, heads: AuxiliaryHeads, images: dict, batch: dict, segments: Segments
) -> dict[str, torch.Tensor]:
    """Compute all losses of a step.

    Args:
        model: The model.
        heads: The auxiliary heads.
        images: The image processor's output.
        batch: An item of `PretrainDataset`.
        segments: From `recipe_segments`.

    Returns:
        Scalar losses by name; `end` is the loss of whether there is a region.
    """
    rows = list(zip(*(batch[name] for name in EXAMPLES), strict=True))
    with mixed_precision():
        features = model.model.get_image_features(images["pixel_values"], images["image_sizes"])
        targets = (torch.from_numpy(np.stack(batch[name])) for name in ("token_targets", "image_targets"))
        auxiliary = heads(features, *targets)
        logits, labels, regions = packed_forward(model, features, rows)
    return answer_losses(rows, logits, labels, segments) | {"region": regions} | auxiliary


def answer_losses(
    rows: list[list[Example]], logits: torch.Tensor, labels: torch.Tensor, segments: Segments, regions: int = 0
) -> dict[str, torch.Tensor]:
    """Compute the losses `recipe`, `end` and `text` of packed rows.

    Args:
        rows: The examples of each image; see `example_kinds`.
        logits: [L, V] of the answer tokens.
        labels: [L].
        segments: From `recipe_segments`.
        regions: Number of further region examples in each row.
    """
    kinds = example_kinds(rows, regions)
    recipes = logits[kinds == 0].unflatten(0, (len(rows), -1)), labels[kinds == 0].unflatten(0, (len(rows), -1))
    return {
        "recipe": recipe_loss(*recipes, segments),
        "end": cross_entropy(logits[kinds == 1], labels[kinds == 1]),
        "text": cross_entropy(logits[kinds == 2], labels[kinds == 2]),
    }


def example_kinds(rows: list[list[Example]], regions: int = 0) -> torch.Tensor:
    """Return what each answer token of packed rows belongs to: 0 recipe, 1 region, 2 text, 3 others; [L].

    Each row has an example of each of EXAMPLES, `regions` further regions, and others.
    """
    kinds = [min(kind, 2) for kind in range(len(EXAMPLES))] + [1] * regions
    kinds += [3] * (max(map(len, rows)) - len(kinds))
    return torch.tensor([kinds[index] for row in rows for index, example in enumerate(row) for _ in example.answer])


# Per segment of the grammar: token ids of its alternatives [n], soft targets [n, n], weight.
Segments = list[tuple[torch.Tensor, torch.Tensor, float]]


def recipe_segments(tokenizer: PreTrainedTokenizerFast, width: float = LEVEL_WIDTH) -> Segments:
    """Compile the recipe grammar for `recipe_loss`.

    The levels of an operation are ordered: neighbours of the true level share the target, as a Gaussian with a standard
    deviation of `width` levels. Words (looks) have hard targets.
    """
    segments = []
    crop = True
    for alternatives in grammar_segments():
        crop = crop and alternatives[0] != "; exposure"
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)[0] for text in alternatives])
        order = torch.arange(len(ids)).float()
        numbers = all(text.strip().lstrip("+-").isdigit() for text in alternatives)
        soft = torch.exp(-0.5 * ((order[:, None] - order[None]) / width) ** 2) if numbers else torch.eye(len(ids))
        segments.append((ids, soft / soft.sum(-1, keepdim=True), CROP_WEIGHT if crop else 1.0))
    return segments


def recipe_loss(logits: torch.Tensor, labels: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Return the weighted cross-entropy, summed over a recipe's tokens and averaged over recipes.

    Args:
        logits: [N, segments + 1, V].
        labels: [N, segments + 1], the end token last.
        segments: From `recipe_segments`.
    """
    log_probs = logits.log_softmax(-1)
    loss = -log_probs[:, -1].gather(1, labels[:, -1:]).mean()
    for index, (ids, soft, weight) in enumerate(segments):
        true = (labels[:, index, None] == ids[None]).int().argmax(1)
        loss = loss - weight * (soft[true] * log_probs[:, index, ids]).sum(-1).mean()
    return loss
