"""The files around the code: requirements are pinned and complete, workflows are safe, make and CI agree."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = sorted(ROOT.glob("requirements*.txt"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
RUNTIME = (
    "app.py",
    "settings.py",
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
OPTIONAL = {"moondream", "kestrel"}  # imported where they are wanted, and only there


def pins(file: Path) -> list[Requirement]:
    """The requirements a file names itself, for every Python."""
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def all_pins() -> list[Requirement]:
    return [pin for name in ("requirements.txt", "requirements-dev.txt") for pin in pins(ROOT / name)]


def providers_by_import() -> dict[str, set[str]]:
    """Which installed distributions bring which top-level names. (Python 3.10's own answer lacks many.)"""
    found: dict[str, set[str]] = {}
    for distribution in importlib.metadata.distributions():
        record = distribution.read_text("RECORD") or ""
        for name in {re.split(r"[/.,]", line, maxsplit=1)[0] for line in record.splitlines()}:
            found.setdefault(name, set()).add(canonicalize_name(distribution.metadata["Name"]))
    return found


def third_party_imports(*places: str) -> set[str]:
    """The top-level names of the libraries that the files in these places import."""
    found: set[str] = set()
    files = [
        file for place in places for file in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"))
    ]
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    ours = {path.stem for path in ROOT.iterdir()}
    return found - sys.stdlib_module_names - ours - OPTIONAL


@pytest.mark.parametrize("file", REQUIREMENTS, ids=lambda file: file.name)
def test_every_requirement_is_pinned(file: Path) -> None:
    assert pins(file)
    for pin in pins(file):
        assert [specifier.operator for specifier in pin.specifier] == ["=="], str(pin)


def test_every_python_gets_each_requirement_once() -> None:
    for python in ("3.10", "3.11", "3.12", "3.13"):
        wanted = [
            pin.name for pin in all_pins() if pin.marker is None or pin.marker.evaluate({"python_version": python})
        ]
        assert len(wanted) == len(set(wanted))
        assert {"gradio", "torch", "numpy", "pandas", "transformers", "trl", "sqlalchemy", "pytest"} <= set(wanted)


def test_what_is_installed_here_is_what_is_pinned() -> None:
    wrong = {}
    for pin in all_pins():
        if pin.marker is None or pin.marker.evaluate():
            installed = importlib.metadata.version(pin.name).partition("+")[0]
            if not pin.specifier.contains(installed, prereleases=True):
                wrong[str(pin)] = installed
    assert wrong == {}


@pytest.mark.parametrize(
    ("names", "places"),
    [(["requirements.txt"], RUNTIME), (["requirements.txt", "requirements-dev.txt"], ("tests", "bench"))],
    ids=["runtime", "tests"],
)
def test_everything_that_is_imported_is_required_by_name(names: list[str], places: tuple[str, ...]) -> None:
    required = {canonicalize_name(pin.name) for name in names for pin in pins(ROOT / name)}
    distributions = providers_by_import()
    imported = {name: distributions.get(name, set()) for name in third_party_imports(*places)}
    assert {name for name, providers in imported.items() if not providers & required} == set()


def test_the_slim_requirements_are_the_full_ones_without_what_local_models_need() -> None:
    slim, full = ({str(pin) for pin in pins(ROOT / name)} for name in ("requirements-slim.txt", "requirements.txt"))
    left_out = {Requirement(pin).name for pin in full - slim}
    assert slim < full and {"torch", "transformers", "trl", "peft", "accelerate", "datasets"} <= left_out
    names = {canonicalize_name(Requirement(pin).name) for pin in slim}
    for name in sorted(names):
        for text in importlib.metadata.requires(name) or [] if here(name) else []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert canonicalize_name(needed.name) in names, f"{name} needs {needed.name}"


def here(name: str) -> bool:
    """Whether it is installed: some are for other Pythons."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def test_the_page_opens_with_the_slim_requirements_and_says_what_is_not_there(tmp_path: Path) -> None:
    """Everything else is hidden from Python; the page is built, and local models say why they cannot be asked."""
    slim, full = ({pin.name for pin in pins(ROOT / name)} for name in ("requirements-slim.txt", "requirements.txt"))
    distributions = importlib.metadata.packages_distributions()
    hidden = [name for name, owners in distributions.items() if owners and set(owners) <= full - slim]
    program = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hidden())
import importlib.util as util
found = util.find_spec
util.find_spec = lambda name, *rest: None if name in {hidden} else found(name, *rest)
import app
from fastapi.testclient import TestClient
from inference.registry import MODELS
from pathlib import Path
from settings import Settings
client = TestClient(app.create_app(Settings(data_dir=Path({str(tmp_path)!r}))))
assert client.get("/").status_code == client.get("/healthz").status_code == client.get("/v1/usage").status_code == 200
print(MODELS["moondream-tiny"].unavailable())
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "torch" in hidden and "no torch (requirements-slim.txt)" in run.stdout


def test_the_deployer_needs_what_its_requirements_bring_and_nothing_else() -> None:
    brought, todo = set(), [canonicalize_name(pin.name) for pin in pins(ROOT / "requirements-previews.txt")]
    while todo:
        name = todo.pop()
        if name not in brought and here(name):
            brought.add(name)
            needed = [Requirement(text) for text in importlib.metadata.requires(name) or []]
            todo += [
                canonicalize_name(one.name) for one in needed if not one.marker or one.marker.evaluate({"extra": ""})
            ]
    distributions = providers_by_import()
    imported = {name: distributions.get(name, set()) for name in third_party_imports("previews")}
    assert {name for name, providers in imported.items() if not providers & brought} == set()
    full = {canonicalize_name(pin.name): pin.specifier for pin in all_pins() if not pin.marker or pin.marker.evaluate()}
    assert all(full[canonicalize_name(pin.name)] == pin.specifier for pin in pins(ROOT / "requirements-previews.txt"))


def test_the_sdk_needs_no_kernels_for_its_cloud_and_tuning_clients() -> None:
    """The claim that requirements-sdk.txt rests on."""
    program = "import moondream, sys; moondream.vl(api_key='none'); moondream.ft; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert not {"kestrel", "torch"} & set(run.stdout.split())
    assert [pin.name for pin in pins(ROOT / "requirements-sdk.txt")] == ["moondream"]


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_a_workflow_may_do_only_what_it_must(file: Path) -> None:
    workflow = yaml.safe_load(file.read_text())
    assert workflow["permissions"] in ({}, {"contents": "read"})
    assert all("uses" in job or 0 < job["timeout-minutes"] <= 60 for job in workflow["jobs"].values())
    for step in steps(workflow):
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w./-]+@[0-9a-f]{40}", step["uses"]), step["uses"]
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
        assert "${{" not in step.get("run", ""), "what a stranger may write must not become a command"


def test_ci_calls_make_and_nothing_else_of_its_own() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    runs = {step["run"] for step in steps(workflow) if "run" in step}
    assert runs == {"make lint", "bash .ci/run"}
    last = (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1]
    assert last == "exec make test"


def test_the_ci_script_is_good_bash() -> None:
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], capture_output=True, text=True).stderr == ""


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here: install it")
@pytest.mark.parametrize("target", ["run", "test", "lint", "bench"])
def test_make_installs_before_it_starts_and_only_once(target: str, tmp_path: Path) -> None:
    def planned() -> str:
        command = ["make", "-n", target, f"VENV={tmp_path}/venv"]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert run.returncode == 0, run.stderr
        return run.stdout

    fresh = planned()
    assert "-m venv" in fresh and "-r requirements.txt" in fresh
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for name in ("bin/python", ".installed", ".installed-dev"):
        (tmp_path / "venv" / name).touch()
    again = planned()
    assert "-m venv" not in again and "pip install" not in again


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here: install it")
def test_make_says_which_python_it_needs(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = ["make", "run", f"VENV={tmp_path}/venv", f"PYTHON={old}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode != 0 and "Python 3.10 or newer is needed" in run.stdout
