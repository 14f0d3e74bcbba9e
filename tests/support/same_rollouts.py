"""`training.grpo` with sampling that depends only on the photo, the completion's index and the step.

One process and two then sample the same batch. Used by test_distributed.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from transformers import LogitsProcessor

from training.grpo.__main__ import main
from training.grpo.policy import Policy, image_fingerprint


class PerPhotoSampler(LogitsProcessor):
    """Samples each row's token with its own generator."""

    def __init__(self, seeds: list[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        noise = [torch.empty(scores.shape[1]).exponential_(generator=generator) for generator in self.generators]
        chosen = (scores.float() - torch.stack(noise).log()).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


call_numbers = itertools.count(1)


def generate(self: Policy, *args: Any, **kwargs: Any) -> Any:
    """Generate as `Policy.generate`, with rows seeded by their photo in the trainer's calls."""
    length = kwargs["input_ids"].shape[1]
    assert self.constraint is not None
    processors: list[LogitsProcessor] = [self.constraint.processor(length)]
    if kwargs.get("generation_config") is not None:  # the trainer's call; probes decode greedily
        call = next(call_numbers)
        keys = [image_fingerprint(p, t) for p, t in zip(kwargs["pixel_values"], kwargs["image_sizes"], strict=True)]
        seeds = [int.from_bytes(key[:4], "big") + 97 * keys[:row].count(key) + call for row, key in enumerate(keys)]
        processors.append(PerPhotoSampler(seeds))
    return super(Policy, self).generate(*args, logits_processor=processors, **kwargs)  # type: ignore[misc]


if __name__ == "__main__":
    Policy.generate = generate  # type: ignore[method-assign]
    main()
