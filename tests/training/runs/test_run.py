"""Tests of run folders: validation, incomplete files, killed processes and full disks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from filelock import FileLock

from storage.files import write_atomically
from tests.support.runs import CONFIG, make_config
from training.runs import run as run_module
from training.runs.run import Ownership, Run, RunConfig, RunError, RunStore, Status


@pytest.fixture
def runs(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs")


@pytest.fixture
def run(runs: RunStore) -> Run:
    return runs.create(make_config())


def test_config_needs_only_base_reward_and_seed() -> None:
    config = RunConfig.from_json('{"base": "moondream-tiny", "reward": {"sharpness": 1.0}, "seed": 7}')
    assert (config.base, config.reward, config.seed) == ("moondream-tiny", {"sharpness": 1.0}, 7)
    assert config.photos == config.held_out == "bundled"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed": 3}, "speed: unknown key"),
        ({"reward": {"beauty": 1}}, "no reward named beauty"),
        ({"reward": {"sharpness": 0}}, "All weights are zero"),
        ({"reward": {"sharpness": float("nan")}}, "reward"),
        ({"seed": -1}, "seed"),
        ({"steps": 0}, "steps"),
        ({"steps": 1_000_000}, "steps"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"name": "x" * 81}, "name"),
        ({"rollouts": 1}, "rollouts"),
        ({"where": "moon"}, "backend"),
    ],
)
def test_invalid_config_names_the_wrong_key(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RunError, match=message):
        make_config(**changes)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", b"\xff\xfe", '{"base": "moondream-tiny"}'])
def test_malformed_config_file_is_refused(text: str | bytes) -> None:
    with pytest.raises(RunError, match="cannot be used"):
        RunConfig.from_json(text)


@pytest.mark.parametrize("key", ["where", "backend"])
def test_config_file_accepts_where_and_backend(run: Run, key: str) -> None:
    (run.folder / "config.json").write_text(json.dumps(CONFIG | {key: "jobs"}))
    assert run.config().backend == "jobs"


def test_config_file_keeps_the_key_where(run: Run) -> None:
    """Run folders stay readable by older versions."""
    (run.folder / "config.json").write_text(json.dumps(CONFIG | {"where": "hosted"}))
    run.rename("Renamed")
    written = json.loads((run.folder / "config.json").read_text())
    assert written["where"] == "hosted" and "backend" not in written
    assert run.config().backend == "hosted"


def test_new_backend_overrides_the_stored_one() -> None:
    stored = make_config(backend="jobs").model_dump()
    assert RunConfig.create(**(stored | {"backend": "here"})).backend == "here"


def test_new_runs_are_queued_and_listed_in_order(runs: RunStore) -> None:
    created = [runs.create(make_config(name=str(index))) for index in range(20)]
    assert [run.id for run in runs.list()] == [run.id for run in created]
    status = created[0].status()
    assert status.state == "queued" and status.created > 0 and status.steps == make_config().steps


def test_dead_process_leaves_its_run_interrupted(run: Run) -> None:
    with FileLock(run.folder / "lock"):
        run.set_status(state="running", step=3)
        assert run.alive() and run.status().state == "running"
    assert not run.alive() and run.status().state == "interrupted" and "Resume" in run.status().message


def test_incomplete_line_is_skipped(run: Run) -> None:
    run.append_metrics({"step": 1, "reward": 0.5})
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "rew')
    assert [row["step"] for row in run.metrics()] == [1]
    assert run.probes() == []


def test_truncate_after_removes_later_steps(run: Run) -> None:
    for step in (1, 2, 3):
        run.append_metrics({"step": step})
        run.append_probe({"step": step})
        run.append_rollouts({"step": step, "groups": []})
    run.truncate_after(2)
    assert run.rollouts(3) == run.rollouts(2) == {"step": 2, "groups": []}
    assert run.rollouts(1) == {"step": 1, "groups": []} and run.rollouts(0) is None
    assert [row["step"] for row in run.metrics()] == [row["step"] for row in run.probes()] == [1, 2]


def test_log_is_read_from_its_end(run: Run) -> None:
    assert run.log() == ""
    (run.folder / "log.txt").write_bytes(b"x" * 100_000 + b"\nbar 1\rbar 2\n\xff last\n")
    assert run.log(2).splitlines() == ["bar 2", "\ufffd last"]


@pytest.mark.parametrize(
    "name", ["", "../../etc", "nothing", "20990101-000000-abcdef", None, 3, "20990101-000000-abcdef/.."]
)
def test_get_refuses_unknown_and_malformed_ids(runs: RunStore, name: object) -> None:
    with pytest.raises(RunError, match="There is no run"):
        runs.get(name)  # type: ignore[arg-type]


def test_delete_refuses_a_running_run(runs: RunStore, run: Run) -> None:
    with FileLock(run.folder / "lock"), pytest.raises(RunError, match="Cancel it first"):
        runs.delete(run.id)
    runs.delete(run.id)
    assert runs.list() == [] and list(runs.folder.iterdir()) == []


def test_deleted_run_does_not_come_back(runs: RunStore, run: Run) -> None:
    """A page or a worker may still hold the deleted run and check whether it is alive."""
    runs.delete(run.id)
    assert not run.alive() and run.status() == Status()
    assert runs.list() == [] and list(runs.folder.iterdir()) == []


def test_process_killed_while_deleting_leaves_no_half_run(
    runs: RunStore, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise SystemExit("simulated kill")

    kept = runs.create(make_config())
    with monkeypatch.context() as patch:
        patch.setattr(run_module.shutil, "rmtree", die)
        with pytest.raises(SystemExit):
            runs.delete(run.id)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "set_status", die)
        with pytest.raises(SystemExit):
            runs.create(make_config())
    assert [left.id for left in runs.list()] == [kept.id] and len(list(runs.folder.iterdir())) == 3
    runs.remove_leftovers()
    assert list(runs.folder.iterdir()) == [kept.folder]


def test_failed_deletion_keeps_the_run(runs: RunStore, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(run_module.os, "replace", fail)
        with pytest.raises(RunError, match="could not be deleted"):
            runs.delete(run.id)
    assert runs.get(run.id).config() == make_config()


def test_owner_is_stored_beside_the_config(runs: RunStore, run: Run) -> None:
    assert run.ownership == Ownership("", "", False)
    owned = runs.create(make_config(), owner="hf:4711", owner_name="Ada", own_key=True)
    owned.rename("Renamed")
    owned.set_status(state="done")
    assert (owned.owner, owned.owner_name, owned.own_key) == ("hf:4711", "Ada", True)
    assert "4711" not in (owned.folder / "config.json").read_text() + (owned.folder / "status.json").read_text()


def test_run_of_a_version_without_owners_belongs_to_the_administrator(run: Run) -> None:
    (run.folder / "owner.json").unlink()
    assert run.ownership == Ownership()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"owner": "hf:1", "role": "admin"}'])
def test_unreadable_owner_grants_nothing(run: Run, text: str) -> None:
    (run.folder / "owner.json").write_text(text)
    assert run.owner == "" and run.own_key


def test_number_of_runs_is_limited(runs: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "MAX_RUNS", 2)
    for _ in range(2):
        runs.create(make_config())
    with pytest.raises(RunError, match="Delete one first"):
        runs.create(make_config())


def test_full_disk_leaves_existing_files_unchanged(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    before = run.status()
    monkeypatch.setattr(run_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run.set_status(state="running")
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "file", "text")
    assert run.status() == before and not list(tmp_path.glob(".*part"))
    with pytest.raises(RunError, match="Free some disk space"):
        RunStore(tmp_path / "others").create(make_config())
    assert list((tmp_path / "others").iterdir()) == []


def test_rename_strips_and_validates_the_name(run: Run) -> None:
    run.rename("  Sharper  ")
    assert run.config().name == "Sharper"
    with pytest.raises(RunError, match="name"):
        run.rename("x" * 81)
    assert run.config().name == "Sharper"


def test_queued_run_is_cancelled_at_once(run: Run) -> None:
    run.cancel()
    assert run.status().state == "cancelled" and run.cancelled


def test_seconds_left_is_estimated_from_past_steps() -> None:
    status = Status("running", step=10, steps=40, started=100.0)
    assert status.seconds_left(120.0) == pytest.approx(60.0)
    assert Status("running", steps=40, started=100.0).seconds_left(120.0) is None
    assert Status("done", step=40, steps=40).seconds_left() is None
