"""Static analysis: whether Gradio's hot reload applies a change completely.

Hot reload replaces function bodies in place and re-executes changed module-level lines; then app.py's stamp line
rebuilds the page. It also reports success where old state survives: values that other modules imported by name, class
fields, functions wrapped by decorators such as `cache`, and anything computed once at startup. `reload_blocker` finds
these changes so that they are deployed by a restart.
"""

from __future__ import annotations

import ast
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

from previews.source import APP_FILE, STAMPED

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
CONSTRUCTORS = ("__init__", "__post_init__", "__new__")
Symbol: TypeAlias = "tuple[str, str]"  # file path, and in it "function", "Class" or "Class.method"
_PARSE_LOCK = threading.Lock()


def parse(content: bytes) -> ast.Module:
    """Parse a Python file, one at a time.

    Python 3.11 counts the recursion depth of the parser across threads and fails when two parse concurrently ("AST
    constructor recursion depth mismatch").

    Raises:
        SyntaxError, ValueError: If the file cannot be parsed.
    """
    with _PARSE_LOCK:
        return ast.parse(content)


class Codebase:
    """Parsed Python files of the new commit.

    Attributes:
        modules: Modules by path.
        startup_functions: Functions that run while the application starts.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        trees = {path: _parse_or_none(content) or ast.Module([], []) for path, content in files.items()}
        self.modules = {path: ModuleInfo(path, tree, trees) for path, tree in trees.items()}
        self.startup_functions = find_startup_functions(self.modules)


def reload_blocker(before: Mapping[str, bytes], codebase: Codebase) -> str | None:
    """Return why hot reload would leave old state in place, or None if it applies the whole change.

    Args:
        before: Old contents of the changed Python files by path. New files are not included: nothing refers to them.
        codebase: The new commit's Python files.
    """
    for path, content in sorted(before.items()):
        old = _parse_or_none(content)
        new = codebase.modules[path].tree if path in codebase.modules else ast.Module([], [])
        if old is None:
            return f"{path}: the Space's version cannot be parsed"
        reason = _module_level_blocker(old, new, _names_held_elsewhere(path, codebase.modules))
        if reason is None:
            stale = sorted(name for name in _edited_functions(old, new) if (path, name) in codebase.startup_functions)
            reason = f"{stale[0]}() already ran at startup" if stale else None
        if reason:
            return f"{path}: {reason}"
    return None


def _parse_or_none(content: bytes) -> ast.Module | None:
    try:
        return parse(content)
    except (SyntaxError, ValueError):
        return None


# ── Module-level changes ────────────────────────────────────────────────────────────────────────────────────────────


def _module_level_blocker(old: ast.Module, new: ast.Module, held_elsewhere: set[str]) -> str | None:
    """Return which change outside function bodies leaves old state in place.

    Args:
        old: The old module.
        new: The new module.
        held_elsewhere: Names of the module that other modules hold; "*" means all.
    """
    old_signatures = {name: _signature(node, name) for node in old.body for name in _bound_names(node)}
    new_signatures = {name: _signature(node, name) for node in new.body for name in _bound_names(node)}
    changed = {
        name
        for name, signature in old_signatures.items()
        if name in new_signatures and new_signatures[name] != signature
    }
    for node in new.body:
        for name in sorted(set(_bound_names(node)) & changed):
            if isinstance(node, ast.ClassDef):
                return f"class {name} changes in more than its methods"
            if isinstance(node, FUNCTIONS):
                return f"{name}() has a decorator, which may keep the old function"
            if name in held_elsewhere or "*" in held_elsewhere:
                return f"other modules hold {name}"
            if _is_read_on_import(new, name):
                return f"{name} is used at module level"
    old_statements, new_statements = (
        {ast.dump(node) for node in tree.body if _has_side_effects(node)} for tree in (old, new)
    )
    return "a module-level statement changes" if old_statements != new_statements else None


def _bound_names(node: ast.stmt) -> list[str]:
    """Return the names that a module-level statement binds."""
    if isinstance(node, (ast.ClassDef, *FUNCTIONS)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
    return []


def _has_side_effects(node: ast.stmt) -> bool:
    """Return whether a statement binds no name and may have an effect."""
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return False
    return not (_bound_names(node) or _is_docstring(node) or _is_stamp(node))


def _signature(node: ast.stmt, name: str) -> str:
    """Return the part of a statement that must not change for hot reload to replace the rest in place."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        origin = f"{node.level} {node.module} " if isinstance(node, ast.ImportFrom) else ""
        aliases = [alias for alias in node.names if name in (alias.asname, alias.name, alias.name.partition(".")[0])]
        return origin + " ".join(alias.name for alias in aliases)
    if isinstance(node, FUNCTIONS):
        return "def" if not node.decorator_list else ast.dump(node)
    if isinstance(node, ast.ClassDef):
        header = [ast.dump(part) for part in (*node.bases, *node.keywords, *node.decorator_list)]
        fields = [ast.dump(part) for part in node.body if not (isinstance(part, FUNCTIONS) or _is_docstring(part))]
        decorated = [ast.dump(part) for part in node.body if isinstance(part, FUNCTIONS) and part.decorator_list]
        return "\n".join(["class", *header, *fields, *decorated])
    return "" if _is_stamp(node) else ast.dump(node)


def _is_main_block(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_stamp(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and STAMPED.match(ast.unparse(node)) is not None


def _names_held_elsewhere(path: str, modules: Mapping[str, ModuleInfo]) -> set[str]:
    """Return this module's names that other modules import, or read from it on import; "*" means all."""
    name = module_name(path)
    held: set[str] = set()
    for other in modules.values():
        aliases = set()  # names by which the other module refers to this one
        for node in other.imports:
            if isinstance(node, ast.ImportFrom) and node.module == name:
                held |= {alias.name for alias in node.names}
            else:
                prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                aliases |= {alias.asname or alias.name for alias in node.names if f"{prefix}{alias.name}" == name}
        for node in other.import_time_nodes if aliases else ():
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in aliases:
                held.add(node.attr)
    return held


def _is_read_on_import(tree: ast.Module, name: str) -> bool:
    """Return whether code that runs when the module is imported reads the name."""
    reads = (node for node in _import_time_nodes(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
    return any(node.id == name for node in reads)


# ── Functions that run at startup ───────────────────────────────────────────────────────────────────────────────────


def find_startup_functions(modules: Mapping[str, ModuleInfo]) -> set[Symbol]:
    """Find the functions that run while the application starts: those called on import, and what they call.

    Names and imports are followed, methods of objects that the code does not name are not. Calls from app.py's stamp
    line are excluded: they run again at each reload.
    """
    rerun = _functions_rerun_by_stamp(modules)
    startup: set[Symbol] = set()
    pending = [symbol for module in modules.values() for symbol in module.called_symbols(module.import_time_nodes)]
    while pending:
        path, name = symbol = pending.pop()
        function = modules[path].functions.get(name)
        if symbol not in startup and symbol not in rerun and function is not None:
            startup.add(symbol)
            pending += modules[path].called_symbols(ast.walk(function), name.rpartition(".")[0])
    return startup


def _functions_rerun_by_stamp(modules: Mapping[str, ModuleInfo]) -> set[Symbol]:
    """Find the undecorated functions of app.py that its stamp line calls, directly or indirectly."""
    app = modules.get(APP_FILE)
    if app is None:
        return set()
    rerun: set[Symbol] = set()
    pending = [symbol for node in app.tree.body if _is_stamp(node) for symbol in app.called_symbols(ast.walk(node))]
    while pending:
        path, name = symbol = pending.pop()
        function = app.functions.get(name) if path == APP_FILE and symbol not in rerun else None
        if isinstance(function, FUNCTIONS) and not function.decorator_list:
            rerun.add(symbol)
            pending += app.called_symbols(ast.walk(function))
    return rerun


class ModuleInfo:
    """One parsed module.

    Attributes:
        imports: Its import statements, at any depth outside functions.
        import_time_nodes: Nodes that execute when the module is imported.
        functions: Functions by name, methods as "Class.method".
        names: Symbols of the application that names in this module refer to.
    """

    def __init__(self, path: str, tree: ast.Module, trees: Mapping[str, ast.Module]) -> None:
        self.path, self.tree = path, tree
        self.imports = [node for node in _statements(tree.body) if isinstance(node, (ast.Import, ast.ImportFrom))]
        self.import_time_nodes = list(_import_time_nodes(tree))
        self.functions: dict[str, ast.AST] = dict(_functions(tree))
        classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        self.names: dict[str, Symbol] = {name: (path, name) for name in {*self.functions, *classes}}
        for node in self.imports:
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    submodule = _module_file(f"{node.module}.{alias.name}", trees)
                    module = _module_file(node.module, trees)
                    if submodule or module:
                        self.names[alias.asname or alias.name] = (submodule, "") if submodule else (module, alias.name)

    def called_symbols(self, nodes: Iterable[ast.AST], class_name: str = "") -> Iterator[Symbol]:
        """Yield the symbols that the calls among the nodes may execute; for classes, their constructors.

        Args:
            nodes: Syntax nodes to search, not recursively.
            class_name: The class whose method contains the nodes, to resolve `self` and `cls`.
        """
        for node in nodes:
            if not isinstance(node, ast.Call):
                continue
            callee = None
            if isinstance(node.func, ast.Name):
                callee = self.names.get(node.func.id)
            elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                owner_name = node.func.value.id
                is_own_method = owner_name in ("self", "cls") and class_name
                owner = (self.path, class_name) if is_own_method else self.names.get(owner_name)
                callee = (owner[0], f"{owner[1]}.{node.func.attr}".lstrip(".")) if owner else None
            if callee:
                yield callee
                yield from ((callee[0], f"{callee[1]}.{constructor}") for constructor in CONSTRUCTORS)


def module_name(path: str) -> str:
    """Convert a file path to its dotted module name."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _module_file(module: str, trees: Mapping[str, ast.Module]) -> str:
    """Return the file of one of the application's modules; "" for any other."""
    stem = module.replace(".", "/")
    return next((path for path in (f"{stem}.py", f"{stem}/__init__.py") if path in trees), "")


def _statements(block: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield every statement in a block, at any depth."""
    for node in block:
        yield node
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            for inner in getattr(node, name, ()):
                is_clause = isinstance(inner, (ast.ExceptHandler, ast.match_case))
                yield from _statements(inner.body if is_clause else [inner])


def _import_time_nodes(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield every node that runs on import: no function bodies, no stamp, no `__main__` block of other programs."""
    is_app = any(_is_stamp(node) for node in tree.body)
    pending: list[ast.AST] = [
        node for node in tree.body if not _is_stamp(node) and (is_app or not _is_main_block(node))
    ]
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, (*FUNCTIONS, ast.Lambda)):
            defaults = [*node.args.defaults, *(part for part in node.args.kw_defaults if part)]
            pending += [*defaults, *getattr(node, "decorator_list", [])]
        else:
            pending += ast.iter_child_nodes(node)


def _edited_functions(old: ast.Module, new: ast.Module) -> set[str]:
    """Return the functions and methods present in both modules whose code differs."""
    old_functions, new_functions = (dict(_functions(tree)) for tree in (old, new))
    return {
        name
        for name in old_functions.keys() & new_functions.keys()
        if ast.dump(old_functions[name]) != ast.dump(new_functions[name])
    }


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    for node in tree.body:
        if isinstance(node, FUNCTIONS):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{part.name}", part) for part in node.body if isinstance(part, FUNCTIONS))
