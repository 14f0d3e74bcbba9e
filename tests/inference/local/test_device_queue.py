"""Turns: one at a time, in order, with positions, and those who give up leave the line."""

import queue
import threading

import pytest

from inference.local.device_queue import Cancelled, DeviceQueue


class Person:
    """A thread that takes a turn; `seen` has the positions told, `inside` and `leave` are its two moments."""

    def __init__(self, turns: DeviceQueue, log: list[int], number: int) -> None:
        self.stop, self.leave, self.inside = threading.Event(), threading.Event(), threading.Event()
        self.seen: queue.Queue[int] = queue.Queue()
        self.outcome = None
        self.thread = threading.Thread(target=self._take, args=(turns, log, number), daemon=True)
        self.thread.start()

    def _take(self, turns: DeviceQueue, log: list[int], number: int) -> None:
        try:
            with turns.turn(self.stop.is_set, self.seen.put):
                log.append(number)
                self.inside.set()
                self.leave.wait(10)
            self.outcome = "done"
        except Cancelled:
            self.outcome = "stopped"


def test_first_come_first_served_with_positions() -> None:
    turns, log = DeviceQueue(), []
    people = []
    for number in range(4):
        people.append(Person(turns, log, number))
        assert people[-1].seen.get(timeout=5) == number
    assert len(turns) == 4
    for number, person in enumerate(people):
        assert person.inside.wait(5)
        assert log == list(range(number + 1)), "nobody else is inside"
        person.leave.set()
        person.thread.join(5)
        for place, later in enumerate(people[number + 1 :]):
            assert later.seen.get(timeout=5) == place
    assert len(turns) == 0


def test_who_gives_up_leaves_the_line_and_the_others_move_up() -> None:
    turns, log = DeviceQueue(), []
    first, second = Person(turns, log, 0), None
    assert first.inside.wait(5)
    second = Person(turns, log, 1)
    assert second.seen.get(timeout=5) == 1
    third = Person(turns, log, 2)
    assert third.seen.get(timeout=5) == 2
    second.stop.set()
    second.thread.join(5)
    assert second.outcome == "stopped"
    assert third.seen.get(timeout=5) == 1
    first.leave.set()
    assert third.seen.get(timeout=5) == 0
    third.leave.set()
    third.thread.join(5)
    assert log == [0, 2] and len(turns) == 0


def test_a_failure_inside_frees_the_turn() -> None:
    turns = DeviceQueue()
    with pytest.raises(ZeroDivisionError), turns.turn(lambda: False, lambda position: None):
        1 / 0  # noqa: B018
    with turns.turn(lambda: False, lambda position: None):
        assert len(turns) == 1


def test_nobody_is_let_in_who_has_stopped_already() -> None:
    turns = DeviceQueue()
    with pytest.raises(Cancelled), turns.turn(lambda: True, lambda position: None):
        pytest.fail("must not come in")
    assert len(turns) == 0
