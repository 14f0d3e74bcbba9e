"""Cost of fine-tuning on Moondream's tuning API: an upper bound before a run, and the amount spent during it."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field

from inference.hosted.backend import IMAGE_TOKENS
from inference.types import recipe_prompt
from training.runs.run import PROBE_PHOTOS, RunConfig
from usage.prices import Prices

PHOTO_TOKENS = IMAGE_TOKENS + 5  # of an image of any size, and of the query template
CHARACTERS_PER_TOKEN = 3.5  # of English, on the low side so that the cost is not underestimated
MAX_TOKENS = 128  # per answer; a recipe has about 40


def estimate_tokens(text: str) -> int:
    """Estimate the number of tokens in a text."""
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)


@dataclass
class CostTracker:
    """Estimates and sums the cost of one run in US dollars. Methods return None if a price is not known.

    Prices of rollouts and of tuned models are not published; they are assumed to equal the base model's.

    Attributes:
        base: Name of the base model.
        question: The prompt that is sent with each photo.
        prices: The price table.
        dollars: Amount spent so far.
        tokens_in: Input tokens of the calls so far, estimated; likewise `tokens_out`. An update has those of its
            answers.
    """

    base: str
    question: str = field(default_factory=recipe_prompt)
    prices: Prices = field(default_factory=Prices)
    dollars: float = 0.0
    tokens_in: int = 0
    tokens_out: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    @property
    def priced(self) -> bool:
        """Whether the prices of inference and training are known."""
        return self.inference_cost(0, 0) is not None and self.training_cost(0, 0) is not None

    def inference_cost(self, count: int, tokens_out: int) -> float | None:
        """Return the cost of generating `count` answers with `tokens_out` tokens in total."""
        return self.prices.call(self.base, count * (PHOTO_TOKENS + estimate_tokens(self.question)), tokens_out)

    def training_cost(self, count: int, tokens_out: int) -> float | None:
        """Return the cost of training on `count` answers with `tokens_out` tokens in total."""
        return self.prices.train(self.base, count * (PHOTO_TOKENS + estimate_tokens(self.question)) + tokens_out)

    def max_step_cost(self, config: RunConfig) -> float | None:
        """Return the maximum cost of a GRPO step: its rollouts and its update."""
        count = config.photos_per_step * config.rollouts
        rollouts = self.inference_cost(count, count * MAX_TOKENS)
        update = self.training_cost(count, count * MAX_TOKENS)
        return None if rollouts is None or update is None else rollouts + update

    def max_evaluation_cost(self, photos: int) -> float | None:
        """Return the maximum cost of answering `photos` photos once each."""
        return self.inference_cost(photos, photos * MAX_TOKENS)

    def max_cost(self, config: RunConfig, held_out: int) -> float | None:
        """Return the maximum cost of a run.

        Args:
            config: The run's settings.
            held_out: Number of held-out photos, on which base and tuned model are evaluated.
        """
        sft_step = self.training_cost(config.photos_per_step, config.photos_per_step * MAX_TOKENS)
        step = self.max_step_cost(config)
        probe = self.max_evaluation_cost(min(PROBE_PHOTOS, held_out))
        evaluation = self.max_evaluation_cost(2 * held_out)
        if step is None or probe is None or evaluation is None or sft_step is None:
            return None
        probes = math.ceil(config.steps / config.probe_every) + 1
        return config.steps * step + config.sft_steps * sft_step + probes * probe + evaluation

    def add_inference(self, count: int, tokens_out: int) -> None:
        """Add the cost and the tokens of `count` answers with `tokens_out` tokens in total. Safe in several threads."""
        self._add(self.inference_cost(count, tokens_out), count, tokens_out)

    def add_training(self, count: int, tokens_out: int) -> None:
        """Add the cost and the tokens of an update on `count` answers with `tokens_out` tokens in total."""
        self._add(self.training_cost(count, tokens_out), count, tokens_out)

    def _add(self, dollars: float | None, count: int, tokens_out: int) -> None:
        with self._lock:
            self.dollars += dollars or 0.0
            self.tokens_in += count * (PHOTO_TOKENS + estimate_tokens(self.question))
            self.tokens_out += tokens_out
