"""The shape of the house: who may import whom, what a start may load, and what every file must have."""

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
ROOMS = ("bench", "inference", "previews", "recipes", "rewards", "serving", "storage", "training", "ui", "usage")
# Each room, and what of the house it may import beside itself. What is not named here may import nothing.
MAY_IMPORT: dict[str, set[str]] = {
    "app": {"settings", "ui", "serving", "training", "inference", "usage", "storage", "rewards", "recipes"},
    "bench": {"app", "settings", "ui", "serving", "training", "inference", "usage", "storage", "rewards", "recipes"},
    "ui": {"training", "inference", "usage", "storage", "rewards", "recipes"},
    "serving": {"training", "inference", "usage", "storage", "rewards", "recipes"},
    "training": {"inference", "usage", "storage", "rewards", "recipes"},
    "inference": {"usage", "storage", "recipes"},
    "usage": {"storage"},
    "storage": {"rewards"},
    "rewards": {"recipes"},
    "recipes": set(),
    "previews": set(),
    "settings": set(),
}
# Libraries that a room may import; rooms that are not named may import any.
MAY_USE: dict[str, set[str]] = {
    "recipes": {"numpy", "cv2", "PIL"},
    "rewards": {"numpy", "cv2"},
    "settings": set(),
    "storage": {"alembic", "sqlalchemy"},
    "usage": {"numpy", "pyarrow", "sqlalchemy"},
}
# Libraries that only some files may import, since they are heavy or hard to test.
ONLY_IN: dict[str, re.Pattern[str]] = {
    "PIL": re.compile(r"(?!recipes/(?!photo_io\.py))(?!rewards/).*"),
    "trl": re.compile(r"training/grpo/(train|__main__)\.py"),
    "gradio": re.compile(r"(app|ui/.*|serving/.*|bench/.*)\.py|ui/.*"),
    "torch": re.compile(r"(inference|training|bench)/.*"),
    "transformers": re.compile(r"(inference|training|bench)/.*"),
}
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate"}
LIGHT_MODULES = ("app", "inference.types", "inference.registry", "rewards", "settings", "storage.reward_functions")


def python_files() -> list[Path]:
    """Every Python file of the house: the root's and the rooms', without tests."""
    return sorted([*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))])


def text_files() -> Iterator[Path]:
    """Every file that git keeps and that is text."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        file = ROOT / name
        if file.suffix not in (".jpg", ".png", ".safetensors", ".npz", ".npy") and file.is_file():
            yield file


def imports(file: Path) -> set[str]:
    """The top-level names of all that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            own = file.relative_to(ROOT).parts[0]
            found.add(own if node.level else (node.module or "").partition(".")[0])
    return found


def room(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def named(files: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("file", files, ids=[str(file.relative_to(ROOT)) for file in files])


def test_the_house_is_looked_at_whole() -> None:
    assert {room(file) for file in python_files()} <= set(MAY_IMPORT)
    assert {"app", "settings", "recipes", "rewards", "inference", "usage", "ui"} <= {room(f) for f in python_files()}


@named(python_files())
def test_a_room_imports_only_what_lies_below_it(file: Path) -> None:
    own = room(file)
    assert (imports(file) & set(MAY_IMPORT)) - {own} <= MAY_IMPORT[own]


@named(python_files())
def test_libraries_stay_where_they_belong(file: Path) -> None:
    used = imports(file) - set(MAY_IMPORT) - sys.stdlib_module_names
    assert used <= MAY_USE.get(room(file), used)
    name = file.relative_to(ROOT).as_posix()
    assert [library for library in used & set(ONLY_IN) if not ONLY_IN[library].fullmatch(name)] == []


def relative_imports(file: Path) -> list[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level > 1]


@named(python_files())
def test_no_import_climbs_out_of_its_room(file: Path) -> None:
    assert relative_imports(file) == []


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_importing_loads_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert HEAVY & set(run.stdout.split()) == set()


def test_every_module_imports_with_an_empty_environment_and_no_network() -> None:
    modules = [file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for file in python_files()]
    program = f"""
import importlib, socket
def refuse(*_): raise AssertionError("an import asked for the network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
for name in {[name.removesuffix(".__init__") for name in modules if not name.endswith("__main__")]}:
    importlib.import_module(name)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={"PATH": os.defpath}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_nothing_in_the_root_hides_a_library() -> None:
    """With `python app.py` the root comes first in the search, so a folder `queue` would replace the library."""
    ours = {path.name.removesuffix(".py") for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"}
    libraries = set(importlib.metadata.packages_distributions()) - {"tests"}  # some install theirs by mistake
    assert ours & (sys.stdlib_module_names | libraries | {"datasets", "evaluate", "spaces", "trl"}) == set()


@named([*python_files(), *sorted((ROOT / "tests").rglob("*.py"))])
def test_every_file_begins_by_saying_what_lives_there(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert ast.get_docstring(tree), "the first line of a file says what lives there"
    assert tree.body[0].lineno <= (2 if source.startswith("#!") else 1)


def test_there_is_no_place_for_what_has_no_name() -> None:
    assert [file.name for file in python_files() if file.stem in ("utils", "util", "helpers", "common", "misc")] == []


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    pattern = re.compile(r"(?<![\w./-])/(?:root|work)/[\w.-]+")
    found = {
        f"{file.relative_to(ROOT)}: {match[0]}"
        for file in text_files()
        for match in pattern.finditer(file.read_text(encoding="utf-8", errors="replace"))
    }
    assert found == set()
