"""The device queue: order, positions and cancellation."""

import queue
import threading

import pytest

from inference.local.device_queue import Cancelled, DeviceQueue


class Worker:
    """A thread that acquires the device. `positions` receives its positions; it holds the device until `release`."""

    def __init__(self, device_queue: DeviceQueue, log: list[int], number: int) -> None:
        self.cancel, self.release, self.acquired = threading.Event(), threading.Event(), threading.Event()
        self.positions: queue.Queue[int] = queue.Queue()
        self.outcome = None
        self.thread = threading.Thread(target=self._run, args=(device_queue, log, number), daemon=True)
        self.thread.start()

    def _run(self, device_queue: DeviceQueue, log: list[int], number: int) -> None:
        try:
            with device_queue.acquire(self.cancel.is_set, self.positions.put):
                log.append(number)
                self.acquired.set()
                self.release.wait(10)
            self.outcome = "done"
        except Cancelled:
            self.outcome = "cancelled"


def test_requests_are_served_in_order_with_positions() -> None:
    device_queue, log = DeviceQueue(), []
    workers = []
    for number in range(4):
        workers.append(Worker(device_queue, log, number))
        assert workers[-1].positions.get(timeout=5) == number
    assert len(device_queue) == 4
    for number, worker in enumerate(workers):
        assert worker.acquired.wait(5)
        assert log == list(range(number + 1)), "no other worker holds the device"
        worker.release.set()
        worker.thread.join(5)
        for position, later in enumerate(workers[number + 1 :]):
            assert later.positions.get(timeout=5) == position
    assert len(device_queue) == 0


def test_cancelled_request_leaves_the_queue_and_others_move_up() -> None:
    device_queue, log = DeviceQueue(), []
    first, second = Worker(device_queue, log, 0), None
    assert first.acquired.wait(5)
    second = Worker(device_queue, log, 1)
    assert second.positions.get(timeout=5) == 1
    third = Worker(device_queue, log, 2)
    assert third.positions.get(timeout=5) == 2
    second.cancel.set()
    second.thread.join(5)
    assert second.outcome == "cancelled"
    assert third.positions.get(timeout=5) == 1
    first.release.set()
    assert third.positions.get(timeout=5) == 0
    third.release.set()
    third.thread.join(5)
    assert log == [0, 2] and len(device_queue) == 0


def test_exception_releases_the_device() -> None:
    device_queue = DeviceQueue()
    with pytest.raises(ZeroDivisionError), device_queue.acquire(lambda: False, lambda position: None):
        1 / 0  # noqa: B018
    with device_queue.acquire(lambda: False, lambda position: None):
        assert len(device_queue) == 1


def test_cancelled_request_never_acquires_the_device() -> None:
    device_queue = DeviceQueue()
    with pytest.raises(Cancelled), device_queue.acquire(lambda: True, lambda position: None):
        pytest.fail("must not acquire the device")
    assert len(device_queue) == 0
