"""Difference between a Space and a commit, and the deploy path that applies it."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from previews.errors import ExitCode, PreviewError
from previews.hot_reload import Codebase, module_name, parse, reload_blocker
from previews.source import APP_FILE, README, File, Source

MAX_HOT_RELOAD_FILES = 8  # hot reload takes one file at a time
RUN_AT_STARTUP = ("storage/migrations/",)  # Python files that Alembic executes without importing them
# Never read by the application, except for the README's front matter.
DOCUMENTATION = ("docs/", README, "LICENSE", "pyproject.toml", ".gitignore")
BUILD_INPUTS = ("requirements.txt", "pre-requirements.txt", "packages.txt")
RESTART_FILE = ".deploy"  # changed to force a restart when no other file changes
PRESERVED_FILES = (".gitattributes", RESTART_FILE)  # the Hub creates .gitattributes


class DeployPath(Enum):
    """How a change goes live, ordered by cost: in the running process, by a restart, or by a new image."""

    NOTHING = "nothing"
    HOT_RELOAD = "hot reload"
    RESTART = "restart"
    BUILD = "build"

    def is_cheaper_than(self, other: DeployPath) -> bool:
        """Return whether this path does less than the other."""
        order = list(DeployPath)
        return order.index(self) < order.index(other)


@dataclass(frozen=True)
class RemoteFile:
    """A file in a Space.

    Attributes:
        oid: Git blob hash; for a large file, that of its LFS pointer.
        sha256: Content hash of a large file, otherwise None.
    """

    oid: str
    sha256: str | None = None


@dataclass(frozen=True)
class Plan:
    """Files to upload and delete, the deploy path, and the reason for choosing it."""

    path: DeployPath
    reason: str
    upload: list[File] = field(default_factory=list)
    delete: list[str] = field(default_factory=list)


def make_plan(
    source: Source,
    remote: dict[str, RemoteFile],
    front_matter: str | None,
    read_remote: Callable[[list[str]], dict[str, bytes]],
    codebase: Callable[[], Codebase],
) -> Plan:
    """Plan the deploy of a commit to a Space.

    Args:
        source: The commit's files.
        remote: The Space's files by path.
        front_matter: Front matter of the Space's README, or None if unknown.
        read_remote: Returns the Space's contents of the given paths.
        codebase: Returns the commit's parsed Python files.

    Raises:
        PreviewError: If a changed Python file has a syntax error; the running application stays unchanged.
    """
    upload = [file for path, file in sorted(source.files.items()) if _differs(file, remote.get(path))]
    delete = sorted(path for path in remote if path not in source.files and path not in PRESERVED_FILES)
    check_syntax(upload)
    same_front_matter = read_front_matter(source.files.get(README)) == front_matter
    changed = [
        path
        for path in [*(file.path for file in upload), *delete]
        if not (path.startswith(DOCUMENTATION) and same_front_matter)
    ]
    if not changed:
        return Plan(DeployPath.NOTHING, "the Space already has these files")
    path, reason = _choose_path(remote, changed, [path for path in delete if path in changed], same_front_matter)
    if path is DeployPath.HOT_RELOAD:
        blocker = reload_blocker(read_remote([name for name in changed if name in remote]), codebase())
        if blocker is None:  # documentation is uploaded with the next restart
            return Plan(path, reason, sort_by_imports([file for file in upload if file.path in changed]))
        path, reason = DeployPath.RESTART, f"hot reload would not apply the whole change: {blocker}"
    return Plan(path, reason, upload, delete)


def _differs(file: File, remote: RemoteFile | None) -> bool:
    if remote is None:
        return True
    return file.sha256 != remote.sha256 if remote.sha256 else file.oid != remote.oid


def _choose_path(
    remote: dict[str, RemoteFile], changed: list[str], delete: list[str], same_front_matter: bool
) -> tuple[DeployPath, str]:
    if APP_FILE not in remote:
        return DeployPath.BUILD, "the Space is new"
    build_inputs = [path for path in changed if path in BUILD_INPUTS]
    if build_inputs:
        return DeployPath.BUILD, f"{build_inputs[0]} changed"
    if README in changed and not same_front_matter:
        return DeployPath.BUILD, f"the front matter of {README} changed"
    if delete:
        return DeployPath.RESTART, f"{delete[0]} was deleted"
    other = [path for path in changed if not path.endswith(".py")]
    if other:
        return DeployPath.RESTART, f"{other[0]} is not Python"
    startup = [path for path in changed if path.startswith(RUN_AT_STARTUP)]
    if startup:
        return DeployPath.RESTART, f"{startup[0]} only runs at startup"
    if len(changed) > MAX_HOT_RELOAD_FILES:
        return DeployPath.RESTART, f"{len(changed)} files changed, and hot reload takes one at a time"
    names = ", ".join(path for path in changed if path != APP_FILE) or "only the stamp"
    return DeployPath.HOT_RELOAD, f"only Python changed: {names}"


def read_front_matter(readme: File | None) -> str | None:
    """Return the YAML front matter of README.md without its `---` lines, or None if it has none."""
    text = readme.content.decode("utf-8", "replace") if readme else ""
    parts = text.split("---\n", 2)
    return parts[1] if len(parts) == 3 and not parts[0] else None


def check_syntax(files: list[File]) -> None:
    """Check the syntax of the Python files.

    Raises:
        PreviewError: With path and line of the first syntax error.
    """
    for file in files:
        if file.path.endswith(".py"):
            try:
                parse(file.content)
            except (SyntaxError, ValueError) as error:
                line = getattr(error, "lineno", None)
                location = f"{file.path}, line {line}" if line else file.path
                message = f"{location}: {error.args[0]}. Nothing was uploaded; the Space is unchanged."
                raise PreviewError(message, ExitCode.APP) from None


def sort_by_imports(files: list[File]) -> list[File]:
    """Sort files so that each follows the files it imports; app.py, which contains the stamp, comes last."""
    modules = {module_name(file.path): file for file in files}
    ordered: list[File] = []
    visited: set[str] = set()

    def visit(file: File) -> None:
        if file.path in visited:
            return
        visited.add(file.path)
        for name in sorted(_imported_names(file)):
            if name in modules:
                visit(modules[name])
        ordered.append(file)

    for file in sorted(files, key=lambda file: file.path):
        visit(file)
    return sorted(ordered, key=lambda file: file.path == APP_FILE)


def _imported_names(file: File) -> set[str]:
    """Return the dotted names a file imports; `from a import b` gives both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(parse(file.content)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names
