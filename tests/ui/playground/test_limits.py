"""Tests of the limits of comparisons: each visitor's own, and no place is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from access.roles import LOCAL_ADMIN, Role, Visitor
from ui.playground.limits import MAX_RUNNING, MAX_RUNNING_SHARED, MAX_STARTS, ComparisonLimiter, LimitError

ANN, BOB = Visitor(Role.GUEST, "guest:ann", "", "ann"), Visitor(Role.USER, "hf:7", "bob", "bob")


def run(limiter: ComparisonLimiter, visitor: Visitor, steps: int = 3) -> Iterator[int]:
    """Run a comparison with a number of snapshots."""
    with limiter.admit(visitor):
        yield from range(steps)


def test_third_comparison_of_a_visitor_is_refused_until_one_ends() -> None:
    limiter = ComparisonLimiter()
    running = [run(limiter, ANN) for _ in range(MAX_RUNNING)]
    for comparison in running:
        next(comparison)
    with pytest.raises(LimitError, match=r"You have 2 comparisons running. Wait for one to finish or cancel it."):
        next(run(limiter, ANN))
    next(run(limiter, BOB))
    list(running[0])
    next(run(limiter, ANN))


@pytest.mark.parametrize("ending", ["finished", "closed", "failed"])
def test_no_place_is_lost(ending: str) -> None:
    limiter = ComparisonLimiter()
    for _ in range(2 * MAX_RUNNING):
        comparison = run(limiter, ANN)
        next(comparison)
        if ending == "finished":
            list(comparison)
        elif ending == "closed":
            comparison.close()  # type: ignore[attr-defined]
        else:
            with pytest.raises(ValueError, match="model"):
                comparison.throw(ValueError("model"))  # type: ignore[attr-defined]


def test_generator_that_is_dropped_gives_its_place_back() -> None:
    limiter = ComparisonLimiter()
    for _ in range(2 * MAX_RUNNING):
        next(run(limiter, ANN))


def test_starts_per_minute_are_limited() -> None:
    now = [1000.0]
    limiter = ComparisonLimiter(clock=lambda: now[0])
    for _ in range(MAX_STARTS):
        list(run(limiter, ANN))
    now[0] += 20
    with pytest.raises(LimitError, match=r"30 comparisons in the last minute. Try again in 40 s."):
        list(run(limiter, ANN))
    list(run(limiter, BOB))
    now[0] += 40
    list(run(limiter, ANN))


def test_clients_without_a_session_share_one_limit_and_keys_have_their_own() -> None:
    limiter = ComparisonLimiter()
    with ExitStack() as stack:
        for _ in range(MAX_RUNNING_SHARED):
            stack.enter_context(limiter.admit(Visitor()))
        with pytest.raises(LimitError, match="clients without a session"):
            stack.enter_context(limiter.admit(Visitor()))
        stack.enter_context(limiter.admit(Visitor(Role.USER, "key:1234")))


def test_administrators_have_no_limit() -> None:
    limiter = ComparisonLimiter()
    with ExitStack() as stack:
        for _ in range(MAX_STARTS + 1):
            stack.enter_context(limiter.admit(LOCAL_ADMIN))


def test_visitors_of_the_past_are_forgotten() -> None:
    now = [0.0]
    limiter = ComparisonLimiter(clock=lambda: now[0])
    for number in range(100):
        list(run(limiter, Visitor(hash=str(number))))
    now[0] += 61
    list(run(limiter, ANN))
    assert list(limiter._calls) == ["ann"]
