"""The store, on both databases for real: what it keeps, and that no trouble costs what was kept before."""

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

from rewards import DEFAULT, RewardFunction
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
    """Where to keep things: each test runs on both databases."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.sqlite3'}"
    return request.getfixturevalue("postgres_url")


@pytest.fixture
def store(url: str) -> Iterator[RewardFunctionStore]:
    """An empty store on either database."""
    store = RewardFunctionStore(url)
    yield store
    store.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An SQLite file that holds CRISP as "crisp" and is closed."""
    file = tmp_path / "store.sqlite3"
    store = RewardFunctionStore(f"sqlite:///{file}")
    store.save("crisp", CRISP)
    store.close()
    return file


def at(file: Path) -> RewardFunctionStore:
    """The store in `file`, impatient, so that tests need not wait."""
    return RewardFunctionStore(f"sqlite:///{file}", busy_seconds=0.1)


def names(store: RewardFunctionStore) -> list[str]:
    return [saved.name for saved in store.list()]


# What it keeps


def test_what_is_saved_is_there_again_in_another_store(store: RewardFunctionStore, url: str) -> None:
    saved = store.save("  crisp ", CRISP)
    other = RewardFunctionStore(url)
    assert other.get("crisp") == CRISP
    assert other.list() == [saved]
    assert saved.name == "crisp" and saved.created == saved.updated and saved.created.tzinfo is not None
    other.close()


def test_an_empty_store_lists_nothing_and_answers(store: RewardFunctionStore) -> None:
    assert store.list() == []
    store.ping()


def test_the_list_is_in_the_order_of_the_names_whatever_their_case(store: RewardFunctionStore) -> None:
    for name in ("beta", "Alpha", "gamma"):
        store.save(name, DEFAULT)
    assert names(store) == ["Alpha", "beta", "gamma"]


def test_a_name_is_taken_whatever_its_case_or_composition(store: RewardFunctionStore) -> None:
    store.save("Café", CRISP)
    for name in ("Café", "CAFÉ", "cafe\u0301"):
        with pytest.raises(StoreError, match="already") as caught:
            store.save(name, VIVID)
        assert caught.value.kind == "taken"
    assert store.get("CAFÉ") == CRISP


def test_overwriting_keeps_the_day_it_was_made(store: RewardFunctionStore) -> None:
    before = store.save("mine", CRISP)
    after = store.save("MINE", VIVID, overwrite=True)
    assert store.list() == [after]
    assert (after.name, after.function, after.created) == ("MINE", VIVID, before.created)
    assert after.updated > before.updated


def test_overwriting_what_is_not_there_saves_it(store: RewardFunctionStore) -> None:
    store.save("new", VIVID, overwrite=True)
    assert store.get("new") == VIVID


def test_renaming_moves_the_function(store: RewardFunctionStore) -> None:
    store.save("old", CRISP)
    store.rename("OLD", "new")
    assert names(store) == ["new"] and store.get("new") == CRISP


def test_the_case_of_a_name_can_be_changed(store: RewardFunctionStore) -> None:
    store.save("crisp", CRISP)
    store.rename("crisp", "Crisp")
    assert names(store) == ["Crisp"]


def test_renaming_to_a_taken_name_changes_nothing(store: RewardFunctionStore) -> None:
    store.save("one", CRISP)
    store.save("two", VIVID)
    with pytest.raises(StoreError, match="already"):
        store.rename("one", "TWO")
    assert store.get("one") == CRISP and store.get("two") == VIVID


def test_deleting_forgets_one_and_no_other(store: RewardFunctionStore) -> None:
    store.save("one", CRISP)
    store.save("two", VIVID)
    store.delete("ONE")
    assert names(store) == ["two"]


def test_what_is_not_there_is_said_to_be_missing(store: RewardFunctionStore) -> None:
    for action in (lambda: store.get("x"), lambda: store.delete("x"), lambda: store.rename("x", "y")):
        with pytest.raises(StoreError, match="no reward function called “x”") as caught:
            action()
        assert caught.value.kind == "unknown"


# Hostile names


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_strange_names_come_back_as_they_were(store: RewardFunctionStore, name: str) -> None:
    store.save("other", VIVID)
    store.save(name, CRISP)
    assert store.get(name) == CRISP
    assert sorted(names(store)) == sorted([name, "other"])
    store.delete(name)
    assert names(store) == ["other"]


@pytest.mark.parametrize(
    ("name", "said"),
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
def test_names_that_cannot_be_are_refused_in_few_words(store: RewardFunctionStore, name: str, said: str) -> None:
    store.save("one", CRISP)
    for action in (lambda: store.save(name, CRISP), lambda: store.rename("one", name), lambda: store.get(name)):
        with pytest.raises(StoreError, match=said) as caught:
            action()
        assert caught.value.kind == "name" and len(str(caught.value)) < 200
    assert names(store) == ["one"]


# Several at once


def _open_and_save(url: str, name: str, start: "multiprocessing.synchronize.Barrier") -> None:
    start.wait(30)
    RewardFunctionStore(url, busy_seconds=30).save(name, CRISP)


def test_processes_that_start_at_once_make_the_schema_once(url: str) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(4)
    processes = [context.Process(target=_open_and_save, args=(url, f"p{i}", start)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert names(RewardFunctionStore(url)) == ["p0", "p1", "p2", "p3"]


def test_threads_that_share_a_store_lose_nothing(store: RewardFunctionStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.save(f"n{i:02}", CRISP), range(24)))
    assert names(store) == [f"n{i:02}" for i in range(24)]


def test_of_many_who_want_one_name_one_gets_it(store: RewardFunctionStore) -> None:
    def attempt(_: int) -> str:
        try:
            store.save("wanted", CRISP)
        except StoreError as error:
            return error.kind
        return "saved"

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(attempt, range(8))) == ["saved", *["taken"] * 7]


def test_overwriting_at_once_is_no_error(store: RewardFunctionStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: store.save("mine", VIVID, overwrite=True), range(16)))
    assert names(store) == ["mine"]


# Files in trouble


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may write everywhere; being nobody for a moment shows what others see."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A file that holds "crisp", in a folder open to every user, so that only its own rights count."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        file = Path(folder) / "store.sqlite3"
        at(file).save("crisp", CRISP)
        yield file


def test_a_read_only_file_can_be_read_and_says_what_to_do(open_to_all: Path) -> None:
    open_to_all.chmod(0o444)
    store = at(open_to_all)
    with unprivileged():
        assert store.get("crisp") == CRISP
        for action in (lambda: store.save("x", VIVID), lambda: store.delete("crisp")):
            with pytest.raises(StoreError, match="read-only.*Make it writable") as caught:
                action()
            assert caught.value.kind == "database" and str(open_to_all) in str(caught.value)
    assert names(at(open_to_all)) == ["crisp"]


def test_a_folder_that_cannot_be_written_says_what_to_do(open_to_all: Path) -> None:
    folder = open_to_all.parent / "closed"
    folder.mkdir(mode=0o755)
    with unprivileged():
        if os.geteuid() == folder.stat().st_uid:
            folder.chmod(0o555)
        for file in (folder / "store.sqlite3", folder / "deeper" / "store.sqlite3"):
            with pytest.raises(StoreError, match="Check that its folder|Set DATA_DIR"):
                at(file).ping()
    folder.chmod(0o755)


def test_a_corrupt_file_is_named_left_alone_and_replaced_once_moved_away(tmp_path: Path) -> None:
    file = tmp_path / "store.sqlite3"
    file.write_bytes(b"this is no database " * 1000)
    store = at(file)
    for action in (store.ping, store.list, lambda: store.save("x", CRISP)):
        with pytest.raises(StoreError, match="damaged.*Move it away"):
            action()
    assert file.read_bytes() == b"this is no database " * 1000
    file.rename(tmp_path / "moved")
    store.save("x", CRISP)
    assert names(store) == ["x"]


def test_a_file_with_torn_pages_is_said_to_be_damaged(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:100] + b"\xff" * (len(whole) - 100))
    with pytest.raises(StoreError, match="damaged"):
        at(file).list()


def test_a_folder_in_place_of_the_file_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be opened"):
        at(tmp_path).list()


def test_a_file_in_place_of_the_folder_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(StoreError, match=r"cannot be used as a folder.*DATA_DIR"):
        at(tmp_path / "data" / "store.sqlite3").list()


def test_a_locked_file_can_be_read_and_says_to_try_again(file: Path) -> None:
    store = at(file)
    with sqlite3.connect(file, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        assert names(store) == ["crisp"]
        with pytest.raises(StoreError, match="in use by another program.*try again"):
            store.save("x", VIVID)
        other.execute("ROLLBACK")
    other.close()
    store.save("x", VIVID)
    assert names(store) == ["crisp", "x"]


def test_a_writer_waits_for_a_lock_that_is_let_go(file: Path) -> None:
    other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(0.3, lambda: other.execute("COMMIT")).start()
    store = RewardFunctionStore(f"sqlite:///{file}", busy_seconds=30)
    store.save("x", VIVID)
    other.close()
    assert names(store) == ["crisp", "x"]


def test_a_full_database_says_so_and_keeps_what_it_has(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's own page limit gives the error of a full disk without one."""
    real = sqlite3.connect

    def small(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection = real(*args, **kwargs)
        connection.execute("PRAGMA max_page_count = 1")  # no less than it has already
        return connection

    monkeypatch.setattr(sqlite3.dbapi2, "connect", small)
    kept = fill(at(file))
    assert names(at(file)) == sorted(kept)


def test_a_full_disk_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    """A real file system of 256 kB, where this machine lets us have one."""
    script = (
        f"mount -t tmpfs -o size=256k tmpfs {tmp_path} || exit 77; exec {sys.executable} -c "
        f'\'import runpy; runpy.run_path("{__file__}")["on_a_full_disk"]("{tmp_path}")\''
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = ["unshare", "-m", "sh", "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if run.returncode == 77 or "unshare" in run.stderr:
        pytest.skip("this machine does not let us mount a small file system")
    assert run.returncode == 0, run.stderr


def on_a_full_disk(folder: str) -> None:
    """Fill a store until the disk is full, then find all that was kept."""
    file = Path(folder) / "store.sqlite3"
    kept = fill(at(file))
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as connection:
        found = [name for (name,) in connection.execute("SELECT name FROM reward_functions ORDER BY name")]
    assert found == sorted(kept), (found, kept)


def fill(store: RewardFunctionStore) -> list[str]:
    """Save until nothing more fits; the names that are kept, with what was there before."""
    kept = names(store)
    for number in range(10_000):
        name = f"{number:05}" + "x" * (MAX_NAME - 5)
        try:
            store.save(name, VIVID)
        except StoreError as error:
            assert re.search("disk is full.*Free some space", str(error)), error
            return kept
        kept.append(name)
    raise AssertionError("it never filled up")


def test_a_process_killed_in_the_middle_leaves_the_last_good_state(file: Path) -> None:
    program = f"""
import time
from rewards import RewardFunction
from storage.reward_functions import Store
from sqlalchemy import text
store = Store("sqlite:///{file}")
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
    store = at(file)
    assert names(store) == ["before", "crisp"]
    store.save("after", VIVID)
    assert names(store) == ["after", "before", "crisp"]


def test_a_file_deleted_under_a_running_store_is_made_anew(file: Path) -> None:
    store = at(file)
    assert names(store) == ["crisp"]
    file.unlink()
    store.save("x", VIVID)
    assert names(store) == ["x"]


def test_the_folder_is_made(tmp_path: Path) -> None:
    store = at(tmp_path / "a" / "b" / "store.sqlite3")
    store.save("x", CRISP)
    assert names(store) == ["x"]


# Other versions and wrong settings


def test_what_another_version_saved_is_passed_over_and_can_be_replaced(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("""UPDATE reward_functions SET weights = '{"zest": 1}'""")
    connection.close()
    store = at(file)
    assert store.list() == []
    with pytest.raises(StoreError, match="another version") as caught:
        store.get("crisp")
    assert caught.value.kind == "unreadable"
    store.save("crisp", VIVID, overwrite=True)
    assert store.get("crisp") == VIVID


def test_a_newer_schema_is_left_as_it_is(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE schema_version SET version = 99")
    connection.close()
    assert names(at(file)) == ["crisp"]
    with sqlite3.connect(file) as connection:
        assert connection.execute("SELECT version FROM schema_version").fetchall() == [(99,)]
    connection.close()


@pytest.mark.parametrize(
    "url", ["", "nonsense", "mysql://me:hunter2@db/x", "postgresql://me:hunter2@db:port/x", "sqlite://"]
)
def test_a_url_that_cannot_be_used_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(StoreError, match="DATABASE_URL") as caught:
        RewardFunctionStore(url)
    assert "hunter2" not in "".join(map(str, [caught.value, caught.value.__cause__, repr(caught.value)]))


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_a_database_that_is_down_says_what_to_check_without_the_password(scheme: str) -> None:
    store = RewardFunctionStore(f"{scheme}://me:hunter2@127.0.0.1:9/x", busy_seconds=2)
    with pytest.raises(StoreError, match="cannot be reached.*DATABASE_URL") as caught:
        store.ping()
    error: BaseException | None = caught.value
    while error is not None:
        assert "hunter2" not in str(error)
        error = error.__cause__ or error.__context__


@pytest.mark.postgres
def test_a_lost_connection_is_opened_again(postgres_url: str) -> None:
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
def test_a_user_without_rights_is_told_so(postgres_url: str) -> None:
    store = RewardFunctionStore(
        postgres_url.replace("search_path%3D", "default_transaction_read_only%3Don%20-csearch_path%3D")
    )
    with pytest.raises(StoreError, match="refused.*rights|refused.*user may"):
        store.save("one", CRISP)
