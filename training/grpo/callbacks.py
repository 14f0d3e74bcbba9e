"""The trainer callback that records a run's metrics and probe answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import TrainerCallback

from training.data.sources import PhotoSet
from training.evaluate import ScoredAnswer, reward_totals
from training.grpo.alarms import AlarmMonitor
from training.grpo.result import format_log_line
from training.grpo.reward import RecipeReward
from training.grpo.rollouts import record_rollouts
from training.runs.run import PROBE_PHOTOS, Run, RunConfig


class RunCallback(TrainerCallback):
    """Writes metrics, probe answers, alarms and progress to the run's folder, and stops a cancelled run's trainer.

    Args:
        run: The run.
        config: Its config.
        evaluate_photos: Returns the policy's scored greedy answers to photos.
        reward: The reward function, whose component means are logged.
        held_out: The held-out photos. The first PROBE_PHOTOS are answered every `config.probe_every` steps.
    """

    def __init__(
        self,
        run: Run,
        config: RunConfig,
        evaluate_photos: Callable[[Sequence[np.ndarray]], list[ScoredAnswer]],
        reward: RecipeReward,
        held_out: PhotoSet,
    ) -> None:
        self.run, self.config, self.evaluate_photos, self.reward = run, config, evaluate_photos, reward
        self.photos, self.names = held_out.photos[:PROBE_PHOTOS], held_out.names[:PROBE_PHOTOS]
        self.alarms = AlarmMonitor(run, reward.function, held_out)
        self.started = time.monotonic()
        self.held_out_mean: float | None = None  # of the last probe, until it is logged

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Append one row of metrics per step."""
        if not state.is_world_process_zero or not logs or "reward" not in logs:
            return
        row = {"step": state.global_step, "seconds": round(time.monotonic() - self.started, 2)}
        row |= {name: logs[name] for name in ("reward", "kl", "entropy", "learning_rate") if name in logs}
        # Tokens of all prompts and answers so far, and the mean length of this step's answers.
        row |= {"tokens": logs.get("num_tokens"), "answer_tokens": logs.get("completions/mean_length")}
        row |= {"no_signal": logs.get("frac_reward_zero_std"), **self.reward.component_means}
        if self.held_out_mean is not None:
            row["held_out"], self.held_out_mean = self.held_out_mean, None
        self.run.append_metrics(row)
        record_rollouts(self.run, state.global_step, self.reward)
        print(format_log_line(row, state.max_steps), flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop a cancelled run, probe the policy if it is due, and record the progress."""
        if self.run.cancelled:
            control.should_training_stop = True
        if not state.is_world_process_zero:
            return
        if state.global_step % self.config.probe_every == 0:
            self.probe(state.global_step)
        self.run.set_status(step=state.global_step)

    def probe(self, step: int) -> None:
        """Evaluate the policy on the probe photos, record its answers, and raise alarms."""
        answers = self.evaluate_photos(self.photos)
        self.held_out_mean = float(np.nanmean(reward_totals(answers, self.reward.function)))
        first = answers[0]
        self.run.append_probe(
            {
                "step": step,
                "photo": self.names[0],
                "recipe": str(first.recipe),
                "scores": first.scores,
                "total": self.reward.function.total(first.scores),
                "held_out": self.held_out_mean,
                **self.alarms.measure(answers),
            }
        )
        self.alarms.check(step)
