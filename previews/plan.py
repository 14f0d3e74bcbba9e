"""What differs between a Space and a commit, and the path by which the difference goes live."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from previews.errors import Exit, PreviewError
from previews.hot_reload import Program, module_name, obstacle, parse
from previews.source import APP_FILE, README, File, Source

# Hot reload takes one file at a time.
MOST_HOT = 8
# Python files that are not imported but read, by Alembic: hot reload would change them and show nothing.
NOT_HOT = ("storage/migrations/",)
# What no program reads, but for the README's front-matter.
INERT = ("docs/", README, "LICENSE", "pyproject.toml", ".gitignore")
BUILT_FROM = ("requirements.txt", "pre-requirements.txt", "packages.txt")


class DeployPath(Enum):
    """How a change goes live: in the running process, by a restart, or by a new image. In order of what it takes."""

    NOTHING = "nothing"
    HOT_RELOAD = "hot reload"
    RESTART = "restart"
    BUILD = "build"

    def is_less_than(self, other: DeployPath) -> bool:
        """Whether the other takes more."""
        order = list(DeployPath)
        return order.index(self) < order.index(other)


@dataclass(frozen=True)
class Remote:
    """A file in the Space. digest: the SHA-256 of one that is stored as a large file, whose oid is its pointer's."""

    oid: str
    digest: str | None = None


@dataclass(frozen=True)
class Plan:
    """What to send, what to delete, by which path, and why that one."""

    path: DeployPath
    reason: str
    send: list[File] = field(default_factory=list)
    delete: list[str] = field(default_factory=list)


def plan(
    source: Source,
    remote: dict[str, Remote],
    front_matter: str | None,
    before: Callable[[list[str]], dict[str, bytes]],
    program: Callable[[], Program],
) -> Plan:
    """The way from what a Space has to a commit. front_matter: that of the Space's README; None: not known.

    before: gives the contents that files of the Space have now; program: the commit's Python.
    Raises PreviewError for a Python file that no Python can read: the running application is left as it is.
    """
    send = [file for path, file in sorted(source.files.items()) if _differs(file, remote.get(path))]
    delete = sorted(path for path in remote if path not in source.files and path not in KEPT)
    check_syntax(send)
    same_front = read_front_matter(source.files.get(README)) == front_matter
    changed = [path for path in [*(file.path for file in send), *delete] if not (path.startswith(INERT) and same_front)]
    if not changed:
        return Plan(DeployPath.NOTHING, "the Space has these files already")
    path, reason = _path(source, remote, changed, [path for path in delete if path in changed], same_front)
    if path is DeployPath.HOT_RELOAD:
        why = obstacle(before([name for name in changed if name in remote]), program())
        if why:
            path, reason = DeployPath.RESTART, f"hot reload would not show all of it: {why}"
    if path is DeployPath.HOT_RELOAD:  # what only people read goes along with the next restart
        return Plan(path, reason, in_order([file for file in send if file.path in changed]))
    return Plan(path, reason, send, delete)


FORCED = ".deploy"  # the file that changes where a Space is started again and nothing else does
KEPT = (".gitattributes", FORCED)  # the first is the Hub's own


def _differs(file: File, there: Remote | None) -> bool:
    if there is None:
        return True
    return file.sha256 != there.digest if there.digest else file.oid != there.oid


def _path(
    source: Source, remote: dict[str, Remote], changed: list[str], delete: list[str], same_front: bool
) -> tuple[DeployPath, str]:
    if APP_FILE not in remote:
        return DeployPath.BUILD, "the Space is new"
    built = [path for path in changed if path in BUILT_FROM]
    if built:
        return DeployPath.BUILD, f"{built[0]} changed"
    if README in changed and not same_front:
        return DeployPath.BUILD, f"the front-matter of {README} changed"
    if delete:
        return DeployPath.RESTART, f"{delete[0]} is gone"
    other = [path for path in changed if not path.endswith(".py")]
    if other:
        return DeployPath.RESTART, f"{other[0]} is not Python"
    early = [path for path in changed if path.startswith(NOT_HOT)]
    if early:
        return DeployPath.RESTART, f"{early[0]} matters only at the start"
    if len(changed) > MOST_HOT:
        return DeployPath.RESTART, f"{len(changed)} files changed, and hot reload takes one at a time"
    words = ", ".join(path for path in changed if path != APP_FILE) or "the stamp alone"
    return DeployPath.HOT_RELOAD, f"only Python changed: {words}"


def read_front_matter(readme: File | None) -> str | None:
    """What stands between the two lines of --- at the head of README.md; None without."""
    text = readme.content.decode("utf-8", "replace") if readme else ""
    parts = text.split("---\n", 2)
    return parts[1] if len(parts) == 3 and not parts[0] else None


def check_syntax(files: list[File]) -> None:
    """Raises PreviewError, with place and line, for the first Python file that cannot be read."""
    for file in files:
        if file.path.endswith(".py"):
            try:
                parse(file.content)
            except (SyntaxError, ValueError) as error:
                line = getattr(error, "lineno", None)
                where = f"{file.path}, line {line}" if line else file.path
                message = f"{where}: {error.args[0]}. Nothing was sent; what ran before goes on running."
                raise PreviewError(message, Exit.APP) from None


def in_order(files: list[File]) -> list[File]:
    """Files so that each comes after those it imports, and app.py, which has the stamp, last."""
    modules = {module_name(file.path): file for file in files}
    ordered: list[File] = []
    visiting: set[str] = set()

    def visit(file: File) -> None:
        if file.path in visiting:
            return
        visiting.add(file.path)
        for name in sorted(_imports(file)):
            if name in modules:
                visit(modules[name])
        ordered.append(file)

    for file in sorted(files, key=lambda file: file.path):
        visit(file)
    return sorted(ordered, key=lambda file: file.path == APP_FILE)


def _imports(file: File) -> set[str]:
    """The dotted names a file imports, and for `from a import b` both a and a.b."""
    found: set[str] = set()
    for node in ast.walk(parse(file.content)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found
