"""The reward of a run: the very numbers that the playground shows for the same candidates. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recipes import parse
from rewards import REWARDS, RewardFunction, score_recipes
from training.runs.run import RunAborted

ALL_PARTS_EVERY = 5  # steps: rewards that weigh nothing are computed only now and then


@dataclass
class Scorer:
    """The reward that TRL asks for: the very numbers that the playground shows for the same candidates.

    Rows come in blocks of `group` answers to one photo. Beside the total the parts are kept for the log.
    """

    photos: Sequence[np.ndarray]
    function: RewardFunction
    group: int
    calls: int = 0
    parts: dict[str, float | None] = field(default_factory=dict)
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2))
    __name__: str = "reward"

    def __call__(self, completions: list[Any], photo: list[int], **_: Any) -> list[float | None]:
        """One total per completion; None for an answer that is no recipe. Raises whatever a reward raises."""
        texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
        everything = self.calls % ALL_PARTS_EVERY == 0
        self.calls += 1
        names = [name for name in REWARDS if everything or self.function.weights.get(name)]
        blocks = [slice(start, start + self.group) for start in range(0, len(texts), self.group)]
        scored = list(self.threads.map(lambda block: self._block(texts[block], photo[block.start], names), blocks))
        self._keep(texts, [row for block in scored for row in block], names)
        return [None if row is None else _finite(self.function.total(row)) for block in scored for row in block]

    def _block(self, texts: list[str], photo: int, names: Sequence[str]) -> list[dict[str, float | None] | None]:
        parsed = [parse(text) for text in texts]
        recipes = [one.recipe for one in parsed if one.ok]
        scores = iter(score_recipes(self.photos[photo], recipes, names) if recipes else [])
        return [next(scores).scores if one.ok else None for one in parsed]

    def _keep(self, texts: list[str], rows: list[dict[str, float | None] | None], names: Sequence[str]) -> None:
        read = [row for row in rows if row is not None]
        groups = [texts[start : start + self.group] for start in range(0, len(texts), self.group)]
        self.parts = dict.fromkeys(REWARDS)
        for name in names:
            known = [value for row in read if (value := row[name]) is not None]
            self.parts[name] = float(np.mean(known)) if known else None
        self.parts["valid"] = len(read) / max(1, len(texts))
        self.parts["distinct"] = float(np.mean([len(set(group)) / len(group) for group in groups]))


def _finite(total: float | None) -> float | None:
    if total is not None and not np.isfinite(total):
        raise RunAborted(f"A reward gave {total}, which is no number. The run stops rather than learn from it.")
    return total
