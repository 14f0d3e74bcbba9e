"""Code that runs the Playground's comparison from outside: Python for three clients, and curl. Uses no Gradio.

Everything that a visitor can write is quoted by the filters `python` and `shell`, and keys are read from an environment
variable.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from inference.types import RECIPE_QUESTION, ModelSpec
from rewards import RewardFunction
from ui.playground.link import PlaygroundSettings

CLIENTS = {"moondream": "Moondream SDK", "openai": "OpenAI SDK", "gradio_client": "Gradio client", "curl": "curl"}
UPLOADED_PHOTO = "photo.jpg"
ROUTES = {"recipe": "query"}  # of /v1, where they differ from the skills
ANSWER_KEYS = {"recipe": "answer", "query": "answer", "detect": "objects", "point": "points", "segment": "path"}
CANDIDATE_KEYS = {"detect": "boxes", "point": "points", "segment": "outline"}  # of /compare, where it is not the text
REGION_FIELDS = {"detect": ["x_min", "y_min", "x_max", "y_max"], "point": ["x", "y"]}
_HERE = Path(__file__).resolve().parent


def snippets(
    settings: PlaygroundSettings, specs: Mapping[str, ModelSpec], address: str, reward: RewardFunction | None
) -> dict[str, str]:
    """Write a comparison as code.

    Args:
        settings: The settings of the comparison, validated.
        specs: The models that the visitor may use, by name.
        address: Address of this deployment, without a slash at the end.
        reward: Weights of the rewards; None scores nothing.

    Returns:
        The code by name of CLIENTS.
    """
    served = {name: specs[name] for name in settings.models if specs[name].backend != "hosted"}
    hosted = [name for name in settings.models if name not in served]
    weights = dict(reward.weights) if reward and settings.skill == "recipe" else None
    sampling = {
        name: {"temperature": round(settings.temperature * spec.temperature, 4), "top_p": spec.top_p}
        for name, spec in served.items()
    }
    values = {
        "address": address,
        "url": f"{address}/v1",
        "photo": settings.photo or UPLOADED_PHOTO,
        "models": list(settings.models),
        "skill": settings.skill,
        "route": ROUTES.get(settings.skill, settings.skill),
        "page_prompt": settings.prompt,
        "prompt": api_prompt(settings),
        "length": settings.length,
        "temperature": settings.temperature,
        "seeds": range(settings.seed, settings.seed + settings.n),
        "sampling": sampling,
        "bodies": [open_body(settings, name, fields) for name, fields in sampling.items()],
        "answer_key": ANSWER_KEYS.get(settings.skill, settings.skill),
        "candidate_key": CANDIDATE_KEYS.get(settings.skill, "text"),
        "fields": REGION_FIELDS.get(settings.skill),
        "reward": weights,
        "reward_json": json.dumps(weights),
    }
    note = f"# Not served under /v1, but to the Gradio client: {', '.join(map(to_python, hosted))}\n"
    code = {client: _templates().get_template(f"{client}.jinja").render(values) for client in CLIENTS}
    for client in ("moondream", "openai", "curl") if hosted else ():
        code[client] = note + (code[client] if served else "")
    return code


def api_prompt(settings: PlaygroundSettings) -> str:
    """Return the question or object of a request to /v1; see `inference.types.skill_of_question`."""
    if settings.skill != "recipe" or settings.prompt == RECIPE_QUESTION:
        return settings.prompt
    return f"{RECIPE_QUESTION} {settings.prompt}".strip()


def open_body(settings: PlaygroundSettings, model: str, sampling: Mapping[str, float]) -> str:
    """Return a body of /v1 as JSON without its end: seed and photo follow."""
    body: dict[str, Any] = {"model": model}
    if settings.skill == "caption":
        body["length"] = settings.length
    else:
        body["question" if settings.skill in ("recipe", "query") else "object"] = api_prompt(settings)
    return json.dumps(body | {"settings": sampling}, ensure_ascii=False)[:-2]


def to_python(value: Any) -> str:
    """Write a string, a number, or a list or dict of them as Python, in which JSON is the same."""
    nested = isinstance(value, dict) and any(isinstance(item, dict) for item in value.values())
    if not nested:
        return json.dumps(value, ensure_ascii=False)
    rows = (f"    {to_python(key)}: {to_python(item)},\n" for key, item in value.items())
    return "{\n" + "".join(rows) + "}"


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE / "snippets"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"python": to_python, "shell": lambda value: shlex.quote(str(value))}
    return environment
