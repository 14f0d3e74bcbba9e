"""Boxes and points as a tuning server learns them: drawing, how likely they are, and rewards against the truth.

An object is the bins that were chosen for it: (x, y) for a point, (x, y, width, height) for a box, x and y its centre.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from training.grpo.policy import Policy

STEPS = {"detect": 3, "point": 2}
NEAR = 0.05  # of the photo's width and height: a point as near as this to a true one is on it
Bins = tuple[int, ...]
Shares = dict[str, float]


def write(
    policy: Policy, inputs: dict[str, torch.Tensor], features: torch.Tensor, skill: str, count: int, **how: Any
) -> list[list[Bins]]:
    """So many lists of objects for one photo; `how`: max_objects and temperature of `detect` and `point`."""
    find = policy.detect if skill == "detect" else policy.point
    found = find(
        inputs["input_ids"], inputs["attention_mask"], image_features=features, num_return_sequences=count, **how
    )
    return [[bins_of(policy, region) for region in regions] for regions in found]


def bins_of(policy: Policy, region: Shares) -> Bins:
    """The bins nearest to a box or a point, in shares of the photo."""
    heads = policy.model.region
    if "x" in region:
        centre, size = (region["x"], region["y"]), ()
    else:
        centre = ((region["x_min"] + region["x_max"]) / 2, (region["y_min"] + region["y_max"]) / 2)
        size = (region["x_max"] - region["x_min"], region["y_max"] - region["y_min"])
    places = heads.coordinate_bin(torch.tensor(centre))
    sizes = heads.size_bin(torch.tensor(size)) if size else torch.tensor([], dtype=torch.long)
    return (*places.tolist(), *sizes.tolist())


def region_of(policy: Policy, bins: Bins) -> Shares:
    """A box or a point in shares of the photo, clipped to it."""
    heads = policy.model.region
    x, y = heads.coordinate_of(torch.tensor(bins[:2])).tolist()
    if len(bins) == 2:
        return {"x": x, "y": y}
    width, height = heads.size_of(torch.tensor(bins[2:])).tolist()
    sides = {"x_min": x - width / 2, "y_min": y - height / 2, "x_max": x + width / 2, "y_max": y + height / 2}
    return {name: min(1.0, max(0.0, side)) for name, side in sides.items()}


def score(
    policy: Policy, prompt: torch.Tensor, features: torch.Tensor, objects: Sequence[Bins], ended: bool, skill: str
) -> torch.Tensor:
    """The log-probability [K] of each choice that was made: for an object that there is one more, its coordinates and
    its size, and at last, where it ended by itself, that there is none more."""
    heads, steps = policy.model.region, STEPS[skill]
    embeds = policy.model.embed(prompt, features)
    fed = torch.stack([one for bins in objects for one in _fed(policy, bins)]) if objects else embeds[0, :0]
    whole = torch.cat([embeds, fed[None].to(embeds)], 1)
    prefix = torch.nn.functional.pad(policy.model.prefix_of(prompt, None).long(), (0, len(fed)))
    out = policy.model(inputs_embeds=whole, attention_mask=torch.ones_like(prefix), token_type_ids=prefix)
    hidden = out.pre_norm_hidden_state[0, prompt.shape[1] - 1 :]

    def likely(logits: torch.Tensor, chosen: int) -> torch.Tensor:
        return (logits.float() / policy.temperature).log_softmax(-1)[chosen]

    def none_more(state: torch.Tensor) -> torch.Tensor:
        return likely(policy.lm_head(policy.model.text.post_ln(state)), policy.config.eos_id)

    told = []
    for place, bins in enumerate(objects):
        at = hidden[place * steps :]
        told.append(torch.log1p(-none_more(at[0]).exp().clamp(max=1 - 1e-6)))
        told += [likely(heads.decode_coordinate(at[axis]), bins[axis]) for axis in (0, 1)]
        if skill == "detect":
            sizes = heads.decode_size(at[2])
            told += [likely(sizes[axis], bins[2 + axis]) for axis in (0, 1)]
    if ended:
        told.append(none_more(hidden[len(objects) * steps]))
    return torch.stack(told)


def _fed(policy: Policy, bins: Bins) -> list[torch.Tensor]:
    """The embeddings by which an object's choices are told to the model."""
    heads = policy.model.region
    fed = [heads.encode_coordinate(heads.coordinate_of(torch.tensor([one]))) for one in bins[:2]]
    return fed + ([heads.encode_size(heads.size_of(torch.tensor(bins[2:])))] if len(bins) == 4 else [])


def reward(found: Sequence[Shares], truth: Sequence[Shares]) -> float:
    """0..1: of boxes against boxes their overlap (intersection over union), of points how many are in a box or near a
    true point; each true one counts once, and what is too much or missing counts as nothing."""
    if not found or not truth:
        return float(not found and not truth)
    pairs = sorted(((_fits(a, b), i, j) for i, a in enumerate(found) for j, b in enumerate(truth)), reverse=True)
    total, used, met = 0.0, set(), set()
    for fit, i, j in pairs:
        if i not in used and j not in met:
            total, used, met = total + fit, used | {i}, met | {j}
    return total / max(len(found), len(truth))


def _fits(found: Shares, true: Shares) -> float:
    if "x" in found and "x" in true:
        return float(max(abs(found["x"] - true["x"]), abs(found["y"] - true["y"])) <= NEAR)
    if "x" in found:
        inside = true["x_min"] <= found["x"] <= true["x_max"] and true["y_min"] <= found["y"] <= true["y_max"]
        return float(inside)
    width = min(found["x_max"], true["x_max"]) - max(found["x_min"], true["x_min"])
    height = min(found["y_max"], true["y_max"]) - max(found["y_min"], true["y_min"])
    train_eval_split = max(0.0, width) * max(0.0, height)
    return train_eval_split / max(1e-9, _area(found) + _area(true) - train_eval_split)


def _area(box: Shares) -> float:
    return max(0.0, box["x_max"] - box["x_min"]) * max(0.0, box["y_max"] - box["y_min"])
