"""The model picker: a drop-down of check boxes in which unavailable models are disabled, with the reason.

gr.Dropdown cannot disable single choices. The component's value is the list of selected model names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from pydantic import SecretStr

from inference.availability import unavailable
from inference.registry import MODELS
from inference.types import ModelSpec
from ui.messages import user_error

MAX_MODELS = 4
_HERE = Path(__file__).resolve().parent


def model_picker(value: list[str], **settings: Any) -> gr.HTML:
    """Create the component. It triggers `choose` when the user has changed the selection."""
    return gr.HTML(
        value=value,
        choices=choices(),
        max_models=MAX_MODELS,
        html_template=(_HERE / "picker.html").read_text(encoding="utf-8"),
        js_on_load=(_HERE / "picker.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        **settings,
    )


def choices(models: Mapping[str, ModelSpec] = MODELS, key: SecretStr | None = None) -> list[dict[str, str]]:
    """Describe the models for the picker.

    Args:
        models: The models to offer.
        key: The user's Moondream API key.

    Returns:
        Name, title, note, and the reason why the model is unavailable or an empty string, per model.
    """
    return [
        {
            "name": spec.name,
            "title": spec.title,
            "note": spec.note,
            "reason": unavailable(spec.with_key(key)) or "",
        }
        for spec in list(models.values())  # a copy: a finished run may register a model meanwhile
    ]


def check_models(names: Any) -> list[str]:
    """Validate selected models.

    Args:
        names: The selection, from the page or an API client.

    Returns:
        The names without duplicates, in the order of MODELS.

    Raises:
        gr.Error: A name is unknown, or there are too few or too many.
    """
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise user_error("Select models from the list.", "Models")
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise user_error(f"Unknown model {unknown[0][:80]!r}. Available models: {', '.join(list(MODELS))}.", "Models")
    if not 1 <= len(set(names)) <= MAX_MODELS:
        raise user_error(f"Select 1 to {MAX_MODELS} models.", "Models")
    return [name for name in list(MODELS) if name in names]
