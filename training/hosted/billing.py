"""Budget check before each paid call of a hosted run, and its usage event right after it.

The training process does both itself, because it outlives the application that started it: it opens the deployment's
database, whose address it receives in an environment variable. A row in the run's calls.jsonl precedes the usage event,
so that a call is counted once whether the process is killed or the database cannot be reached in between.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sqlalchemy.engine import make_url

from storage.database import Database, StoreError
from training.hosted.cost import CostTracker
from training.runs.run import Run, RunPaused
from training.runs.usage_events import call_event
from usage.budgets import BudgetExceededError, Budgets
from usage.events import Deployment, UsageEvent
from usage.recorder import insert_events

ACCOUNT_VARIABLE = "HOSTED_RUN_ACCOUNT"


@dataclass(frozen=True)
class BillingAccount:
    """The deployment that hosted runs are recorded for, and the database with its budgets and usage events.

    Attributes:
        database_url: URL of the database. It may contain a password and is not part of the repr.
        deployment: Branch, commit and Space of the usage events; the branch selects the budgets.
    """

    database_url: str = field(repr=False)
    deployment: Deployment

    def to_env(self) -> dict[str, str]:
        """Return the environment variable that passes the account to a training process in any working directory."""
        url = make_url(self.database_url)
        if url.get_backend_name() == "sqlite" and url.database:
            url = url.set(database=str(Path(url.database).resolve()))
        address = url.render_as_string(hide_password=False)
        return {ACCOUNT_VARIABLE: json.dumps({"database_url": address, "deployment": asdict(self.deployment)})}

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> BillingAccount | None:
        """Read the account of the deployment that started this process; None if it was started in a shell."""
        if not environ.get(ACCOUNT_VARIABLE):
            return None
        values = json.loads(environ[ACCOUNT_VARIABLE])
        return cls(values["database_url"], Deployment(**values["deployment"]))


@dataclass
class PaidCall:
    """A paid call in progress.

    Attributes:
        skill: Name of the skill, or "train_step".
        candidates: Number of answers that are requested or trained on.
        reward: Mean reward of the answers, 0 to 1, once known.
    """

    skill: str
    candidates: int
    reward: float | None = None


class PaidCalls:
    """The paid calls of one run: checked before, recorded after.

    Without an account, calls are only written to the run's folder. Calls that the visitor's own key pays for are
    recorded, but neither checked nor stopped by an unreachable database.
    """

    def __init__(self, run: Run, costs: CostTracker, account: BillingAccount | None) -> None:
        self.run, self.costs, self.account = run, costs, account
        self.payer = "visitor" if run.own_key else "deployment"
        self.database = Database(account.database_url) if account else None
        calls = run.calls()
        costs.dollars = max(costs.dollars, sum(call.get("cost") or 0.0 for call in calls))
        self._recorded_dollars, self._recorded_tokens = costs.dollars, (costs.tokens_in, costs.tokens_out)
        self._pending = [event for row in calls if (event := call_event(run, row))]  # of a killed process

    @contextmanager
    def call(self, skill: str, candidates: int) -> Iterator[PaidCall]:
        """Check the budget, make a call within the context, and record what `costs` gained meanwhile.

        Args:
            skill: See `PaidCall`.
            candidates: See `PaidCall`.

        Raises:
            RunPaused: The budget is spent, or the database cannot be reached. Nothing was paid.
        """
        self.check_budget()
        start, outcome, error_kind = time.monotonic(), "cancelled", ""
        call = PaidCall(skill, candidates)
        try:
            yield call
            outcome = "ok"
        except Exception as error:
            outcome, error_kind = "error", getattr(error, "kind", type(error).__name__)
            raise
        finally:
            self._record(call, time.monotonic() - start, outcome, error_kind)

    def check_budget(self) -> None:
        """Check that another paid call is allowed, including everything this run has spent. Raises RunPaused."""
        if self.database is None or self.account is None or self.payer == "visitor":
            return
        try:
            self._store_pending(self.database, self.account)
            Budgets(self.database).check(self.account.deployment.branch)
        except BudgetExceededError as error:
            raise RunPaused(f"{error} The run stopped before its next paid call; resume it then.") from None
        except StoreError as error:
            raise RunPaused(
                f"{error} The run stopped before its next paid call, because the budget could not be checked. Resume "
                "it when the database works again."
            ) from None

    def _record(self, call: PaidCall, seconds: float, outcome: str, error: str) -> None:
        dollars, tokens_in, tokens_out = self.costs.dollars, self.costs.tokens_in, self.costs.tokens_out
        row = {"id": uuid.uuid4().hex, "time": time.time(), "seconds": seconds, "skill": call.skill}
        row |= {"candidates": call.candidates, "reward": call.reward, "payer": self.payer}
        row |= {"cost": dollars - self._recorded_dollars if self.costs.priced else None}
        row |= {"outcome": outcome, "error": error}
        before_in, before_out = self._recorded_tokens
        if tokens_in > before_in:
            row |= {"tokens_in": tokens_in - before_in, "tokens_out": tokens_out - before_out}
        self._recorded_dollars, self._recorded_tokens = dollars, (tokens_in, tokens_out)
        if event := call_event(self.run, row):
            self._pending.append(event)
        try:
            self.run.append_call(row)
        finally:
            if self.database is not None and self.account is not None:
                with suppress(StoreError):  # the next check reports it
                    self._store_pending(self.database, self.account)

    def _store_pending(self, database: Database, account: BillingAccount) -> None:
        events: list[UsageEvent] = [event.with_deployment(account.deployment) for event in self._pending]
        insert_events(database, events)
        self._pending = []
