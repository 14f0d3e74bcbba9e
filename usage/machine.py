"""Cost of this machine: what an administrator sets it to cost an hour, else its price in the table of prices.

The cost of a local model's call is the machine's time. It is always an estimate.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import BigInteger, Float, cast, delete, func, select, update

from storage.database import Database, StoreError
from storage.tables import DOLLAR, EVENTS, HOUR, HOURS, KIND_COLUMNS, KINDS, MACHINE_PRICES, SECOND
from usage.events import MAX_NAME_LENGTH, name_digest, sanitize
from usage.prices import Prices
from usage.recorder import kind_ids

MAX_PRICE = 10_000.0  # US dollars per hour
REFRESH_SECONDS = 60.0  # between two reads of the price, which another process may have changed
LAPTOP_WATTS, DOLLARS_PER_KWH = 40.0, 0.30
JOBS = "job/"  # prefix of the names of machines of Hugging Face Jobs
_log = logging.getLogger(__name__)


class MachinePriceError(ValueError):
    """Raised for an invalid price. The message says what to change."""


@dataclass(frozen=True)
class PriceSuggestion:
    """A price to choose from, in US dollars per hour, and what it stands for."""

    title: str
    dollars: float


class MachinePrice:
    """What this machine costs an hour. Threads can share it.

    Attributes:
        machine: Name of this machine in the database: its Space, or its host name.
    """

    def __init__(self, database: Database, prices: Prices, hardware: str | None, machine: str) -> None:
        """Create the price without reading it.

        Args:
            database: Where the price is stored.
            prices: The table of prices.
            hardware: Name of this machine's hardware in `prices`; None if unknown.
            machine: See `MachinePrice`.
        """
        self.machine = sanitize(machine, MAX_NAME_LENGTH)
        self._database, self._prices, self._hardware = database, prices, hardware
        self._lock = threading.Lock()
        self._dollars: float | None = None
        self._read_at: float | None = None

    @property
    def is_set(self) -> bool:
        """Whether an administrator has set the price."""
        return self._read() is not None

    @property
    def per_hour(self) -> float | None:
        """US dollars per hour; None if unknown."""
        dollars = self._read()
        return self._prices.machine(self._hardware, 3600) if dollars is None else dollars

    def cost(self, seconds: float) -> float | None:
        """Return the cost of `seconds` seconds in US dollars; None if unknown. Never raises StoreError."""
        dollars = self.per_hour
        return None if dollars is None else seconds * dollars / 3600

    def set(self, dollars: float | None) -> None:
        """Set the price per hour, or return to that of the table of prices (None).

        Raises:
            MachinePriceError: The price is out of range.
            StoreError: The database cannot be written.
        """
        if dollars is not None and not 0 <= dollars <= MAX_PRICE:
            raise MachinePriceError(f"A machine's price must be from 0 to {MAX_PRICE:,.0f} US dollars per hour.")
        digest = name_digest(self.machine)
        with self._database.transaction(write=True) as connection:
            connection.execute(delete(MACHINE_PRICES).where(MACHINE_PRICES.c.digest == digest))
            if dollars is not None:
                values = {"digest": digest, "machine": self.machine, "price": round(dollars * DOLLAR)}
                connection.execute(MACHINE_PRICES.insert().values(values))
        with self._lock:
            self._read_at = None

    def suggestions(self) -> list[PriceSuggestion]:
        """Return the prices of Spaces' machines, and of a laptop's electricity."""
        machines = [
            PriceSuggestion(name, price) for name, price in self._prices.hardware.items() if not name.startswith(JOBS)
        ]
        watts, rate = LAPTOP_WATTS, DOLLARS_PER_KWH
        laptop = PriceSuggestion(f"electricity of a laptop, {watts:g} W at ${rate:.2f} per kWh", watts / 1000 * rate)
        return [*machines, laptop]

    def price_past_events(self, space: str, is_local: Callable[[str, str], bool]) -> int:
        """Price the successful calls of local models that have no cost. Archived months are left as they are.

        Args:
            space: Space of the events; "" for those that were recorded outside of Spaces.
            is_local: Whether a model and an adapter, given by their names, ran on this machine.

        Returns:
            The number of calls.

        Raises:
            MachinePriceError: The price is not known.
            StoreError: The database cannot be written.
        """
        dollars = self.per_hour
        if dollars is None:
            raise MachinePriceError("Set a price first.")
        query = select(KINDS.c.id, *(KINDS.c[name] for name in KIND_COLUMNS))
        query = query.where(KINDS.c.space == space, KINDS.c.outcome == "ok", KINDS.c.cost_basis == "unknown")
        with self._database.transaction() as connection:
            kinds = connection.execute(query.where(KINDS.c.payer == "deployment")).mappings().all()
        cost = cast(func.round(cast(EVENTS.c.latency, Float(53)) * (dollars * DOLLAR / (3600 * SECOND))), BigInteger)
        count = 0
        for kind in (kind for kind in kinds if is_local(kind["model"], kind["adapter"])):
            names = tuple("estimated" if name == "cost_basis" else kind[name] for name in KIND_COLUMNS)
            with self._database.transaction(write=True) as connection:
                priced = kind_ids(self._database, connection, {names})[names]
                changed = update(EVENTS).where(EVENTS.c.kind == kind["id"]).values(kind=priced, cost=cost)
                count += connection.execute(changed).rowcount
                hours = select(EVENTS.c.time - EVENTS.c.time % HOUR).where(EVENTS.c.kind == priced)
                bump = update(HOURS).where(HOURS.c.hour.in_(hours)).values(changes=HOURS.c.changes + 1)
                connection.execute(bump)
        return count

    def _read(self) -> float | None:
        """Return the stored price, read at most once a minute; the last one if the database cannot be read."""
        with self._lock:
            now = time.monotonic()
            if self._read_at is None or now - self._read_at > REFRESH_SECONDS:
                self._read_at = now
                query = select(MACHINE_PRICES.c.price).where(MACHINE_PRICES.c.digest == name_digest(self.machine))
                try:
                    with self._database.transaction() as connection:
                        price = connection.execute(query).scalar_one_or_none()
                    self._dollars = None if price is None else price / DOLLAR
                except StoreError as error:
                    _log.warning("The machine's price cannot be read: %s", error)
            return self._dollars
