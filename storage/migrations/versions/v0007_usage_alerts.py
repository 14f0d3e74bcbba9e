"""Version 7: limits of the usage, and which of them are exceeded."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Create the table; storage/tables.py documents its columns."""
    op.create_table(
        "usage_alerts",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("branch", sa.Text, nullable=False),
        sa.Column("measure", sa.String(20), nullable=False),
        sa.Column("limit", sa.Float, nullable=False),
        sa.Column("value", sa.Float),
        sa.Column("since", sa.BigInteger),
        sa.Column("attempt", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("sent", sa.Boolean, nullable=False, server_default=sa.false()),
    )
