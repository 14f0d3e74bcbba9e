"""Every code block in the README and in docs/ is executed or compared with the code; links lead somewhere."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import json
import re
import shlex
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

import recipes
import rewards
from inference.registry import MODELS
from recipes import parse
from rewards import RewardFunction
from tests.support.app_server import app_server
from tests.support.doc_blocks import BLOCKS, LOCAL, PAGES, ROOT, Block
from training.data.bundled import PHOTO_FOLDER
from training.preferences.export import FILE, read_folder
from training.runs.run import RunConfig
from ui.playground.link import read_link
from usage.prices import Prices

PHOTO = ROOT / "assets" / "photos" / "coffee.jpg"
MAX_README_LINES = 150


def of(*languages: str) -> pytest.MarkDecorator:
    """Parametrize a test with the blocks in these languages."""
    chosen = [block for block in BLOCKS if block.language in languages]
    assert chosen, languages
    return pytest.mark.parametrize("block", chosen, ids=[f"{block.page.name}:{block.line}" for block in chosen])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the app and yield its address."""
    with app_server(tmp_path_factory.mktemp("data")) as address:
        yield address


def test_every_block_is_checked() -> None:
    """A block in a language that no test handles is an error.

    tests/serving/test_clients.py runs those of clients, tests/inference/moondream/test_export.py that of the export.
    """
    checked = {"python", "sh", "json", "text", "map", "link", "signature", "tuning-client", "imports"}
    checked |= {"python clients", "sh clients", "python export"}
    assert {block.language for block in BLOCKS} <= checked


@of("python")
def test_python_blocks_run(block: Block, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    code = block.text.replace(LOCAL, server).replace('"photo.jpg"', repr(str(PHOTO)))
    with Image.open(PHOTO) as photo, contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, f"{block.page.name}:{block.line}", "exec"), {"photo": photo})


def check_module(arguments: list[str]) -> None:
    """Check a module after `python -m` and its options against the module's argument parser."""
    module, *rest = arguments
    path = ROOT / module.replace(".", "/")
    source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    for option in (argument for argument in rest if argument.startswith("--")):
        assert re.search(rf'add_argument\([^)]*"{re.escape(option)}"', source), f"python -m {module} has no {option}"


def check_make(arguments: list[str]) -> None:
    """Check that make knows the target and its variables."""
    target, *variables = arguments
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^(?:[\w ]* )?{target}\b[\w ]*:", makefile, re.MULTILINE), f"make has no target {target}"
    for variable in variables:
        assert re.search(rf"^{variable.partition('=')[0]} \?=", makefile, re.MULTILINE), variable


@of("sh")
def test_shell_blocks_match_the_commands(block: Block, server: str, tmp_path: Path) -> None:
    for line in block.text.splitlines():
        command = re.sub(r"\s+# .*", "", line)
        words = shlex.split(command)
        match words:
            case ["make", *arguments]:
                check_make(arguments)
            case ["python", "-m", *arguments]:
                check_module(arguments)
            case ["accelerate", "launch", *options, "-m", "training.grpo", "runs/first"]:
                assert options == ["--num_processes", "2"]  # executed by tests/training/grpo/test_distributed.py
            case ["mkdir", "-p", "runs/first", "&&", "echo", *_]:
                subprocess.run(command, shell=True, cwd=tmp_path, check=True)
                assert RunConfig.from_json((tmp_path / "runs/first/config.json").read_text()).base == "moondream-tiny"
            case ["curl", address]:
                with urllib.request.urlopen(address.replace(LOCAL, server)) as response:
                    assert response.status == 200
            case _:
                pytest.fail(f"no check for: {line}")


@of("json")
def test_json_blocks_are_accepted(block: Block, tmp_path: Path) -> None:
    def read_preference(file: Path) -> None:
        row = json.loads(file.read_text())
        file.with_name(FILE).write_text(json.dumps(row))
        file.with_name(row["images"][0]).write_bytes((PHOTO_FOLDER / row["images"][0]).read_bytes())
        assert read_folder(tmp_path)[0] == [row]

    readers: dict[str, Callable[[Path], object]] = {
        "api.md": lambda file: file.read_text().index("/mcp"),  # tests/ui/test_mcp.py connects with it
        "preferences.md": read_preference,
        "rewards.md": lambda file: RewardFunction.from_json(file.read_text()),
        "usage.md": Prices.read,
    }
    file = tmp_path / "block.json"
    file.write_text(block.text)
    readers[block.page.name](file)
    assert json.loads(block.text)


@of("text")
def test_text_blocks_match_the_code(block: Block) -> None:
    if block.page.name == "README.md":  # a recipe in canonical form
        parsed = parse(block.text)
        assert parsed.ok and str(parsed.recipe) == block.text.strip()
    else:  # the flow of data names functions
        names = re.findall(r"recipes\.(\w+)", block.text)
        assert names and all(hasattr(recipes, name) for name in names)


@of("map")
def test_map_names_existing_files_and_every_package(block: Block) -> None:
    listed: set[str] = set()
    folder = ROOT
    for line in block.text.splitlines():
        entry = re.match(r"(\S+)\s{2,}(.*)|\s+(.*)", line)
        assert entry, line
        if entry[1]:
            assert (ROOT / entry[1]).exists(), entry[1]
            listed.add(entry[1].rstrip("/"))
            folder = ROOT / entry[1]
        for name in re.findall(r"(?<![\w/`.-])([\w/-]+(?:\.py|\.js|/)(?=[\s:,()·]|$))", entry[2] or entry[3]):
            places = [folder, *(path for path in folder.iterdir() if path.is_dir())] if folder.is_dir() else [ROOT]
            assert any((place / name).exists() for place in [*places, ROOT]), f"{folder.name}: {name}"
    packages = {file.parent.name for file in ROOT.glob("*/__init__.py")}
    assert packages <= listed


@of("link")
def test_links_are_understood(block: Block) -> None:
    query = dict(pair.split("=", 1) for pair in block.text.strip().lstrip("?").split("&"))
    settings, problems = read_link(query, MODELS)
    assert problems == [] and settings.photo == query["photo"] and settings.seed == int(query["seed"])


@of("signature")
def test_reward_signature_matches(block: Block) -> None:
    assert block.text.strip() == f"def colour{inspect.signature(rewards.REWARDS['colour'])}".replace("'", "").replace(
        "numpy.", "np."
    )


@of("tuning-client")
def test_tuning_client_matches_the_sdk(block: Block) -> None:
    moondream = pytest.importorskip("moondream")
    call = next(node for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.Call))
    assert ast.unparse(call.func) == "moondream.ft"
    bound = {keyword.arg: None for keyword in call.keywords}
    inspect.signature(moondream.ft).bind(*call.args, **bound)  # type: ignore[arg-type]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_existing_files_and_headings(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], target


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < MAX_README_LINES


def test_documented_variables_are_read() -> None:
    """Every environment variable in the README's table occurs in the code."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = {
        name for row in re.findall(r"^\| (`[A-Z].*?) \|", readme, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    sources = [ROOT / "settings.py", ROOT / "inference" / "registry.py"]
    used = {
        name
        for file in sources
        for name in re.findall(r'"([A-Z][A-Z0-9]*_[A-Z0-9_]+|PORT|HARDWARE)"', file.read_text())
    }
    assert table <= used
