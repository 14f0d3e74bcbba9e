"""Where this process runs: the branch and commit that the deployer states, else git's, else "local"."""

from __future__ import annotations

from pathlib import Path

from usage.events import Deployment


def deployment(branch: str | None, commit: str | None, space: str | None, root: Path) -> Deployment:
    """What is stated goes first; what is missing is read from git's files in `root`, without running git."""
    if branch:
        return Deployment(branch, commit or "", space or "")
    found = from_git(root)
    return Deployment(found.branch, commit or found.commit, space or "")


def from_git(root: Path) -> Deployment:
    """The branch and commit that are checked out; branch "local" without git, "detached" without a branch."""
    try:
        folder = _git_folder(root / ".git")
        head = (folder / "HEAD").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return Deployment()
    if not head.startswith("ref: "):
        return Deployment("detached", head[:40])
    name = head.removeprefix("ref: ")
    return Deployment(name.removeprefix("refs/heads/"), _commit(folder, name))


def _git_folder(path: Path) -> Path:
    """In a worktree .git is a file that names the folder."""
    if path.is_file():
        return (path.parent / path.read_text(encoding="utf-8").removeprefix("gitdir:").strip()).resolve()
    return path


def _commit(folder: Path, name: str) -> str:
    """The commit of a branch, from its own file or from the packed ones; "" before the first commit."""
    common = folder / "commondir"
    try:
        places = [folder, (folder / common.read_text().strip()).resolve()] if common.is_file() else [folder]
        for place in places:
            if (place / name).is_file():
                return (place / name).read_text().strip()[:40]
            if (place / "packed-refs").is_file():
                for line in (place / "packed-refs").read_text().splitlines():
                    if line.endswith(f" {name}"):
                        return line[:40]
    except (OSError, UnicodeDecodeError):
        pass
    return ""
