"""Components whose template and script are files of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr


def template_component(
    folder: Path, name: str, elem_id: str | None = None, value: Any = None, **settings: Any
) -> gr.HTML:
    """Create a component from the template `<name>.html` and the script `<name>.js` of a folder.

    Args:
        folder: The folder.
        name: Name of both files without suffix.
        elem_id: Id of the component on the page.
        value: Its first value.
        **settings: Further properties, which the script reads from `props`, and options of `gr.HTML`.
    """
    return gr.HTML(
        value=value,
        html_template=(folder / f"{name}.html").read_text(encoding="utf-8"),
        js_on_load=(folder / f"{name}.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id=elem_id,
        **settings,
    )
