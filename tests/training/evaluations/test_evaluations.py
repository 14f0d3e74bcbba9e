"""Evaluations: answers in batches, resuming, budgets, usage events, leaderboards and exports."""

from __future__ import annotations

import csv
import html
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from inference import registry
from inference.metering import UsageMeter
from inference.registry import MODELS, answer
from inference.types import Answer, AnswerEvent, InferenceError, Request
from recipes import Recipe, load_photo, parse
from rewards import EQUAL_WEIGHTS, REWARDS, RewardFunction, score_recipes
from rewards.report import score_each
from storage.database import Database
from tests.support.fake_backend import HOSTILE, fake_spec
from training.evaluate import evaluate_to_folder
from training.evaluations import runner
from training.evaluations.evaluation import EvaluatedModel, Evaluation, EvaluationConfig, EvaluationStore, create_folder
from training.evaluations.export import FORMATS, markdown_table, to_csv, write_exports
from training.evaluations.leaderboard import compare_evaluations, compute_totals, leaderboard, photo_order
from training.evaluations.runner import ModelAccess, run_evaluation
from training.runs.run import RunError
from usage.analytics import UsageAnalytics
from usage.budgets import Budget, Budgets
from usage.events import Deployment, UsageEvent
from usage.prices import Prices
from usage.recorder import Recorder, insert_events
from usage.time_window import UsageFilter

ROOT = Path(__file__).resolve().parents[3]
SHARP = RewardFunction({"sharpness": 1.0})


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(f"sqlite:///{tmp_path / 'x.sqlite3'}")


@pytest.fixture
def meter(database: Database, tmp_path: Path) -> UsageMeter:
    recorder = Recorder(database, tmp_path / "spool", Deployment("topic"))
    return UsageMeter(recorder, Prices(), "cpu-upgrade", Budgets(database))


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add fake models to the registry."""
    monkeypatch.setitem(registry.BACKENDS, "fake", "tests.support.fake_backend")
    for name in ("one", "two"):
        monkeypatch.setitem(MODELS, name, fake_spec(name))
    for name in ("broken", "hostile", "prose"):
        monkeypatch.setitem(MODELS, name, fake_spec(name, name))


def config(photos: str, *models: str, **settings: object) -> EvaluationConfig:
    """Return settings of a small evaluation."""
    chosen = [EvaluatedModel(name=name, title=name) for name in models or ("one", "two")]
    values = {"models": chosen, "reward": dict(EQUAL_WEIGHTS.weights), "photos": photos, "candidates": 2, "pool": 3}
    return EvaluationConfig.create(**values | settings)


def evaluated(folder: Path, settings: EvaluationConfig, meter: UsageMeter, **options: object) -> Evaluation:
    """Do an evaluation in a folder."""
    evaluation = create_folder(folder, settings)
    run_evaluation(evaluation, ModelAccess.of_specs(MODELS, meter), **options)
    return evaluation


# ── Answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_photos_of_a_batch_are_answered_and_scored_like_single_ones(
    tmp_path: Path, photo_folder: str, meter: UsageMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    batched = runner.answer_batch
    monkeypatch.setattr(runner, "answer_batch", lambda *args: sizes.append(len(args[1])) or batched(*args))
    evaluation = evaluated(tmp_path / "e", config(photo_folder, "moondream-tiny"), meter)
    results = evaluation.results()
    assert evaluation.status().state == "done" and sizes == [3]
    for photo in range(3):
        image = load_photo(evaluation.photo_file(photo))
        events = answer("moondream-tiny", Request(image, "recipe", n=2, seed=1))
        texts = [event.text for event in events if isinstance(event, Answer)]
        assert results.rows[photo, 0]["texts"] == texts
        for candidate, text in enumerate(texts):
            scores = score_recipes(image, [parse(text).recipe])[0].scores
            assert results.scores[photo, 0, candidate] == pytest.approx([scores[name] for name in REWARDS], abs=1e-5)
    single = sum(row["seconds"] for row in results.rows.values())
    meter.recorder.flush()
    events = UsageAnalytics(meter.budgets.database).recent(UsageFilter("day"))  # type: ignore[union-attr]
    assert sum(event.latency for event in events) == pytest.approx(single, abs=0.01)  # the time of the machine


def test_each_photo_and_model_is_one_usage_event_with_its_reward(
    tmp_path: Path, photo_folder: str, meter: UsageMeter, database: Database
) -> None:
    evaluation = evaluated(tmp_path / "e", config(photo_folder, "one", "prose"), meter)
    meter.recorder.flush()
    events = UsageAnalytics(database).recent(UsageFilter("day"))
    assert len(events) == 6 and {event.source for event in events} == {"evaluate"}
    assert all(event.candidates == 2 and event.outcome == "ok" and event.reward is not None for event in events)
    results = evaluation.results()
    assert results.valid[:, 0].tolist() == [1, 1, 1] and results.valid[:, 1].tolist() == [0, 0, 0]
    assert np.allclose(results.scores[:, 1, 0], results.untouched)  # an answer without a recipe changes nothing


@pytest.mark.parametrize(("skill", "prompt"), [("caption", ""), ("detect", "dog"), ("query", "What is it?")])
def test_other_skills_are_not_scored(
    skill: str, prompt: str, tmp_path: Path, photo_folder: str, meter: UsageMeter
) -> None:
    evaluation = evaluated(tmp_path / "e", config(photo_folder, skill=skill, prompt=prompt), meter)
    table = leaderboard(evaluation.results(), EQUAL_WEIGHTS)
    assert evaluation.status().state == "done" and not table["scored"]
    assert [row["kind"] for row in table["rows"]] == ["model", "model"]
    for row in table["rows"]:
        assert row["reward"]["mean"] is None and row["valid"] == 1 and row["latency"] > 0
        assert row["tokens_in"] == 740 and row["cost"] > 0  # of the machine
    assert write_exports(evaluation, EQUAL_WEIGHTS, tmp_path)


# ── Stopping and resuming ───────────────────────────────────────────────────────────────────────────────────────────


class Cancelling(threading.Event):
    """An event that becomes set when it has been looked at several times."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks < 0 or super().is_set()


def test_a_cancelled_evaluation_is_resumed_without_asking_again(
    tmp_path: Path, photo_folder: str, meter: UsageMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "HOSTED_CALLS", 1)
    settings, calls = config(photo_folder, "one"), []
    evaluation = create_folder(tmp_path / "e", settings)

    def counted(name: str, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
        calls.append(name)
        if len(calls) == 3:
            raise InferenceError("cancelled", "Cancelled.")
        yield from answer(name, request, cancel)

    access = ModelAccess(MODELS, counted, meter)
    run_evaluation(evaluation, access)
    assert evaluation.status().state == "cancelled"
    answered = evaluation.rows()
    assert 1 <= len(answered) <= 2
    run_evaluation(evaluation, access)
    assert evaluation.status().state == "done" and len(evaluation.rows()) == 3
    assert len(calls) == 3 + 3 - len(answered)
    run_evaluation(create_folder(tmp_path / "e", settings), access)  # complete: nothing is left to do
    assert len(calls) == 3 + 3 - len(answered)
    with pytest.raises(RunError, match="other settings"):
        create_folder(tmp_path / "e", config(photo_folder, "two"))


def test_cancelling_stops_between_photos_and_the_file_does_the_same(
    tmp_path: Path, photo_folder: str, meter: UsageMeter
) -> None:
    evaluation = evaluated(tmp_path / "e", config(photo_folder), meter, cancel=Cancelling(2))
    assert evaluation.status().state == "cancelled" and evaluation.photos() is None
    evaluation.cancel()
    run_evaluation(evaluation, ModelAccess.of_specs(MODELS, meter))
    assert evaluation.status().state == "cancelled"


def test_a_part_of_a_line_is_repaired(tmp_path: Path, photo_folder: str, meter: UsageMeter) -> None:
    evaluation = evaluated(tmp_path / "e", config(photo_folder, "one"), meter)
    complete = evaluation.rows()
    file = evaluation.folder / "answers.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    evaluation.set_status(state="running")
    assert evaluation.status().state == "interrupted"
    run_evaluation(evaluation, ModelAccess.of_specs(MODELS, meter))
    without_time = [{key: value for key, value in row.items() if key != "seconds"} for row in complete.values()]
    again = {key: {k: v for k, v in row.items() if k != "seconds"} for key, row in evaluation.rows().items()}
    assert [again[key] for key in complete] == without_time


@pytest.mark.slow
def test_a_killed_command_resumes_to_the_same_result(tmp_path: Path, photo_folder: str) -> None:
    command = [sys.executable, "-m", "training.evaluate", "--models", "base", "--photos", photo_folder, "--pool", "2"]
    command += ["--json", "--candidates", "2", "--out"]
    folder = tmp_path / "killed"
    process = subprocess.Popen([*command, str(folder)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (folder / "photos.json").exists():
        threading.Event().wait(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = subprocess.run([*command, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True)
    table = json.loads(resumed.stdout)
    assert table["answered"] == 3 and table["rows"][-1]["label"] == "best of 2 recipes"
    assert {file.name for file in folder.glob("evaluation.*")} == {f"evaluation.{suffix}" for suffix in FORMATS}
    direct = evaluate_to_folder(
        tmp_path / "direct", ["moondream-tiny"], [1.0], EQUAL_WEIGHTS, photos=photo_folder, pool=2, candidates=2
    )
    assert [row["reward"] for row in table["rows"]] == [row["reward"] for row in direct["rows"]]


def test_a_model_that_always_fails_ends_the_evaluation(
    tmp_path: Path, photo_folder: str, meter: UsageMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "MAX_FAILURES", 2)
    evaluation = evaluated(tmp_path / "e", config(photo_folder, "one", "broken"), meter)
    status = evaluation.status()
    assert status.state == "failed" and "The fake model is broken" in status.message
    monkeypatch.setattr(runner, "MAX_FAILURES", 10)
    run_evaluation(evaluation, ModelAccess.of_specs(MODELS, meter))
    table = leaderboard(evaluation.results(), EQUAL_WEIGHTS)
    assert evaluation.status().state == "done" and table["rows"][1]["valid"] == 0
    assert table["rows"][1]["reward"]["mean"] is None and table["rows"][0]["photos"] == 3


def test_answers_that_were_paid_for_are_kept_and_recorded_when_another_model_fails(
    tmp_path: Path, photo_folder: str, meter: UsageMeter, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def failing(name: str, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
        calls.append(name)
        if name == "two":
            raise InferenceError("unavailable", "The server is gone.")
        yield from answer(name, request, cancel)

    evaluation = create_folder(tmp_path / "e", config(photo_folder))
    run_evaluation(evaluation, ModelAccess(MODELS, failing, meter))
    assert evaluation.status().state == "failed" and "server is gone" in evaluation.status().message
    assert len(evaluation.rows()) == calls.count("one")
    meter.recorder.flush()
    events = UsageAnalytics(database).recent(UsageFilter("day"))
    assert len(events) == len(calls)


def test_a_spent_budget_stops_paid_calls(
    tmp_path: Path, photo_folder: str, meter: UsageMeter, monkeypatch: pytest.MonkeyPatch, database: Database
) -> None:
    monkeypatch.setitem(MODELS, "paid", fake_spec("paid", needs_key=True))
    Budgets(database).set(Budget("topic", 0.01, stop=True))
    event = UsageEvent(datetime.now(timezone.utc), "paid", "recipe", cost=1.0, cost_basis="estimated", branch="topic")
    insert_events(database, [event])
    evaluation = evaluated(tmp_path / "e", config(photo_folder, "paid"), meter)
    assert evaluation.status().state == "failed" and "budget" in evaluation.status().message
    assert evaluation.rows() == {}


def test_photos_that_cannot_be_read_end_the_evaluation_with_a_message(tmp_path: Path, meter: UsageMeter) -> None:
    (tmp_path / "empty").mkdir()
    evaluation = evaluated(tmp_path / "e", config(str(tmp_path / "empty")), meter)
    assert evaluation.status().state == "failed" and "No photo could be read" in evaluation.status().message


def test_reference_scores_are_shared_by_evaluations_of_the_same_photos(
    tmp_path: Path, photo_folder: str, meter: UsageMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(photo_folder, "one", pool=256, max_photos=1)
    first = evaluated(tmp_path / "a", settings, meter, cache_folder=tmp_path / "cache")
    monkeypatch.setattr(runner, "random_recipes", lambda count: [Recipe()] * count)  # would give other scores
    second = evaluated(tmp_path / "b", settings, meter, cache_folder=tmp_path / "cache")
    assert np.array_equal(first.results().pool, second.results().pool)


# ── Store and settings ──────────────────────────────────────────────────────────────────────────────────────────────


def test_store_lists_renames_and_deletes(tmp_path: Path) -> None:
    store = EvaluationStore(tmp_path / "evaluations")
    evaluation = store.create(config("bundled"), "hf:1", "Ada")
    assert [item.id for item in store.list()] == [evaluation.id] and evaluation.owner == "hf:1"
    evaluation.rename("  Mine ")
    assert store.get(evaluation.id).config().name == "Mine"
    with evaluation.lock(), pytest.raises(RunError, match="This evaluation is still working"):
        store.delete(evaluation.id)
    store.delete(evaluation.id)
    assert store.list() == []
    with pytest.raises(RunError, match="There is no evaluation"):
        store.get(evaluation.id)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": []}, "models"),
        ({"models": [EvaluatedModel(name="one")] * 2}, "another temperature"),
        ({"models": [EvaluatedModel(name=str(number)) for number in range(7)]}, "models"),
        ({"reward": {"beauty": 1}}, "no reward named"),
        ({"candidates": 9}, "candidates"),
        ({"unknown": 1}, "unknown key"),
    ],
)
def test_invalid_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RunError, match=message):
        EvaluationConfig.create(**{"models": [EvaluatedModel(name="one")], "reward": {"sharpness": 1}, **settings})


# ── Leaderboard ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def evaluation(tmp_path: Path, photo_folder: str, meter: UsageMeter) -> Evaluation:
    return evaluated(tmp_path / "e", config(photo_folder, candidates=3), meter)


def test_interval_of_the_first_answers_is_within_their_rewards(evaluation: Evaluation) -> None:
    first, *_ = evaluation.rows().values()
    (evaluation.folder / "answers.jsonl").write_text(json.dumps(first) + "\n")
    row = leaderboard(evaluation.results(), EQUAL_WEIGHTS)["rows"][first["model"]]
    assert row["photos"] == 1 and row["reward"]["mean"] > 0
    assert row["reward"]["low"] == row["reward"]["high"] == pytest.approx(row["reward"]["mean"])


def test_scores_of_untouched_photos_are_in_the_rows_or_in_files_of_earlier_versions(
    evaluation: Evaluation,
) -> None:
    scores = evaluation.results().untouched
    expected = [score_each(load_photo(evaluation.photo_file(photo)), [Recipe()])[0] for photo in range(3)]
    assert scores == pytest.approx(np.array(expected), abs=1e-5)
    rows = [{key: value for key, value in row.items() if key != "untouched"} for row in evaluation.rows().values()]
    (evaluation.folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert np.isnan(evaluation.results().untouched).all()
    photos = [{**photo, "untouched": scores[index].tolist()} for index, photo in enumerate(evaluation.photos() or [])]
    (evaluation.folder / "photos.json").write_text(json.dumps(photos))
    assert evaluation.results().untouched.tolist() == scores.tolist()


@pytest.mark.parametrize("function", [EQUAL_WEIGHTS, SHARP, RewardFunction({"colour": 0.2, "creativity": 0.9})])
def test_leaderboard_follows_the_weights_without_rendering(
    evaluation: Evaluation, function: RewardFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "score_each", None)
    results = evaluation.results()
    table = leaderboard(results, function)

    def best_total(photo: int, model: int) -> float:
        scores = results.rows[photo, model]["scores"]
        return max(function.total(dict(zip(REWARDS, values))) or 0.0 for values in scores)

    best = np.array([[best_total(photo, model) for model in range(2)] for photo in range(3)])
    untouched = np.array([function.total(dict(zip(REWARDS, scores.tolist()))) for scores in results.untouched], float)
    assert [row["reward"]["mean"] for row in table["rows"][:2]] == pytest.approx(best.mean(0))
    assert table["rows"][2]["label"] == "untouched photo" and table["rows"][2]["wins"] is None
    assert table["rows"][2]["reward"]["mean"] == pytest.approx(untouched.mean())
    assert table["rows"][3]["label"] == "best of 3 recipes"
    wins = (best > untouched[:, None]) + 0.5 * np.isclose(best, untouched[:, None], atol=1e-9)
    assert [row["wins"]["mean"] for row in table["rows"][:2]] == pytest.approx(wins.mean(0))
    for row in table["rows"]:
        assert row["reward"]["low"] <= row["reward"]["mean"] <= row["reward"]["high"]
        assert row["mean_candidate"] <= row["reward"]["mean"] + 1e-9
    against_first = leaderboard(results, function, 0)
    expected = (best[:, 1] > best[:, 0]) + 0.5 * np.isclose(best[:, 1], best[:, 0], atol=1e-9)
    assert against_first["rows"][1]["wins"]["mean"] == pytest.approx(expected.mean())


def test_photos_are_ordered_by_disagreement_and_by_loss(evaluation: Evaluation) -> None:
    results = evaluation.results()
    totals = compute_totals(results, EQUAL_WEIGHTS)
    spread = np.abs(totals.best[:, 0] - totals.best[:, 1])
    order = photo_order(results, totals, "disagree")
    assert sorted(order) == [0, 1, 2] and list(spread[order]) == sorted(spread, reverse=True)
    lost = photo_order(results, totals, "loses", 0, 1)
    assert set(lost) == {photo for photo in range(3) if totals.best[photo, 0] < totals.best[photo, 1]}
    assert photo_order(results, totals, "photo") == [0, 1, 2]


def test_an_incomplete_evaluation_has_a_leaderboard(evaluation: Evaluation) -> None:
    lines = (evaluation.folder / "answers.jsonl").read_text().splitlines(keepends=True)
    (evaluation.folder / "answers.jsonl").write_text("".join(lines[:1]))
    (evaluation.folder / "references.npy").unlink()
    table = leaderboard(evaluation.results(), EQUAL_WEIGHTS)
    assert sum(row["photos"] for row in table["rows"][:2]) == 1
    assert table["rows"][3]["reward"]["mean"] is None
    assert "–" in markdown_table(table)


def test_an_earlier_evaluation_is_compared_by_common_photos(
    tmp_path: Path, photo_folder: str, meter: UsageMeter, evaluation: Evaluation
) -> None:
    again = evaluated(tmp_path / "again", config(photo_folder, candidates=3), meter).results()
    rows = compare_evaluations(again, evaluation.results(), SHARP)
    assert [row["photos"] for row in rows] == [3] * 4 and all(row["difference"]["mean"] == 0 for row in rows)
    fewer = evaluated(tmp_path / "fewer", config(photo_folder, "one", candidates=1, max_photos=2), meter).results()
    rows = compare_evaluations(fewer, evaluation.results(), SHARP)
    assert rows[0]["label"] == "one, T 1" and rows[0]["photos"] == 2 and rows[0]["difference"]["mean"] <= 0


# ── Exports ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_exports_contain_every_candidate_and_escape_text(tmp_path: Path, photo_folder: str, meter: UsageMeter) -> None:
    settings = config(photo_folder, "one", "hostile", name="<b>Mine</b>")
    evaluation = evaluated(tmp_path / "e", settings, meter)
    files = {file.suffix: file for file in write_exports(evaluation, SHARP, tmp_path)}
    rows = list(csv.DictReader(files[".csv"].open(encoding="utf-8")))
    assert len(rows) == 12 and float(rows[0]["total"]) == float(rows[0]["sharpness"])
    table = parquet.read_table(files[".parquet"]).to_pylist()
    assert len(table) == 12 and table[0]["recipe"] and table[0]["text"] == rows[0]["text"].removeprefix("'")
    assert parquet.read_table(evaluation.folder / "scores.parquet").num_rows == 12
    content = json.loads(files[".json"].read_text(encoding="utf-8"))
    assert content["config"]["photos"] == "own photos" and str(tmp_path) not in files[".json"].read_text()
    assert content["leaderboard"]["rows"][0]["label"] == "one, T 1" and len(content["candidates"]) == 12
    page = files[".html"].read_text(encoding="utf-8")
    assert "<script" not in page and "<b>Mine" not in page and html.escape("<b>Mine</b>") in page
    assert "onerror=" not in page.replace(html.escape(HOSTILE), "").replace("onerror=&quot;", "")
    assert page.count("data:image/jpeg") == 9 and "http" not in page and str(tmp_path) not in page


def test_a_spreadsheet_computes_no_text_as_a_formula(evaluation: Evaluation) -> None:
    results = evaluation.results()
    results.photos[0]["name"] = "=1+1"
    results.rows[0, 0]["texts"][0] = "@SUM(A1)"
    text = to_csv(results, SHARP)
    assert "'=1+1" in text and "'@SUM" in text and "\n=1" not in text
