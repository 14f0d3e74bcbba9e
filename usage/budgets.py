"""Monthly budgets per branch: a warning at 80 %, and an optional stop of paid calls at 100 %.

Calls that visitors pay with their own API key do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Literal

from sqlalchemy import delete, func, select

from storage.database import Database
from storage.tables import BUDGETS, DOLLAR, EVENTS, KINDS
from usage.events import MAX_NAME_LENGTH, name_digest, sanitize
from usage.time_window import to_micros

WARNING_SHARE = 0.8
MAX_LIMIT = 1_000_000.0  # US dollars
ALL_BRANCHES = ""


class BudgetError(ValueError):
    """Raised for an invalid budget. The message says what to change."""


class BudgetExceededError(Exception):
    """Raised if a budget does not allow a paid call. The message names the budget and how to continue."""


@dataclass(frozen=True)
class Budget:
    """A limit per calendar month (UTC).

    Attributes:
        branch: Git branch, or "" for all branches together.
        limit: US dollars per month.
        stop: Whether to refuse paid calls once the limit is reached.
    """

    branch: str
    limit: float
    stop: bool = False


@dataclass(frozen=True)
class BudgetStatus:
    """A budget and its use in the current month.

    Attributes:
        budget: The budget.
        spent: US dollars that the deployment spent this month.
        unpriced: Number of calls without a known cost, which `spent` does not include.
    """

    budget: Budget
    spent: float
    unpriced: int

    @property
    def share(self) -> float:
        """Spent fraction of the limit; 1.0 is all of it."""
        return self.spent / self.budget.limit

    @property
    def state(self) -> Literal["ok", "warning", "spent"]:
        """State: "warning" from 80 % and "spent" from 100 % of the limit."""
        return "spent" if self.share >= 1 else "warning" if self.share >= WARNING_SHARE else "ok"


class Budgets:
    """Budgets stored in a database. Every method raises StoreError if the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def set(self, budget: Budget) -> None:
        """Create or replace the budget of a branch.

        Raises:
            BudgetError: The limit is out of range.
        """
        if not 0 < budget.limit <= MAX_LIMIT or round(budget.limit * DOLLAR) == 0:
            raise BudgetError(f"A budget must be more than 0 and at most {MAX_LIMIT:,.0f} US dollars.")
        branch = sanitize(budget.branch, MAX_NAME_LENGTH)
        values = {"branch": branch, "limit": round(budget.limit * DOLLAR), "stop": budget.stop}
        statement = self.database.insert(BUDGETS).values(digest=name_digest(branch), **values)
        with self.database.transaction(write=True) as connection:
            connection.execute(statement.on_conflict_do_update(index_elements=["digest"], set_=values))

    def remove(self, branch: str) -> None:
        """Delete the budget of a branch, if there is one."""
        digest = name_digest(sanitize(branch, MAX_NAME_LENGTH))
        with self.database.transaction(write=True) as connection:
            connection.execute(delete(BUDGETS).where(BUDGETS.c.digest == digest))

    def list(self, now: datetime | None = None) -> tuple[BudgetStatus, ...]:
        """Return the status of all budgets in the month of `now`, sorted by branch; the one for all branches first."""
        now = now or datetime.now(timezone.utc)
        return tuple(self._status(budget, now) for budget in self._budgets())

    def check(self, branch: str, now: datetime | None = None) -> None:
        """Check that a branch may make a paid call.

        Call this before each call that the deployment pays (hosted inference, rollouts, training steps), not for local
        models. Only recorded calls count: calls in flight can exceed the limit by their own cost.

        Raises:
            BudgetExceededError: A budget with `stop` is spent.
        """
        now = now or datetime.now(timezone.utc)
        for budget in self._budgets():
            applies = budget.branch in (ALL_BRANCHES, sanitize(branch, MAX_NAME_LENGTH))
            if applies and budget.stop and self._status(budget, now).state == "spent":
                scope = f"of the branch “{budget.branch}”" if budget.branch else "of all branches"
                raise BudgetExceededError(
                    f"The monthly budget {scope} (${budget.limit:g}) is spent, so paid calls are stopped. "
                    "Raise it in the Usage tab, or wait for the next month (UTC)."
                )

    def _budgets(self) -> list[Budget]:
        """Return all budgets, sorted by branch; the one for all branches first."""
        with self.database.transaction() as connection:
            rows = connection.execute(select(BUDGETS.c.branch, BUDGETS.c.limit, BUDGETS.c.stop)).all()
        budgets = [Budget(row.branch, row.limit / DOLLAR, row.stop) for row in rows]
        return sorted(budgets, key=lambda budget: budget.branch)

    def _status(self, budget: Budget, now: datetime) -> BudgetStatus:
        start, end = month_of(now)
        query = select(func.sum(EVENTS.c.cost), func.count() - func.count(EVENTS.c.cost))
        query = query.join(KINDS, KINDS.c.id == EVENTS.c.kind)
        query = query.where(EVENTS.c.time >= to_micros(start), EVENTS.c.time < to_micros(end))
        query = query.where(KINDS.c.payer != "visitor")
        if budget.branch != ALL_BRANCHES:
            query = query.where(KINDS.c.branch == budget.branch)
        with self.database.transaction() as connection:
            spent, unpriced = connection.execute(query).one()
        return BudgetStatus(budget, int(spent or 0) / DOLLAR, unpriced)


def month_of(now: datetime) -> tuple[datetime, datetime]:
    """Return the start of the calendar month of `now` and of the next one, in UTC."""
    start = now.astimezone(timezone.utc).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    year, month = (start.year + 1, 1) if start.month == 12 else (start.year, start.month + 1)
    return start, start.replace(year=year, month=month)
