"""The schema's versions (Alembic, storage/migrations/versions): which one a database has, and the way to the newest."""

from __future__ import annotations

import threading
from pathlib import Path

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

_ONE_AT_A_TIME = threading.Lock()  # `alembic.op` is one for the whole process: two threads would mix up their databases
FOLDER = Path(__file__).resolve().parent / "migrations"


def is_current(connection: Connection) -> bool:
    """Whether there is nothing to do: the database has the newest version, or one that is newer than this program."""
    script = ScriptDirectory(str(FOLDER))
    heads = MigrationContext.configure(connection).get_current_heads()
    known = {revision.revision for revision in script.walk_revisions()}
    return any(head not in known or head == script.get_current_head() for head in heads)


def upgrade(connection: Connection) -> None:
    """Bring the database to the newest version, inside the caller's transaction; a newer database is left alone."""
    if is_current(connection):
        return
    script = ScriptDirectory(str(FOLDER))
    steps = {"fn": lambda revision, _: script._upgrade_revs("head", revision)}
    context = MigrationContext.configure(connection, opts=steps)
    with _ONE_AT_A_TIME, Operations.context(context):
        context.run_migrations()
