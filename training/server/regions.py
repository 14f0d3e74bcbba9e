"""Sampling, log-probabilities and rewards of boxes and points, for the skills `detect` and `point`.

An object is represented by the bins of its coordinates: (x, y) for a point and (x, y, width, height) for a box, where
(x, y) is the centre.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rewards.image_metrics import box_iou
from training.grpo.policy import Policy

TOKENS_PER_OBJECT = {"detect": 3, "point": 2}
POINT_TOLERANCE = 0.05  # as a share of the photo's width and height
Bins = tuple[int, ...]
Region = dict[str, float]  # a box or a point, coordinates in 0..1


def sample_regions(
    policy: Policy,
    inputs: dict[str, torch.Tensor],
    image_features: torch.Tensor,
    skill: str,
    count: int,
    **settings: Any,
) -> list[list[Bins]]:
    """Sample lists of objects in one photo.

    Args:
        policy: The model.
        inputs: The processed prompt, one row.
        image_features: The photo's features, [1, T, D].
        skill: "detect" or "point".
        count: Number of lists to sample.
        **settings: `max_objects` and `temperature`, as `Policy.detect` and `Policy.point` take them.

    Returns:
        `count` lists of objects.
    """
    generate = policy.detect if skill == "detect" else policy.point
    samples = generate(
        inputs["input_ids"],
        inputs["attention_mask"],
        image_features=image_features,
        num_return_sequences=count,
        **settings,
    )
    return [[region_to_bins(policy, region) for region in regions] for regions in samples]


def region_to_bins(policy: Policy, region: Region) -> Bins:
    """Return the nearest bins of a box or a point."""
    heads = policy.model.region
    if "x" in region:
        centre, size = (region["x"], region["y"]), ()
    else:
        centre = ((region["x_min"] + region["x_max"]) / 2, (region["y_min"] + region["y_max"]) / 2)
        size = (region["x_max"] - region["x_min"], region["y_max"] - region["y_min"])
    coordinate_bins = heads.coordinate_to_bin(torch.tensor(centre)).tolist()
    size_bins = heads.size_to_bin(torch.tensor(size)).tolist() if size else []
    return (*coordinate_bins, *size_bins)


def bins_to_region(policy: Policy, bins: Bins) -> Region:
    """Return the box or the point of these bins; boxes are clipped to the photo."""
    heads = policy.model.region
    x, y = heads.bin_to_coordinate(torch.tensor(bins[:2])).tolist()
    if len(bins) == 2:
        return {"x": x, "y": y}
    width, height = heads.bin_to_size(torch.tensor(bins[2:])).tolist()
    sides = {"x_min": x - width / 2, "y_min": y - height / 2, "x_max": x + width / 2, "y_max": y + height / 2}
    return {name: min(1.0, max(0.0, side)) for name, side in sides.items()}


def region_log_probs(
    policy: Policy, prompt: torch.Tensor, image_features: torch.Tensor, objects: Sequence[Bins], ended: bool, skill: str
) -> torch.Tensor:
    """Compute the log-probability of every choice made in a list of objects.

    The choices of an object are that the list continues, its coordinates and, for a box, its size.

    Args:
        policy: The model.
        prompt: Token ids of the prompt, [1, P].
        image_features: The photo's features, [1, T, D].
        objects: The objects, in the order in which they were sampled.
        ended: Whether the model ended the list itself; that choice is then the last one.
        skill: "detect" or "point".

    Returns:
        Log-probabilities at the policy's temperature, [K].
    """
    heads = policy.model.region
    embeddings = policy.model.embed(prompt, image_features)
    object_embeddings = embeddings[0, :0]
    if objects:
        object_embeddings = torch.stack([row for bins in objects for row in _embed_object(policy, bins)])
    full = torch.cat([embeddings, object_embeddings[None].to(embeddings)], 1)
    prefix = torch.nn.functional.pad(policy.model.prefix_mask(prompt, None).long(), (0, len(object_embeddings)))
    outputs = policy.model(inputs_embeds=full, attention_mask=torch.ones_like(prefix), token_type_ids=prefix)
    hidden = outputs.pre_norm_hidden_state[0, prompt.shape[1] - 1 :]

    def log_prob(logits: torch.Tensor, chosen: int) -> torch.Tensor:
        return (logits.float() / policy.temperature).log_softmax(-1)[chosen]

    def end_log_prob(state: torch.Tensor) -> torch.Tensor:
        return log_prob(policy.lm_head(policy.model.text.post_ln(state)), policy.config.eos_id)

    log_probs = []
    for index, bins in enumerate(objects):
        states = hidden[index * TOKENS_PER_OBJECT[skill] :]
        log_probs.append(torch.log1p(-end_log_prob(states[0]).exp().clamp(max=1 - 1e-6)))
        log_probs += [log_prob(heads.decode_coordinate(states[axis]), bins[axis]) for axis in (0, 1)]
        if skill == "detect":
            size_logits = heads.decode_size(states[2])
            log_probs += [log_prob(size_logits[axis], bins[2 + axis]) for axis in (0, 1)]
    if ended:
        log_probs.append(end_log_prob(hidden[len(objects) * TOKENS_PER_OBJECT[skill]]))
    return torch.stack(log_probs)


def _embed_object(policy: Policy, bins: Bins) -> list[torch.Tensor]:
    """Return the input embeddings of an object: one per coordinate and, for a box, one for its size."""
    heads = policy.model.region
    embeddings = [heads.encode_coordinate(heads.bin_to_coordinate(torch.tensor([value]))) for value in bins[:2]]
    if len(bins) == 4:
        embeddings.append(heads.encode_size(heads.bin_to_size(torch.tensor(bins[2:]))))
    return embeddings


def region_reward(predicted: Sequence[Region], truth: Sequence[Region]) -> float:
    """Score predicted boxes or points against the ground truth.

    Predictions and true regions are matched greedily, one to one. A pair of boxes scores its intersection over union;
    a point scores 1 inside a true box or within POINT_TOLERANCE of a true point. Unmatched regions score 0.

    Args:
        predicted: Boxes or points.
        truth: The true boxes or points.

    Returns:
        The mean score over the larger of the two lists, 0..1; 1 if both are empty.
    """
    if not predicted or not truth:
        return float(not predicted and not truth)
    pairs = [(_match_score(p, t), i, j) for i, p in enumerate(predicted) for j, t in enumerate(truth)]
    total, used, matched = 0.0, set(), set()
    for score, i, j in sorted(pairs, reverse=True):
        if i not in used and j not in matched:
            total, used, matched = total + score, used | {i}, matched | {j}
    return total / max(len(predicted), len(truth))


def _match_score(predicted: Region, true: Region) -> float:
    if "x" in predicted and "x" in true:
        return float(max(abs(predicted["x"] - true["x"]), abs(predicted["y"] - true["y"])) <= POINT_TOLERANCE)
    if "x" in predicted:
        inside = true["x_min"] <= predicted["x"] <= true["x_max"] and true["y_min"] <= predicted["y"] <= true["y_max"]
        return float(inside)
    first, second = (tuple(box[side] for side in ("x_min", "y_min", "x_max", "y_max")) for box in (predicted, true))
    return box_iou(first, second)
