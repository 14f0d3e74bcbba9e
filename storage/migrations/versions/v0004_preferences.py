"""Version 4: choices between candidates, and the photos that their owners agreed to keep."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Create the tables; storage/tables.py documents their columns."""
    op.create_table(
        "preference_photos",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("jpeg", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("owner", "digest"),
    )
    op.create_table(
        "preferences",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("outcome", sa.String(8), nullable=False),
        *(
            sa.Column(f"{side}_{name}", sa.Text, nullable=False)
            for side in ("left", "right")
            for name in ("model", "recipe", "scores")
        ),
        sa.Column("start", sa.Text, nullable=False),
        sa.Column("sample", sa.Text, nullable=False),
        sa.Column("photo", sa.Integer),
    )
    op.create_index("preferences_owner", "preferences", ["owner", "id"])
