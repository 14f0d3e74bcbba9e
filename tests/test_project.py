"""Tests of the files around the code: requirements, Makefile, CI script and workflows."""

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

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
LOCKS = sorted(ROOT.glob("requirements*.txt"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
RUNTIME = (
    *("app.py", "settings.py", "inference", "previews", "recipes", "rewards", "serving", "storage"),
    *("training", "ui", "usage"),
)
OPTIONAL = {"moondream", "kestrel"}  # imported only where they are installed
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def requirements(name: str) -> list[Requirement]:
    """Return the requirements in a file, without those of the files that it includes."""
    lines = (line.partition(" #")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith(("-", "#"))]


def versions(name: str) -> dict[str, str]:
    """Return the versions that a lock file pins for this Python and platform, by canonical name."""
    return {
        canonicalize_name(pin.name): next(iter(pin.specifier)).version
        for pin in requirements(name)
        if pin.marker is None or pin.marker.evaluate()
    }


def included(name: str) -> list[Requirement]:
    """Return the requirements in an .in file and in those that it includes."""
    files = re.findall(r"^-r (\S+)$", (ROOT / name).read_text(), re.MULTILINE)
    return [*requirements(name), *(requirement for file in files for requirement in included(file))]


def is_installed(name: str) -> bool:
    """Return whether a distribution is installed: some are for other Pythons."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def dependencies(name: str) -> set[str]:
    """Return the canonical names of an installed distribution's dependencies on this machine, without extras."""
    needed = [Requirement(text) for text in importlib.metadata.requires(name) or []]
    return {canonicalize_name(item.name) for item in needed if not item.marker or item.marker.evaluate({"extra": ""})}


def distributions_by_import() -> dict[str, set[str]]:
    """Map top-level import names to the installed distributions that provide them.

    `importlib.metadata.packages_distributions` of Python 3.10 misses many.
    """
    providers: dict[str, set[str]] = {}
    for distribution in importlib.metadata.distributions():
        record = distribution.read_text("RECORD") or ""
        for name in {re.split(r"[/.,]", line, maxsplit=1)[0] for line in record.splitlines()}:
            providers.setdefault(name, set()).add(canonicalize_name(distribution.metadata["Name"]))
    return providers


def third_party_imports(*paths: str) -> set[str]:
    """Return the top-level names of the libraries that the files under these paths import."""
    names: set[str] = set()
    files = [
        file for path in paths for file in ([ROOT / path] if path.endswith(".py") else (ROOT / path).rglob("*.py"))
    ]
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    own = {path.stem for path in ROOT.iterdir()}
    return names - sys.stdlib_module_names - own - OPTIONAL


def undeclared_imports(declared: set[str], *paths: str) -> set[str]:
    """Return the libraries that the files import and that none of the declared distributions provides."""
    providers = distributions_by_import()
    return {name for name in third_party_imports(*paths) if not providers.get(name, set()) & declared}


@pytest.mark.parametrize("file", LOCKS, ids=lambda file: file.name)
def test_lock_files_pin_every_requirement(file: Path) -> None:
    pins = requirements(file.name)
    assert pins
    for pin in pins:
        assert [specifier.operator for specifier in pin.specifier] == ["=="], str(pin)


@pytest.mark.parametrize("file", LOCKS, ids=lambda file: file.name)
def test_lock_files_satisfy_their_source(file: Path) -> None:
    """`make lock` was run after the last change of an .in file."""
    source = file.with_suffix(".in").name
    for python in PYTHONS:
        environment = {"python_version": python, "python_full_version": f"{python}.0"}
        locked = {
            canonicalize_name(pin.name): next(iter(pin.specifier)).version
            for pin in requirements(file.name)
            if pin.marker is None or pin.marker.evaluate(environment)
        }
        for wanted in included(source):
            if wanted.marker is None or wanted.marker.evaluate(environment):
                assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)], prereleases=True), str(wanted)


def test_every_python_gets_one_version_of_each_requirement() -> None:
    for python in PYTHONS:
        environment = {"python_version": python, "python_full_version": f"{python}.0"}
        names = [
            canonicalize_name(pin.name)
            for pin in requirements("requirements-dev.txt")
            if pin.marker is None or pin.marker.evaluate(environment)
        ]
        assert len(names) == len(set(names))
        assert {"gradio", "torch", "numpy", "pandas", "transformers", "trl", "sqlalchemy", "pytest"} <= set(names)


def test_installed_versions_are_the_pinned_ones() -> None:
    pins = versions("requirements-dev.txt")
    wrong = {
        name: (importlib.metadata.version(name), pinned)
        for name, pinned in pins.items()
        if importlib.metadata.version(name).partition("+")[0] != pinned
    }
    if wrong and os.environ.get("CI", "").lower() not in ("1", "true"):
        pytest.skip(f"not the pinned versions: {wrong}; `make clean` and `make test` install them")
    assert wrong == {}


@pytest.mark.parametrize(
    ("source", "paths"),
    [("requirements.in", RUNTIME), ("requirements-dev.in", ("tests", "bench"))],
    ids=["runtime", "tests"],
)
def test_imported_libraries_are_named_in_the_source(source: str, paths: tuple[str, ...]) -> None:
    named = {canonicalize_name(item.name) for item in included(source)}

    assert undeclared_imports(named, *paths) == set()


def test_slim_requirements_are_a_closed_subset_of_the_full_ones() -> None:
    slim, full = ({str(pin) for pin in requirements(name)} for name in ("requirements-slim.txt", "requirements.txt"))
    omitted = {Requirement(pin).name for pin in full - slim}
    assert slim < full and {"torch", "transformers", "trl", "peft", "accelerate", "datasets"} <= omitted
    names = {canonicalize_name(Requirement(pin).name) for pin in slim}
    missing = {name: dependencies(name) - names for name in sorted(names) if is_installed(name)}
    assert {name: needed for name, needed in missing.items() if needed} == {}


def test_page_opens_with_slim_requirements_and_explains_missing_models(tmp_path: Path) -> None:
    """Hide everything else from Python; the page is built, and local models say why they cannot be used."""
    slim, full = (
        {canonicalize_name(pin.name) for pin in requirements(name)}
        for name in ("requirements-slim.txt", "requirements.txt")
    )
    providers = importlib.metadata.packages_distributions()
    hidden = [
        name for name, owners in providers.items() if owners and set(map(canonicalize_name, owners)) <= full - slim
    ]
    program = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hidden())
import importlib.util as util
original = util.find_spec
util.find_spec = lambda name, *rest: None if name in {hidden} else original(name, *rest)
import app
from fastapi.testclient import TestClient
from inference.availability import unavailable
from inference.registry import MODELS
from pathlib import Path
from settings import Settings
application = app.create_app(Settings(data_dir=Path({str(tmp_path)!r})))
client = TestClient(application, base_url="http://localhost", client=("127.0.0.1", 1))
assert client.get("/").status_code == client.get("/healthz").status_code == client.get("/v1/usage").status_code == 200
print(unavailable(MODELS["moondream-tiny"]))
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "torch" in hidden and "no torch (requirements-slim.txt)" in result.stdout


def test_deployer_requirements_are_complete_and_match_the_full_ones() -> None:
    locked = versions("requirements-previews.txt")
    assert undeclared_imports(set(locked), "previews") == set()
    full = versions("requirements.txt")
    assert {name: version for name, version in locked.items() if full.get(name) != version} == {}


def test_sdk_clients_need_no_kernels() -> None:
    """The Cloud and tuning clients of the SDK import neither kestrel nor torch (see requirements-sdk.in)."""
    program = "import moondream, sys; moondream.vl(api_key='none'); moondream.ft; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    assert not {"kestrel", "torch"} & set(result.stdout.split())
    assert [pin.name for pin in requirements("requirements-sdk.txt")] == ["moondream"]


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the steps of all jobs of a workflow."""
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflows_have_minimal_permissions(file: Path) -> None:
    workflow = yaml.safe_load(file.read_text())
    assert workflow["permissions"] in ({}, {"contents": "read"})
    assert all("uses" in job or 0 < job["timeout-minutes"] <= 60 for job in workflow["jobs"].values())
    for step in steps(workflow):
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w./-]+@[0-9a-f]{40}", step["uses"]), step["uses"]
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
        assert "${{" not in step.get("run", ""), "expressions in `run` would execute text of a pull request"


def test_ci_workflow_runs_the_ci_script() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert {step["run"] for step in steps(workflow) if "run" in step} == {"bash .ci/run"}
    script = (ROOT / ".ci" / "run").read_text().strip().splitlines()
    assert script[-2:] == ["make lint types", "exec make test"]


def test_ci_script_is_valid_bash() -> None:
    check = subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], capture_output=True, text=True, check=False)
    assert check.stderr == ""


def run_make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make outside of the make that runs the tests, and without uv."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", *arguments, "UV="]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


@needs_make
@pytest.mark.parametrize("target", ["run", "check", "test", "lint", "types", "bench"])
def test_make_installs_once_before_it_runs(target: str, tmp_path: Path) -> None:
    def plan() -> str:
        result = run_make("-n", target, f"VENV={tmp_path}/venv")
        assert result.returncode == 0, result.stderr
        return result.stdout

    first = plan()
    assert "-m venv" in first and "-r requirements.txt" in first
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for name in ("bin/python", ".installed", ".installed-dev"):
        (tmp_path / "venv" / name).touch()
    second = plan()
    assert "-m venv" not in second and "pip install" not in second


@needs_make
def test_make_uses_uv_where_it_is_installed(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", "-n", "run", f"VENV={tmp_path}/venv", "UV=/opt/uv"]
    plan = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True).stdout
    assert "/opt/uv pip install" in plan and "-m pip" not in plan


@needs_make
def test_make_names_the_python_it_requires(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = run_make("run", f"VENV={tmp_path}/venv", f"PYTHON={old}")
    assert result.returncode != 0 and "Python 3.10 or newer is required" in result.stdout
