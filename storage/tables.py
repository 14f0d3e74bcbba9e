"""SQLAlchemy tables for queries. The schema is created and changed by storage/migrations/versions."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

# Numbers are stored as integers, so that sums are the same in every database. Times and durations are in microseconds
# (times since 1970), costs in billionths of a US dollar, rewards in millionths.
SECOND = 1_000_000
HOUR = 3600 * SECOND
DOLLAR = 1_000_000_000
REWARD = 1_000_000

MAX_NAME = 80
METADATA = MetaData()
REWARD_FUNCTIONS = Table(
    "reward_functions",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("name", String(MAX_NAME), nullable=False),
    Column("name_key", Text, nullable=False, unique=True),
    Column("weights", Text, nullable=False),
    Column("created", DateTime(timezone=True), nullable=False),
    Column("updated", DateTime(timezone=True), nullable=False),
)
# Reward functions of owners other than "", whose reward functions are in the table above; see access/roles.py.
USER_REWARD_FUNCTIONS = Table(
    "user_reward_functions",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("name", String(MAX_NAME), nullable=False),
    Column("name_key", Text, nullable=False),
    Column("weights", Text, nullable=False),
    Column("created", DateTime(timezone=True), nullable=False),
    Column("updated", DateTime(timezone=True), nullable=False),
    UniqueConstraint("owner", "name_key"),
)
# Attributes that many events share: few kinds stand for millions of events. The digest of all names is unique; the
# names themselves (up to 10 kB) are too long for an index. `payer` is part of the digest only if it is "visitor":
# versions without this column write the same digests for the other events, and get its default, "deployment".
NAME_COLUMNS = ("branch", "commit", "space", "source", "model", "adapter", "skill", "outcome", "error")
BASIS_COLUMNS = ("tokens_basis", "cost_basis")
KIND_COLUMNS = (*NAME_COLUMNS, *BASIS_COLUMNS, "payer")  # the names that a kind of event has
KINDS = Table(
    "usage_kinds",
    METADATA,
    Column("id", BigInteger, primary_key=True),
    Column("digest", String(64)),
    *(Column(name, Text) for name in (*NAME_COLUMNS, *BASIS_COLUMNS)),
    Column("payer", Text),
)
# Unknown numbers are NULL. `kind` is an id in usage_kinds. `session` is a visitor hash; see usage/events.py. Events are
# also numbered in the order of insertion: see EVENT_NUMBER.
EVENTS = Table(
    "usage_events",
    METADATA,
    Column("id", String(32), primary_key=True),
    *(Column(name, BigInteger) for name in ("time", "kind", "latency", "first_token", "queue")),
    *(Column(name, BigInteger) for name in ("tokens_in", "tokens_out", "cost", "reward", "candidates")),
    Column("request", String(64)),
    Column("session", String(64)),
    Column("cold_start", BigInteger),
)
EVENT_NUMBER = {"sqlite": "usage_events.rowid", "postgresql": "usage_events.number"}
# One row per hour (microseconds since 1970). `changes` counts the transactions that changed events of this hour: every
# INSERT, UPDATE or DELETE of events increments it, and caches then compare the hour. The table's other columns serve
# earlier versions.
HOURS = Table(
    "usage_hours",
    METADATA,
    Column("hour", BigInteger, primary_key=True),
    Column("changes", BigInteger),
)
# Old events as Parquet, several files per month ("2026-11"). Written in the transaction that deletes the events.
ARCHIVE = Table(
    "usage_archive",
    METADATA,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("month", String(7)),
    Column("events", BigInteger),
    Column("content", LargeBinary),
)
# Limits of the usage. `since`: time from which the limit is exceeded, else NULL. `attempt`: time of the last attempt to
# send the webhook, 0 before the first. `sent`: the receiver accepted it.
ALERTS = Table(
    "usage_alerts",
    METADATA,
    Column("digest", String(64), primary_key=True),
    Column("branch", Text),
    Column("measure", String(20)),
    *(Column(name, Float) for name in ("limit", "value")),
    *(Column(name, BigInteger) for name in ("since", "attempt")),
    Column("sent", Boolean),
)
# `price` per hour, in billionths of a US dollar.
MACHINE_PRICES = Table(
    "machine_prices",
    METADATA,
    Column("digest", String(64), primary_key=True),
    Column("machine", Text),
    Column("price", BigInteger),
)
# `limit` per calendar month (UTC), in billionths of a US dollar. The branch "" stands for all branches.
BUDGETS = Table(
    "usage_budgets",
    METADATA,
    Column("digest", String(64), primary_key=True),
    Column("branch", Text),
    Column("limit", BigInteger),
    Column("stop", Boolean),
)
# Photos that their owners agreed to keep with their choices, as small JPEG files. `digest` is the SHA-256 of the file.
PREFERENCE_PHOTOS = Table(
    "preference_photos",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("jpeg", LargeBinary, nullable=False),
    UniqueConstraint("owner", "digest"),
)
# Choices between two candidates of a photo. `scores` and `start`, the sliders' weights at the time, are JSON objects.
# `sample` names a bundled photo; "" is another one. `photo` is an id in preference_photos, or NULL.
SIDES = ("left", "right")
PREFERENCES = Table(
    "preferences",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("created", DateTime(timezone=True), nullable=False),
    Column("outcome", String(8), nullable=False),
    *(Column(f"{side}_{name}", Text, nullable=False) for side in SIDES for name in ("model", "recipe", "scores")),
    Column("start", Text, nullable=False),
    Column("sample", Text, nullable=False),
    Column("photo", Integer),
)
