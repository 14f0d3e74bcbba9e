"""Version 2: events of model calls, their kinds, hourly roll-ups, and budgets."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
NUMBER = sa.BigInteger
KEY = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite auto-increments INTEGER keys only


def upgrade() -> None:
    """Create the tables; storage/tables.py documents their columns."""
    words = ("branch", "commit", "space", "source", "model", "adapter", "skill", "outcome", "error")
    op.create_table(
        "usage_kinds",
        sa.Column("id", KEY, primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False, unique=True),
        *(sa.Column(name, sa.Text, nullable=False) for name in (*words, "tokens_basis", "cost_basis")),
    )
    optional = ("first_token", "queue", "tokens_in", "tokens_out", "cost", "reward")
    op.create_table(
        "usage_events",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("time", NUMBER, nullable=False),
        sa.Column("kind", KEY, nullable=False),
        sa.Column("latency", NUMBER, nullable=False),
        *(sa.Column(name, NUMBER) for name in optional),
        sa.Column("candidates", NUMBER, nullable=False),
        sa.Column("request", sa.String(64), nullable=False),
        sa.Column("session", sa.String(64), nullable=False),
    )
    op.create_index("usage_events_time", "usage_events", ["time", "id"])
    op.create_table(
        "usage_hours",
        sa.Column("hour", NUMBER, primary_key=True, autoincrement=False),
        sa.Column("changes", NUMBER, nullable=False),
        sa.Column("built", NUMBER, nullable=False, server_default="-1"),
        sa.Column("sealed", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("cells", sa.LargeBinary),
    )
    op.create_table(
        "usage_budgets",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("branch", sa.Text, nullable=False),
        sa.Column("limit", NUMBER, nullable=False),
        sa.Column("stop", sa.Boolean, nullable=False),
    )
