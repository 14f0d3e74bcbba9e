"""The networks that find faces and people, in several threads."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
import pytest

from rewards.subject import find_faces

THREADS = 4


def test_threads_load_the_networks_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV's importer sometimes fails if two threads use it at once for the first time in a process."""
    read, busy, overlaps = cv2.dnn.readNetFromTFLite, threading.Lock(), []

    def slow_read(*arguments: Any, **options: Any) -> Any:
        entered = busy.acquire(blocking=False)
        overlaps.append(not entered)
        try:
            time.sleep(0.02)
            return read(*arguments, **options)
        finally:
            if entered:
                busy.release()

    monkeypatch.setattr(cv2.dnn, "readNetFromTFLite", slow_read)
    barrier, photo = threading.Barrier(THREADS), np.zeros((64, 64, 3), np.uint8)

    def find_together(_: int) -> list[Any]:
        barrier.wait()
        return find_faces(photo)

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(find_together, range(THREADS))) == [[]] * THREADS
    assert overlaps == [False] * 2 * THREADS
