"""Tests of atomic file writes."""

from __future__ import annotations

import threading
from pathlib import Path

from storage.files import write_atomically


def test_simultaneous_writers_leave_the_content_of_one(tmp_path: Path) -> None:
    """Two threads of one process write the same file: neither takes the temporary file of the other."""
    path, barrier, errors = tmp_path / "state.json", threading.Barrier(2), []
    contents = [letter * 100_000 for letter in "ab"]

    def write(content: str) -> None:
        barrier.wait()
        try:
            for _ in range(50):
                write_atomically(path, content)
                if path.read_text() not in contents:
                    errors.append("mixed content")
        except OSError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and path.read_text() in contents and list(tmp_path.iterdir()) == [path]
