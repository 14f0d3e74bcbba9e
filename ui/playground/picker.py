"""The model picker: a drop-down of check boxes in which unavailable models are disabled, with the reason.

gr.Dropdown cannot disable single choices. The component's value is the list of selected model names.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import gradio as gr

from inference.types import SKILLS
from ui.components import template_component
from ui.messages import user_error
from ui.playground.models import VisitorModels, public_models

MAX_MODELS = 4
_HERE = Path(__file__).resolve().parent


def model_picker(value: list[str], **settings: Any) -> gr.HTML:
    """Create the component. It triggers `choose` when the user has changed the selection.

    All visitors receive its first choices, so they are the public ones; opening the page replaces them.
    """
    return template_component(
        _HERE,
        "picker",
        value=value,
        choices=choices(public_models()),
        max_models=MAX_MODELS,
        skills={name: skill.title for name, skill in SKILLS.items()},
        **settings,
    )


def choices(models: VisitorModels) -> list[dict[str, Any]]:
    """Describe a visitor's models for the picker.

    Returns:
        Name, title, note, skills, and the reason why the model is unavailable or an empty string, per model.
    """
    return [
        {
            "name": name,
            "title": spec.title,
            "note": spec.note,
            "reason": models.unavailable(name) or "",
            "skills": [skill for skill in SKILLS if skill != "segment" or spec.segments],
        }
        for name, spec in models.specs.items()
    ]


def check_models(names: Any, models: Collection[str]) -> list[str]:
    """Validate selected models.

    Args:
        names: The selection, from the page or an API client.
        models: Names of the models that the visitor may select.

    Returns:
        The names without duplicates, in the order of `models`.

    Raises:
        gr.Error: A name is unknown, or there are too few or too many.
    """
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise user_error("Select models from the list.", "Models")
    unknown = [name for name in names if name not in models]
    if unknown:
        raise user_error(f"Unknown model {unknown[0][:80]!r}. Available models: {', '.join(models)}.", "Models")
    if not 1 <= len(set(names)) <= MAX_MODELS:
        raise user_error(f"Select 1 to {MAX_MODELS} models.", "Models")
    return [name for name in models if name in names]
