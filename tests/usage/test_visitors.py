"""Tests of visitor hashes and of the file of their salt."""

import logging
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from usage.visitors import SALT_FILE, VisitorHasher

ROOT = Path(__file__).resolve().parents[2]


def test_hash_depends_on_secret_and_deployment_and_survives_a_restart(tmp_path: Path) -> None:
    hasher = VisitorHasher(tmp_path / "new" / "data")
    hashed = hasher.hash("sécret")
    assert re.fullmatch("v1-[0-9a-f]{24}", hashed) and hasher.hash("") == ""
    assert VisitorHasher(tmp_path / "new" / "data").hash("sécret") == hashed
    assert hasher.hash("secret") != hashed and VisitorHasher(tmp_path / "other").hash("sécret") != hashed


def test_salt_can_be_read_by_its_owner_only(tmp_path: Path) -> None:
    VisitorHasher(tmp_path).hash("x")
    (file,) = tmp_path.iterdir()
    assert file.name == SALT_FILE and stat.S_IMODE(file.stat().st_mode) == 0o600 and len(file.read_bytes()) == 32


def test_processes_that_start_at_once_use_the_same_salt(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from usage.visitors import VisitorHasher
print("ready", flush=True)
sys.stdin.readline()
print(VisitorHasher(Path({str(tmp_path)!r})).hash("x"))
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for _ in range(6)
    ]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    hashes = {process.communicate()[0] for process in processes}
    assert hashes == {VisitorHasher(tmp_path).hash("x") + "\n"}
    assert [file.name for file in tmp_path.iterdir()] == [SALT_FILE]


@pytest.mark.parametrize("damage", ["folder", "truncated"])
def test_unusable_salt_is_replaced_in_memory_with_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / SALT_FILE
    if damage == "folder":
        file.mkdir()
    else:
        file.write_bytes(b"short")
    hasher = VisitorHasher(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert hasher.hash("x") == hasher.hash("x") != VisitorHasher(tmp_path).hash("x")
    assert SALT_FILE in caplog.text
