"""Alarms of a training run: signs that its reward rises although its pictures do not get better. Imports no torch.

The policy's greedy answers to a few held-out photos are recorded every few steps (`probes.jsonl`), and the rewards of
the rollouts in every step (`metrics.jsonl`). `find_alarms` reads these rows only, so that a resumed run finds what it
would have found. An alarm must hold at PATIENCE probes in succession; the final evaluation, on all held-out photos,
counts at once. An alarm stays, also if its reason ends: at a later step it may return.

Alarms are kept in the run's `alarms.json`, each with small pictures of the photo that shows it best. A run with an
alarm is never taken over by itself; see `training.runs.adapters`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from recipes import OPERATIONS, PREVIEW_SIDE, Recipe, encode_jpeg, parse, render, shrink
from rewards import REWARDS, RewardFunction
from rewards.comparison import profile, relative_box
from rewards.subject import framing
from storage.files import write_atomically
from training.data.sources import PhotoSet
from training.evaluate import ScoredAnswer
from training.runs.run import ALARM_KINDS, Run

PATIENCE = 2  # probes in succession: one probe of 8 photos may be an accident

# The reward rises in training, but not on held-out photos
MIN_RISE = 0.03  # of the training reward: a smaller one is hardly visible in the pictures
MAX_FLAT_GAIN = 0.01  # of the held-out reward: a third of the smallest rise that counts
RISE_ERRORS = 3.0  # standard errors that it must exceed: the photos change with the step, the rule is tried often
MIN_WINDOW, MAX_WINDOW = 8, 30  # steps at each end of the run that are compared

# A part of the reward is paid for by another
MIN_PART_LOSS = 0.05  # of the part that falls: about what separates an edit from one that people reject
LOSS_ERRORS = 2.0  # standard errors that the loss must exceed: about 95 %
MIN_PART_GAIN = 0.03  # of the part that rises, as MIN_RISE

# Cut subjects. Of the bundled photos, cropping 10 % on each side loses up to 0.1 of the subject in 95 %, a quarter of
# the photo's area loses 0.35 to 0.5.
MAX_SUBJECT_LOST = 0.25  # share of the photo's importance outside of the crop
MAX_HEAD_LOST = 0.2  # share of a head outside; its box has a margin of hair and chin, which a tight portrait may lose
MAX_CUT_SHARE = 0.25  # of the answers. Models that were not tuned cut the subject of fewer than one photo in ten

# Recipes at the limits of the grammar. Of the recipes that restore randomly degraded photos, 23 % are there.
MAX_LIMIT_SHARE = 0.6  # of the answers: 5 of 8, which such recipes reach in one probe of fifty

# Repeated answers. One edit for most photos means that the photo no longer matters. Leaving a good photo alone is what
# people prefer, so the recipe that changes nothing may be the answer to most photos, but not to all of them.
MAX_REPEATED_SHARE = 0.6
MAX_UNTOUCHED_SHARE = 0.9

MIN_ANSWERS = 4  # fewer say nothing about a share
MIN_AFFECTED = 2  # answers: a single one may be an error of the subject measure

# No training signal
MAX_NO_SIGNAL = 0.9  # share of the groups whose answers all have the same reward
MIN_SIGNAL_STEPS = 10

THUMBNAIL_SIDE, THUMBNAIL_QUALITY = 320, 85  # px, JPEG: 10 to 40 kB
_MAX_TEXT = 600  # characters of a text that another machine reports

Row = dict[str, Any]


@dataclass(frozen=True)
class Alarm:
    """An alarm.

    Attributes:
        kind: One of ALARM_KINDS.
        title: What is wrong, in a few words.
        message: The numbers, and what they mean.
        advice: What to do.
        step: The step at which it was first raised.
        last_step: The last step at which it was seen.
        index: Index of the held-out photo that shows it best; None without one.
        photo: The photo's name.
        recipe: The policy's answer to it.
    """

    kind: str
    title: str
    message: str
    advice: str
    step: int = 0
    last_step: int = 0
    index: int | None = None
    photo: str = ""
    recipe: str = ""


# ── What is measured ────────────────────────────────────────────────────────────────────────────────────────────────


def subject_cut(photo: np.ndarray, recipe: Recipe) -> float:
    """Return how much of a photo's subject, or of a head, a recipe's crop cuts off, 0..1; 0 up to the limits.

    Args:
        photo: uint8 [H, W, 3] RGB.
        recipe: The recipe.
    """
    if recipe.crop == Recipe().crop:
        return 0.0
    before = profile(shrink(photo, PREVIEW_SIDE))
    left, top, right, bottom = (value / 100 for value in recipe.crop)
    kept = framing(before.subject, relative_box((left, top, right, bottom), before.content))
    if kept.subject_lost <= MAX_SUBJECT_LOST and kept.head_lost <= MAX_HEAD_LOST:
        return 0.0
    return max(kept.subject_lost, kept.head_lost)


def at_limits(recipe: Recipe) -> list[str]:
    """Return the operations of a recipe that have a number at the end of its range, other than the neutral one."""
    names = []
    for name, operation in OPERATIONS.items():
        value = getattr(recipe, name)
        numbers = value if isinstance(value, tuple) else (value,)
        slots = zip(operation.slots, numbers, strict=False)  # an operation of words has no slots
        if any(number in (slot.low, slot.high) and number != slot.neutral for slot, number in slots):
            names.append(name)
    return names


# ── The rules ───────────────────────────────────────────────────────────────────────────────────────────────────────


def find_alarms(
    metrics: Sequence[Row], probes: Sequence[Row], weights: RewardFunction, patience: int = PATIENCE
) -> list[Alarm]:
    """Return the alarms that the last probes of a run raise.

    Args:
        metrics: The run's metrics, one row per step.
        probes: Its probes, with the fields of `AlarmMonitor.measure`, oldest first. The others are compared with the
            first one. Rows without these fields, of earlier versions, are ignored.
        weights: The run's reward function. Parts with weight 0 may fall.
        patience: Number of successive probes at which an alarm must hold.
    """
    probes = [probe for probe in probes if probe.get("recipes")]
    if len(probes) < patience + 1:
        return []
    recent = []
    for probe in probes[-patience:]:
        so_far = [row for row in metrics if row.get("step", 0) <= probe.get("step", 0)]
        alarms = [rule(so_far, probes[0], probe, weights) for rule in _RULES]
        recent.append({alarm.kind: _with_recipe(alarm, probe) for alarm in alarms if alarm})
    return [alarm for kind, alarm in recent[-1].items() if all(kind in alarms for alarms in recent)]


def _not_generalizing(metrics: Sequence[Row], first: Row, last: Row, _: RewardFunction) -> Alarm | None:
    rise, gain = _training_rise(metrics), _changes(first["totals"], last["totals"])
    if rise is None or not len(gain) or np.isnan(gain).all() or np.nanmean(gain) > MAX_FLAT_GAIN:
        return None
    mean = float(np.nanmean(gain))
    change = f"fell by {-mean:.3f}" if mean < -MAX_FLAT_GAIN else f"stayed about the same ({mean:+.3f})"
    return Alarm(
        "not_generalizing",
        "The reward rises in training, but not on held-out photos",
        f"Since the start the reward rose by {rise:.3f} on the training photos, and {change} on {len(gain)} photos "
        "that the model is not trained on. The improvement does not generalize.",
        "Train again on more, and more varied, photos, for fewer steps, or with a higher KL weight.",
        index=int(np.nanargmin(gain)),
    )


def _training_rise(metrics: Sequence[Row]) -> float | None:
    """Return by how much the training reward rose between the first and the last steps; None if it did not clearly."""
    rewards = np.array([row["reward"] for row in metrics if row.get("reward") is not None], np.float64)
    window = min(MAX_WINDOW, max(MIN_WINDOW, len(rewards) // 4))
    if len(rewards) < 2 * window:
        return None
    start, end = rewards[:window], rewards[-window:]
    rise = float(end.mean() - start.mean())
    error = float(np.sqrt((start.var(ddof=1) + end.var(ddof=1)) / window))
    return rise if rise >= max(MIN_RISE, RISE_ERRORS * error) else None


def _traded_part(_: Sequence[Row], first: Row, last: Row, weights: RewardFunction) -> Alarm | None:
    changes = {
        name: _changes(first["parts"].get(name, ()), last["parts"].get(name, ()))
        for name in REWARDS
        if weights.weights.get(name)
    }
    means = {name: float(np.nanmean(change)) for name, change in changes.items() if (~np.isnan(change)).sum() > 1}
    clear = {name: mean for name, mean in means.items() if mean + LOSS_ERRORS * _standard_error(changes[name]) < 0}
    fallen = min(clear, key=lambda name: clear[name], default="")
    risen = max(means, key=lambda name: means[name], default="")
    if not fallen or clear[fallen] > -MIN_PART_LOSS or means[risen] < MIN_PART_GAIN:
        return None
    return Alarm(
        "traded_part",
        f"{risen.capitalize()} rises at the cost of {fallen}",
        f"On held-out photos {risen} rose by {means[risen]:.3f} since the start, while {fallen} fell by "
        f"{-means[fallen]:.3f}. The total can rise although the pictures get worse in one respect.",
        f"Look at the photo. If {fallen} matters to you, train again and give it a higher weight.",
        index=int(np.nanargmin(changes[fallen])),
    )


def _cut_subject(_: Sequence[Row], first: Row, last: Row, weights: RewardFunction) -> Alarm | None:
    cuts = [cut for cut in last["cut"] if cut is not None]
    affected = sum(cut > 0 for cut in cuts)
    if not _is_alarming(affected, len(cuts), MAX_CUT_SHARE):
        return None
    return Alarm(
        "cut_subject",
        "Edits cut off the subject",
        f"In {_share(affected, len(cuts))} the crop removes more than {MAX_SUBJECT_LOST:.0%} of what matters in the "
        "photo, or cuts off a head. The reward pays for cutting away.",
        "Look at the photo. Train again with other weights: people do not agree with a reward that is won by "
        "small crops.",
        index=int(np.argmax([cut or 0.0 for cut in last["cut"]])),
    )


def _at_limits(_: Sequence[Row], first: Row, last: Row, weights: RewardFunction) -> Alarm | None:
    recipes = [parse(text).recipe if text else None for text in last["recipes"]]
    limits = [at_limits(recipe) if recipe else [] for recipe in recipes]
    affected, answers = sum(map(bool, limits)), sum(recipe is not None for recipe in recipes)
    if not _is_alarming(affected, answers, MAX_LIMIT_SHARE):
        return None
    common = ", ".join(name for name, _count in Counter(name for names in limits for name in names).most_common(3))
    totals = [np.inf if total is None else total for total in last["totals"]]
    return Alarm(
        "at_limits",
        "Recipes are at the limits of their ranges",
        f"{_share(affected, answers).capitalize()} have the largest or smallest possible value, mostly in {common}. "
        "The reward rises with the strength of an edit, not with its fit to the photo.",
        "Look at the photo. Train again with a lower weight of the part that rises, or with a higher KL weight.",
        index=max(range(len(limits)), key=lambda index: (len(limits[index]), -totals[index])),
    )


def _repeated_answers(_: Sequence[Row], first: Row, last: Row, weights: RewardFunction) -> Alarm | None:
    counts = Counter(recipe for recipe in last["recipes"] if recipe)
    answers = sum(counts.values())
    recipe, affected = counts.most_common(1)[0] if counts else ("", 0)
    untouched = recipe == str(Recipe())
    if not _is_alarming(affected, answers, MAX_UNTOUCHED_SHARE if untouched else MAX_REPEATED_SHARE):
        return None
    meaning = (
        "change nothing. The model has stopped editing."
        if untouched
        else "are the same recipe. The model has stopped looking at the photo: one edit for all is a filter."
    )
    indices = [index for index, text in enumerate(last["recipes"]) if text == recipe]
    change = np.nan_to_num(_changes(first["totals"], last["totals"]))
    return Alarm(
        "repeated_answers",
        "Most photos get the same recipe",
        f"{_share(affected, answers).capitalize()} {meaning}",
        "Train again on more varied photos, or with a higher KL weight, a lower learning rate or a higher temperature.",
        index=min(indices, key=lambda index: change[index]),
    )


def _no_signal(metrics: Sequence[Row], first: Row, last: Row, weights: RewardFunction) -> Alarm | None:
    shares = [row["no_signal"] for row in metrics if row.get("no_signal") is not None]
    if len(shares) < MIN_SIGNAL_STEPS or np.mean(shares) <= MAX_NO_SIGNAL:
        return None
    return Alarm(
        "no_signal",
        "There is nothing to learn from",
        f"In {np.mean(shares):.0%} of the groups all answers to a photo got the same reward: the model cannot change.",
        "Train again with a higher temperature or more rollouts, or with other weights or photos.",
    )


_RULES: tuple[Callable[[Sequence[Row], Row, Row, RewardFunction], Alarm | None], ...] = (
    _not_generalizing,
    _traded_part,
    _cut_subject,
    _at_limits,
    _repeated_answers,
    _no_signal,
)


def _with_recipe(alarm: Alarm, probe: Row) -> Alarm:
    return alarm if alarm.index is None else replace(alarm, recipe=probe["recipes"][alarm.index] or "")


def _changes(before: Sequence[float | None], after: Sequence[float | None]) -> np.ndarray:
    """Return the change of each photo's score, NaN where one is missing."""
    count = min(len(before), len(after))
    return np.array(after[:count], np.float64) - np.array(before[:count], np.float64)


def _standard_error(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1) / np.sqrt(len(known)))


def _is_alarming(affected: int, answers: int, share: float) -> bool:
    return answers >= MIN_ANSWERS and affected >= MIN_AFFECTED and affected / answers >= share


def _share(affected: int, answers: int) -> str:
    return f"{affected} of {answers} answers to held-out photos"


# ── The record ──────────────────────────────────────────────────────────────────────────────────────────────────────


class AlarmMonitor:
    """Measures the answers of a run's policy, and records and prints the alarms that they raise.

    Args:
        run: The run.
        function: Its reward function.
        held_out: The held-out photos. Answers are given for the first ones, in their order.
    """

    def __init__(self, run: Run, function: RewardFunction, held_out: PhotoSet) -> None:
        self.run, self.function, self.held_out = run, function, held_out

    def measure(self, answers: Sequence[ScoredAnswer]) -> Row:
        """Return the fields of a probe that `find_alarms` needs, one entry per photo.

        Returns:
            "recipes" (None for an answer that is not one), "totals", "parts" by reward, and "cut": how much of the
            subject the crop cuts off.
        """
        return {
            "recipes": [str(answer.recipe) if answer.valid else None for answer in answers],
            "totals": [_rounded(self.function.total(answer.scores)) for answer in answers],
            "parts": {name: [_rounded(answer.scores[name]) for answer in answers] for name in REWARDS},
            "cut": [
                round(subject_cut(photo, answer.recipe), 3) if answer.valid else None
                for photo, answer in zip(self.held_out.photos, answers, strict=False)  # a probe has the first photos
            ],
        }

    def check(self, step: int) -> None:
        """Raise the alarms of the probes so far. Call after a probe has been appended. Raises OSError."""
        self._record(find_alarms(self.run.metrics(), self.run.probes(), self.function), step)

    def check_result(self, base: Sequence[ScoredAnswer], tuned: Sequence[ScoredAnswer]) -> list[Row]:
        """Raise the alarms of the answers to all held-out photos; return all alarms of the run. Raises OSError."""
        step = self.run.status().step
        probes = [{"step": 0, **self.measure(base)}, {"step": step, **self.measure(tuned)}]
        self._record(find_alarms(self.run.metrics(), probes, self.function, patience=1), step)
        return self.run.alarms()

    def _record(self, alarms: Sequence[Alarm], step: int) -> None:
        rows = {row["kind"]: row for row in self.run.alarms()}
        for alarm in alarms:
            if alarm.kind not in rows:
                print(f"ALARM after step {step}: {alarm.title}. {alarm.message} {alarm.advice}", flush=True)
            first = rows.get(alarm.kind, {}).get("step", step)
            photo = "" if alarm.index is None else self.held_out.names[alarm.index]
            rows[alarm.kind] = asdict(replace(alarm, step=first, last_step=step, photo=photo))
        if alarms:
            store_alarms(self.run, list(rows.values()), self.held_out)


def store_alarms(run: Run, rows: Sequence[Row], held_out: PhotoSet | None) -> None:
    """Store a run's alarms with small pictures of their photos, before and after the recipe.

    Args:
        run: The run.
        rows: The fields of `Alarm`. They may come from the log of a job: rows without the fields are ignored.
        held_out: The held-out photos; None if they cannot be read here, so that there are no pictures.

    Raises:
        OSError: A file cannot be written.
    """
    alarms = []
    for row in rows:
        try:
            alarm = Alarm(**{name: row[name] for name in Alarm.__dataclass_fields__})
        except KeyError:
            continue
        texts = (alarm.title, alarm.message, alarm.advice, alarm.photo, alarm.recipe)
        numbers = (alarm.step, alarm.last_step, 0 if alarm.index is None else alarm.index)
        if alarm.kind not in ALARM_KINDS or not all(isinstance(text, str) and len(text) <= _MAX_TEXT for text in texts):
            continue
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            continue
        if held_out is not None and alarm.index is not None and alarm.index < len(held_out.photos):
            _write_pictures(run, alarm, held_out.photos[alarm.index])
        alarms.append(asdict(alarm))
    run.set_alarms(alarms)


def _write_pictures(run: Run, alarm: Alarm, photo: np.ndarray) -> None:
    before = shrink(photo, THUMBNAIL_SIDE)
    parsed = parse(alarm.recipe)
    after = shrink(render(photo, parsed.recipe), THUMBNAIL_SIDE) if parsed.ok else before
    for path, picture in zip(run.alarm_pictures(alarm.kind), (before, after), strict=True):
        write_atomically(path, encode_jpeg(picture, THUMBNAIL_QUALITY))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
