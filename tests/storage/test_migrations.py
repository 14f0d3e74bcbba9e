"""Tests of schema migrations: databases of earlier versions keep their content."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sqlalchemy import inspect

from storage.database import Database
from storage.reward_functions import RewardFunctionStore

VERSION_1 = """
CREATE TABLE schema_version (version INTEGER NOT NULL);
INSERT INTO schema_version VALUES (1);
CREATE TABLE reward_functions (id INTEGER NOT NULL PRIMARY KEY, name VARCHAR(80) NOT NULL,
    name_key TEXT NOT NULL UNIQUE, weights TEXT NOT NULL, created DATETIME NOT NULL, updated DATETIME NOT NULL);
INSERT INTO reward_functions VALUES
    (1, 'crisp', 'crisp', '{"sharpness": 1.0}', '2026-11-01 10:00:00.000000', '2026-11-01 10:00:00.000000');
"""


def test_database_of_version_1_keeps_its_reward_functions(tmp_path: Path) -> None:
    file = tmp_path / "old.sqlite3"
    with sqlite3.connect(file) as connection:
        connection.executescript(VERSION_1)
    connection.close()
    assert [saved.name for saved in RewardFunctionStore(f"sqlite:///{file}").list()] == ["crisp"]
    with sqlite3.connect(file) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0002",)]
        assert connection.execute("SELECT count(*) FROM usage_events").fetchone() == (0,)
    connection.close()


def test_databases_created_concurrently_do_not_mix(tmp_path: Path) -> None:
    def create(number: int) -> set[str]:
        with Database(f"sqlite:///{tmp_path / f'{number}.sqlite3'}").transaction() as connection:
            return set(inspect(connection).get_table_names())

    with ThreadPoolExecutor(8) as threads:
        schemas = list(threads.map(create, range(24)))
    assert "usage_events" in schemas[0] and all(tables == schemas[0] for tables in schemas)
