"""What a commit holds: the files a Space gets, read from git, and the stamp that tells which commit runs."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from previews.errors import Exit, PreviewError

APP_FILE, README = "app.py", "README.md"
# The line of app.py that builds the page. Hot reload shows a new page only if this line changes: so the commit stands
# in it, and the running page can be asked which one it is.
STAMP = re.compile(r'^(demo = stamped\(__name__, ")[^"\n]*("\))', re.MULTILINE)
STAMPED = re.compile(r"demo = stamped\(__name__, ")
# What a Space has no use for.
LEFT_OUT = ("tests/", "bench/", "previews/", ".github/", ".ci/", "requirements-", "Makefile")
REQUIREMENTS, SLIM = "requirements.txt", "requirements-slim.txt"


@dataclass(frozen=True)
class File:
    """A file as it shall be in the Space. oid: git's name for its content."""

    path: str
    oid: str
    content: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True)
class Source:
    """The files of a commit, by path, app.py stamped with it."""

    sha: str
    files: dict[str, File]

    @property
    def python(self) -> dict[str, bytes]:
        """The contents of its Python files, by path."""
        return {path: file.content for path, file in self.files.items() if path.endswith(".py")}


def read(folder: Path, sha: str, slim: bool = False) -> Source:
    """A commit's files. slim: with its slim requirements in the place of the full ones.

    Raises PreviewError if git has no such commit, if it lacks a file, or if app.py has no place for the stamp.
    """
    sha = resolve(folder, sha)
    entries = _git(folder, "ls-tree", "-r", "-z", sha).decode("utf-8", "surrogateescape").split("\0")
    wanted: dict[str, str] = {}
    for entry in filter(None, entries):
        about, path = entry.split("\t", 1)
        mode, kind, oid = about.split()
        if kind == "blob" and mode != "120000":  # a Space has no use for links
            wanted[path] = oid
    if slim and SLIM not in wanted:
        raise PreviewError(f"Commit {sha[:12]} has no {SLIM}: deploy it without --slim.", Exit.USAGE)
    if slim:
        wanted[REQUIREMENTS] = wanted[SLIM]
    wanted = {path: oid for path, oid in wanted.items() if not path.startswith(LEFT_OUT)}
    if APP_FILE not in wanted:
        raise PreviewError(f"Commit {sha[:12]} has no {APP_FILE}, so there is nothing to serve.", Exit.USAGE)
    if README not in wanted:
        raise PreviewError(f"A Space needs a {README} with its front-matter; {sha[:12]} has none.", Exit.USAGE)
    contents = blobs(folder, list(wanted.values()))
    files = {path: File(path, oid, contents[oid]) for path, oid in wanted.items()}
    files[APP_FILE] = stamped(files[APP_FILE], sha)
    return Source(sha, files)


def resolve(folder: Path, name: str) -> str:
    """The full name of a commit. Raises PreviewError for one that is not here."""
    if not name or name.startswith("-"):
        raise PreviewError("A commit is needed: give --sha, or run this inside the repository.", Exit.USAGE)
    try:
        return (
            _git(folder, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}").decode().strip()
        )
    except PreviewError:
        message = f"git knows no commit {name[:60]!r} here. Fetch it (in a workflow: fetch-depth: 0)."
        raise PreviewError(message, Exit.USAGE) from None


def branches(folder: Path, fetched: bool = False) -> set[str]:
    """The branches that the remote `origin` has, or without a remote the local ones. fetched: as of the last fetch."""
    if fetched:
        listed = _git(folder, "for-each-ref", "--format=%(refname)", "refs/remotes/origin")
        names = listed.decode("utf-8", "surrogateescape").splitlines()
        return {name.removeprefix("refs/remotes/origin/") for name in names} - {"HEAD"}
    if _git(folder, "remote").split():
        listed = _git(folder, "ls-remote", "--heads", "origin").decode("utf-8", "surrogateescape").splitlines()
        return {line.split("\t", 1)[1].removeprefix("refs/heads/") for line in listed}
    listed = _git(folder, "for-each-ref", "--format=%(refname)", "refs/heads").decode("utf-8", "surrogateescape")
    return {line.removeprefix("refs/heads/") for line in listed.splitlines()}


def fetched_at(folder: Path) -> datetime:
    """When git has last fetched, or where it does not tell, ten minutes ago; less a minute, for clocks that differ."""
    marked = folder / os.fsdecode(_git(folder, "rev-parse", "--git-path", "FETCH_HEAD").rstrip(b"\n"))
    now = datetime.now(timezone.utc)
    known = (
        datetime.fromtimestamp(marked.stat().st_mtime, timezone.utc) if marked.exists() else now - timedelta(minutes=10)
    )
    return known - timedelta(minutes=1)


def is_ancestor(folder: Path, older: str, newer: str) -> bool:
    """Whether one commit is among the ancestors of another; False where git does not know both."""
    command = ["git", "-C", str(folder), "merge-base", "--is-ancestor", older, newer]
    return subprocess.run(command, capture_output=True).returncode == 0


def stamped(app: File, sha: str) -> File:
    """app.py with the commit in its stamp."""
    text, found = STAMP.subn(rf"\g<1>{sha}\g<2>", app.content.decode("utf-8"))
    if found != 1:
        line = 'demo = stamped(__name__, "")'
        message = f"{APP_FILE} needs the line {line} once, at the left margin; it has it {found} times."

        raise PreviewError(message, Exit.USAGE)
    content = text.encode()
    return File(app.path, blob_oid(content), content)


def blob_oid(content: bytes) -> str:
    """Git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def blobs(folder: Path, oids: list[str]) -> dict[str, bytes]:
    """The contents of blobs, by their names, in one call of git; what it does not have is left out."""
    told = _git(folder, "cat-file", "--batch", given="".join(f"{oid}\n" for oid in oids).encode()) if oids else b""
    found, place = {}, 0
    for oid in oids:
        end = told.index(b"\n", place)
        about = told[place:end].split()
        size = int(about[2]) if len(about) == 3 else -1
        if size >= 0:
            found[oid] = told[end + 1 : end + 1 + size]
        place = end + 2 + size
    return found


def _git(folder: Path, *arguments: str, given: bytes | None = None) -> bytes:
    try:
        run = subprocess.run(["git", "-C", str(folder), *arguments], input=given, capture_output=True)
    except FileNotFoundError:
        raise PreviewError("git is needed, and not installed here.", Exit.USAGE) from None
    if run.returncode:
        said = run.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["it said nothing"]
        raise PreviewError(f"git {arguments[0]} failed: {said[0]}", Exit.USAGE)
    return run.stdout
