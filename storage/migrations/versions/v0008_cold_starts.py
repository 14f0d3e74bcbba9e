"""Version 8: the time in which a model was loaded for a call. Earlier versions go on writing without it."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Add the column; storage/tables.py documents it."""
    op.add_column("usage_events", sa.Column("cold_start", sa.BigInteger))
