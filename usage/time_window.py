"""Periods, filters and the bins of a chart, in any time zone: pure arithmetic on moments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from zoneinfo import ZoneInfo, available_timezones

from usage.events import MAX_WORD, storable

PERIODS: dict[str, timedelta] = {
    "hour": timedelta(hours=1),
    "day": timedelta(days=1),
    "week": timedelta(days=7),
    "30 days": timedelta(days=30),
}
CUSTOM = "custom"
MIN_YEAR, MAX_YEAR = 1990, 2200
MAX_PERIOD = timedelta(days=3660)
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
SECOND = 1_000_000
HOUR = 3600 * SECOND
# A period up to so long is cut into bins of this kind; a longer one into months.
BINS: dict[str, timedelta] = {
    "minute": timedelta(hours=3),
    "hour": timedelta(days=3),
    "6 hours": timedelta(days=14),
    "day": timedelta(days=180),
}


class FilterError(ValueError):
    """A filter that cannot be; the message says what to change."""


@dataclass(frozen=True)
class Window:
    """From `start` up to, but without, `end`."""

    start: datetime
    end: datetime

    @property
    def before(self) -> Window:
        """The period of the same length that ends where this one starts."""
        return Window(self.start - (self.end - self.start), self.start)


@dataclass(frozen=True)
class Filter:
    """Which events are meant. An empty tuple means all; several names of a kind mean any of them.

    period: a name of PERIODS, which ends now, or "custom" with `start` and `end`.
    zone: an IANA name; it decides where the bins of charts begin, and what a start or end without a zone means.
    """

    period: str = "day"
    branches: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    skills: tuple[str, ...] = ()
    outcomes: tuple[str, ...] = ()
    zone: str = "UTC"
    start: datetime | None = None
    end: datetime | None = None

    def __post_init__(self) -> None:
        """Raises FilterError."""
        if self.zone not in available_timezones():
            raise FilterError("This time zone is not known. Use a name such as Europe/Berlin.")
        if self.period != CUSTOM and self.period not in PERIODS:
            raise FilterError(f"The period must be one of {', '.join([*PERIODS, CUSTOM])}.")
        for name in ("branches", "models", "skills", "outcomes"):
            object.__setattr__(self, name, tuple(storable(text, MAX_WORD) for text in getattr(self, name)))
        for name in ("start", "end"):
            moment = getattr(self, name)
            if moment is not None and moment.tzinfo is None:
                object.__setattr__(self, name, moment.replace(tzinfo=ZoneInfo(self.zone)))
        if self.period == CUSTOM:
            _check(self.start, self.end)

    def window(self, now: datetime) -> Window:
        """The period as moments in UTC; `now` has a zone."""
        if self.start is not None and self.end is not None and self.period == CUSTOM:
            return Window(self.start.astimezone(timezone.utc), self.end.astimezone(timezone.utc))
        now = now.astimezone(timezone.utc)
        return Window(now - PERIODS[self.period], now)

    def only(self, branch: str) -> Filter:
        """The same for one branch alone."""
        return replace(self, branches=(branch,))


def _check(start: datetime | None, end: datetime | None) -> None:
    if start is None or end is None:
        raise FilterError("A custom period needs a start and an end.")
    try:
        length = end.astimezone(timezone.utc) - start.astimezone(timezone.utc)
    except OverflowError:
        raise FilterError("The period is beyond the calendar.") from None
    if not MIN_YEAR <= start.year <= end.year <= MAX_YEAR:
        raise FilterError(f"A custom period lies between the years {MIN_YEAR} and {MAX_YEAR}.")
    if not timedelta(0) < length <= MAX_PERIOD:
        raise FilterError("A custom period ends after its start, at most ten years later.")


def bin_size(window: Window) -> str:
    """ "minute", "hour", "6 hours", "day" or "month": so that a chart has some dozens of bins."""
    length = window.end - window.start
    return next((name for name, longest in BINS.items() if length <= longest), "month")


def bins(window: Window, zone: str) -> list[datetime]:
    """Where the bins of a window begin, in `zone`; the first begins at or before the window, the last one within it.

    Days, months and quarters of days follow the clock on the wall, so that a day may have 23 or 25 hours.
    """
    place = ZoneInfo(zone)
    found = [moment for moment in _starts(window, place, bin_size(window)) if moment < window.end]
    first = max((n for n, moment in enumerate(found) if moment <= window.start), default=0)
    return [moment.astimezone(place) for moment in found[first:]]


def _starts(window: Window, place: ZoneInfo, size: str) -> Iterator[datetime]:
    """Starts of bins in UTC, rising, from before the window's start to its end."""
    local = window.start.astimezone(place)
    if size in ("minute", "hour"):
        offset = local.utcoffset() or timedelta(0)
        step = timedelta(minutes=1) if size == "minute" else timedelta(hours=1)
        moment = window.start - (window.start - EPOCH + offset) % step
        while moment < window.end:
            yield moment
            moment += step
        return
    last, wall = None, _wall(local, size)
    while last is None or last < window.end:
        moment = wall.replace(tzinfo=place).astimezone(timezone.utc)
        if last is None or moment > last:
            yield moment
            last = moment
        wall = _next(wall, size)


def _wall(local: datetime, size: str) -> datetime:
    """The start, on the wall's clock, of a bin that is safely before this moment."""
    day = local.replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
    return day.replace(day=1) if size == "month" else day - timedelta(days=1)


def _next(wall: datetime, size: str) -> datetime:
    if size == "month":
        return (wall + timedelta(days=32)).replace(day=1)
    return wall + (timedelta(days=1) if size == "day" else timedelta(hours=6))


def micros(moment: datetime) -> int:
    """Microseconds since 1970."""
    return (moment - EPOCH) // timedelta(microseconds=1)


def moment(time: int) -> datetime:
    """The moment, in UTC, of so many microseconds since 1970."""
    return EPOCH + timedelta(microseconds=time)
