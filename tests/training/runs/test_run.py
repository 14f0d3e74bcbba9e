"""Runs as folders: what is refused, what survives half a line, a killed process and a full disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from filelock import FileLock

from training.runs import run as module
from training.runs.run import Run, RunConfig, RunError, Runs, Status, write_whole

ASKED = {"base": "moondream-tiny", "reward": {"sharpness": 1.0}, "seed": 7}


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "runs")


@pytest.fixture
def run(runs: Runs) -> Run:
    return runs.create(RunConfig.make(**ASKED))


def test_base_reward_and_seed_are_enough() -> None:
    config = RunConfig.read(json.dumps(ASKED))
    assert (config.base, config.reward, config.seed) == ("moondream-tiny", {"sharpness": 1.0}, 7)
    assert config.photos == config.held_out == "bundled"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speed": 3}, "speed: there is no such key"),
        ({"reward": {"beauty": 1}}, "no reward named beauty"),
        ({"reward": {"sharpness": 0}}, "All weights are zero"),
        ({"reward": {"sharpness": float("nan")}}, "reward"),
        ({"seed": -1}, "seed"),
        ({"steps": 0}, "steps"),
        ({"steps": 1_000_000}, "steps"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"name": "x" * 81}, "name"),
        ({"rollouts": 1}, "rollouts"),
    ],
)
def test_what_a_run_cannot_be_is_named(changes: dict[str, object], words: str) -> None:
    with pytest.raises(RunError, match=words):
        RunConfig.make(**(ASKED | changes))


@pytest.mark.parametrize("text", ["", "[]", "{", "null", b"\xff\xfe", '{"base": "moondream-tiny"}'])
def test_what_is_no_config_is_refused_in_words(text: str | bytes) -> None:
    with pytest.raises(RunError, match="cannot be used"):
        RunConfig.read(text)


def test_a_new_run_is_queued_and_listed_in_order(runs: Runs) -> None:
    made = [runs.create(RunConfig.make(**ASKED, name=str(place))) for place in range(3)]
    assert [run.id for run in runs.list()] == sorted(run.id for run in made)
    status = made[0].status()
    assert status.state == "queued" and status.created > 0 and status.steps == RunConfig.make(**ASKED).steps


def test_a_process_that_has_gone_leaves_its_run_interrupted(run: Run) -> None:
    with FileLock(run.folder / "lock"):
        run.set_status(state="running", step=3)
        assert run.alive() and run.status().state == "running"
    assert not run.alive() and run.status().state == "interrupted" and "Resume" in run.status().message


def test_half_a_line_is_left_out(run: Run) -> None:
    run.add("metrics", {"step": 1, "reward": 0.5})
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "rew')
    assert [line["step"] for line in run.metrics()] == [1]
    assert run.probes() == []


def test_a_resumed_run_forgets_the_later_steps(run: Run) -> None:
    for step in (1, 2, 3):
        run.add("metrics", {"step": step})
        run.add("probes", {"step": step})
    run.forget_after(2)
    assert [line["step"] for line in run.metrics()] == [line["step"] for line in run.probes()] == [1, 2]


def test_the_log_is_read_from_its_end(run: Run) -> None:
    assert run.log() == ""
    (run.folder / "log.txt").write_bytes(b"x" * 100_000 + b"\nbar 1\rbar 2\n\xff last\n")
    assert run.log(2).splitlines() == ["bar 2", "\ufffd last"]


@pytest.mark.parametrize(
    "name", ["", "../../etc", "nothing", "20990101-000000-abcdef", None, 3, "20990101-000000-abcdef/.."]
)
def test_only_a_run_is_found(runs: Runs, name: object) -> None:
    with pytest.raises(RunError, match="There is no run"):
        runs.get(name)  # type: ignore[arg-type]


def test_a_run_that_works_is_not_deleted(runs: Runs, run: Run) -> None:
    with FileLock(run.folder / "lock"), pytest.raises(RunError, match="Cancel it first"):
        runs.delete(run.id)
    runs.delete(run.id)
    assert runs.list() == [] and list(runs.folder.iterdir()) == []


def test_only_so_many_runs_are_kept(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RUNS", 2)
    for _ in range(2):
        runs.create(RunConfig.make(**ASKED))
    with pytest.raises(RunError, match="Delete one first"):
        runs.create(RunConfig.make(**ASKED))


def test_a_full_disk_leaves_what_was_there(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    before = run.status()
    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run.set_status(state="running")
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "file", "text")
    assert run.status() == before and not list(tmp_path.glob(".*part"))
    with pytest.raises(RunError, match="Free some space"):
        Runs(tmp_path / "others").create(RunConfig.make(**ASKED))
    assert list((tmp_path / "others").iterdir()) == []


def test_a_run_is_renamed_within_limits(run: Run) -> None:
    run.rename("  Sharper  ")
    assert run.config().name == "Sharper"
    with pytest.raises(RunError, match="name"):
        run.rename("x" * 81)
    assert run.config().name == "Sharper"


def test_a_queued_run_is_cancelled_at_once(run: Run) -> None:
    run.cancel()
    assert run.status().state == "cancelled" and run.cancelled


def test_the_time_left_comes_from_the_steps_so_far() -> None:
    status = Status("running", step=10, steps=40, started=100.0)
    assert status.seconds_left(120.0) == pytest.approx(60.0)
    assert Status("running", steps=40, started=100.0).seconds_left(120.0) is None
    assert Status("done", step=40, steps=40).seconds_left() is None


def test_runs_are_listed_in_the_order_in_which_they_were_made(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    made = [runs.create(RunConfig.make(base="moondream-tiny", reward={"colour": 1}, seed=n)).id for n in range(20)]
    assert [run.id for run in runs.list()] == made
