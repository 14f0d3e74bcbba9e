"""Files of a commit, read from git, and the commit stamp in app.py."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from previews.errors import ExitCode, PreviewError

APP_FILE, README = "app.py", "README.md"
# The line of app.py that builds the page. Hot reload rebuilds the page only if this line changes, so it contains the
# commit, which also lets the running page report its commit.
STAMP = re.compile(r'^(demo = space_page\(__name__, ")[^"\n]*("\))', re.MULTILINE)
STAMPED = re.compile(r"demo = space_page\(__name__, ")
# Not sent to Spaces.
EXCLUDED = ("tests/", "bench/", "previews/", ".github/", ".ci/", "requirements-", "Makefile")
REQUIREMENTS, SLIM_REQUIREMENTS = "requirements.txt", "requirements-slim.txt"


@dataclass(frozen=True)
class File:
    """A file to deploy.

    Attributes:
        oid: Git blob hash of the content.
    """

    path: str
    oid: str
    content: bytes

    @property
    def sha256(self) -> str:
        """SHA-256 of the content, as Git LFS identifies it."""
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True)
class Source:
    """Deployable files of a commit by path, with app.py stamped."""

    sha: str
    files: dict[str, File]

    @property
    def python(self) -> dict[str, bytes]:
        """Contents of the Python files by path."""
        return {path: file.content for path, file in self.files.items() if path.endswith(".py")}


def read_commit(folder: Path, commit: str, slim: bool = False) -> Source:
    """Read the deployable files of a commit.

    Args:
        folder: The git repository.
        commit: Any name of the commit that git resolves.
        slim: Use requirements-slim.txt as requirements.txt.

    Raises:
        PreviewError: If the commit or a required file is missing, or app.py has no stamp line.
    """
    sha = resolve_commit(folder, commit)
    entries = _git(folder, "ls-tree", "-r", "-z", sha).decode("utf-8", "surrogateescape").split("\0")
    oids: dict[str, str] = {}
    for entry in filter(None, entries):
        metadata, path = entry.split("\t", 1)
        mode, kind, oid = metadata.split()
        if kind == "blob" and mode != "120000":  # no symbolic links
            oids[path] = oid
    if slim and SLIM_REQUIREMENTS not in oids:
        raise PreviewError(f"Commit {sha[:12]} has no {SLIM_REQUIREMENTS}: deploy it without --slim.", ExitCode.USAGE)
    if slim:
        oids[REQUIREMENTS] = oids[SLIM_REQUIREMENTS]
    oids = {path: oid for path, oid in oids.items() if not path.startswith(EXCLUDED)}
    if APP_FILE not in oids:
        raise PreviewError(f"Commit {sha[:12]} has no {APP_FILE}, so there is nothing to serve.", ExitCode.USAGE)
    if README not in oids:
        raise PreviewError(f"Commit {sha[:12]} has no {README}; a Space needs its front matter.", ExitCode.USAGE)
    contents = read_blobs(folder, list(oids.values()))
    files = {path: File(path, oid, contents[oid]) for path, oid in oids.items()}
    files[APP_FILE] = stamp_app(files[APP_FILE], sha)
    return Source(sha, files)


def resolve_commit(folder: Path, name: str) -> str:
    """Return the full hash of a commit.

    Raises:
        PreviewError: If the repository does not contain it.
    """
    if not name or name.startswith("-"):
        raise PreviewError("No commit given: set --sha, or run this inside the repository.", ExitCode.USAGE)
    arguments = ("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    try:
        return _git(folder, *arguments).decode().strip()
    except PreviewError:
        message = f"Commit {name[:60]!r} is not in this repository. Fetch it (in a workflow: fetch-depth: 0)."
        raise PreviewError(message, ExitCode.USAGE) from None


def list_branches(folder: Path, fetched: bool = False) -> set[str]:
    """List the branches of the remote `origin`, or the local ones if there is no remote.

    Args:
        folder: The git repository.
        fetched: Use the remote branches of the last fetch instead of querying the remote.
    """
    if fetched:
        output = _git(folder, "for-each-ref", "--format=%(refname)", "refs/remotes/origin")
        names = output.decode("utf-8", "surrogateescape").splitlines()
        return {name.removeprefix("refs/remotes/origin/") for name in names} - {"HEAD"}
    if _git(folder, "remote").split():
        lines = _git(folder, "ls-remote", "--heads", "origin").decode("utf-8", "surrogateescape").splitlines()
        return {line.split("\t", 1)[1].removeprefix("refs/heads/") for line in lines}
    output = _git(folder, "for-each-ref", "--format=%(refname)", "refs/heads").decode("utf-8", "surrogateescape")
    return {line.removeprefix("refs/heads/") for line in output.splitlines()}


def last_fetch_time(folder: Path) -> datetime:
    """Return the time of the last `git fetch`, or ten minutes ago if unknown, less one minute for clock skew."""
    fetch_head = folder / os.fsdecode(_git(folder, "rev-parse", "--git-path", "FETCH_HEAD").rstrip(b"\n"))
    if fetch_head.exists():
        fetched = datetime.fromtimestamp(fetch_head.stat().st_mtime, timezone.utc)
    else:
        fetched = datetime.now(timezone.utc) - timedelta(minutes=10)
    return fetched - timedelta(minutes=1)


def is_ancestor(folder: Path, older: str, newer: str) -> bool:
    """Return whether one commit is an ancestor of another; False if git does not have both."""
    command = ["git", "-C", str(folder), "merge-base", "--is-ancestor", older, newer]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def stamp_app(app: File, sha: str) -> File:
    """Write the commit into the stamp line of app.py.

    Raises:
        PreviewError: If app.py does not have exactly one stamp line.
    """
    text, count = STAMP.subn(rf"\g<1>{sha}\g<2>", app.content.decode("utf-8"))
    if count != 1:
        line = 'demo = space_page(__name__, "")'
        message = f"{APP_FILE} must contain the line {line} exactly once, not indented; found {count}."
        raise PreviewError(message, ExitCode.USAGE)
    content = text.encode()
    return File(app.path, blob_oid(content), content)


def blob_oid(content: bytes) -> str:
    """Compute the git blob hash of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def read_blobs(folder: Path, oids: list[str]) -> dict[str, bytes]:
    """Read blobs by hash in one git call; blobs that the repository lacks are omitted."""
    output = _git(folder, "cat-file", "--batch", stdin="".join(f"{oid}\n" for oid in oids).encode()) if oids else b""
    contents, offset = {}, 0
    for oid in oids:
        end = output.index(b"\n", offset)
        header = output[offset:end].split()
        size = int(header[2]) if len(header) == 3 else -1
        if size >= 0:
            contents[oid] = output[end + 1 : end + 1 + size]
        offset = end + 2 + size
    return contents


def _git(folder: Path, *arguments: str, stdin: bytes | None = None) -> bytes:
    try:
        run = subprocess.run(["git", "-C", str(folder), *arguments], input=stdin, capture_output=True, check=False)
    except FileNotFoundError:
        raise PreviewError("git is not installed. Install it and run the command again.", ExitCode.USAGE) from None
    if run.returncode:
        error = run.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no error message"]
        raise PreviewError(f"git {arguments[0]} failed: {error[0]}", ExitCode.USAGE)
    return run.stdout
