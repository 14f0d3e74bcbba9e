"""Save and restore of the state through the real Hub client, over HTTP, against a simulated Hub with buckets."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from storage.state import bucket as state_bucket
from storage.state import files
from storage.state.bucket import StateBucket
from storage.state.files import DATABASE, FileCopier, is_state_path, state_files
from storage.state.remote import BucketClient, BucketError
from tests.support.bucket_server import TOKEN, BucketServer, run_bucket_server
from tests.support.runs import until

BUCKET = "team/state"
pytestmark = pytest.mark.slow
RUN = "20261126-100000-abcdef"
OTHER_RUN = "20261126-110000-abcdef"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketServer]:
    """Provide a simulated Hub with one empty bucket, as the endpoint of huggingface_hub."""
    with run_bucket_server(BUCKET) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        monkeypatch.setattr(huggingface_hub.hf_api.constants, "ENDPOINT", server.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(state_bucket, "RETRY_SECONDS", 0.05)
        yield server


def open_bucket(data_dir: Path, **options: Any) -> StateBucket:
    """Return a bucket that saves on demand only, and gives up soon at startup."""
    options = {"deployment": "team/space", "save_seconds": 0.2, **options}
    return StateBucket(BUCKET, data_dir, token=TOKEN, **options)


def restored(data_dir: Path, **options: Any) -> StateBucket:
    bucket = open_bucket(data_dir, **options)
    assert bucket.restore() is True, bucket.status().message
    return bucket


def write(file: Path, content: str | bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def write_run(data_dir: Path, run: str = RUN, state: str = "running", photos: str = "bundled") -> Path:
    """Write the files of a run as training does."""
    folder = data_dir / "runs" / run
    write(folder / "config.json", json.dumps({"base": "moondream-tiny", "photos": photos}))
    write(folder / "status.json", json.dumps({"state": state}))
    write(folder / "metrics.jsonl", '{"step": 1}\n')
    write(folder / "adapter" / "adapter_model.safetensors", os.urandom(200_000))
    write(folder / "lock", "")
    for step in (5, 10):
        write(folder / f"checkpoint-{step}" / "optimizer.pt", os.urandom(1000))
        write(folder / f"checkpoint-{step}" / "trainer_state.json", "{}")
    write(folder / "checkpoint-15" / "optimizer.pt", "not complete")
    return folder


def write_database(data_dir: Path, *words: str) -> None:
    data_dir.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(data_dir / DATABASE)) as connection, connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE IF NOT EXISTS words (word TEXT)")
        connection.executemany("INSERT INTO words VALUES (?)", [(word,) for word in words])


def read_database(data_dir: Path) -> list[str]:
    with closing(sqlite3.connect(data_dir / DATABASE)) as connection:
        return [word for (word,) in connection.execute("SELECT word FROM words ORDER BY word")]


def write_state(data_dir: Path) -> None:
    """Write state of every kind."""
    write_database(data_dir, "saved")
    write_run(data_dir)
    write(data_dir / "runs" / "adopted.json", '{"used": [], "settled": []}')
    write(data_dir / "usage-spool" / "00000000000000000001-abc.jsonl", '{"id": 1}\n')
    write(data_dir / "tuning" / "tenant" / "f00" / "finetune.json", '{"step": 3}')
    write(data_dir / "tuning" / "tenant" / "f00" / "steps" / "3" / "adapter_model.safetensors", os.urandom(5000))


def contents(data_dir: Path) -> dict[str, bytes]:
    """Return the files of a folder except for the database and the work folder, by path."""
    files = {file.relative_to(data_dir).as_posix(): file for file in data_dir.rglob("*") if file.is_file()}
    return {path: file.read_bytes() for path, file in files.items() if not path.startswith((".state", DATABASE))}


def manifest_of(hub: BucketServer, index: int = -1) -> tuple[str, dict[str, Any]]:
    """Return name and content of a manifest, as a reader of the bucket gets it."""
    name = hub.paths(BUCKET, "manifests/")[index]
    return name, json.loads(BucketClient(BUCKET, TOKEN).read(name) or b"")


def replace_manifest(**changes: Any) -> None:
    """Save a manifest on top of the last one, with the first row of its files changed."""
    client = BucketClient(BUCKET, TOKEN)
    name = max(client.list("manifests"))
    values = json.loads(client.read(name) or b"")
    values["files"][0] |= changes
    client.upload([(json.dumps(values).encode(), "manifests/0000000099-1700000000000-aaaaaaaaaaaaaaaa.json")])


def expire_lease() -> None:
    """Let the lease end, as if its process had not renewed it."""
    client = BucketClient(BUCKET, TOKEN)
    lease = json.loads(client.read("lease.json") or b"")
    client.upload([(json.dumps(lease | {"expires": 0}).encode(), "lease.json")])


# ── What is saved ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_state_of_every_kind_is_restored_on_an_empty_disk(hub: BucketServer, tmp_path: Path) -> None:
    write_state(tmp_path / "a")
    assert restored(tmp_path / "a").save() is True
    bucket = restored(tmp_path / "b")
    assert bucket.status().ok and bucket.status().last_sync
    expected = contents(tmp_path / "a")
    local = [path for path in expected if path.endswith("/lock") or "checkpoint-5/" in path or "checkpoint-15/" in path]
    assert len(local) == 4
    assert contents(tmp_path / "b") == {path: content for path, content in expected.items() if path not in local}
    assert read_database(tmp_path / "b") == ["saved"]


def test_secrets_locks_temporary_files_and_unknown_files_are_not_saved(hub: BucketServer, tmp_path: Path) -> None:
    write_state(tmp_path)
    for path in ("visitor-salt", "secrets/key", "uploads/photo.jpg", f"runs/{RUN}/.x.part", "runs/.worker"):
        write(tmp_path / path, "not for the bucket")
    (tmp_path / "runs" / RUN / "link").symlink_to("/etc/hostname")
    restored(tmp_path).save()
    saved = {row["path"] for row in manifest_of(hub)[1]["files"]}
    assert DATABASE in saved and not [path for path in saved if "salt" in path or "key" in path or "upload" in path]
    assert not [path for path in saved if path.endswith((".part", ".worker", "link", "lock"))]
    contents_in_bucket = b"".join(hub.xorbs.values())
    assert b"not for the bucket" not in contents_in_bucket


def test_evaluations_are_saved_without_their_lock_and_the_shared_references(tmp_path: Path) -> None:
    evaluation = tmp_path / "evaluations" / RUN
    for name in ("config.json", "answers.jsonl", "photo-0.jpg", "lock"):
        write(evaluation / name, "{}")
    write(tmp_path / "evaluations" / ".references" / "1" / "2.npy", "scores")
    saved = [path.relative_to(tmp_path).as_posix() for path in state_files(tmp_path)]
    assert saved == [f"evaluations/{RUN}/{name}" for name in ("answers.jsonl", "config.json", "photo-0.jpg")]
    assert all(map(is_state_path, saved))


def test_database_elsewhere_is_neither_saved_nor_restored(hub: BucketServer, tmp_path: Path) -> None:
    write_state(tmp_path / "a")
    restored(tmp_path / "a", database_url="postgresql://host/name").save()
    assert DATABASE not in {row["path"] for row in manifest_of(hub)[1]["files"]}
    write_database(tmp_path / "b", "own")
    restored(tmp_path / "b", database_url="postgresql://host/name")
    assert read_database(tmp_path / "b") == ["own"]


def test_checkpoints_and_uploads_are_saved_for_unfinished_runs_only(hub: BucketServer, tmp_path: Path) -> None:
    uploads = tmp_path / "uploads"
    write(uploads / "aa" / "0000-sea.jpg", "a photo")
    write(uploads / "bb.zip", "a zip file")
    write_run(tmp_path, RUN, "cancelled", photos=str(uploads / "aa"))
    write_run(tmp_path, OTHER_RUN, "done", photos=str(uploads / "bb.zip"))
    restored(tmp_path).save()
    saved = {row["path"] for row in manifest_of(hub)[1]["files"]}
    assert {f"runs/{RUN}/checkpoint-10/optimizer.pt", "uploads/aa/0000-sea.jpg"} <= saved
    assert [path for path in saved if "checkpoint" in path and f"runs/{RUN}/checkpoint-10/" not in path] == []
    assert "uploads/bb.zip" not in saved and f"runs/{OTHER_RUN}/adapter/adapter_model.safetensors" in saved


def test_batches_are_saved_without_uploads_expired_results_and_large_files(
    hub: BucketServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_BATCH_INPUT", 20)
    batches, now = tmp_path / "a" / "batches" / "tenant", time.time()
    states: dict[str, dict[str, Any]] = {
        "uploading": {"status": "uploading"}, "expired": {"status": "completed", "expires": now - 1},
        "done": {"status": "completed", "expires": now + 99.0}, "small": {"status": "processing"},
        "large": {"status": "processing"},
    }  # fmt: skip
    for name, state in states.items():
        write(batches / name / "state.json", json.dumps({"id": name, "tenant": "tenant", "created_at": name, **state}))
        write(batches / name / "results.jsonl", f"{name}\n")
    write(batches / "small" / "input.jsonl", "{}\n")
    write(batches / "large" / "input.jsonl", "{}\n" * 10)
    write(batches / "uploading" / "part-0001", "{}\n")
    restored(tmp_path / "a").save()
    restored(tmp_path / "b")
    kept = {path.removeprefix("batches/tenant/") for path in contents(tmp_path / "b")}
    assert {path.partition("/")[0] for path in kept} == {"done", "small", "large"}
    assert {path for path in kept if "input" in path} == {"small/input.jsonl"}
    assert (tmp_path / "b/batches/tenant/done/results.jsonl").read_text() == "done\n"


def test_unchanged_state_sends_no_request_and_a_change_uploads_its_content_only(
    hub: BucketServer, tmp_path: Path
) -> None:
    write_state(tmp_path)
    bucket = restored(tmp_path)
    bucket.save()
    hub.requests.clear()
    assert bucket.save() is False and hub.requests == []
    before = set(hub.paths(BUCKET, "blobs/"))
    write(tmp_path / "runs" / RUN / "metrics.jsonl", '{"step": 1}\n{"step": 2}\n')
    assert bucket.save() is True
    assert len(set(hub.paths(BUCKET, "blobs/")) - before) == 1


def test_deleted_runs_disappear_from_the_bucket_after_two_saves(hub: BucketServer, tmp_path: Path) -> None:
    run = write_run(tmp_path, state="done")
    write(tmp_path / "runs" / "adopted.json", "1")
    bucket = restored(tmp_path)
    bucket.save()
    names = {path: version["sha256"] for path, version in ((row["path"], row) for row in manifest_of(hub)[1]["files"])}
    adapter = f"blobs/{names[f'runs/{RUN}/adapter/adapter_model.safetensors']}"
    for file in sorted(run.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    run.rmdir()
    bucket.save()
    assert adapter in hub.paths(BUCKET), "a process that restores the previous state may still need it"
    write(tmp_path / "runs" / "adopted.json", "2")
    bucket.save()
    assert adapter not in hub.paths(BUCKET)
    assert len(hub.paths(BUCKET, "manifests/")) == 2 and len(hub.paths(BUCKET, "blobs/")) == 2


def test_database_is_consistent_while_another_thread_writes(hub: BucketServer, tmp_path: Path) -> None:
    write_database(tmp_path / "a")
    stop = threading.Event()

    def write_pairs() -> None:
        """Insert two rows per transaction, so that an odd number of rows would be half a transaction."""
        number = 0
        while not stop.is_set():
            write_database(tmp_path / "a", f"{number:06d}a", f"{number:06d}b")
            number += 1

    thread = threading.Thread(target=write_pairs)
    thread.start()
    try:
        bucket = restored(tmp_path / "a")
        for number in range(5):
            until(lambda: len(read_database(tmp_path / "a")) > 20 * number)  # noqa: B023 - called in this iteration
            bucket.save()
            restored(tmp_path / f"b{number}", deployment="reader")
            words = read_database(tmp_path / f"b{number}")
            assert words and len(words) % 2 == 0
    finally:
        stop.set()
        thread.join()


def test_files_that_change_during_the_copy_are_chosen_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is replaced by the next one while it is copied."""
    run = write_run(tmp_path)
    copier, original = FileCopier(tmp_path, with_database=False), os.replace

    def rotate(source: Path, target: Path) -> None:
        original(source, target)
        checkpoint = run / "checkpoint-10"
        if checkpoint.exists():
            checkpoint.rename(run / "checkpoint-20")

    monkeypatch.setattr(os, "replace", rotate)
    (tmp_path / "copies").mkdir()
    files = copier.copy_changes(tmp_path / "copies", lambda _: False)
    assert f"runs/{RUN}/checkpoint-20/trainer_state.json" in files
    assert not [path for path in files if "checkpoint-10" in path]


# ── Interrupted and damaged ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("step", ["xorbs", "shards", "batch 1", "batch 2"])
def test_kill_during_an_upload_leaves_the_last_state(hub: BucketServer, tmp_path: Path, step: str) -> None:
    """The connection ends in the middle: during the contents ("batch 1"), or before the manifest ("batch 2")."""
    write_state(tmp_path / "a")
    bucket = restored(tmp_path / "a")
    bucket.save()
    expected = contents(tmp_path / "a")
    name, _, number = step.partition(" ")
    seen: list[str] = []

    def fail(method: str, path: str) -> int:
        if f"/{name}" in path and method == "POST":
            seen.append(path)
        return 403 if seen and len(seen) >= int(number or 1) else 0

    write(tmp_path / "a" / "runs" / RUN / "metrics.jsonl", os.urandom(300_000))
    write_database(tmp_path / "a", "lost")
    hub.on_request = fail
    with pytest.raises(BucketError):
        bucket.save()
    hub.on_request = lambda _method, _path: 0
    restored(tmp_path / "b")
    assert read_database(tmp_path / "b") == ["saved"]
    metrics = f"runs/{RUN}/metrics.jsonl"
    assert contents(tmp_path / "b")[metrics] == expected[metrics]


def test_save_after_a_failed_one_is_complete(hub: BucketServer, tmp_path: Path) -> None:
    write_state(tmp_path / "a")
    bucket = restored(tmp_path / "a")
    hub.on_request = lambda _method, path: 403 if path.endswith("/batch") else 0
    with pytest.raises(BucketError):
        bucket.save()
    hub.on_request = lambda _method, _path: 0
    assert bucket.save() is True
    restored(tmp_path / "b")
    assert read_database(tmp_path / "b") == ["saved"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "../outside"}, "refused"),
        ({"path": "/etc/cron.d/x"}, "refused"),
        ({"path": "runs/../../outside"}, "refused"),
        ({"path": "runs/x/../../../outside"}, "refused"),
        ({"path": "visitor-salt"}, "refused"),
        ({"path": "runs\\x"}, "refused"),
        ({"sha256": "../../x"}, "refused"),
        ({"sha256": "0" * 64}, "does not exist"),
        ({"size": 1}, "damaged"),
        ({"size": "many"}, "cannot be read"),
    ],
)
def test_manipulated_manifest_is_refused_and_kept(
    hub: BucketServer, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_state(tmp_path / "a" / "data")
    restored(tmp_path / "a" / "data").save()
    replace_manifest(**changes)
    before = hub.paths(BUCKET, "manifests/")
    bucket = open_bucket(tmp_path / "b" / "data")
    assert bucket.restore() is False
    assert message in bucket.status().message and not bucket.status().ok
    assert contents(tmp_path / "b") == {}
    write_state(tmp_path / "b" / "data")
    with pytest.raises(BucketError, match="Restart the application"):
        bucket.save()
    assert hub.paths(BUCKET, "manifests/") == before


def test_damaged_content_is_detected_by_its_hash(hub: BucketServer, tmp_path: Path) -> None:
    write_state(tmp_path / "a")
    restored(tmp_path / "a").save()
    blobs = hub.paths(BUCKET, "blobs/")
    files = hub.buckets[BUCKET].files
    sizes = {path: files[path]["size"] for path in blobs}
    first, second = sorted(blobs, key=lambda path: sizes[path])[-2:]
    files[first] = {**files[second], "path": first}
    bucket = open_bucket(tmp_path / "b")
    assert bucket.restore() is False and "does not match its SHA-256" in bucket.status().message
    assert contents(tmp_path / "b") == {}


def test_paths_of_the_state() -> None:
    good = (DATABASE, "runs/a/b.json", "tuning/t/f/steps/1/x", "usage-spool/1.jsonl", "uploads/a.zip")
    assert all(map(is_state_path, good))
    bad = ("", ".", "runs", "runs/", "/runs/a", "runs//a", "./runs/a", "runs/../a", "x/a", f"{DATABASE}/a", "runs/a\nb")
    assert not any(map(is_state_path, bad))


# ── A bucket that cannot be used ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("status", "message"), [(401, "rejects the token"), (403, "write access"), (404, "does not exist"), (500, "500")]
)
def test_failing_bucket_is_explained_without_the_token(
    hub: BucketServer, tmp_path: Path, status: int, message: str
) -> None:
    hub.status = status
    bucket = open_bucket(tmp_path)
    assert bucket.restore() is False
    assert message in bucket.status().message and not bucket.status().ok
    assert TOKEN not in bucket.status().message


def test_unreachable_hub_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.hf_api.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    bucket = open_bucket(tmp_path)
    assert bucket.restore() is False and "cannot be reached" in bucket.status().message


def test_missing_bucket_is_explained(tmp_path: Path, hub: BucketServer) -> None:
    del hub.buckets[BUCKET]
    bucket = open_bucket(tmp_path)
    assert bucket.restore() is False and "Check STATE_BUCKET" in bucket.status().message


def test_transient_failure_at_startup_is_retried(hub: BucketServer, tmp_path: Path) -> None:
    write_state(tmp_path / "a")
    restored(tmp_path / "a").save()
    failures = [500, 503]
    hub.on_request = lambda _method, path: failures.pop() if failures and path == f"/api/buckets/{BUCKET}" else 0
    bucket = open_bucket(tmp_path / "b", save_seconds=30)
    assert bucket.restore() is True and failures == []
    assert read_database(tmp_path / "b") == ["saved"]


def test_unresponsive_hub_does_not_block_the_start(hub: BucketServer, tmp_path: Path) -> None:
    write_state(tmp_path / "a")
    restored(tmp_path / "a").save()
    release = threading.Event()
    hub.on_request = lambda _method, _path: 500 if release.wait(60) else 0
    bucket = open_bucket(tmp_path / "b", stall_seconds=0.5)
    try:
        assert bucket.restore() is False and "did not respond" in bucket.status().message
    finally:
        release.set()
    assert contents(tmp_path / "b") == {}


def test_state_that_could_not_be_loaded_is_not_overwritten(hub: BucketServer, tmp_path: Path) -> None:
    write_state(tmp_path / "a")
    restored(tmp_path / "a").save()
    before = {path: file["xetHash"] for path, file in hub.buckets[BUCKET].files.items() if path != "lease.json"}
    hub.status = 500
    bucket = open_bucket(tmp_path / "b", save_seconds=0.05)
    assert bucket.restore() is False
    hub.status = 0
    write_database(tmp_path / "b", "empty")
    bucket.start()
    until(lambda: "did not load" in bucket.status().message)
    bucket.stop()
    assert not bucket.status().ok and "Restart the application" in bucket.status().message
    after = {path: file["xetHash"] for path, file in hub.buckets[BUCKET].files.items() if path != "lease.json"}
    assert after == before
    restored(tmp_path / "c")
    assert read_database(tmp_path / "c") == ["saved"]


def test_empty_bucket_that_was_unreachable_is_used_once_it_is_reachable(hub: BucketServer, tmp_path: Path) -> None:
    hub.status = 500
    bucket = open_bucket(tmp_path / "a", save_seconds=0.05)
    assert bucket.restore() is False
    write_database(tmp_path / "a", "first")
    hub.status = 0
    bucket.start()
    until(lambda: bucket.status().ok)
    bucket.stop()
    restored(tmp_path / "b")
    assert read_database(tmp_path / "b") == ["first"]


def test_public_bucket_gets_no_state(hub: BucketServer, tmp_path: Path) -> None:
    hub.buckets[BUCKET].private = False
    write_state(tmp_path)
    bucket = restored(tmp_path)
    with pytest.raises(BucketError, match="Make it private"):
        bucket.save()
    assert hub.paths(BUCKET, "blobs/") == []


# ── A disk that survived ────────────────────────────────────────────────────────────────────────────────────────────


def test_surviving_disk_is_kept_with_what_was_not_saved(hub: BucketServer, tmp_path: Path) -> None:
    write_state(tmp_path)
    restored(tmp_path).save()
    write_database(tmp_path, "unsaved")
    bucket = restored(tmp_path)
    assert read_database(tmp_path) == ["saved", "unsaved"] and not list(tmp_path.glob("replaced-*"))
    assert bucket.save() is True
    assert len(hub.paths(BUCKET, "manifests/")) == 2


def test_newer_state_replaces_a_surviving_disk_and_keeps_its_files(hub: BucketServer, tmp_path: Path) -> None:
    write_state(tmp_path / "a")
    restored(tmp_path / "a").save()
    other = restored(tmp_path / "b")
    write_database(tmp_path / "b", "newer")
    other.save()
    write_database(tmp_path / "a", "unsaved")
    restored(tmp_path / "a")
    assert read_database(tmp_path / "a") == ["newer", "saved"]
    (replaced,) = (tmp_path / "a").glob("replaced-*")
    assert read_database(replaced) == ["saved", "unsaved"]


def test_existing_state_is_saved_to_an_empty_bucket(hub: BucketServer, tmp_path: Path) -> None:
    write_state(tmp_path)
    assert restored(tmp_path).save() is True
    assert read_database(tmp_path) == ["saved"] and len(hub.paths(BUCKET, "manifests/")) == 1


# ── Two processes ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_older_replica_stops_saving_when_a_newer_one_starts(hub: BucketServer, tmp_path: Path) -> None:
    write_state(tmp_path / "a")
    older = restored(tmp_path / "a")
    older.save()
    newer = restored(tmp_path / "b")
    write_database(tmp_path / "a", "older")
    with pytest.raises(BucketError, match="a newer process of this deployment"):
        older.save()
    write_database(tmp_path / "b", "newer")
    assert newer.save() is True
    with pytest.raises(BucketError, match="a newer process of this deployment"):
        older.save()
    restored(tmp_path / "c", deployment="reader")
    assert read_database(tmp_path / "c") == ["newer", "saved"]


def test_another_deployment_saves_only_after_the_lease_expired_and_on_the_same_state(
    hub: BucketServer, tmp_path: Path
) -> None:
    write_state(tmp_path / "a")
    first = restored(tmp_path / "a")
    first.save()
    second, third = restored(tmp_path / "b", deployment="laptop"), restored(tmp_path / "c", deployment="desk")
    write_database(tmp_path / "b", "laptop")
    with pytest.raises(BucketError, match="the deployment 'team/space'"):
        second.save()
    expire_lease()
    assert second.save() is True
    write_database(tmp_path / "a", "first")
    with pytest.raises(BucketError, match="the deployment 'laptop'"):
        first.save()
    second.start()
    second.stop()  # releases the lease
    with pytest.raises(BucketError, match="did not load"):
        third.save()
    restored(tmp_path / "d")
    assert read_database(tmp_path / "d") == ["laptop", "saved"]


@pytest.mark.parametrize("moment", ["contents", "manifest"])
def test_replica_that_loses_the_lease_during_an_upload_does_not_overwrite(
    hub: BucketServer, tmp_path: Path, moment: str
) -> None:
    """A newer replica starts and saves while the older one uploads its contents, or in the last unguarded moment."""
    write_state(tmp_path / "a")
    older = restored(tmp_path / "a")
    older.save()
    write_database(tmp_path / "a", "older")
    newer: list[StateBucket] = []
    batches: list[str] = []

    def start_newer(_method: str, path: str) -> int:
        if path.endswith("/batch"):
            batches.append(path)
            if len(batches) == (1 if moment == "contents" else 2) and not newer:
                newer.append(open_bucket(tmp_path / "b"))
                assert newer[0].restore()
                write_database(tmp_path / "b", "newer")
                newer[0].save()
        return 0

    hub.on_request = start_newer
    with pytest.raises(BucketError):
        older.save()
    hub.on_request = lambda _method, _path: 0
    with pytest.raises(BucketError):
        older.save()
    restored(tmp_path / "c", deployment="reader")
    assert read_database(tmp_path / "c") == ["newer", "saved"]


def test_stop_saves_a_last_time_and_releases_the_lease(hub: BucketServer, tmp_path: Path) -> None:
    write_state(tmp_path / "a")
    bucket = restored(tmp_path / "a", save_seconds=3600)
    bucket.start()
    bucket.stop()
    assert bucket.status().ok and "lease.json" not in hub.paths(BUCKET)
    restored(tmp_path / "b")
    assert read_database(tmp_path / "b") == ["saved"]


def test_lease_is_renewed_while_nothing_changes(hub: BucketServer, tmp_path: Path) -> None:
    write_state(tmp_path)
    bucket = restored(tmp_path, lease_seconds=2.0)
    bucket.save()

    def expiry() -> float:
        return json.loads(BucketClient(BUCKET, TOKEN).read("lease.json") or b"")["expires"]

    first, manifests = expiry(), hub.paths(BUCKET, "manifests/")
    until(lambda: not bucket.save() and expiry() > first)
    assert hub.paths(BUCKET, "manifests/") == manifests


def test_hub_functions_have_the_parameters_that_are_used(hub: BucketServer) -> None:
    """The requests of the simulated Hub come from the real client, with its default endpoint and this token only."""
    BucketClient(BUCKET, TOKEN).upload([(b"x", "x")])
    assert BucketClient(BUCKET, TOKEN).read("x") == b"x" and BucketClient(BUCKET, TOKEN).read("y") is None
    BucketClient(BUCKET, TOKEN).delete(["x"])
    assert hub.paths(BUCKET) == [] and hub.tokens == {f"Bearer {TOKEN}"}
    assert f"POST /api/buckets/{BUCKET}/batch" in hub.requests
