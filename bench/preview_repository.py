"""A git repository with this application, deployed by `python -m previews` to the simulated Hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.spaces_server import TOKEN, SpacesServer

ROOT = Path(__file__).resolve().parents[1]
OWNER = "team"
BUTTON = '"Fine-tune with this reward"'  # in ui/playground/tab.py: a change that hot reload can apply


class PreviewRepository:
    """A copy of this repository's tracked files, without tests, benchmarks and documentation.

    Attributes:
        folder: The working tree.
        stderr: Standard error of the last `previews` command.
    """

    def __init__(self, folder: Path, hub: SpacesServer, database: str) -> None:
        self.folder, self.hub, self.database, self.stderr = folder, hub, database, ""
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in filter(None, listing.stdout.split("\0")):
            if not name.startswith(("tests/", "bench/", "docs/")) and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        self.git("init", "-q", "-b", "main")
        self.commit("the application")

    def git(self, *arguments: str) -> str:
        """Run git and return its output."""
        identity = ["-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=True).stdout.strip()

    def commit(self, message: str) -> str:
        """Commit all changes and return the new commit."""
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")

    def edit(self, name: str, old: str, new: str) -> str:
        """Replace a string in a file, commit, and return the new commit."""
        file = self.folder / name
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))
        return self.commit(f"edit {name}")

    def previews(self, *arguments: str, code: int = 0) -> Any:
        """Run `python -m previews ... --json` and return its parsed output.

        Raises:
            AssertionError: If the command exits with another code than `code`, or prints the token.
        """
        env = {"PATH": os.environ["PATH"], "HOME": str(self.folder.parent), "HF_TOKEN": TOKEN}
        env |= {"HF_ENDPOINT": self.hub.address, "HF_HUB_DISABLE_XET": "1", "PREVIEW_OWNER": OWNER}
        env |= {"PYTHONPATH": str(ROOT), "DATABASE_URL": self.database}
        command = [sys.executable, "-m", "previews", *arguments, "--json"]
        run = subprocess.run(
            command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=240, check=False
        )
        self.stderr = run.stderr
        assert run.returncode == code, f"{run.returncode}: {run.stdout}\n{run.stderr}"
        assert TOKEN not in run.stdout + run.stderr
        return json.loads(run.stdout)
