"""The tables as queries see them. What creates and changes them is in storage/migrations/versions."""

from sqlalchemy import BigInteger, Boolean, Column, DateTime, Integer, LargeBinary, MetaData, String, Table, Text

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
# What many events have in common, in words, once: few kinds stand for millions of events. A digest of the words is
# what is unique, for words of 10 kB are too long for an index.
WORDS = ("branch", "commit", "space", "source", "model", "adapter", "skill", "outcome", "error")
BASES = ("tokens_basis", "cost_basis")
KINDS = Table(
    "usage_kinds",
    METADATA,
    Column("id", BigInteger, primary_key=True),
    Column("digest", String(64)),
    *(Column(name, Text) for name in (*WORDS, *BASES)),
)
# Whole numbers, so that sums are the same in every database: time, latency, first_token and queue in microseconds
# (time since 1970), cost in billionths of a US dollar, reward in millionths. What is not known is NULL.
EVENTS = Table(
    "usage_events",
    METADATA,
    Column("id", String(32), primary_key=True),
    *(Column(name, BigInteger) for name in ("time", "kind", "latency", "first_token", "queue")),
    *(Column(name, BigInteger) for name in ("tokens_in", "tokens_out", "cost", "reward", "candidates")),
    Column("request", String(64)),
    Column("session", String(64)),
)
# One row per hour (microseconds since 1970). `changes` counts the batches that brought events of this hour; `cells` is
# the hour's roll-up, true as long as `built` equals `changes`. `sealed`: the events themselves may have gone.
HOURS = Table(
    "usage_hours",
    METADATA,
    Column("hour", BigInteger, primary_key=True),
    Column("changes", BigInteger),
    Column("built", BigInteger),
    Column("sealed", Boolean),
    Column("cells", LargeBinary),
)
# `limit` per calendar month (UTC), in billionths of a US dollar; branch "" means all branches together.
BUDGETS = Table(
    "usage_budgets",
    METADATA,
    Column("digest", String(64), primary_key=True),
    Column("branch", Text),
    Column("limit", BigInteger),
    Column("stop", Boolean),
)
