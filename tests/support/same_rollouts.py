"""`training.grpo` with answers that depend on the photo, the candidate's number and the step alone, not on who draws
them: so that one process and two have the same batch. Used by test_distributed.py."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor

from training.grpo import train as grpo
from training.grpo.policy import Policy, _fingerprint


class DrawByPhoto(LogitsProcessor):
    """Draws each row's token with a generator seeded by the row's photo and its place in the group."""

    def __init__(self, seeds: list[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        waits = [torch.empty(scores.shape[1]).exponential_(generator=generator) for generator in self.generators]
        drawn = (scores.float() - torch.stack(waits).log()).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


calls = 0


def generate(self: Policy, *args: Any, **kwargs: Any) -> Any:
    """As Policy.generate, with rows drawn by photo where several answers are drawn."""
    global calls
    length = kwargs["input_ids"].shape[1]
    assert self.constraint is not None
    processors: list[LogitsProcessor] = [self.constraint.processor(length)]
    if kwargs.get("generation_config") is not None:  # the trainer's call; probes are greedy
        calls += 1
        keys = [_fingerprint(p, t) for p, t in zip(kwargs["pixel_values"], kwargs["image_sizes"], strict=True)]
        seeds = [int.from_bytes(key[:4], "big") + 97 * keys[:row].count(key) + calls for row, key in enumerate(keys)]
        processors.append(DrawByPhoto(seeds))
    return super(Policy, self).generate(*args, logits_processor=processors, **kwargs)  # type: ignore[misc]


if __name__ == "__main__":
    Policy.generate = generate  # type: ignore[method-assign]
    grpo.main()
