"""Rules of the code's structure: import directions, light imports, file names and docstrings. One test per rule."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "access",
    "bench",
    "docs",
    "inference",
    "previews",
    "recipes",
    "rewards",
    "serving",
    "storage",
    "training",
    "ui",
    "usage",
)
# Package -> the other packages of this project that it may import. A package that is not listed may import none.
ALLOWED_IMPORTS: dict[str, set[str]] = {
    "app": {"access", "settings", "ui", "serving", "training", "inference", "usage", "storage", "rewards", "recipes"},
    "bench": {
        "access",
        "app",
        "settings",
        "ui",
        "serving",
        "training",
        "inference",
        "usage",
        "storage",
        "rewards",
        "recipes",
    },
    "access": set(),
    "docs": set(),
    "ui": {"access", "training", "inference", "usage", "storage", "rewards", "recipes"},
    "serving": {"access", "training", "inference", "usage", "storage", "rewards", "recipes"},
    "training": {"inference", "usage", "storage", "rewards", "recipes"},
    "inference": {"usage", "storage", "recipes"},
    "usage": {"storage"},
    "storage": {"rewards"},
    "rewards": {"recipes"},
    "recipes": set(),
    "previews": set(),
    "settings": set(),
}
# Package -> the third-party libraries that it may import; packages that are not listed may import any.
ALLOWED_LIBRARIES: dict[str, set[str]] = {
    "access": {"anyio", "orjson", "starlette"},
    "recipes": {"numpy", "cv2", "PIL"},
    "rewards": {"numpy", "cv2"},
    "settings": set(),
    "storage": {"alembic", "huggingface_hub", "sqlalchemy"},
    "usage": {"duckdb", "filelock", "httpx", "numpy", "opentelemetry", "prometheus_client", "pyarrow", "pydantic"}
    | {"sqlalchemy"},
}
# Library -> the files that may import it, for libraries that are heavy or tie the code to a framework.
LIBRARY_LOCATIONS: dict[str, re.Pattern[str]] = {
    "PIL": re.compile(r"(?!recipes/(?!photo_io\.py))(?!rewards/).*"),
    "trl": re.compile(r"training/(grpo|dpo)/\w+\.py"),
    "gradio": re.compile(r"(app|ui/.*|serving/.*|bench/.*)\.py"),
    "torch": re.compile(r"(inference|training|bench)/.*"),
    "transformers": re.compile(r"(inference|training|bench)/.*"),
}
HEAVY_LIBRARIES = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "scipy"}
LIGHT_MODULES = ("app", "inference.types", "inference.registry", "rewards", "settings", "storage.reward_functions")
VAGUE_NAMES = ("utils", "util", "helpers", "common", "misc")


def source_files() -> list[Path]:
    """Return every Python file outside of tests."""
    return sorted([*ROOT.glob("*.py"), *(file for name in PACKAGES for file in (ROOT / name).rglob("*.py"))])


def text_files() -> Iterator[Path]:
    """Yield every text file that git tracks."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listing.split("\0")):
        file = ROOT / name
        if file.suffix not in (".jpg", ".png", ".safetensors", ".npz", ".npy") and file.is_file():
            yield file


def name_of(file: Path) -> str:
    """Return a file's path relative to the root, as ids and messages show it."""
    return file.relative_to(ROOT).as_posix()


def package_of(file: Path) -> str:
    """Return the top-level package, or the top-level module, of a file."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def module_of(file: Path) -> str:
    """Return a file's dotted module name."""
    return name_of(file).removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def parsed(file: Path) -> ast.Module:
    """Parse a file."""
    return ast.parse(file.read_text(encoding="utf-8"))


def imported_names(file: Path) -> set[str]:
    """Return the top-level names of all imports of a file, at any depth."""
    names: set[str] = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(package_of(file) if node.level else (node.module or "").partition(".")[0])
    return names


def imported_modules(file: Path, modules: set[str]) -> set[str]:
    """Return the modules of this project that a file imports when it is imported itself.

    Imports inside functions and under `if TYPE_CHECKING:` do not run at that time and are left out.
    """
    statements = [node for node in parsed(file).body if isinstance(node, ast.Import | ast.ImportFrom)]
    found: set[str] = set()
    for node in statements:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        package = module_of(file) if file.name == "__init__.py" else module_of(file).rpartition(".")[0]
        base = f"{package}.{node.module or ''}".rstrip(".") if node.level else node.module or ""
        names = {f"{base}.{alias.name}" for alias in node.names}
        found |= {name if name in modules else base for name in names}
    return found & modules


def test_every_package_is_checked() -> None:
    packages = {package_of(file) for file in source_files()}
    assert packages <= set(ALLOWED_IMPORTS)
    assert {"app", "settings", "recipes", "rewards", "inference", "storage", "usage", "ui"} <= packages


def test_packages_import_only_lower_packages() -> None:
    violations = {}
    for file in source_files():
        package = package_of(file)
        upward = (imported_names(file) & set(ALLOWED_IMPORTS)) - {package} - ALLOWED_IMPORTS[package]
        if upward:
            violations[name_of(file)] = upward
    assert violations == {}


def test_documented_import_directions_are_the_checked_ones() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"```imports\n(.*?)```", text, re.DOTALL)
    assert block
    documented = {}
    for line in block[1].splitlines():
        package, _, imports = line.partition("→")
        documented[package.strip()] = set(imports.strip().split(", "))
    checked = {package: imports for package, imports in ALLOWED_IMPORTS.items() if imports and package != "bench"}
    assert documented == checked


def test_modules_import_each_other_without_cycles() -> None:
    files = {module_of(file): file for file in source_files()}
    graph = {module: imported_modules(file, set(files)) - {module} for module, file in files.items()}
    while leaves := {module for module, imports in graph.items() if not imports & set(graph)}:
        graph = {module: imports for module, imports in graph.items() if module not in leaves}
    assert graph == {}


def test_libraries_are_imported_only_where_allowed() -> None:
    violations = {}
    for file in source_files():
        libraries = imported_names(file) - set(ALLOWED_IMPORTS) - sys.stdlib_module_names
        wrong = libraries - ALLOWED_LIBRARIES.get(package_of(file), libraries)
        restricted = libraries & set(LIBRARY_LOCATIONS)
        wrong |= {library for library in restricted if not LIBRARY_LOCATIONS[library].fullmatch(name_of(file))}
        if wrong:
            violations[name_of(file)] = wrong
    assert violations == {}


def test_relative_imports_stay_inside_their_package() -> None:
    violations = {
        name_of(file): ast.unparse(node)
        for file in source_files()
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.ImportFrom) and node.level > 1
    }
    assert violations == {}


def test_tests_import_shared_code_from_support_only() -> None:
    """A folder of tests imports `tests.support`, not another folder of tests; bench and the app import no tests."""
    pattern = re.compile(r"^\s*(?:from|import) tests\.(?!support\b)", re.MULTILINE)
    files = [*source_files(), *(ROOT / "tests").rglob("*.py")]
    assert [name_of(file) for file in files if pattern.search(file.read_text(encoding="utf-8"))] == []
    assert [name_of(file) for file in source_files() if "tests" in imported_names(file)] == []


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_importing_a_light_module_loads_no_heavy_library(module: str) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert HEAVY_LIBRARIES & set(result.stdout.split()) == set()


def test_every_module_imports_with_an_empty_environment_and_without_network() -> None:
    modules = [module_of(file) for file in source_files() if file.name != "__main__.py"]
    program = f"""
import importlib, socket
def refuse(*_): raise AssertionError("an import used the network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
for name in {modules}:
    importlib.import_module(name)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={"PATH": os.defpath}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_no_top_level_name_shadows_a_library() -> None:
    """Check the names that `python app.py` puts first on the import path."""
    names = {path.name.removesuffix(".py") for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"}
    libraries = set(importlib.metadata.packages_distributions()) - {"tests"}  # some packages install theirs by mistake
    assert names & (sys.stdlib_module_names | libraries | {"datasets", "evaluate", "spaces", "trl"}) == set()


def test_every_file_begins_with_a_docstring() -> None:
    files = [*source_files(), *sorted((ROOT / "tests").rglob("*.py"))]
    assert [name_of(file) for file in files if not ast.get_docstring(parsed(file))] == []
    late = [
        name_of(file)
        for file in files
        if parsed(file).body[0].lineno > (2 if file.read_text(encoding="utf-8").startswith("#!") else 1)
    ]
    assert late == []


def test_no_file_has_a_vague_name() -> None:
    assert [name_of(file) for file in source_files() if file.stem in VAGUE_NAMES] == []


def test_no_file_contains_a_path_of_a_development_machine() -> None:
    pattern = re.compile(r"(?<![\w./-])/(?:root|work)/[\w.-]+")
    matches = {
        f"{name_of(file)}: {match[0]}"
        for file in text_files()
        for match in pattern.finditer(file.read_text(encoding="utf-8", errors="replace"))
    }
    assert matches == set()
