"""Detection of the running deployment: branch and commit from the settings, else from git."""

from __future__ import annotations

import subprocess
from pathlib import Path

from usage.events import Deployment


def resolve_deployment(branch: str | None, commit: str | None, space: str | None, root: Path) -> Deployment:
    """Return the deployment.

    Args:
        branch: Branch from the settings; by default that of the git checkout.
        commit: Commit from the settings.
        space: Hugging Face Space as owner/name.
        root: Folder of the repository.
    """
    if branch:
        return Deployment(branch, commit or "", space or "")
    checkout = git_checkout(root)
    return Deployment(checkout.branch, commit or checkout.commit, space or "")


def git_checkout(root: Path) -> Deployment:
    """Return the checked-out branch and commit; branch "local" without a repository, "detached" without a branch."""
    branch = _git(root, "symbolic-ref", "--short", "HEAD")
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    if branch is None and commit is None:
        return Deployment()
    return Deployment(branch or "detached", commit or "")


def _git(root: Path, *arguments: str) -> str | None:
    """Run git; return its output, or None if it fails or is not installed."""
    try:
        # With --git-dir git neither searches the folders above nor checks the owner of the repository.
        command = ["git", f"--git-dir={root / '.git'}", *arguments]
        result = subprocess.run(command, capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.decode("utf-8", "replace").strip() or None if result.returncode == 0 else None
