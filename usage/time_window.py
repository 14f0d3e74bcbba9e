"""Time windows, usage filters and chart bins in any time zone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from functools import cache
from zoneinfo import ZoneInfo, available_timezones

from usage.events import MAX_NAME_LENGTH, sanitize

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
# Bin size -> the longest window that uses it. Longer windows are divided into months.
BIN_SIZES: dict[str, timedelta] = {
    "minute": timedelta(hours=3),
    "hour": timedelta(days=3),
    "6 hours": timedelta(days=14),
    "day": timedelta(days=180),
}


class FilterError(ValueError):
    """Raised for an invalid filter. The message tells the user what to change."""


@dataclass(frozen=True)
class Window:
    """A time window, including `start` and excluding `end`."""

    start: datetime
    end: datetime

    @property
    def previous(self) -> Window:
        """The window of the same length that ends where this one starts."""
        return Window(self.start - (self.end - self.start), self.start)


@dataclass(frozen=True)
class UsageFilter:
    """A selection of events. Empty tuples select everything; several names are combined by "or".

    Attributes:
        period: A name in `PERIODS`, which ends now, or "custom" with `start` and `end`.
        branches: Branches; `models`, `skills` and `outcomes` likewise.
        zone: IANA time zone of chart bins, and of a `start` or `end` without an offset.
        start: Start of a custom period.
        end: End of a custom period.

    Raises:
        FilterError: A value is invalid.
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
        if self.zone not in time_zones():
            raise FilterError("This time zone is not known. Use a name such as Europe/Berlin.")
        if self.period != CUSTOM and self.period not in PERIODS:
            raise FilterError(f"The period must be one of {', '.join([*PERIODS, CUSTOM])}.")
        for name in ("branches", "models", "skills", "outcomes"):
            names = tuple(sanitize(text, MAX_NAME_LENGTH) for text in getattr(self, name))
            object.__setattr__(self, name, names)
        for name in ("start", "end"):
            time = getattr(self, name)
            if time is not None and time.tzinfo is None:
                object.__setattr__(self, name, time.replace(tzinfo=ZoneInfo(self.zone)))
        if self.period == CUSTOM:
            _check_custom_period(self.start, self.end)

    def window(self, now: datetime) -> Window:
        """Return the window in UTC. `now` is the end of a named period and needs a time zone."""
        if self.start is not None and self.end is not None and self.period == CUSTOM:
            return Window(self.start.astimezone(timezone.utc), self.end.astimezone(timezone.utc))
        now = now.astimezone(timezone.utc)
        return Window(now - PERIODS[self.period], now)

    def only(self, branch: str) -> UsageFilter:
        """Return the same filter for one branch."""
        return replace(self, branches=(branch,))


@cache
def time_zones() -> frozenset[str]:
    """Return the names of all IANA time zones. Cached: `available_timezones` reads hundreds of files."""
    return frozenset(available_timezones())


def _check_custom_period(start: datetime | None, end: datetime | None) -> None:
    if start is None or end is None:
        raise FilterError("A custom period needs a start and an end.")
    try:
        length = end.astimezone(timezone.utc) - start.astimezone(timezone.utc)
    except OverflowError:
        raise FilterError("The dates are outside of the supported range.") from None
    if not MIN_YEAR <= start.year <= end.year <= MAX_YEAR:
        raise FilterError(f"A custom period must be between the years {MIN_YEAR} and {MAX_YEAR}.")
    if not timedelta(0) < length <= MAX_PERIOD:
        raise FilterError("A custom period must end after its start, at most ten years later.")


def bin_size(window: Window) -> str:
    """Return the bin size for a chart of at most about 200 bins: "minute", "hour", "6 hours", "day" or "month"."""
    length = window.end - window.start
    return next((size for size, longest in BIN_SIZES.items() if length <= longest), "month")


def bin_starts(window: Window, zone: str) -> list[datetime]:
    """Return the starts of a window's bins, as local times in `zone`.

    The first bin starts at or before the window, the last one within it. Days, months and 6-hour bins follow local
    clock time, so that a day may have 23 or 25 hours.
    """
    tz = ZoneInfo(zone)
    starts = [start for start in _iterate_bins(window, tz, bin_size(window)) if start < window.end]
    first = max((index for index, start in enumerate(starts) if start <= window.start), default=0)
    return [start.astimezone(tz) for start in starts[first:]]


def _iterate_bins(window: Window, tz: ZoneInfo, size: str) -> Iterator[datetime]:
    """Yield ascending bin starts in UTC, from at or before the window's start to its end."""
    local = window.start.astimezone(tz)
    if size in ("minute", "hour"):
        offset = local.utcoffset() or timedelta(0)
        step = timedelta(minutes=1) if size == "minute" else timedelta(hours=1)
        start = window.start - (window.start - EPOCH + offset) % step
        while start < window.end:
            yield start
            start += step
        return
    # Local clock time without a zone. Starting a bin early covers every change of the offset.
    clock = local.replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
    clock = clock.replace(day=1) if size == "month" else clock - timedelta(days=1)
    last = None
    while last is None or last < window.end:
        start = clock.replace(tzinfo=tz).astimezone(timezone.utc)
        if last is None or start > last:
            yield start
            last = start
        if size == "month":
            clock = (clock + timedelta(days=32)).replace(day=1)
        else:
            clock += timedelta(days=1) if size == "day" else timedelta(hours=6)


def to_micros(time: datetime) -> int:
    """Convert a time to microseconds since 1970."""
    return (time - EPOCH) // timedelta(microseconds=1)


def from_micros(micros: int) -> datetime:
    """Convert microseconds since 1970 to a time in UTC."""
    return EPOCH + timedelta(microseconds=micros)
