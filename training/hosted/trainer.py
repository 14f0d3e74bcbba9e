"""Fine-tuning on Moondream's tuning API: weights are updated on the server, recipes are rendered and scored locally.

Rewards are computed by the same code as on screen. `hosted.json` in the run's folder holds the finetune's id and its
step, so that a killed run continues where the finetune stands; `calls.jsonl` holds what was paid. The API key is read
from the environment and never stored.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import SecretStr

from inference.hosted.client import CloudError, MoondreamClient, photo_data_url
from inference.types import CLOUD_URL, DEFAULT_RATE, RECIPE_QUESTION, recipe_prompt
from recipes import Recipe, parse, random_recipe, save_picture
from rewards import score_recipes
from storage.files import write_atomically
from training.data.sources import PhotoSourceError, mix_flawed, train_eval_split
from training.evaluate import ScoredAnswer, reward_totals, score_answer
from training.grpo.alarms import AlarmMonitor
from training.grpo.result import build_result, format_log_line
from training.grpo.reward import RecipeReward
from training.grpo.rollouts import record_rollouts
from training.hosted.billing import BillingAccount, PaidCalls
from training.hosted.client import (
    MAX_ROLLOUTS,
    MIN_REWARD_RANGE,
    RANKS,
    Rollouts,
    TuningClient,
    rl_group,
    sft_group,
)
from training.hosted.cost import MAX_TOKENS, CostTracker, estimate_tokens
from training.runs.run import PROBE_PHOTOS, Run, RunAborted, RunConfig
from usage.prices import PriceError, Prices

CONCURRENT_REQUESTS = 4  # the client's rate limiter bounds the requests per second
SFT_CANDIDATES = 8  # random recipes per photo, the best of which becomes a supervised example
ANSWERS_PER_CALL = 8  # answers of an evaluation between two checks of the budget

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class HostedRunState:
    """Progress of a hosted run, stored in `hosted.json`.

    Attributes:
        finetune_id: The finetune's id on the server.
        step: The finetune's step.
        done: GRPO steps of this run, including those without an update.
        best: Best mean reward on held-out photos so far.
        saved: Step of the checkpoint with the best mean reward, 0 without one.
        dollars: Estimated amount spent.
        twice: Updates that were applied in excess by repeated requests.
        silent: Groups without a learning signal.
        groups: Groups sampled.
        base: The base model's answers to the held-out photos, which are paid for once.
        tuned: The answers of the checkpoint `saved`, likewise.
    """

    finetune_id: str = ""
    step: int = 0
    done: int = 0
    best: float = -1.0
    saved: int = 0
    dollars: float = 0.0
    twice: int = 0
    silent: int = 0
    groups: int = 0
    base: list[str] = field(default_factory=list)
    tuned: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, run: Run) -> HostedRunState:
        """Read the state of a run; a new state if there is none."""
        try:
            return cls(**json.loads((run.folder / "hosted.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return cls()

    def save(self, run: Run) -> None:
        """Write the state. Raises OSError."""
        write_atomically(run.folder / "hosted.json", json.dumps(asdict(self)))


def has_api_key() -> bool:
    """Whether the deployment has its own Moondream API key."""
    return bool(os.environ.get("MOONDREAM_API_KEY", "").strip())


def client_from_env() -> MoondreamClient:
    """Build a client from MOONDREAM_API_KEY, MOONDREAM_API_URL and MOONDREAM_RATE. Raises RunAborted."""
    key = os.environ.get("MOONDREAM_API_KEY", "").strip()
    url = os.environ.get("MOONDREAM_API_URL", "").strip().rstrip("/") or CLOUD_URL
    if not key and url == CLOUD_URL:
        raise RunAborted("Moondream's tuning API needs a key. Set MOONDREAM_API_KEY, or enter yours in the form.")
    try:
        rate = float(os.environ.get("MOONDREAM_RATE", "").strip() or DEFAULT_RATE)
        return MoondreamClient(url, SecretStr(key) if key else None, rate)
    except ValueError as error:
        raise RunAborted(f"The Moondream server cannot be used: {error}") from None


def train_hosted(run: Run, config: RunConfig, set_phase: Callable[[str], None]) -> dict[str, Any] | None:
    """Execute a run on the tuning API.

    Args:
        run: The run.
        config: Its settings.
        set_phase: Called with a description of each phase.

    Returns:
        The content of result.json, or None if the run was cancelled.

    Raises:
        RunPaused: If the deployment's budget is spent or cannot be checked.
        RunAborted: If the run cannot continue. Errors of rewards and disk are passed on.
    """
    server, account, prices = client_from_env(), BillingAccount.from_env(os.environ), _prices_from_env()
    try:
        return HostedTrainer(run, config, server, set_phase, account, prices).train()
    except CloudError as error:
        message = f"{error.message} Resume the run when the problem is solved; its progress is kept."
        raise RunAborted(message) from None
    except PhotoSourceError as error:
        raise RunAborted(str(error)) from None


class HostedTrainer:
    """GRPO loop of one run: rollouts and updates on the server, rewards computed here.

    Args:
        run: The run.
        config: Its settings.
        server: HTTP client.
        set_phase: Called with a description of each phase.
        account: Where paid calls are checked and recorded; None if no deployment started the run.
        prices: The price table.
    """

    def __init__(
        self,
        run: Run,
        config: RunConfig,
        server: MoondreamClient,
        set_phase: Callable[[str], None],
        account: BillingAccount | None = None,
        prices: Prices | None = None,
    ) -> None:
        if config.rank not in RANKS:
            raise RunAborted(f"The tuning API supports ranks {', '.join(map(str, RANKS))}, not {config.rank}.")
        if config.rollouts > MAX_ROLLOUTS:
            raise RunAborted(f"The tuning API samples at most {MAX_ROLLOUTS} rollouts at once, not {config.rollouts}.")
        self.run, self.config, self.server, self.set_phase = run, config, server, set_phase
        photos, self.held_out = train_eval_split(config.photos, config.held_out, config.max_photos, config.seed)
        self.photos = mix_flawed(photos, config.seed)
        # moondream-tiny was trained on a short question; other models need the grammar in the prompt.
        self.question = RECIPE_QUESTION if config.base.startswith("moondream-tiny") else recipe_prompt()
        self.reward = RecipeReward(self.photos.photos, config.reward_function, config.rollouts)
        self.alarms = AlarmMonitor(run, config.reward_function, self.held_out)
        self.state = HostedRunState.load(run)
        self.costs = CostTracker(config.base, self.question, prices or Prices(), self.state.dollars)
        self.calls = PaidCalls(run, self.costs, account)
        self.started = time.monotonic()
        self.threads = ThreadPoolExecutor(CONCURRENT_REQUESTS)

    def train(self) -> dict[str, Any] | None:
        """Execute the run; see `train_hosted`."""
        self.set_phase("opening the finetune")
        self.tuning = self._open_finetune()
        self.run.truncate_after(self.state.done)
        self.run.set_status(step=self.state.done, steps=self.config.steps)
        save_picture(self.held_out.photos[0], Recipe(), self.run.folder / "probe.png")
        self.set_phase("evaluating the base model")
        base = self.evaluate_base()
        if self.state.done == 0:
            self._train_on_examples()
            self._probe(0)
        self.set_phase("training")
        while self.state.done < self.config.steps and not self.run.cancelled and self._budget_allows_step():
            self._step()
        if self.run.cancelled:
            return None
        if not self.state.saved:
            raise RunAborted(
                "Nothing was learned: no update was applied. Choose other photos, or a higher temperature or budget."
            )
        self.set_phase("evaluating the tuned model")
        model = self.tuning.model(self.state.saved, self.config.base)
        tuned = self._evaluate(model, self.state.tuned)
        self.state.dollars = self.costs.dollars
        result = build_result(self.run, self.config.base, self.config.reward_function, self.held_out, base, tuned)
        if self.state.done < self.config.steps:
            result["alarm"] = result["alarm"] or f"The budget ended the run after {self.state.done} steps."
        facts = {key: getattr(self.state, key) for key in ("finetune_id", "dollars", "twice", "silent", "groups")}
        return result | {"model": model, **facts}

    def _open_finetune(self) -> TuningClient:
        """Create the run's finetune, or open it and catch up with its step, which may be ahead of the stored one."""
        if not self.state.finetune_id:
            tuning = TuningClient.create(self.server, f"playground-{self.run.id}", self.config.rank)
            self.state.finetune_id = tuning.finetune_id
            self.state.save(self.run)
            return tuning
        tuning = TuningClient.open(self.server, self.state.finetune_id)
        step = tuning.step()
        if step > self.state.step:
            print(f"The finetune is at step {step}, ahead of the stored step {self.state.step}. Continuing from there.")
            self.state.done += min(1, step - self.state.step) if self.state.step >= self.config.sft_steps else 0
            self.state.twice += max(0, step - self.state.step - 1)
            self.state.step = step
        return tuning

    # ── Training ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _step(self) -> None:
        """Sample rollouts for a few photos, score them, update the weights and log the step."""
        number = self.state.done + 1
        rng = np.random.default_rng([self.config.seed, number])
        photo_count = min(self.config.photos_per_step, len(self.photos.photos))
        indices = [int(index) for index in rng.choice(len(self.photos.photos), photo_count, replace=False)]
        with self.calls.call("recipe", photo_count * self.config.rollouts) as call:
            groups = self._map(self._sample_rollouts, indices)
            texts = [text for group in groups for text in group.texts]
            rewards = self.reward(texts, [index for index in indices for _ in range(self.config.rollouts)])
            call.reward = _mean(rewards)
        payload, tokens_out = [], 0
        for index, group in enumerate(groups):
            start = index * self.config.rollouts
            group_rewards = _fill_missing(rewards[start : start + self.config.rollouts], group.texts)
            if np.ptp(group_rewards) > MIN_REWARD_RANGE:
                payload.append(rl_group(group, group_rewards))
                tokens_out += _tokens_out(group)
        silent = len(groups) - len(payload)
        kl = self._update(payload, len(payload) * self.config.rollouts, tokens_out, number) if payload else None
        self.state.done = number
        self.state.groups += len(groups)
        self.state.silent += silent
        self._log_step(number, rewards, silent / len(groups), kl)
        record_rollouts(self.run, number, self.reward)
        if number % self.config.probe_every == 0 or number == self.config.steps:
            self._probe(number)
        self._save_state()
        self.run.set_status(step=number)

    def _sample_rollouts(self, index: int) -> Rollouts:
        url = photo_data_url(self.photos.photos[index])
        rollouts = self.tuning.rollouts(url, self.question, self.config.rollouts, self.config.temperature, MAX_TOKENS)
        self.costs.add_inference(len(rollouts.texts), _tokens_out(rollouts))
        return rollouts

    def _update(self, groups: Sequence[dict[str, Any]], answers: int, tokens_out: int, done: int) -> float | None:
        """Apply one update; return its KL divergence if the server reports it.

        Args:
            groups: The groups to train on.
            answers: Number of answers in them.
            tokens_out: Number of their tokens.
            done: GRPO steps done afterwards, stored together with the update, so that a killed run repeats nothing.
        """
        with self.calls.call("train_step", answers):
            try:
                result = self.tuning.train_step(groups, self.config.learning_rate, self.state.step)
            except CloudError as error:
                if error.uncertain:
                    self.costs.add_training(answers, tokens_out)
                raise
            for _ in range(1 + result.extra_steps):
                self.costs.add_training(answers, tokens_out)
        if result.response_lost:
            print("The response to this step was lost, but the finetune advanced; the step was not sent again.")
        if result.extra_steps:
            self.state.twice += result.extra_steps
            print(f"WARNING: a repeated request applied, and charged, {result.extra_steps} extra step(s).")
        self.state.step, self.state.done = result.step, done
        self._save_state()
        return result.kl

    def _train_on_examples(self) -> None:
        """Apply the remaining supervised steps, each on the best of a few random recipes per photo."""
        for number in range(self.state.step, self.config.sft_steps):
            if self.run.cancelled or not self._budget_allows_step():
                return
            self.set_phase(f"training on example recipes ({number + 1} of {self.config.sft_steps})")
            rng = np.random.default_rng([self.config.seed, 1_000_000 + number])
            indices = rng.integers(len(self.photos.photos), size=self.config.photos_per_step)
            examples = [self._example(self.photos.photos[int(index)], rng) for index in indices]
            token_count = sum(estimate_tokens(group["target"]["answer"]) for group in examples)
            self._update(examples, len(examples), token_count, done=0)

    def _example(self, photo: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
        recipes = [random_recipe(rng) for _ in range(SFT_CANDIDATES)]
        function = self.config.reward_function
        scored = [(function.total(score_recipes(photo, [item])[0].scores) or 0.0, str(item)) for item in recipes]
        return sft_group(photo_data_url(photo), self.question, max(scored)[1])

    def _log_step(self, number: int, rewards: Sequence[float | None], silent: float, kl: float | None) -> None:
        row = {"step": number, "seconds": round(time.monotonic() - self.started, 2), "kl": kl, "no_signal": silent}
        row |= {"reward": _mean(rewards) or 0.0, "learning_rate": self.config.learning_rate}
        row |= {"dollars": round(self.costs.dollars, 6), **self.reward.component_means}
        self.run.append_metrics(row)
        print(f"{format_log_line(row, self.config.steps)}  spent ${self.costs.dollars:.4f}", flush=True)

    def _budget_allows_step(self) -> bool:
        """Whether the budget covers another step, a probe and the final evaluation."""
        if self.config.budget is None:
            return True
        step = self.costs.max_step_cost(self.config)
        evaluation = self.costs.max_evaluation_cost(len(self.held_out.photos) + PROBE_PHOTOS)
        if step is None or evaluation is None:
            raise RunAborted(
                f"No price is known for {self.config.base}, so a budget cannot be kept. Remove the budget."
            )
        if self.costs.dollars + step + evaluation <= self.config.budget:
            return True
        budget = f"${self.config.budget:g}"
        print(f"The budget of {budget} does not cover another step (up to ${step:.4f}). Stopping.", flush=True)
        return False

    # ── Evaluation ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _probe(self, step: int) -> None:
        """Evaluate the current weights on the probe photos, and save a checkpoint if they are the best so far."""
        photos, function = self.held_out.photos[:PROBE_PHOTOS], self.config.reward_function
        with self.calls.call("recipe", len(photos)) as call:
            answers = self._map(self._greedy_answer, photos)
            mean = call.reward = float(np.nanmean(reward_totals(answers, function)))
        first = answers[0]
        row = {"step": step, "photo": self.held_out.names[0], "recipe": str(first.recipe), "scores": first.scores}
        row |= {"total": function.total(first.scores), "held_out": mean}
        self.run.append_probe(row | self.alarms.measure(answers))
        self.alarms.check(step)
        if step and self.state.step and mean > self.state.best:
            self.state.saved, self.state.tuned = self.tuning.save(), []
            self.state.best = mean
        if step:
            self.tuning.log(self.state.step, {"eval/held_out": mean})
        self._save_state()

    def _greedy_answer(self, photo: np.ndarray) -> ScoredAnswer:
        rollouts = self.tuning.rollouts(photo_data_url(photo), self.question, 1, 0.0, MAX_TOKENS)
        self.costs.add_inference(1, _tokens_out(rollouts))
        return score_answer(photo, rollouts.texts[0])

    def evaluate_base(self) -> list[ScoredAnswer]:
        """Return the base model's greedy answers to the held-out photos; a resumed run has them stored."""
        return self._evaluate(self.config.base, self.state.base)

    def _evaluate(self, model: str, texts: list[str]) -> list[ScoredAnswer]:
        """Return a model's greedy answers to the held-out photos.

        Args:
            model: Id of the model.
            texts: The answers of `self.state` so far, which are completed and stored.
        """
        photos = self.held_out.photos
        if len(texts) > len(photos):
            texts.clear()
        while len(texts) < len(photos):
            batch = photos[len(texts) : len(texts) + ANSWERS_PER_CALL]
            with self.calls.call("recipe", len(batch)):
                texts += self._map(lambda photo: self._query(model, photo), batch)
            self._save_state()
        return [score_answer(photo, text) for photo, text in zip(photos, texts, strict=True)]

    def _query(self, model: str, photo: np.ndarray) -> str:
        """Return a model's greedy answer from the inference API, which serves base and tuned models alike."""
        payload = {
            "model": model,
            "question": self.question,
            "image_url": photo_data_url(photo),
            "stream": False,
            "reasoning": False,
            "settings": {"temperature": 0.0, "top_p": 1.0, "max_tokens": MAX_TOKENS},
        }
        answer = self.server.post("query", payload).data.get("answer")
        text = answer if isinstance(answer, str) else ""
        self.costs.add_inference(1, estimate_tokens(text))
        return text

    def _map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Call a function for all items in the threads. After an error, calls in progress end before it is raised."""
        futures = [self.threads.submit(function, item) for item in items]
        for future in wait(futures, return_when=FIRST_EXCEPTION).not_done:
            future.cancel()
        wait(futures)
        failed = [future for future in futures if not future.cancelled() and future.exception()]
        return [future.result() for future in failed or futures]

    def _save_state(self) -> None:
        self.state.dollars = self.costs.dollars
        self.state.save(self.run)


def _prices_from_env() -> Prices:
    """Read the price table of the deployment, as the application does. Raises RunAborted."""
    file = os.environ.get("PRICES_FILE", "").strip()
    try:
        return Prices.read(Path(file).expanduser()) if file else Prices()
    except PriceError as error:
        raise RunAborted(f"PRICES_FILE cannot be used: {error}") from None


def _mean(rewards: Sequence[float | None]) -> float | None:
    known = [reward for reward in rewards if reward is not None]
    return float(np.mean(known)) if known else None


def _fill_missing(rewards: Sequence[float | None], texts: Sequence[str]) -> list[float]:
    """Replace missing rewards: 0 for an invalid recipe, the group's mean where no reward applies."""
    known = [reward for reward in rewards if reward is not None]
    mean = float(np.mean(known)) if known else 0.0
    return [
        float(reward) if reward is not None else mean if parse(text).ok else 0.0
        for reward, text in zip(rewards, texts, strict=True)
    ]


def _tokens_out(rollouts: Rollouts) -> int:
    return rollouts.tokens_out if rollouts.tokens_out is not None else sum(map(estimate_tokens, rollouts.texts))
