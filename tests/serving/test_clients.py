"""Clients that other people wrote, each in a process of its own, against the running app with keys.

They are installed in an environment of their own: `make clients`, or .ci/run.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference.registry import MODELS
from settings import ROOT, Settings
from tests.support import fake_backend
from tests.support.app_server import app_server
from tests.support.doc_blocks import BLOCKS, LOCAL, Block

pytestmark = pytest.mark.slow

BIN = ROOT / ".venv-clients" / "bin"
KEY = "a-key-of-20-letters-"
PHOTO = ROOT / "assets" / "photos" / "coffee.jpg"
SETUP = """
import base64, json, os
url, key, path = os.environ["API_URL"], os.environ["API_KEY"], os.environ["PHOTO"]
photo = "data:image/jpeg;base64," + base64.b64encode(open(path, "rb").read()).decode()
def messages(text):
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": photo}}]
    return [{"role": "user", "content": parts}]
QUESTION = "Is the photo bright or dark?"
RECIPE = "How should this photo be finished?"
"""
# Every public method of the client is called; `encode_image` and `close` are called by the others and by `with`.
MOONDREAM = """
import moondream
from PIL import Image
image, settings = Image.open(path), {"temperature": 0, "max_tokens": 20}
with moondream.vl(endpoint=url, api_key=key, model="moondream-tiny") as client:
    caption = client.caption(image, length="short", settings=settings)["caption"]
    assert "".join(client.caption(image, length="short", stream=True, settings=settings)["caption"]) == caption != ""
    answer = client.query(client.encode_image(image), QUESTION, settings=settings)["answer"]
    assert "".join(client.query(image, QUESTION, stream=True, settings=settings)["answer"]) == answer != ""
    assert client.query(question="What is 2 plus 2?", settings=settings)["answer"]
    result = client.chat(messages(QUESTION), settings=settings)
    assert result["message"]["content"] == answer and result["finish_reason"] == "stop"
    assert "".join(client.chat(messages(QUESTION), stream=True, settings=settings)["message"]) == answer
    assert client.detect(image, "the main subject", settings={"max_objects": 3})["objects"][0].keys() >= {"x_min"}
    assert client.point(image, "the brightest area")["points"][0].keys() == {"x", "y"}
    tried = {"caption", "query", "chat", "detect", "point", "segment", "encode_image", "close"}
    assert {name for name in dir(client) if name[0] != "_" and callable(getattr(client, name))} == tried
with moondream.vl(endpoint=url, api_key=key, model="segmenter") as client:
    outline = client.segment(image, "cup", spatial_refs=[[0.5, 0.5]], settings={"seed": 1})
    assert outline["path"].startswith("M") and outline["bbox"]
    assert list(client.segment(image, "cup", stream=True, settings={"seed": 1}))[-1] == {**outline, "completed": True}
    assert client.point(image, "cup", spatial_refs=[[0.1, 0.1, 0.9, 0.9]])["points"]
    assert client.query(image, QUESTION, spatial_refs=[[0.5, 0.5]], reasoning=True)["answer"]
"""
OPENAI = """
import openai
from pydantic import BaseModel
client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
assert client.models.list().data[0].id == client.models.retrieve("moondream-tiny").id == "moondream-tiny"
chat = client.chat.completions
fixed = {"model": "moondream-tiny", "temperature": 0, "max_completion_tokens": 20}
answer = chat.create(messages=messages(QUESTION), **fixed)
text = answer.choices[0].message.content
assert text and answer.usage.total_tokens > 60 and answer.choices[0].finish_reason == "stop" and answer._request_id
chunks = list(chat.create(messages=messages(QUESTION), stream=True, stream_options={"include_usage": True}, **fixed))
assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == text
assert chunks[-1].usage == answer.usage
recipes = chat.create(model="moondream-tiny", messages=messages(RECIPE), n=3, temperature=1, seed=7)
assert len({choice.message.content for choice in recipes.choices}) > 1
stopped = chat.create(messages=messages(RECIPE), stop=[";"], **fixed).choices[0]
assert ";" not in stopped.message.content and stopped.finish_reason == "stop"
class Box(BaseModel):
    x_min: float
    y_min: float
    x_max: float
    y_max: float
class Boxes(BaseModel):
    boxes: list[Box]
found = chat.parse(model="moondream-tiny", messages=messages("the main subject"), response_format=Boxes)
box = found.choices[0].message.parsed.boxes[0]
assert 0 <= box.x_min < box.x_max <= 1
def fails(error, **fields):
    try:
        chat.create(**{"model": "moondream-tiny", "messages": messages(QUESTION), **fields})
    except error as raised:
        return raised
    raise AssertionError(error)
assert fails(openai.BadRequestError, temperature=2.5).param == "temperature"
assert fails(openai.NotFoundError, model="none").code == "not_found"
wrong = openai.OpenAI(base_url=url, api_key="wrong", max_retries=0)
chat = wrong.chat.completions
assert "valid key" in str(fails(openai.AuthenticationError))
"""
LITELLM = """
import litellm
fixed = {"model": "openai/moondream-tiny", "api_base": url, "api_key": key, "temperature": 0, "max_tokens": 20}
answer = litellm.completion(messages=messages(QUESTION), **fixed)
chunks = litellm.completion(messages=messages(QUESTION), stream=True, **fixed)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content != ""
assert answer.usage.prompt_tokens > 60
try:
    litellm.completion(messages=messages(QUESTION), **{**fixed, "model": "openai/none"})
except litellm.NotFoundError as error:
    assert "no model called" in str(error)
else:
    raise AssertionError("no error")
"""
LANGCHAIN = """
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
model = ChatOpenAI(model="moondream-tiny", base_url=url, api_key=key, temperature=0, max_tokens=20, stream_usage=True)
answer = model.invoke(messages(QUESTION))
chunks = list(model.stream(messages(QUESTION)))
assert "".join(chunk.content for chunk in chunks) == answer.content != ""
assert answer.usage_metadata["input_tokens"] > 60
assert model.invoke([SystemMessage("Be brief."), HumanMessage("What is 2 plus 2?")]).content
class Point(BaseModel):
    x: float
    y: float
class Points(BaseModel):
    points: list[Point]
found = model.with_structured_output(Points, method="json_schema").invoke(messages("the brightest area"))
assert 0 <= found.points[0].x <= 1
"""
PROGRAMS = {"moondream": MOONDREAM, "openai": OPENAI, "litellm": LITELLM, "langchain-openai": LANGCHAIN}
BOX_SCHEMA = "x_min float, y_min float, x_max float, y_max float"


@pytest.fixture(scope="module", autouse=True)
def clients() -> None:
    """Skip with the reason, or fail in CI, if the clients are not installed."""
    if not (BIN / "python").exists():
        message = "the clients are not installed: run `make clients`"
        (pytest.fail if os.environ.get("CI", "").lower() in ("1", "true") else pytest.skip)(message)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the app with one key, and a fake model with the abilities that moondream-tiny lacks."""
    MODELS["segmenter"] = fake_backend.fake_spec("segmenter", segments=True, spatial_refs=True, reasons=True)
    keys = Settings.from_env({"PLAYGROUND_API_KEYS": KEY}).api_keys
    with app_server(tmp_path_factory.mktemp("clients"), api_keys=keys, api_rate=100.0) as address:
        yield address
    del MODELS["segmenter"]


def run(command: list[str], address: str, folder: Path) -> str:
    """Run a client and return what it prints."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "API_URL": f"{address}/v1",
        "API_KEY": KEY,
        "PHOTO": str(PHOTO),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # no download
        "LLM_USER_PATH": str(folder),
    }
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("client", PROGRAMS)
def test_client_works_with_every_feature(client: str, server: str, tmp_path: Path) -> None:
    run([str(BIN / "python"), "-c", SETUP + PROGRAMS[client]], server, tmp_path)


def test_llm_command_line(server: str, tmp_path: Path) -> None:
    def llm(*arguments: str) -> str:
        command = [str(BIN / "llm"), "openai", "endpoint", f"{server}/v1", *arguments, "--key", KEY]
        return run(command, server, tmp_path).strip()

    assert llm("--models").splitlines()[0] == "moondream-tiny"
    ask = ("-m", "moondream-tiny", "Is the photo bright or dark?", "-a", str(PHOTO), "-o", "temperature", "0")
    assert llm(*ask) == llm(*ask, "--no-stream") != ""
    found = llm("-m", "moondream-tiny", "the main subject", "-a", str(PHOTO), "--schema-multi", BOX_SCHEMA)
    assert '"items"' in found and '"x_min"' in found


SNIPPETS = [block for block in BLOCKS if block.language in ("python clients", "sh clients")]


@pytest.mark.parametrize("block", SNIPPETS, ids=[f"{block.page.name}:{block.line}" for block in SNIPPETS])
def test_snippets_of_the_documentation_run(block: Block, server: str, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(PHOTO.read_bytes())
    text = block.text.replace(LOCAL, server).replace("YOUR_KEY", KEY)
    if block.language == "python clients":
        output = run([str(BIN / "python"), "-c", text], server, tmp_path)
    else:
        output = run(["bash", "-ec", f"export PATH={BIN}:$PATH\n{text}"], server, tmp_path)
    assert output.strip()


def test_documentation_has_a_row_for_each_client() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)
    assert set(rows) >= {*PROGRAMS, "llm"}
    pins = (ROOT / "requirements-clients.txt").read_text() + (ROOT / "requirements-sdk.txt").read_text()
    for client in (*PROGRAMS, "llm"):
        version = re.search(rf"^{client}==(\S+)$", pins, re.MULTILINE)
        assert version and f"| `{client}` | {version[1]} |" in page, client
