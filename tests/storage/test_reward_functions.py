"""Tests of saved reward functions on SQLite and PostgreSQL, with real file system and database failures."""

import multiprocessing
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from rewards import EQUAL_WEIGHTS, RewardFunction
from storage.reward_functions import MAX_NAME, RewardFunctionStore, StoreError

CRISP = RewardFunction({"sharpness": 1.0})
VIVID = RewardFunction({"colour": 0.3, "creativity": 0.7})
ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
HOSTILE_NAMES = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "'; DROP TABLE reward_functions; --",
    '" OR "1"="1',
    "100 %s %(name)s {name} \\",
    "خيال واسع",
    "מצב חד",
    "👩‍🎨 crisp",
    "../../etc/passwd",
    "null",
    "x" * MAX_NAME,
)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database; each test runs on both kinds."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.sqlite3'}"
    return request.getfixturevalue("postgres_url")


@pytest.fixture
def store(url: str) -> Iterator[RewardFunctionStore]:
    """Return an empty store on either database."""
    store = RewardFunctionStore(url)
    yield store
    store.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a closed SQLite file with CRISP saved as "crisp"."""
    file = tmp_path / "store.sqlite3"
    store = RewardFunctionStore(f"sqlite:///{file}")
    store.save("crisp", CRISP)
    store.close()
    return file


def open_store(file: Path) -> RewardFunctionStore:
    """Open a store with a short lock timeout."""
    return RewardFunctionStore(f"sqlite:///{file}", busy_seconds=0.1)


def names(store: RewardFunctionStore) -> list[str]:
    return [saved.name for saved in store.list()]


# Saving, listing, renaming and deleting


def test_saved_function_can_be_read_by_another_store(store: RewardFunctionStore, url: str) -> None:
    saved = store.save("  crisp ", CRISP)
    other = RewardFunctionStore(url)
    assert other.get("crisp") == CRISP
    assert other.list() == [saved]
    assert saved.name == "crisp" and saved.created == saved.updated and saved.created.tzinfo is not None
    other.close()


def test_empty_store_lists_nothing(store: RewardFunctionStore) -> None:
    assert store.list() == []


def test_list_is_sorted_by_name_regardless_of_case(store: RewardFunctionStore) -> None:
    for name in ("beta", "Alpha", "gamma"):
        store.save(name, EQUAL_WEIGHTS)
    assert names(store) == ["Alpha", "beta", "gamma"]


def test_names_are_unique_regardless_of_case_and_unicode_composition(store: RewardFunctionStore) -> None:
    store.save("Café", CRISP)
    for name in ("Café", "CAFÉ", "cafe\u0301"):
        with pytest.raises(StoreError, match="already") as caught:
            store.save(name, VIVID)
        assert caught.value.kind == "taken"
    assert store.get("CAFÉ") == CRISP


def test_overwriting_keeps_the_creation_time(store: RewardFunctionStore) -> None:
    before = store.save("mine", CRISP)
    after = store.save("MINE", VIVID, overwrite=True)
    assert store.list() == [after]
    assert (after.name, after.function, after.created) == ("MINE", VIVID, before.created)
    assert after.updated > before.updated


def test_overwriting_an_unknown_name_saves_it(store: RewardFunctionStore) -> None:
    store.save("new", VIVID, overwrite=True)
    assert store.get("new") == VIVID


def test_rename_moves_the_function(store: RewardFunctionStore) -> None:
    store.save("old", CRISP)
    store.rename("OLD", "new")
    assert names(store) == ["new"] and store.get("new") == CRISP


def test_rename_can_change_the_case_only(store: RewardFunctionStore) -> None:
    store.save("crisp", CRISP)
    store.rename("crisp", "Crisp")
    assert names(store) == ["Crisp"]


def test_rename_to_a_taken_name_changes_nothing(store: RewardFunctionStore) -> None:
    store.save("one", CRISP)
    store.save("two", VIVID)
    with pytest.raises(StoreError, match="already"):
        store.rename("one", "TWO")
    assert store.get("one") == CRISP and store.get("two") == VIVID


def test_delete_removes_only_the_named_function(store: RewardFunctionStore) -> None:
    store.save("one", CRISP)
    store.save("two", VIVID)
    store.delete("ONE")
    assert names(store) == ["two"]


def test_unknown_name_is_reported(store: RewardFunctionStore) -> None:
    for action in (lambda: store.get("x"), lambda: store.delete("x"), lambda: store.rename("x", "y")):
        with pytest.raises(StoreError, match="no reward function called “x”") as caught:
            action()
        assert caught.value.kind == "unknown"


# Hostile names


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_are_stored_unchanged(store: RewardFunctionStore, name: str) -> None:
    store.save("other", VIVID)
    store.save(name, CRISP)
    assert store.get(name) == CRISP
    assert sorted(names(store)) == sorted([name, "other"])
    store.delete(name)
    assert names(store) == ["other"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "empty"),
        (" \t\n ", "empty"),
        ("x" * (MAX_NAME + 1), "too long"),
        ("x" * 10_000, "too long"),
        ("a\x00b", "invisible"),
        ("a\nb", "invisible"),
        ("cod\u202eexe.", "invisible"),
        ("a\u2066b", "invisible"),
        ("a\ud800b", "invisible"),
    ],
)
def test_invalid_names_are_rejected_with_a_short_reason(store: RewardFunctionStore, name: str, message: str) -> None:
    store.save("one", CRISP)
    for action in (lambda: store.save(name, CRISP), lambda: store.rename("one", name), lambda: store.get(name)):
        with pytest.raises(StoreError, match=message) as caught:
            action()
        assert caught.value.kind == "name" and len(str(caught.value)) < 200
    assert names(store) == ["one"]


# Concurrency


def _open_and_save(url: str, name: str, start: "multiprocessing.synchronize.Barrier") -> None:
    start.wait(30)
    RewardFunctionStore(url, busy_seconds=30).save(name, CRISP)


def test_processes_starting_at_once_create_the_schema_once(url: str) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(4)
    processes = [context.Process(target=_open_and_save, args=(url, f"p{i}", start)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert names(RewardFunctionStore(url)) == ["p0", "p1", "p2", "p3"]


def test_threads_sharing_a_store_lose_nothing(store: RewardFunctionStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.save(f"n{i:02}", CRISP), range(24)))
    assert names(store) == [f"n{i:02}" for i in range(24)]


def test_only_one_of_many_threads_saves_the_same_name(store: RewardFunctionStore) -> None:
    def attempt(_: int) -> str:
        try:
            store.save("wanted", CRISP)
        except StoreError as error:
            return error.kind
        return "saved"

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(attempt, range(8))) == ["saved", *["taken"] * 7]


def test_concurrent_overwrites_succeed(store: RewardFunctionStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: store.save("mine", VIVID, overwrite=True), range(16)))
    assert names(store) == ["mine"]


# File system failures


@contextmanager
def unprivileged() -> Iterator[None]:
    """Drop root privileges for a moment: root may write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def world_writable_file() -> Iterator[Path]:
    """Yield a file with "crisp" in a world-writable folder, so that only the file's own permissions matter."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        file = Path(folder) / "store.sqlite3"
        open_store(file).save("crisp", CRISP)
        yield file


def test_read_only_file_can_be_read_and_write_errors_are_helpful(world_writable_file: Path) -> None:
    world_writable_file.chmod(0o444)
    store = open_store(world_writable_file)
    with unprivileged():
        assert store.get("crisp") == CRISP
        for action in (lambda: store.save("x", VIVID), lambda: store.delete("crisp")):
            with pytest.raises(StoreError, match="read-only.*Make it writable") as caught:
                action()
            assert caught.value.kind == "database" and str(world_writable_file) in str(caught.value)
    assert names(open_store(world_writable_file)) == ["crisp"]


def test_read_only_folder_is_reported_with_advice(world_writable_file: Path) -> None:
    folder = world_writable_file.parent / "closed"
    folder.mkdir(mode=0o755)
    with unprivileged():
        if os.geteuid() == folder.stat().st_uid:
            folder.chmod(0o555)
        for file in (folder / "store.sqlite3", folder / "deeper" / "store.sqlite3"):
            with pytest.raises(StoreError, match="Check that its folder|Set DATA_DIR"):
                open_store(file).list()
    folder.chmod(0o755)


def test_corrupt_file_is_reported_unchanged_and_replaceable(tmp_path: Path) -> None:
    file = tmp_path / "store.sqlite3"
    file.write_bytes(b"this is no database " * 1000)
    store = open_store(file)
    for action in (store.list, lambda: store.get("x"), lambda: store.save("x", CRISP)):
        with pytest.raises(StoreError, match="damaged.*Move it away"):
            action()
    assert file.read_bytes() == b"this is no database " * 1000
    file.rename(tmp_path / "moved")
    store.save("x", CRISP)
    assert names(store) == ["x"]


def test_file_with_torn_pages_is_reported_as_damaged(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:100] + b"\xff" * (len(whole) - 100))
    with pytest.raises(StoreError, match="damaged"):
        open_store(file).list()


def test_folder_in_place_of_the_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be opened"):
        open_store(tmp_path).list()


def test_file_in_place_of_the_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(StoreError, match=r"cannot be used as a folder.*DATA_DIR"):
        open_store(tmp_path / "data" / "store.sqlite3").list()


def test_locked_file_can_be_read_and_write_errors_are_helpful(file: Path) -> None:
    store = open_store(file)
    with sqlite3.connect(file, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        assert names(store) == ["crisp"]
        with pytest.raises(StoreError, match="in use by another program.*Try again"):
            store.save("x", VIVID)
        other.execute("ROLLBACK")
    other.close()
    store.save("x", VIVID)
    assert names(store) == ["crisp", "x"]


def test_writer_waits_for_the_lock(file: Path) -> None:
    other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(0.3, lambda: other.execute("COMMIT")).start()
    store = RewardFunctionStore(f"sqlite:///{file}", busy_seconds=30)
    store.save("x", VIVID)
    other.close()
    assert names(store) == ["crisp", "x"]


def test_full_database_is_reported_and_keeps_its_content(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's page limit raises the same error as a full disk."""
    real = sqlite3.connect

    def connect_limited(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection = real(*args, **kwargs)
        connection.execute("PRAGMA max_page_count = 1")  # never below the current size
        return connection

    monkeypatch.setattr(sqlite3.dbapi2, "connect", connect_limited)
    saved = fill(open_store(file))
    assert names(open_store(file)) == sorted(saved)


def test_full_disk_is_reported_and_keeps_its_content(tmp_path: Path) -> None:
    """Uses a real file system of 256 kB, if mounting is permitted."""
    script = (
        f"mount -t tmpfs -o size=256k tmpfs {tmp_path} || exit 77; exec {sys.executable} -c "
        f'\'import runpy; runpy.run_path("{__file__}")["fill_disk"]("{tmp_path}")\''
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = ["unshare", "-m", "sh", "-c", script]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    if process.returncode == 77 or "unshare" in process.stderr:
        pytest.skip("mounting a file system is not permitted")
    assert process.returncode == 0, process.stderr


def fill_disk(folder: str) -> None:
    """Save until the disk is full, and check that all saved functions are still there."""
    file = Path(folder) / "store.sqlite3"
    saved = fill(open_store(file))
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as connection:
        stored = [name for (name,) in connection.execute("SELECT name FROM reward_functions ORDER BY name")]
    assert stored == sorted(saved), (stored, saved)


def fill(store: RewardFunctionStore) -> list[str]:
    """Save until nothing more fits. Return all saved names."""
    saved = names(store)
    for number in range(10_000):
        name = f"{number:05}" + "x" * (MAX_NAME - 5)
        try:
            store.save(name, VIVID)
        except StoreError as error:
            assert re.search("disk is full.*Free some space", str(error)), error
            return saved
        saved.append(name)
    raise AssertionError("the store was never full")


def test_killed_process_leaves_the_last_committed_state(file: Path) -> None:
    program = f"""
import time
from rewards import RewardFunction
from storage.reward_functions import RewardFunctionStore
from sqlalchemy import text
store = RewardFunctionStore("sqlite:///{file}")
store.save("before", RewardFunction({{"colour": 1.0}}))
with store.database.transaction(write=True) as connection:
    connection.execute(text("DELETE FROM reward_functions"))
    print("deleted", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "deleted\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    store = open_store(file)
    assert names(store) == ["before", "crisp"]
    store.save("after", VIVID)
    assert names(store) == ["after", "before", "crisp"]


def test_file_deleted_while_in_use_is_created_again(file: Path) -> None:
    store = open_store(file)
    assert names(store) == ["crisp"]
    file.unlink()
    store.save("x", VIVID)
    assert names(store) == ["x"]


def test_folder_is_created(tmp_path: Path) -> None:
    store = open_store(tmp_path / "a" / "b" / "store.sqlite3")
    store.save("x", CRISP)
    assert names(store) == ["x"]


# Owners


def test_owners_do_not_see_or_change_each_others_functions(store: RewardFunctionStore) -> None:
    owners = {"": CRISP, "hf:1": VIVID, "hf:2": EQUAL_WEIGHTS}
    for owner, function in owners.items():
        store.save("Mine", function, owner=owner)
    with pytest.raises(StoreError, match="already"):
        store.save("mine", CRISP, owner="hf:1")
    store.save("MINE", CRISP, overwrite=True, owner="hf:2")
    assert store.get("mine") == CRISP and store.get("mine", owner="hf:1") == VIVID
    assert [saved.name for saved in store.list(owner="hf:2")] == ["MINE"]
    store.rename("mine", "other", owner="hf:1")
    store.save("mine", CRISP, owner="hf:1")
    with pytest.raises(StoreError, match="already"):
        store.rename("other", "MINE", owner="hf:1")
    store.delete("other", owner="hf:1")
    for action in (store.get, store.delete):
        with pytest.raises(StoreError, match="no reward function"):
            action("other", owner="hf:1")
        with pytest.raises(StoreError, match="no reward function"):
            action("mine", owner="hf:3")
    assert [saved.name for saved in store.list(owner="hf:1")] == ["mine"]
    assert names(store) == ["Mine"] and store.list(owner="hf:3") == []


def test_owner_can_save_a_limited_number_of_functions(
    store: RewardFunctionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.reward_functions.MAX_PER_OWNER", 3)
    for number in range(3):
        store.save(f"f{number}", CRISP, owner="hf:1")
    for overwrite in (False, True):
        with pytest.raises(StoreError, match="limit. Delete one") as caught:
            store.save("f3", CRISP, overwrite, owner="hf:1")
        assert caught.value.kind == "full"
    with pytest.raises(StoreError, match="already"):
        store.save("f1", CRISP, owner="hf:1")
    store.save("F1", VIVID, overwrite=True, owner="hf:1")
    store.save("f3", CRISP, owner="hf:2")
    store.delete("f0", owner="hf:1")
    store.save("f3", CRISP, owner="hf:1")
    for number in range(5):  # the deployment's own administrator has no limit
        store.save(f"f{number}", CRISP)


# Other versions and invalid settings


def test_incompatible_functions_are_skipped_and_can_be_replaced(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("""UPDATE reward_functions SET weights = '{"zest": 1}'""")
    connection.close()
    store = open_store(file)
    assert store.list() == []
    with pytest.raises(StoreError, match="another version") as caught:
        store.get("crisp")
    assert caught.value.kind == "unreadable"
    store.save("crisp", VIVID, overwrite=True)
    assert store.get("crisp") == VIVID


def test_newer_schema_is_left_unchanged(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE schema_version SET version = 99")
    connection.close()
    assert names(open_store(file)) == ["crisp"]
    with sqlite3.connect(file) as connection:
        assert connection.execute("SELECT version FROM schema_version").fetchall() == [(99,)]
    connection.close()


@pytest.mark.parametrize(
    "url", ["", "nonsense", "mysql://me:hunter2@db/x", "postgresql://me:hunter2@db:port/x", "sqlite://"]
)
def test_invalid_url_is_rejected_without_showing_it(url: str) -> None:
    with pytest.raises(StoreError, match="DATABASE_URL") as caught:
        RewardFunctionStore(url)
    assert "hunter2" not in "".join(map(str, [caught.value, caught.value.__cause__, repr(caught.value)]))


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_unreachable_database_is_reported_without_its_password(scheme: str) -> None:
    store = RewardFunctionStore(f"{scheme}://me:hunter2@127.0.0.1:9/x", busy_seconds=2)
    with pytest.raises(StoreError, match="cannot be reached.*DATABASE_URL") as caught:
        store.list()
    error: BaseException | None = caught.value
    while error is not None:
        assert "hunter2" not in str(error)
        error = error.__cause__ or error.__context__


@pytest.mark.postgres
def test_lost_connection_is_opened_again(postgres_url: str) -> None:
    store = RewardFunctionStore(postgres_url)
    store.save("one", CRISP)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE usename = current_user AND pid <> pg_backend_pid() AND query LIKE '%reward_functions%'"
        )
    assert names(store) == ["one"]
    store.close()


@pytest.mark.postgres
def test_user_without_permissions_is_reported(postgres_url: str) -> None:
    store = RewardFunctionStore(
        postgres_url.replace("search_path%3D", "default_transaction_read_only%3Don%20-csearch_path%3D")
    )
    with pytest.raises(StoreError, match="refused.*rights|refused.*user may"):
        store.save("one", CRISP)
