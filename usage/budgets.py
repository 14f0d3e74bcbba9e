"""Budgets: what a branch may spend in a calendar month (UTC), the warning at 80 %, and the stop at 100 %."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Literal

from sqlalchemy import delete, func, select

from storage.database import Database
from storage.tables import BUDGETS, EVENTS, KINDS
from usage.events import MAX_WORD, storable
from usage.ledger import DOLLAR, digest
from usage.time_window import micros

WARN_AT = 0.8
MAX_LIMIT = 1_000_000.0  # dollars
ALL = ""  # as a branch: all of them together


class BudgetError(ValueError):
    """A budget that cannot be; the message says what to change."""


class BudgetExceeded(Exception):
    """A paid call may not be made; the message says which budget is spent and who can lift it."""


@dataclass(frozen=True)
class Budget:
    """A limit in US dollars per calendar month (UTC). branch: "" for all. stop: refuse paid calls beyond it."""

    branch: str
    limit: float
    stop: bool = False


@dataclass(frozen=True)
class BudgetStatus:
    """A budget and what was spent of it this month, in US dollars. unpriced: calls whose cost is not known.

    state: "ok", "warning" from 80 %, "spent" from 100 %.
    """

    budget: Budget
    spent: float
    unpriced: int

    @property
    def share(self) -> float:
        """Of the limit, 1.0 for all of it."""
        return self.spent / self.budget.limit

    @property
    def state(self) -> Literal["ok", "warning", "spent"]:
        return "spent" if self.share >= 1 else "warning" if self.share >= WARN_AT else "ok"


class Budgets:
    """The budgets in a database. Every method raises StoreError when that is down."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def set(self, budget: Budget) -> None:
        """Keep a budget in place of the one that the branch had. Raises BudgetError."""
        if not 0 < budget.limit <= MAX_LIMIT or round(budget.limit * DOLLAR) == 0:
            raise BudgetError(f"A budget is more than 0 and at most {MAX_LIMIT:,.0f} US dollars.")
        branch = storable(budget.branch, MAX_WORD)
        values = {"branch": branch, "limit": round(budget.limit * DOLLAR), "stop": budget.stop}
        statement = self.database.insert(BUDGETS).values(digest=digest(branch), **values)
        with self.database.transaction(write=True) as connection:
            connection.execute(statement.on_conflict_do_update(index_elements=["digest"], set_=values))

    def remove(self, branch: str) -> None:
        """Forget the branch's budget, if it has one."""
        with self.database.transaction(write=True) as connection:
            connection.execute(delete(BUDGETS).where(BUDGETS.c.digest == digest(storable(branch, MAX_WORD))))

    def list(self, now: datetime | None = None) -> tuple[BudgetStatus, ...]:
        """All budgets and how they stand, by branch, the one for all first. `now`: in which month, if not this one."""
        with self.database.transaction() as connection:
            rows = connection.execute(select(BUDGETS.c.branch, BUDGETS.c.limit, BUDGETS.c.stop)).all()
        budgets = sorted((Budget(row.branch, row.limit / DOLLAR, row.stop) for row in rows), key=lambda b: b.branch)
        return tuple(self._status(budget, now or datetime.now(timezone.utc)) for budget in budgets)

    def check(self, branch: str, now: datetime | None = None) -> None:
        """Return if the branch may make a paid call now; raise BudgetExceeded otherwise.

        To be called right before each paid call (hosted inference, rollouts, training steps), never by local models.
        Only recorded calls count: those on their way may carry the sum past the limit by their own cost.
        """
        for status in self.list(now):
            mine = status.budget.branch in (ALL, storable(branch, MAX_WORD))
            if mine and status.budget.stop and status.state == "spent":
                whose = f"of the branch “{status.budget.branch}”" if status.budget.branch else "of all branches"
                raise BudgetExceeded(
                    f"The budget {whose} for this month (${status.budget.limit:g}) is spent, so paid calls are "
                    "stopped. Raise it in the Usage tab, or wait for the next month (UTC)."
                )

    def _status(self, budget: Budget, now: datetime) -> BudgetStatus:
        start, end = month(now)
        query = select(func.sum(EVENTS.c.cost), func.count() - func.count(EVENTS.c.cost))
        query = query.join(KINDS, KINDS.c.id == EVENTS.c.kind)
        query = query.where(EVENTS.c.time >= micros(start), EVENTS.c.time < micros(end))
        if budget.branch != ALL:
            query = query.where(KINDS.c.branch == budget.branch)
        with self.database.transaction() as connection:
            spent, unpriced = connection.execute(query).one()
        return BudgetStatus(budget, int(spent or 0) / DOLLAR, unpriced)


def month(now: datetime) -> tuple[datetime, datetime]:
    """The calendar month around a moment, in UTC: from its first moment up to the next month's."""
    start = now.astimezone(timezone.utc).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    year, number = (start.year + 1, 1) if start.month == 12 else (start.year, start.month + 1)
    return start, start.replace(year=year, month=number)
