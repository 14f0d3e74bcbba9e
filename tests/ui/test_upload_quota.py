"""Tests of the upload quota: per visitor and hour, in total, oldest files first."""

import os
from pathlib import Path

import httpx
import pytest

from tests.support.app_server import app_server
from ui import upload_quota
from ui.upload_quota import RECENT_SECONDS, WINDOW_SECONDS, UploadQuota

NOW = 1_000_000.0


class Clock:
    """A clock that stands still."""

    now = NOW

    def __call__(self) -> float:
        return self.now


def write(path: Path, size: int, age: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (NOW - age, NOW - age))
    return path


def test_visitor_may_upload_again_after_an_hour(tmp_path: Path) -> None:
    clock = Clock()
    quota = UploadQuota(tmp_path, visitor_bytes=100, total_bytes=10_000, clock=clock)
    assert quota.admit("anna", 60) is None
    assert "Try again later" in (quota.admit("anna", 60) or "")
    assert quota.admit("ben", 60) is None  # a quota of their own
    assert quota.admit("anna", 40) is None  # a refused upload does not count
    clock.now += WINDOW_SECONDS + 1
    assert quota.admit("anna", 100) is None


def test_oldest_files_make_room(tmp_path: Path) -> None:
    old = write(tmp_path / "a" / "old.jpg", 50, age=3000)
    newer = write(tmp_path / "b" / "newer.jpg", 50, age=1000)
    quota = UploadQuota(tmp_path, visitor_bytes=1000, total_bytes=120, clock=Clock())
    assert quota.admit("anna", 60) is None
    assert not old.exists() and newer.exists()


def test_files_in_use_are_kept_and_the_upload_is_refused(tmp_path: Path) -> None:
    recent = write(tmp_path / "recent.jpg", 100, age=RECENT_SECONDS / 2)
    quota = UploadQuota(tmp_path, visitor_bytes=1000, total_bytes=120, clock=Clock())
    assert "space for uploads is full" in (quota.admit("anna", 60) or "")
    assert recent.exists()


def test_server_refuses_an_upload_beyond_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_quota, "VISITOR_BYTES", 3000)
    with app_server(tmp_path) as url:
        files = {"files": ("a.txt", b"x" * 2000)}
        assert httpx.post(f"{url}/gradio_api/upload", files=files).status_code == 200
        refused = httpx.post(f"{url}/gradio_api/upload", files=files)
    assert refused.status_code == 429 and "within an hour" in refused.json()["detail"]
