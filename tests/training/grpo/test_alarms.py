"""Alarms: each history that should raise one does, a healthy one does not; they are recorded and block the takeover."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rewards
from inference.registry import MODELS
from recipes import Recipe, load_photo, save_picture, shrink
from rewards import EQUAL_WEIGHTS, REWARDS, RewardFunction
from tests.support.hackable_reward import small_crops
from training.data.bundled import bundled_photos
from training.data.sources import PhotoSet
from training.evaluate import score_answer
from training.grpo.__main__ import execute
from training.grpo.alarms import Alarm, AlarmMonitor, at_limits, find_alarms, store_alarms, subject_cut
from training.pretrain.degradation import random_inverse_recipe
from training.runs.adapters import AdapterRegistry
from training.runs.run import ALARM_KINDS, Run, RunConfig, RunStore

PHOTOS = 8
ORDER = list(REWARDS)
Row = dict[str, Any]


def metrics(start: float, end: float, steps: int = 60, no_signal: float = 0.1, seed: int = 0) -> list[Row]:
    """Return the steps of a run whose reward changes linearly, with the noise of other photos in each step."""
    noise = np.random.default_rng(seed).normal(0, 0.05, steps)
    values = np.linspace(start, end, steps) + noise
    return [{"step": step + 1, "reward": float(value), "no_signal": no_signal} for step, value in enumerate(values)]


def probe(step: int, parts: dict[str, float], seed: int = 0, **changes: Any) -> Row:
    """Return a probe whose parts have these means; their recipes restore degraded photos."""
    level = np.random.default_rng(99).uniform(-0.2, 0.2, PHOTOS)
    rng = np.random.default_rng([seed, step])
    scores = {name: (mean + level + rng.normal(0, 0.02, PHOTOS)).tolist() for name, mean in parts.items()}
    recipes = [str(random_inverse_recipe(rng).replace(crop=(0, 0, 100, 100))) for _ in level]
    totals = np.mean(list(scores.values()), axis=0).tolist()
    return {"step": step, "recipes": recipes, "totals": totals, "parts": scores, "cut": [0.0] * PHOTOS} | changes


def even(value: float) -> dict[str, float]:
    """Return the same value for every part."""
    return dict.fromkeys(ORDER, value)


def kinds(rows: list[Row], probes: list[Row], function: RewardFunction = EQUAL_WEIGHTS, **options: Any) -> list[str]:
    return [alarm.kind for alarm in find_alarms(rows, probes, function, **options)]


def healthy(seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Return a run whose reward rises on training and held-out photos alike."""
    return metrics(0.3, 0.5, seed=seed), [probe(step, even(0.3 + step / 300), seed) for step in range(0, 61, 10)]


@pytest.mark.parametrize("seed", range(40))
def test_healthy_and_flat_histories_raise_no_alarm_at_any_step(seed: int) -> None:
    rising, flat = (
        healthy(seed),
        (metrics(0.3, 0.3, seed=seed), [probe(step, even(0.3), seed) for step in range(0, 61, 10)]),
    )
    for rows, probes in (rising, flat):
        for count in range(1, len(probes) + 1):
            assert kinds(rows, probes[:count]) == []


def test_reward_that_rises_in_training_only_raises_an_alarm_with_the_photo_that_lost_most() -> None:
    rows, probes = metrics(0.3, 0.5), [probe(step, even(0.3 - step / 1000)) for step in range(0, 61, 10)]
    probes[-1]["totals"][5] -= 0.3
    (alarm,) = find_alarms(rows, probes, EQUAL_WEIGHTS)
    assert (alarm.kind, alarm.index, alarm.recipe) == ("not_generalizing", 5, probes[-1]["recipes"][5])
    assert "fell by" in alarm.message and "on 8 photos" in alarm.message
    assert kinds(metrics(0.3, 0.31), probes) == [], "the training reward did not rise"
    assert kinds(rows[:15], probes) == [], "too few steps to see a rise"
    assert kinds(rows, probes[-2:]) == [], "one probe is not enough"


def test_alarm_needs_two_probes_in_succession_but_one_final_evaluation() -> None:
    rows = metrics(0.3, 0.5)
    probes = [probe(step, even(0.4 if step == 50 else 0.3)) for step in (0, 40, 50, 60)]
    assert kinds(rows, probes[:2]) == kinds(rows, probes[:3]) == kinds(rows, probes) == []
    assert kinds(rows, [probes[0], probes[-1]], patience=1) == ["not_generalizing"]


@pytest.mark.parametrize(("loss", "gain", "raised"), [(0.1, 0.2, True), (0.02, 0.2, False), (0.1, 0.0, False)])
def test_part_that_is_paid_for_by_another_raises_an_alarm(loss: float, gain: float, raised: bool) -> None:
    function = RewardFunction({ORDER[0]: 1.0, ORDER[1]: 1.0})

    def at(step: int) -> Row:
        share = min(1.0, step / 30)
        return probe(step, {ORDER[0]: 0.4 + gain * share, ORDER[1]: 0.5 - loss * share, ORDER[2]: 0.4})

    alarms = find_alarms(metrics(0.4, 0.4), [at(step) for step in range(0, 61, 10)], function)
    assert [alarm.kind for alarm in alarms] == ["traded_part"] * raised
    if raised:
        assert alarms[0].title == f"{ORDER[0].capitalize()} rises at the cost of {ORDER[1]}"
        assert f"{ORDER[1]} fell by 0.0" in alarms[0].message or f"{ORDER[1]} fell by 0.1" in alarms[0].message


def test_part_without_a_weight_may_fall() -> None:
    probes = [probe(step, even(0.4) | {ORDER[0]: 0.4 + step / 200, ORDER[1]: 0.4 - step / 300}) for step in (0, 30, 60)]
    assert kinds(metrics(0.4, 0.7), probes, RewardFunction({ORDER[0]: 1.0})) == []


@pytest.mark.parametrize(("affected", "raised"), [(0, False), (1, False), (2, True), (8, True)])
def test_share_of_cut_subjects(affected: int, raised: bool) -> None:
    rows, probes = healthy()
    cut = [0.3] * affected + [0.0] * (PHOTOS - affected)
    if affected:
        cut[affected - 1] = 0.8
    probes[-2:] = [row | {"cut": cut} for row in probes[-2:]]
    alarms = find_alarms(rows, probes, EQUAL_WEIGHTS)
    assert [alarm.kind for alarm in alarms] == ["cut_subject"] * raised
    if raised:
        assert alarms[0].index == affected - 1 and f"{affected} of 8 answers" in alarms[0].message


@pytest.mark.parametrize(("affected", "raised"), [(4, False), (5, True)])
def test_share_of_recipes_at_the_limits(affected: int, raised: bool) -> None:
    rows, probes = healthy()
    for row in probes[-2:]:
        calm = [f"{Recipe(exposure=10 * (index - 4), contrast=90)}" for index in range(PHOTOS)]
        row["recipes"] = [str(Recipe(exposure=100, warmth=-10 * index)) for index in range(affected)] + calm[affected:]
    alarms = find_alarms(rows, probes, EQUAL_WEIGHTS)
    assert [alarm.kind for alarm in alarms] == ["at_limits"] * raised
    assert not raised or "mostly in exposure" in alarms[0].message


@pytest.mark.parametrize(("affected", "raised"), [(4, False), (5, True)])
def test_share_of_answers_that_repeat(affected: int, raised: bool) -> None:
    rows, probes = healthy()
    for row in probes[-2:]:
        row["recipes"][:affected] = [str(Recipe(sharpening=20))] * affected
    probes[-1]["totals"][2] -= 0.5
    alarms = find_alarms(rows, probes, EQUAL_WEIGHTS)
    assert [alarm.kind for alarm in alarms] == ["repeated_answers"] * raised
    assert not raised or (alarms[0].index == 2 and alarms[0].recipe == str(Recipe(sharpening=20)))


@pytest.mark.parametrize(("affected", "raised"), [(5, False), (7, False), (8, True)])
def test_share_of_photos_left_alone(affected: int, raised: bool) -> None:
    """Good photos need no edit: leaving most of them alone is no alarm, leaving all of them alone is one."""
    rows, probes = healthy()
    for row in probes[-2:]:
        row["recipes"][:affected] = [str(Recipe())] * affected
    alarms = find_alarms(rows, probes, EQUAL_WEIGHTS)
    assert [alarm.kind for alarm in alarms] == ["repeated_answers"] * raised
    assert not raised or "change nothing" in alarms[0].message


def test_missing_training_signal() -> None:
    _, probes = healthy()
    assert kinds(metrics(0.4, 0.4, no_signal=1.0), probes) == ["no_signal"]
    assert kinds(metrics(0.4, 0.4, steps=9, no_signal=1.0), probes) == []


def test_few_photos_answers_that_are_no_recipes_and_missing_scores_raise_nothing() -> None:
    rows, probes = healthy()
    few = [
        {"step": row["step"], "recipes": [str(Recipe(exposure=100))] * 3, "totals": [None] * 3, "cut": [0.9] * 3}
        | {"parts": {name: [None] * 3 for name in ORDER}}
        for row in probes
    ]
    assert kinds(rows, few) == []
    unreadable = [
        row | {"recipes": [None] * PHOTOS, "cut": [None] * PHOTOS, "totals": [None] * PHOTOS} for row in probes
    ]
    assert kinds(rows, unreadable) == []
    old = [{"step": row["step"], "recipe": str(Recipe()), "total": 0.3} for row in probes]
    assert kinds(rows, old) == [], "probes of earlier versions"


def test_limits_are_the_ends_of_the_ranges_but_not_neutral_values() -> None:
    assert at_limits(Recipe()) == at_limits(Recipe(exposure=90, look="noir", crop=(35, 0, 100, 65))) == []
    assert at_limits(Recipe(exposure=-100, sharpening=100, crop=(0, 40, 100, 100))) == [
        "crop",
        "exposure",
        "sharpening",
    ]


@pytest.fixture(scope="module")
def astronaut() -> np.ndarray:
    return load_photo(next(photo.path for photo in bundled_photos() if photo.path.name == "astronaut.jpg"))


def test_crops_that_remove_the_subject_or_a_head_are_cuts(astronaut: np.ndarray) -> None:
    for crop in ((0, 0, 100, 100), (5, 0, 100, 95), (10, 0, 90, 90)):
        assert not subject_cut(astronaut, Recipe(crop=crop)), crop
    for crop in ((0, 30, 100, 100), (40, 40, 100, 100), (40, 0, 75, 100)):
        assert subject_cut(astronaut, Recipe(crop=crop)), crop
    assert not subject_cut(astronaut, Recipe(exposure=100, look="noir")), "tones do not count"


def test_crop_that_removes_a_border_is_no_cut(astronaut: np.ndarray) -> None:
    photo = shrink(astronaut, 400)
    framed = np.full((photo.shape[0] * 5 // 3, photo.shape[1] * 5 // 3, 3), 250, np.uint8)
    top, left = (framed.shape[0] - photo.shape[0]) // 2, (framed.shape[1] - photo.shape[1]) // 2
    framed[top : top + photo.shape[0], left : left + photo.shape[1]] = photo
    assert not subject_cut(framed, Recipe(crop=(20, 20, 80, 80)))
    assert subject_cut(framed, Recipe(crop=(40, 40, 80, 80)))


# The record


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return RunStore(tmp_path / "runs").create(RunConfig(base="moondream-tiny", reward={"sharpness": 1.0}, seed=1))


@pytest.fixture(scope="module")
def held_out() -> PhotoSet:
    files = bundled_photos("held-out")[:PHOTOS]
    return PhotoSet([shrink(load_photo(file.path), 200) for file in files], [file.path.name for file in files])


def test_alarm_is_recorded_with_small_pictures_and_its_first_step(
    run: Run, held_out: PhotoSet, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.alarms() == [] and not run.has_alarm, "also a run of an earlier version"
    monitor = AlarmMonitor(run, EQUAL_WEIGHTS, held_out)
    for step, crop in ((0, (0, 0, 100, 100)), (10, (40, 40, 60, 60)), (20, (40, 40, 60, 60)), (30, (40, 0, 60, 100))):
        texts = [str(Recipe(crop=crop, exposure=10 * index)) for index in range(PHOTOS)]
        answers = [score_answer(photo, text) for photo, text in zip(held_out.photos, texts, strict=True)]
        run.append_probe({"step": step, **monitor.measure(answers)})
        monitor.check(step)
        assert bool(run.alarms()) == (step >= 20)
    cut = next(row for row in run.alarms() if row["kind"] == "cut_subject")
    assert (cut["step"], cut["last_step"]) == (20, 30) and "crop 40 0 60 100" in cut["recipe"]
    assert cut["photo"] == held_out.names[cut["index"]]
    before, after = (load_photo(path) for path in run.alarm_pictures("cut_subject"))
    assert before.shape == held_out.photos[cut["index"]].shape and after.shape[1] < before.shape[1] / 2
    output = capsys.readouterr().out
    assert output.count("ALARM after step 20: Edits cut off the subject") == 1 and "step 30" not in output
    assert run.has_alarm
    run.truncate_after(20)
    assert "cut_subject" in [row["kind"] for row in run.alarms()]
    run.truncate_after(19)
    assert run.alarms() == [] and not run.has_alarm


def test_alarms_of_another_machine_are_validated_and_their_pictures_limited(run: Run) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), np.uint8)
    good = vars(Alarm("cut_subject", "A", "B", "C", 10, 10, 0, "a.jpg", str(Recipe()))) | {"unknown": 1}
    bad = [
        {},
        good | {"kind": "../../escape"},
        good | {"title": "x" * 10_000},
        good | {"index": -1},
        good | {"index": "0"},
        good | {"recipe": 5},
    ]
    store_alarms(run, [*bad, good], PhotoSet([noise], ["a.jpg"]))
    assert [(row["kind"], row["title"]) for row in run.alarms()] == [("cut_subject", "A")]
    assert "unknown" not in run.alarms()[0]
    for path in run.alarm_pictures("cut_subject"):
        assert 0 < path.stat().st_size < 120_000 and max(load_photo(path).shape) == 320
    assert not list(run.folder.parent.glob("**/*escape*"))
    store_alarms(run, [good | {"index": 7}], PhotoSet([noise], ["a.jpg"]))
    (run.folder / "alarms.json").write_text('[{"kind": "unknown"}, 3]')
    assert run.alarms() == []


def test_every_rule_has_a_kind() -> None:
    from training.grpo import alarms

    assert tuple(rule.__name__.lstrip("_") for rule in alarms._RULES) == ALARM_KINDS


# A real run


@pytest.mark.slow
def test_run_with_a_reward_for_small_crops_raises_alarms_and_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train moondream-tiny for real on a reward that is won by cutting away. It wins."""
    monkeypatch.setitem(rewards.REWARDS, "sharpness", small_crops)
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, photo in enumerate(bundled_photos("held-out")[:PHOTOS]):
        save_picture(shrink(load_photo(photo.path), 200), Recipe(), folder / f"{index}.png")
    settings: Row = {"photos": str(folder), "held_out": f"{folder}/", "photos_per_step": 4, "rollouts": 8, "beta": 0.0}
    settings |= {"base": "moondream-tiny", "reward": {"sharpness": 1.0}, "seed": 1, "learning_rate": 1e-2}
    runs = RunStore(tmp_path / "runs")
    run = runs.create(RunConfig.create(**settings, steps=24, probe_every=4))
    execute(run, run.config())
    assert run.status().state == "done"
    result = run.result()
    assert result and result["wins"], "the reward rose on held-out photos as well"
    raised = {row["kind"]: row for row in run.alarms()}
    assert raised.keys() >= {"cut_subject", "at_limits"}
    assert 0 < raised["cut_subject"]["step"] < 24, "during training"
    assert result["alarms"] == run.alarms() and run.status().message == result["alarm"]
    assert "ALARM after step" in capsys.readouterr().out
    assert all(path.is_file() for path in run.alarm_pictures("cut_subject"))
    adapters = AdapterRegistry(runs, dict(MODELS))
    adapters.load()
    assert not adapters.auto_enable(run) and not adapters.is_enabled(run.id)
    assert "Alarm in training: " in adapters.enable(run).note, "by hand, it can be used"
    assert json.loads((run.folder / "probes.jsonl").read_text().splitlines()[-1])["cut"]
