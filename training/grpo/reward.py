"""The reward function that TRL calls: the same scores that the playground shows. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recipes import parse
from rewards import REWARDS, RewardFunction, score_recipes
from training.runs.run import RunAborted

UNWEIGHTED_EVERY = 5  # calls between two computations of rewards with weight 0, which are only logged


@dataclass(frozen=True)
class RolloutGroup:
    """The rollouts for one photo in one step.

    Attributes:
        photo: Index of the photo.
        texts: The completions.
        scores: Score of each weighted reward; None for a text that is not a recipe.
        totals: The weighted totals, 0..1; None without a score.
    """

    photo: int
    texts: list[str]
    scores: list[dict[str, float | None] | None]
    totals: list[float | None]

    def advantages(self) -> list[float | None]:
        """Return (total - mean) / (standard deviation + 0.0001) in the group, as TRL's GRPOTrainer computes them."""
        known = [total for total in self.totals if total is not None]
        if len(known) < 2:
            return [None if total is None else 0.0 for total in self.totals]
        mean, deviation = float(np.mean(known)), float(np.std(known, ddof=1))
        return [None if total is None else (total - mean) / (deviation + 1e-4) for total in self.totals]

    @property
    def no_signal(self) -> bool:
        """Whether all totals are equal, so that the group has no advantage to learn from."""
        known = [total for total in self.totals if total is not None]
        return len(known) < 2 or float(np.std(known, ddof=1)) < 1e-8


@dataclass
class RecipeReward:
    """A reward function for TRL that renders and scores recipes.

    Attributes:
        photos: The training photos, uint8 RGB; completions refer to them by index.
        function: The weights of the rewards.
        group_size: Completions per photo. Rows come in blocks of this size, one photo per block.
        calls: Number of calls so far.
        component_means: For the log: mean of each reward in the last call (None: not computed or not applicable), the
            share of valid recipes ("valid") and the share of distinct completions per group ("distinct").
        groups: The rollouts of the last call, one group per photo.
    """

    photos: Sequence[np.ndarray]
    function: RewardFunction
    group_size: int
    calls: int = 0
    component_means: dict[str, float | None] = field(default_factory=dict)
    groups: list[RolloutGroup] = field(default_factory=list)
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2))
    __name__: str = "reward"

    def __call__(self, completions: list[Any], photo: list[int], **_: Any) -> list[float | None]:
        """Score completions.

        Args:
            completions: Texts, or chats with one message.
            photo: The index of each completion's photo.

        Returns:
            The weighted total of each completion, 0..1; None if it is not a recipe or no reward applies.

        Raises:
            RunAborted: A reward is not a finite number.
        """
        texts = [item if isinstance(item, str) else item[0]["content"] for item in completions]
        all_rewards = self.calls % UNWEIGHTED_EVERY == 0
        self.calls += 1
        names = [name for name in REWARDS if all_rewards or self.function.weights.get(name)]
        blocks = [slice(start, start + self.group_size) for start in range(0, len(texts), self.group_size)]

        def score_block(block: slice) -> list[dict[str, float | None] | None]:
            parsed = [parse(text) for text in texts[block]]
            recipes = [item.recipe for item in parsed if item.ok]
            scores = iter(score_recipes(self.photos[photo[block.start]], recipes, names) if recipes else [])
            return [next(scores).scores if item.ok else None for item in parsed]

        rows = [row for block_rows in self.threads.map(score_block, blocks) for row in block_rows]
        valid = [row for row in rows if row is not None]
        self.component_means = dict.fromkeys(REWARDS)
        for name in names:
            values = [value for row in valid if (value := row[name]) is not None]
            self.component_means[name] = float(np.mean(values)) if values else None
        self.component_means["valid"] = len(valid) / max(1, len(texts))
        groups = [texts[block] for block in blocks]
        self.component_means["distinct"] = float(np.mean([len(set(group)) / len(group) for group in groups]))
        totals = [None if row is None else self._total(row) for row in rows]
        self.groups = [RolloutGroup(photo[b.start], texts[b], rows[b], totals[b]) for b in blocks]
        return totals

    def _total(self, scores: dict[str, float | None]) -> float | None:
        total = self.function.total(scores)
        if total is not None and not np.isfinite(total):
            raise RunAborted(f"A reward returned {total}, which is not a finite number. The run was stopped.")
        return total
