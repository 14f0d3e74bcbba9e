"""Saved reward functions: save, load, rename, delete, import and export the weights on the sliders."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from rewards import REWARDS, RewardFunction, RewardFunctionError
from storage.reward_functions import RewardFunctionStore, StoreError
from ui.events import PRIVATE
from ui.files import download_on, new_file, writing
from ui.messages import as_gradio_error, show_info, show_warning, user_error

TITLE = "Reward functions"
MAX_FILE_BYTES = 10_000


def saved_names(store: RewardFunctionStore) -> list[str]:
    """Return the names of the saved reward functions; if the store cannot be read, show a warning and return none."""
    try:
        return [saved.name for saved in store.list()]
    except StoreError as error:
        show_warning(str(error), TITLE)
        return []


def from_sliders(weights: tuple[float, ...]) -> RewardFunction:
    """Return the reward function on the sliders. Raises gr.Error if all weights are zero."""
    if not any(weights):
        raise user_error("All sliders are at zero. Increase at least one.", TITLE)
    return RewardFunction(dict(zip(REWARDS, weights, strict=True)))


def to_sliders(function: RewardFunction) -> list[float]:
    """Return one value per slider."""
    return [function.weights.get(name, 0.0) for name in REWARDS]


def load(store: RewardFunctionStore, selected: str | None) -> list[Any]:
    """Return the slider values and the name of a saved reward function."""
    if not selected:
        return [gr.skip()] * (len(REWARDS) + 1)
    with as_gradio_error(StoreError, RewardFunctionError, title=TITLE):
        return [*to_sliders(store.get(selected)), selected]


def save(store: RewardFunctionStore, selected: str | None, name: str | None, *weights: float) -> dict[str, Any]:
    """Save the slider values under a name. Only the selected reward function is overwritten."""
    function = from_sliders(weights)
    with as_gradio_error(StoreError, RewardFunctionError, title=TITLE):
        saved = store.save(name or "", function, overwrite=bool(name) and name == selected)
    show_info(f"Saved as “{saved.name}”.", TITLE)
    return gr.update(choices=saved_names(store), value=saved.name)


def rename(store: RewardFunctionStore, selected: str | None, name: str | None) -> dict[str, Any]:
    """Rename the selected reward function."""
    with as_gradio_error(StoreError, RewardFunctionError, title=TITLE):
        store.rename(_required(selected), name or "")
    return gr.update(choices=saved_names(store), value=(name or "").strip())


def delete(store: RewardFunctionStore, selected: str | None) -> tuple[dict[str, Any], str]:
    """Delete the selected reward function; the sliders keep their values."""
    with as_gradio_error(StoreError, RewardFunctionError, title=TITLE):
        store.delete(_required(selected))
    show_info(f"“{selected}” was deleted.", TITLE)
    return gr.update(choices=saved_names(store), value=None), ""


def import_file(path: str | None) -> list[Any]:
    """Return the slider values of a JSON file, and its name as a suggestion for saving."""
    if not path:
        return [gr.skip()] * (len(REWARDS) + 1)
    with as_gradio_error(RewardFunctionError, OSError, title="Not a reward function"), open(path, "rb") as file:
        function = RewardFunction.from_json(file.read(MAX_FILE_BYTES))
    return [*to_sliders(function), Path(path).stem[:80]]


def export_file(name: str | None, *weights: float) -> str:
    """Write the slider values to a JSON file and return its path."""
    function = from_sliders(weights)
    with writing():
        path = new_file(f"{(name or '').strip() or 'reward'}.json")
        path.write_text(function.to_json() + "\n", encoding="utf-8")
    return str(path)


def _required(selected: str | None) -> str:
    if not selected:
        raise user_error("Select a saved reward function first.", TITLE)
    return selected


def build(store: RewardFunctionStore, sliders: list[gr.Slider], download: gr.File) -> gr.Dropdown:
    """Build the accordion below the sliders.

    Args:
        store: The saved reward functions.
        sliders: One slider per reward.
        download: Invisible component for downloads.

    Returns:
        The drop-down of saved reward functions.
    """
    with gr.Accordion("Saved reward functions", open=False, elem_id="reward-functions"):
        with gr.Row():
            selected = gr.Dropdown([], value=None, label="Saved", elem_id="saved", min_width=180)
            name = gr.Textbox(label="Name", max_length=80, max_lines=1, elem_id="reward-name", min_width=180)
        with gr.Row(elem_classes="buttons"):
            save_button = gr.Button("Save", size="sm", min_width=80)
            rename_button = gr.Button("Rename", size="sm", min_width=80)
            delete_button = gr.Button("Delete", size="sm", min_width=80)
            import_button = gr.UploadButton("Import file", size="sm", file_types=[".json"], min_width=80)
            export_button = gr.Button("Export file", size="sm", min_width=80)
    selected.input(partial(load, store), selected, [*sliders, name], **PRIVATE)
    save_button.click(partial(save, store), [selected, name, *sliders], selected, **PRIVATE)
    rename_button.click(partial(rename, store), [selected, name], selected, **PRIVATE)
    delete_button.click(partial(delete, store), selected, [selected, name], **PRIVATE)
    import_button.upload(import_file, import_button, [*sliders, name], **PRIVATE)
    download_on(export_button.click, export_file, [name, *sliders], download)
    return selected
