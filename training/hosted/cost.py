"""What a fine-tune on Moondream's tuning API costs: an upper bound before it, and the running sum."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from inference.types import recipe_prompt
from training.runs.run import RunConfig
from usage.prices import Prices

IMAGE_TOKENS = 735  # 730 of a photo, whatever its size, and the template of a question
CHARACTERS = 3.5  # per token of English, on the low side: an estimate should not be too small
MAX_TOKENS = 128  # of an answer; a recipe takes some forty
WATCHED = 8  # held-out photos that are answered along the way


def tokens(text: str) -> int:
    """A text's tokens, estimated."""
    return math.ceil(len(text) / CHARACTERS)


@dataclass
class Spend:
    """US dollars of one run, by the dated table of prices. Prices of rollouts and of tuned models are not published:
    they are taken for those of the base (an assumption). None where even that is not known."""

    base: str
    question: str = field(default_factory=recipe_prompt)
    prices: Prices = field(default_factory=Prices)
    dollars: float = 0.0

    def answers(self, count: int, tokens_out: int) -> float | None:
        """`count` answers of so many tokens together."""
        return self.prices.call(self.base, count * (IMAGE_TOKENS + tokens(self.question)), tokens_out)

    def learning(self, count: int, tokens_out: int) -> float | None:
        """A training step over `count` answers of so many tokens together."""
        return self.prices.train(self.base, count * (IMAGE_TOKENS + tokens(self.question)) + tokens_out)

    def step(self, config: RunConfig) -> float | None:
        """What a step costs at most."""
        count = config.photos_per_step * config.rollouts
        longest = count * MAX_TOKENS
        return _sum(self.answers(count, longest), self.learning(count, longest))

    def judging(self, photos: int) -> float | None:
        """What answering so many photos costs at most."""
        return self.answers(photos, photos * MAX_TOKENS)

    def bound(self, config: RunConfig, held_out: int) -> float | None:
        """What a whole run costs at most: steps, probes, and base and tuned model on the held-out photos."""
        examples = self.learning(config.photos_per_step, config.photos_per_step * MAX_TOKENS)
        probes = math.ceil(config.steps / config.probe_every) + 1
        step, probe, judged = self.step(config), self.judging(min(WATCHED, held_out)), self.judging(2 * held_out)
        if step is None or probe is None or judged is None or examples is None:
            return None
        return config.steps * step + config.sft_steps * examples + probes * probe + judged

    def add(self, dollars: float | None) -> None:
        """Counts what was spent, where it is known."""
        self.dollars += dollars or 0.0


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other
