"""Whether hot reload can show a change. What a running Python keeps from before is found in the code.

Hot reload replaces the code of functions in place and runs changed lines of modules again; then app.py's stamp builds
the page anew. It reports success also where the old goes on: a value that another module has imported by name, a
class's fields, what a decorator such as `cache` has kept, all that was computed once while the application started.
Those changes are named here, so that they go live by a restart.
"""

from __future__ import annotations

import ast
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

from previews.source import APP_FILE, STAMPED

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_ONE_AT_A_TIME = threading.Lock()


def parse(content: bytes) -> ast.Module:
    """The syntax of a file. Raises SyntaxError or ValueError.

    Python 3.11 counts the depth of what it parses for all threads together, and fails where two parse at once
    ("AST constructor recursion depth mismatch"): so here one at a time does.
    """
    with _ONE_AT_A_TIME:
        return ast.parse(content)


class Program:
    """The Python files of an application as they shall be, by path, read and understood."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        trees = {path: _tree(content) or ast.Module([], []) for path, content in files.items()}
        self.modules = {path: _Module(path, tree, trees) for path, tree in trees.items()}
        self.once = called_once(self.modules)


def obstacle(before: Mapping[str, bytes], program: Program) -> str | None:
    """Why hot reload would leave something of the old application in place; None if it would not.

    before: the old contents of the Python files that change. New files have none, and nothing holds anything of them.
    """
    for path, content in sorted(before.items()):
        old, new = _tree(content), program.modules[path].tree if path in program.modules else ast.Module([], [])
        if old is None:
            return f"{path}: the Space's version of it cannot be read"
        why = _module_changes(old, new, _held_by_others(path, program.modules))
        if why is None:
            stale = sorted(name for name in _edited_functions(old, new) if (path, name) in program.once)
            why = f"{stale[0]}() has done its work when the application has started" if stale else None
        if why:
            return f"{path}: {why}"
    return None


def _tree(content: bytes) -> ast.Module | None:
    try:
        return parse(content)
    except (SyntaxError, ValueError):
        return None


# ── What a module holds ─────────────────────────────────────────────────────────────────────────────────────────────


def _module_changes(old: ast.Module, new: ast.Module, imported: set[str]) -> str | None:
    """Changes outside the bodies of functions that leave something old in place. imported: names others hold."""
    held = {name: _shape(node, name) for node in old.body for name in _bound(node)}
    wanted = {name: _shape(node, name) for node in new.body for name in _bound(node)}
    changed = {name for name, shape in held.items() if name in wanted and wanted[name] != shape}
    for node in new.body:
        for name in sorted(set(_bound(node)) & changed):
            if isinstance(node, ast.ClassDef):
                return f"class {name} changes in more than its methods"
            if isinstance(node, FUNCTIONS):
                return f"{name}() has a decorator, which may keep the old one"
            if name in imported or "*" in imported:
                return f"other modules hold {name}"
            if _is_used_while_loading(new, name):
                return f"{name} is used where the module is loaded"
    loose = {ast.dump(node) for node in old.body if _is_loose(node)} ^ {
        ast.dump(node) for node in new.body if _is_loose(node)
    }
    return "a statement that runs while it is loaded changes" if loose else None


def _bound(node: ast.stmt) -> list[str]:
    """The names that a statement of a module gives a meaning to."""
    if isinstance(node, (ast.ClassDef, *FUNCTIONS)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
    return []


def _is_loose(node: ast.stmt) -> bool:
    """A statement that binds no name and may do something."""
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return False
    return not (_bound(node) or _is_text(node) or _is_stamp(node))


def _shape(node: ast.stmt, name: str) -> str:
    """What of a statement must stay as it is, so that the rest of what it makes of a name may be replaced in place."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        origin = f"{node.level} {node.module} " if isinstance(node, ast.ImportFrom) else ""
        aliases = [alias for alias in node.names if name in (alias.asname, alias.name, alias.name.partition(".")[0])]
        return origin + " ".join(alias.name for alias in aliases)
    if isinstance(node, FUNCTIONS):
        return "def" if not node.decorator_list else ast.dump(node)
    if isinstance(node, ast.ClassDef):
        fields = [ast.dump(part) for part in node.body if not (isinstance(part, FUNCTIONS) or _is_text(part))]
        decorated = [ast.dump(part) for part in node.body if isinstance(part, FUNCTIONS) and part.decorator_list]
        around = [ast.dump(part) for part in (*node.bases, *node.keywords, *node.decorator_list)]
        return "\n".join(["class", *around, *fields, *decorated])
    return "" if _is_stamp(node) else ast.dump(node)


def _is_program(node: ast.stmt) -> bool:
    """`if __name__ == "__main__":`"""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_stamp(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and STAMPED.match(ast.unparse(node)) is not None


def _held_by_others(path: str, modules: Mapping[str, _Module]) -> set[str]:
    """The names of this module that others hold: imported, or read from it while they are loaded. "*" for all."""
    name = module_name(path)
    found: set[str] = set()
    for other in modules.values():
        known = set()  # by which names it knows the module itself
        for node in other.imports:
            if isinstance(node, ast.ImportFrom) and node.module == name:
                found |= {alias.name for alias in node.names}
            else:
                before = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                known |= {alias.asname or alias.name for alias in node.names if f"{before}{alias.name}" == name}
        for node in other.loading if known else ():
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in known:
                found.add(node.attr)
    return found


def _is_used_while_loading(tree: ast.Module, name: str) -> bool:
    """Whether a line that runs while the module is loaded reads the name."""
    read = (node for node in _outside_functions(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
    return any(node.id == name for node in read)


# ── What is called once ─────────────────────────────────────────────────────────────────────────────────────────────

Place: TypeAlias = "tuple[str, str]"  # a file, and in it a function, a class, or a class and a method with a dot
MAKERS = ("__init__", "__post_init__", "__new__")


def called_once(modules: Mapping[str, _Module]) -> set[Place]:
    """The functions that run while the application starts: what modules call when they are loaded, and what that calls.

    Followed are names and what is imported, not methods of objects that the code does not name. Not followed is what
    app.py's stamp calls: it runs again at each reload.
    """
    again = _again(modules)
    found: set[Place] = set()
    todo = [place for one in modules.values() for place in one.calls(one.loading)]
    while todo:
        place = todo.pop()
        body = modules[place[0]].bodies.get(place[1])
        if place not in found and place not in again and body is not None:
            found.add(place)
            todo += modules[place[0]].calls(ast.walk(body), place[1].rpartition(".")[0])
    return found


def _again(modules: Mapping[str, _Module]) -> set[Place]:
    """What app.py's stamp calls, and what that calls in its turn within app.py, but for what a decorator may keep."""
    app = modules.get(APP_FILE)
    found: set[Place] = set()
    todo = [place for node in app.tree.body if _is_stamp(node) for place in app.calls(ast.walk(node))] if app else []
    while app and todo:
        place = todo.pop()
        body = app.bodies.get(place[1]) if place[0] == APP_FILE and place not in found else None
        if isinstance(body, FUNCTIONS) and not body.decorator_list:
            found.add(place)
            todo += app.calls(ast.walk(body))
    return found


class _Module:
    """One module: its imports, what runs while it is loaded, its functions and methods, and what names in it mean."""

    def __init__(self, path: str, tree: ast.Module, trees: Mapping[str, ast.Module]) -> None:
        self.path, self.tree = path, tree
        self.imports = [node for node in _statements(tree.body) if isinstance(node, (ast.Import, ast.ImportFrom))]
        self.loading = list(_outside_functions(tree))
        self.bodies: dict[str, ast.AST] = dict(_functions(tree))
        self.classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        self.names: dict[str, Place] = {name: (path, name) for name in {*self.bodies, *self.classes}}
        for node in self.imports:
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    whole = _file(f"{node.module}.{alias.name}", trees)
                    part = _file(node.module, trees)
                    if whole or part:
                        self.names[alias.asname or alias.name] = (whole, "") if whole else (part, alias.name)

    def calls(self, nodes: Iterable[ast.AST], around: str = "") -> Iterator[Place]:
        """What the calls among these nodes lead to. around: the class whose method they stand in."""
        for node in nodes:
            if isinstance(node, ast.Call):
                name, owner = "", None
                if isinstance(node.func, ast.Name):
                    name, owner = node.func.id, self.names.get(node.func.id)
                elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                    of, name = node.func.value.id, node.func.attr
                    inside = (self.path, around) if of in ("self", "cls") and around else self.names.get(of)
                    owner = (inside[0], f"{inside[1]}.{name}".lstrip(".")) if inside else None
                if owner:
                    yield owner
                    yield from ((owner[0], f"{owner[1]}.{maker}") for maker in MAKERS)


def module_name(path: str) -> str:
    """What a file is imported as."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _file(module: str, trees: Mapping[str, ast.Module]) -> str:
    """The file of a module of the application; "" for others."""
    stem = module.replace(".", "/")
    return next((path for path in (f"{stem}.py", f"{stem}/__init__.py") if path in trees), "")


def _statements(block: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Every statement in a block, at any depth."""
    for node in block:
        yield node
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            for inner in getattr(node, name, ()):
                yield from _statements(
                    inner.body if isinstance(inner, (ast.ExceptHandler, ast.match_case)) else [inner]
                )


def _outside_functions(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node that runs while a module is loaded: no bodies of functions, not the stamp, no other programs."""
    stamped = any(_is_stamp(node) for node in tree.body)
    todo: list[ast.AST] = [node for node in tree.body if not _is_stamp(node) and (stamped or not _is_program(node))]
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, (*FUNCTIONS, ast.Lambda)):
            defaults = [*node.args.defaults, *(part for part in node.args.kw_defaults if part)]
            todo += [*defaults, *getattr(node, "decorator_list", [])]
        else:
            todo += ast.iter_child_nodes(node)


def _edited_functions(old: ast.Module, new: ast.Module) -> set[str]:
    """The functions, and methods as Class.method, whose code differs; what is new or gone is not among them."""
    held, wanted = (dict(_functions(tree)) for tree in (old, new))
    return {name for name in held if name in wanted and ast.dump(held[name]) != ast.dump(wanted[name])}


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    for node in tree.body:
        if isinstance(node, FUNCTIONS):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{part.name}", part) for part in node.body if isinstance(part, FUNCTIONS))
