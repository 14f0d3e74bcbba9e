"""SQLAlchemy tables for queries. The schema is created and changed by storage/migrations/versions."""

from sqlalchemy import BigInteger, Boolean, Column, DateTime, Integer, LargeBinary, MetaData, String, Table, Text

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
# Attributes that many events share: few kinds stand for millions of events. The digest of all names is unique; the
# names themselves (up to 10 kB) are too long for an index.
NAME_COLUMNS = ("branch", "commit", "space", "source", "model", "adapter", "skill", "outcome", "error")
BASIS_COLUMNS = ("tokens_basis", "cost_basis")
KINDS = Table(
    "usage_kinds",
    METADATA,
    Column("id", BigInteger, primary_key=True),
    Column("digest", String(64)),
    *(Column(name, Text) for name in (*NAME_COLUMNS, *BASIS_COLUMNS)),
)
# Unknown numbers are NULL. `kind` is an id in usage_kinds.
EVENTS = Table(
    "usage_events",
    METADATA,
    Column("id", String(32), primary_key=True),
    *(Column(name, BigInteger) for name in ("time", "kind", "latency", "first_token", "queue")),
    *(Column(name, BigInteger) for name in ("tokens_in", "tokens_out", "cost", "reward", "candidates")),
    Column("request", String(64)),
    Column("session", String(64)),
)
# One row per hour (microseconds since 1970). `changes` counts the batches with events of this hour. `cells` is the
# hour's roll-up, valid while `built` equals `changes`. `sealed`: the events themselves may have been deleted.
HOURS = Table(
    "usage_hours",
    METADATA,
    Column("hour", BigInteger, primary_key=True),
    Column("changes", BigInteger),
    Column("built", BigInteger),
    Column("sealed", Boolean),
    Column("cells", LargeBinary),
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
