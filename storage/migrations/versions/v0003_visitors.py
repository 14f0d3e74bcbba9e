"""Version 3: hashed visitors, the payer of a call, and reward functions of users.

Branches with version 2 may share the database and go on writing: new columns have defaults.
"""

import hmac
import secrets

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
BATCH_SIZE = 10_000  # sessions per INSERT; bounds the memory


def upgrade() -> None:
    """Hash old sessions, and add the column and the table; storage/tables.py documents them."""
    _hash_sessions(op.get_bind())
    # After the slow part, because PostgreSQL locks the table until the end of the transaction.
    op.add_column("usage_kinds", sa.Column("payer", sa.Text, nullable=False, server_default="deployment"))
    op.create_table(
        "user_reward_functions",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("name", sa.String(80), nullable=False),
        sa.Column("name_key", sa.Text, nullable=False),
        sa.Column("weights", sa.Text, nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated", sa.DateTime(timezone=True), nullable=False),
        sa.UniqueConstraint("owner", "name_key"),
    )


def _hash_sessions(connection: sa.Connection) -> None:
    """Replace Gradio's session hashes, which give access to a session, by visitor hashes.

    The salt is not kept, so that nobody can test which session belongs to a row.
    """
    salt = secrets.token_bytes(32)
    metadata = sa.MetaData()
    events = sa.Table("usage_events", metadata, sa.Column("session", sa.String(64)))
    hashes = sa.Table(
        "visitor_hashes",
        metadata,
        sa.Column("session", sa.String(64), primary_key=True),
        sa.Column("hash", sa.String(27), nullable=False),
        prefixes=["TEMPORARY"],
    )
    hashes.create(connection)
    query = sa.select(events.c.session).where(events.c.session != "").distinct()
    with connection.execute(query.execution_options(yield_per=BATCH_SIZE)) as sessions:
        for batch in sessions.scalars().partitions():
            rows = [{"session": session, "hash": _hash(salt, session)} for session in batch]
            connection.execute(hashes.insert(), rows)
    connection.execute(events.update().where(events.c.session == hashes.c.session).values(session=hashes.c.hash))
    hashes.drop(connection)


def _hash(salt: bytes, session: str) -> str:
    return "v1-" + hmac.new(salt, session.encode(), "sha256").hexdigest()[:24]
