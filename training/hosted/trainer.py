"""A run on Moondream's tuning API: the weights learn there, recipes are rendered and scored here with the sliders'
reward, by the very code that scores on screen.

`hosted.json` in the run's folder holds the finetune's id, its step and what was spent, so that a run that was killed
goes on where the finetune stands. The key comes from the environment of this process and is written nowhere.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from pydantic import SecretStr

from inference.hosted.client import CloudError, MoondreamClient, photo_url
from inference.places import CLOUD_URL, RATE
from inference.types import RECIPE_QUESTION, recipe_prompt
from recipes import Recipe, parse, random_recipe, save_picture
from rewards import score_recipes
from training.data.sources import CollectError, train_eval_split
from training.evaluate import Judged, judge, totals
from training.grpo.result import log_line, result
from training.grpo.reward import Scorer
from training.hosted.client import MAX_ROLLOUTS, RANKS, Rollouts, Tuning, rl_group, sft_group
from training.hosted.cost import MAX_TOKENS, WATCHED, Spend, tokens
from training.runs.run import Run, RunAborted, RunConfig, write_whole

AT_ONCE = 4  # requests under way; the limiter says how many begin in a second
FLAT = 1e-6  # rewards that differ by less are the same
EXAMPLES = 8  # random recipes per photo, the best of which is an example of the grammar


@dataclass
class State:
    """Where a run stands on the server. step: of the finetune; done: steps of this run that are over, learned or not.

    best, saved: the best held-out mean so far and the step of its checkpoint. dollars: spent so far, estimated.
    twice: steps that were applied once too often; silent: groups whose rewards did not differ. base: what the base said
    to the held-out photos, which is paid for once.
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

    @classmethod
    def of(cls, run: Run) -> State:
        """What is written of it; a new one before anything is."""
        try:
            return cls(**json.loads((run.folder / "hosted.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return cls()

    def keep(self, run: Run) -> None:
        """Writes it. Raises OSError."""
        write_whole(run.folder / "hosted.json", json.dumps(asdict(self)))


def has_key() -> bool:
    """Whether this deployment has a key of its own."""
    return bool(os.environ.get("MOONDREAM_API_KEY", "").strip())


def server_of_environment() -> MoondreamClient:
    """The server and the key that this process was given. Raises Stop."""
    key = os.environ.get("MOONDREAM_API_KEY", "").strip()
    url = os.environ.get("MOONDREAM_API_URL", "").strip().rstrip("/") or CLOUD_URL
    if not key and url == CLOUD_URL:
        raise RunAborted("Moondream's tuning API needs a key. Set MOONDREAM_API_KEY, or give yours in the form.")
    try:
        rate = float(os.environ.get("MOONDREAM_RATE", "").strip() or RATE)
        return MoondreamClient(url, SecretStr(key) if key else None, rate)
    except ValueError as error:
        raise RunAborted(f"Moondream's server cannot be used: {error}") from None


def work(run: Run, config: RunConfig, phase: Callable[[str], None]) -> dict[str, Any] | None:
    """The whole run; None when it was cancelled. Raises Stop, and what rewards and disk raise."""
    server = server_of_environment()
    try:
        return _Loop(run, config, server, phase).run_through()
    except CloudError as error:
        raise RunAborted(
            f"{error.message} Resume the run when that is mended: nothing that was learned is lost."
        ) from None
    except CollectError as error:
        raise RunAborted(str(error)) from None


class _Loop:
    """One run: rollouts there, rewards here, steps there."""

    def __init__(self, run: Run, config: RunConfig, server: MoondreamClient, phase: Callable[[str], None]) -> None:
        _check(config)
        self.run, self.config, self.server, self.phase = run, config, server, phase
        self.photos, self.held_out = train_eval_split(config.photos, config.held_out, config.max_photos, config.seed)
        # moondream-tiny was trained to answer a short question; any other model is told the grammar.
        self.question = RECIPE_QUESTION if config.base.startswith("moondream-tiny") else recipe_prompt()
        self.scorer = Scorer(self.photos.photos, config.reward_function, config.rollouts)
        self.state = State.of(run)
        self.spend = Spend(config.base, self.question, dollars=self.state.dollars)
        self.began = time.monotonic()
        self.threads = ThreadPoolExecutor(AT_ONCE)

    def run_through(self) -> dict[str, Any] | None:
        """See `work`."""
        self.phase("opening the finetune")
        self.tuning = self._opened()
        self.run.forget_after(self.state.done)
        self.run.set_status(step=self.state.done, steps=self.config.steps)
        save_picture(self.held_out.photos[0], Recipe(), self.run.folder / "probe.png")
        self.phase("measuring the base")
        base = self._base()
        if self.state.step == 0:
            self._examples()
        if self.state.done == 0:
            self._probe(0)
        self.phase("training")
        while self.state.done < self.config.steps and not self.run.cancelled and self._can_pay():
            self._step()
        if self.run.cancelled:
            return None
        if not self.state.saved:
            raise RunAborted(
                "Nothing was learned: no step was applied. Choose other photos, a higher temperature or budget."
            )
        self.phase("measuring the tuned model")
        model = self.tuning.model(self.state.saved, self.config.base)
        tuned = self._judged(model, self.held_out.photos)
        found = result(self.run, self.config.base, self.config.reward_function, self.held_out, base, tuned)
        if self.state.done < self.config.steps:
            found["alarm"] = found["alarm"] or f"The budget ended it after {self.state.done} steps."
        facts = {key: getattr(self.state, key) for key in ("finetune_id", "dollars", "twice", "silent", "groups")}
        return found | {"model": model, **facts}

    def _opened(self) -> Tuning:
        """The run's finetune, and the step at which it stands: it may have moved since that was written down."""
        if not self.state.finetune_id:
            tuning = Tuning.create(self.server, f"playground-{self.run.id}", self.config.rank)
            self.state.finetune_id = tuning.finetune_id
            self.state.keep(self.run)
            return tuning
        tuning = Tuning.open(self.server, self.state.finetune_id)
        now = tuning.step()
        if now > self.state.step:
            print(f"The finetune is at step {now}, and {self.state.step} was written down: it goes on from there.")
            self.state.done += min(1, now - self.state.step)
            self.state.twice += max(0, now - self.state.step - 1)
            self.state.step = now
        return tuning

    # ── A step ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _step(self) -> None:
        """Rollouts of some photos, their rewards, one update; then what is to be written down."""
        number = self.state.done + 1
        rng = np.random.default_rng([self.config.seed, number])
        count = min(self.config.photos_per_step, len(self.photos.photos))
        places = [int(place) for place in rng.choice(len(self.photos.photos), count, replace=False)]
        groups = list(self.threads.map(self._rollouts, places))
        texts = [text for group in groups for text in group.texts]
        rewards = self.scorer(texts, [place for place in places for _ in range(self.config.rollouts)])
        sent, silent = self._sendable(groups, rewards)
        self.state.done = number  # written down with the step, so that a run that is killed repeats nothing
        kl = self._learned(sent) if sent else None
        self.state.groups += len(groups)
        self.state.silent += silent
        self._note(number, rewards, silent / len(groups), kl)
        if number % self.config.probe_every == 0 or number == self.config.steps:
            self._probe(number)
        self.state.dollars = self.spend.dollars
        self.state.keep(self.run)
        self.run.set_status(step=number)

    def _rollouts(self, place: int) -> Rollouts:
        url = photo_url(self.photos.photos[place])
        asked = (url, self.question, self.config.rollouts, self.config.temperature, MAX_TOKENS)
        answered = self.tuning.rollouts(*asked)
        self.spend.add(self.spend.answers(len(answered.texts), _tokens_out(answered)))
        return answered

    def _sendable(
        self, groups: Sequence[Rollouts], rewards: Sequence[float | None]
    ) -> tuple[list[dict[str, Any]], int]:
        """The groups from which something can be learned, and how many were left out because their rewards agree."""
        sent = []
        for place, group in enumerate(groups):
            mine = _numbers(rewards[place * self.config.rollouts : (place + 1) * self.config.rollouts], group.texts)
            if np.ptp(mine) > FLAT:
                sent.append(rl_group(group, mine))
                self.spend.add(self.spend.learning(len(mine), _tokens_out(group)))
        return sent, len(groups) - len(sent)

    def _learned(self, groups: Sequence[dict[str, Any]]) -> float | None:
        """One update; returns its KL divergence, where it is told."""
        step = self.tuning.train_step(groups, self.config.learning_rate, self.state.step)
        if step.lost:
            print("The answer to this step was lost. The finetune has moved on, so the step was not sent again.")
        if step.extra:
            self.state.twice += step.extra
            print(f"WARNING: {step.extra} step more than asked was applied, and charged, by a repeated request.")
        self.state.step = step.step
        self.state.keep(self.run)
        return step.kl

    def _examples(self) -> None:
        """The supervised steps before: the best of a few random recipes as an answer, to show the form."""
        for number in range(self.config.sft_steps):
            if self.run.cancelled or not self._can_pay():
                return
            self.phase(f"showing the form of a recipe ({number + 1} of {self.config.sft_steps})")
            rng = np.random.default_rng([self.config.seed, 1_000_000 + number])
            places = rng.integers(len(self.photos.photos), size=self.config.photos_per_step)
            examples = [self._example(self.photos.photos[int(place)], rng) for place in places]
            self._learned(examples)
            texts = sum(tokens(group["target"]["answer"]) for group in examples)
            self.spend.add(self.spend.learning(len(examples), texts))

    def _example(self, photo: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
        recipes = [random_recipe(rng) for _ in range(EXAMPLES)]
        function = self.config.reward_function
        scored = [(function.total(score_recipes(photo, [one])[0].scores) or 0.0, str(one)) for one in recipes]
        return sft_group(photo_url(photo), self.question, max(scored)[1])

    # ── What is known of it ─────────────────────────────────────────────────────────────────────────────────────────

    def _probe(self, step: int) -> None:
        """The present weights' likeliest answers to a few held-out photos; the best weights so far are kept."""
        photos = self.held_out.photos[:WATCHED]
        judged = list(self.threads.map(self._watched, photos))
        function = self.config.reward_function
        held = float(np.nanmean(totals(judged, function)))
        first = judged[0]
        line = {"step": step, "photo": self.held_out.names[0], "recipe": str(first.recipe), "scores": first.scores}
        self.run.add("probes", line | {"total": function.total(first.scores), "held_out": held})
        if step and self.state.step and held > self.state.best:
            self.state.saved = self.tuning.save()
            self.state.best = held
        if step:
            self.tuning.log(self.state.step, {"eval/held_out": held})
        self.state.keep(self.run)

    def _watched(self, photo: np.ndarray) -> Judged:
        answered = self.tuning.rollouts(photo_url(photo), self.question, 1, 0.0, MAX_TOKENS)
        self.spend.add(self.spend.answers(1, _tokens_out(answered)))
        return judge(photo, answered.texts[0])

    def _base(self) -> list[Judged]:
        """The base's likeliest answers; a run that goes on has them already."""
        photos = self.held_out.photos
        if len(self.state.base) != len(photos):
            self.state.base = list(self.threads.map(lambda photo: self._asked(self.config.base, photo), photos))
            self.state.dollars = self.spend.dollars
            self.state.keep(self.run)
        return [judge(photo, text) for photo, text in zip(photos, self.state.base, strict=True)]

    def _judged(self, model: str, photos: Sequence[np.ndarray]) -> list[Judged]:
        """A model's likeliest answers, by the way that everybody asks it: base and tuned are compared like for like."""
        return list(self.threads.map(lambda photo: judge(photo, self._asked(model, photo)), photos))

    def _asked(self, model: str, photo: np.ndarray) -> str:
        settings = {"temperature": 0.0, "top_p": 1.0, "max_tokens": MAX_TOKENS}
        body = {"model": model, "question": self.question, "image_url": photo_url(photo), "stream": False}
        data = self.server.post("query", body | {"reasoning": False, "settings": settings}).data
        answer = data.get("answer")
        text = answer if isinstance(answer, str) else ""
        self.spend.add(self.spend.answers(1, tokens(text)))
        return text

    def _note(self, number: int, rewards: Sequence[float | None], silent: float, kl: float | None) -> None:
        known = [reward for reward in rewards if reward is not None]
        line = {"step": number, "seconds": round(time.monotonic() - self.began, 2), "kl": kl, "no_signal": silent}
        line |= {"reward": float(np.mean(known)) if known else 0.0, "learning_rate": self.config.learning_rate}
        line |= {"dollars": round(self.spend.dollars, 6), **self.scorer.parts}
        self.run.add("metrics", line)
        print(f"{log_line(line, self.config.steps)}  spent ${self.spend.dollars:.4f}", flush=True)

    def _can_pay(self) -> bool:
        """Whether the budget has room for another step and for the judgement at the end."""
        if self.config.budget is None:
            return True
        step, judged = self.spend.step(self.config), self.spend.judging(len(self.held_out.photos) + WATCHED)
        if step is None or judged is None:
            raise RunAborted(
                f"No price is known of {self.config.base}, so no budget can be kept. Leave the budget empty."
            )
        if self.spend.dollars + step + judged <= self.config.budget:
            return True
        print(f"The budget of ${self.config.budget:g} has no room for another step (${step:.4f} at most).", flush=True)
        return False


def _check(config: RunConfig) -> None:
    if config.rank not in RANKS:
        raise RunAborted(f"The tuning API takes ranks {', '.join(map(str, RANKS))}, not {config.rank}.")
    if config.rollouts > MAX_ROLLOUTS:
        raise RunAborted(f"The tuning API gives at most {MAX_ROLLOUTS} rollouts at once, not {config.rollouts}.")


def _numbers(rewards: Sequence[float | None], texts: Sequence[str]) -> list[float]:
    """One number per answer: 0, the least there is, for what is no recipe; the others' mean where no reward applies."""
    known = [reward for reward in rewards if reward is not None]
    middle = float(np.mean(known)) if known else 0.0
    return [
        float(reward) if reward is not None else middle if parse(text).ok else 0.0
        for reward, text in zip(rewards, texts, strict=True)
    ]


def _tokens_out(answered: Rollouts) -> int:
    return answered.tokens_out if answered.tokens_out is not None else sum(map(tokens, answered.texts))
