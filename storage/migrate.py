"""Schema migrations with Alembic; the versions are in storage/migrations/versions."""

from __future__ import annotations

import threading
from pathlib import Path

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

_UPGRADE_LOCK = threading.Lock()  # `alembic.op` is global: parallel upgrades would mix up their databases
FOLDER = Path(__file__).resolve().parent / "migrations"


def is_current(connection: Connection) -> bool:
    """Check whether the database has the latest version, or one that is newer than this program."""
    script = ScriptDirectory(str(FOLDER))
    heads = MigrationContext.configure(connection).get_current_heads()
    known = {revision.revision for revision in script.walk_revisions()}
    return any(head not in known or head == script.get_current_head() for head in heads)


def upgrade(connection: Connection) -> None:
    """Upgrade the database to the latest version in the caller's transaction. Newer databases are left unchanged."""
    if is_current(connection):
        return
    script = ScriptDirectory(str(FOLDER))
    options = {"fn": lambda revision, _: script._upgrade_revs("head", revision)}
    context = MigrationContext.configure(connection, opts=options)
    with _UPGRADE_LOCK, Operations.context(context):
        context.run_migrations()
