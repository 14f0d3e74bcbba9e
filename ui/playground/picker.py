"""The model picker: a drop-down of check boxes, in which a model that cannot be used is greyed and says why.

gr.Dropdown cannot grey one of its choices. The value is the list of chosen names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from pydantic import SecretStr

from inference.registry import MODELS, ModelSpec
from ui.messages import refusal

MAX_MODELS = 4
_HERE = Path(__file__).resolve().parent


def model_picker(value: list[str], **settings: Any) -> gr.HTML:
    """The component. It fires `choose` when a person has chosen."""
    return gr.HTML(
        value=value,
        choices=choices(),
        most=MAX_MODELS,
        html_template=(_HERE / "picker.html").read_text(encoding="utf-8"),
        js_on_load=(_HERE / "picker.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        **settings,
    )


def choices(models: Mapping[str, ModelSpec] = MODELS, key: SecretStr | None = None) -> list[dict[str, str]]:
    """What the picker shows: every model, with the reason why it cannot be used, or an empty one.

    key: the visitor's own, of Moondream.
    """
    return [
        {
            "name": entry.name,
            "title": entry.title,
            "note": entry.note,
            "reason": entry.with_key(key).unavailable() or "",
        }
        for entry in list(models.values())  # a run that ends may add one
    ]


def check_choice(names: Any) -> list[str]:
    """The chosen names if they can all be asked, in the order of MODELS; gr.Error says what to change otherwise."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise refusal("Choose models from the list.", "Models")
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        offered = ", ".join(list(MODELS))
        raise refusal(f"There is no model called {unknown[0][:80]!r}. On offer: {offered}.", "Models")
    if not 1 <= len(set(names)) <= MAX_MODELS:
        raise refusal(f"Choose one to {MAX_MODELS} models.", "Models")
    return [name for name in list(MODELS) if name in names]
