"""Version 6: what machines cost an hour."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Create the table; storage/tables.py documents its columns."""
    op.create_table(
        "machine_prices",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("machine", sa.Text, nullable=False),
        sa.Column("price", sa.BigInteger, nullable=False),
    )
