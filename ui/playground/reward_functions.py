"""Saved reward functions: save, load, rename, delete, import and export the weights on the sliders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import Dependency

from access.permissions import AccessDenied
from access.roles import Role, Visitor
from rewards import REWARDS, RewardFunction, RewardFunctionError
from storage.reward_functions import StoreError
from ui.events import PRIVATE
from ui.files import download_on, new_file, writing
from ui.messages import as_gradio_error, show_info, show_warning, user_error
from ui.permissions import visitor_of
from ui.playground.saved_functions import SavedFunctions
from ui.services import AppServices

TITLE = "Reward functions"
ERRORS = (AccessDenied, StoreError, RewardFunctionError)
BROWSER_KEY = "playground-reward-functions"  # fixed and not secret: a guest's browser keeps nothing confidential
MAX_FILE_BYTES = 10_000


def choices(saved: SavedFunctions) -> list[tuple[str, str]]:
    """Return label and name of each reward function that a visitor sees.

    Shows a warning if the database, or a part of what the browser keeps, cannot be read, and leaves that out.
    """
    names = []
    if saved.browser is not None and saved.browser.ignored:
        show_warning("Some reward functions saved in this browser could not be read and are ignored.", TITLE)
    try:
        names = [(name, name) for name in saved.own_names()]
        return names + [(f"{name} · shared", name) for name in saved.shared_names()]
    except StoreError as error:
        show_warning(str(error), TITLE)
        return names


def storage_note(visitor: Visitor, mode: str) -> str:
    """Return where a visitor's reward functions are kept, as plain text."""
    if visitor.role == Role.GUEST:
        return "Saved in this browser." + (" Sign in to keep them in your account." if mode == "space" else "")
    if visitor.id:
        return "Saved in your account."
    return "" if mode == "local" else "Saved in this deployment. Everyone can load them."


def from_sliders(weights: tuple[float, ...]) -> RewardFunction:
    """Return the reward function on the sliders. Raises gr.Error if all weights are zero."""
    if not any(weights):
        raise user_error("All sliders are at zero. Increase at least one.", TITLE)
    return RewardFunction(dict(zip(REWARDS, weights, strict=True)))


def to_sliders(function: RewardFunction) -> list[float]:
    """Return one value per slider."""
    return [function.weights.get(name, 0.0) for name in REWARDS]


def load(saved: SavedFunctions, selected: str | None) -> list[Any]:
    """Return the slider values and the name of a saved reward function."""
    if not selected:
        return [gr.skip()] * (len(REWARDS) + 1)
    with as_gradio_error(*ERRORS, title=TITLE):
        return [*to_sliders(saved.get(selected)), selected]


def save(saved: SavedFunctions, selected: str | None, name: str | None, *weights: float) -> dict[str, Any]:
    """Save the slider values under a name. Only the selected reward function is overwritten."""
    function = from_sliders(weights)
    with as_gradio_error(*ERRORS, title=TITLE):
        new_name = saved.save(name or "", function, overwrite=bool(name) and name == selected)
    show_info(f"Saved as “{new_name}”.", TITLE)
    return gr.update(choices=choices(saved), value=new_name)


def rename(saved: SavedFunctions, selected: str | None, name: str | None) -> dict[str, Any]:
    """Rename the selected reward function."""
    with as_gradio_error(*ERRORS, title=TITLE):
        new_name = saved.rename(_required(selected), name or "")
    return gr.update(choices=choices(saved), value=new_name)


def delete(saved: SavedFunctions, selected: str | None) -> tuple[dict[str, Any], str]:
    """Delete the selected reward function; the sliders keep their values."""
    with as_gradio_error(*ERRORS, title=TITLE):
        saved.delete(_required(selected))
    show_info(f"“{selected}” was deleted.", TITLE)
    return gr.update(choices=choices(saved), value=None), ""


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


@dataclass(frozen=True)
class SavedComponents:
    """Components that opening the page fills.

    Attributes:
        selected: The drop-down of saved reward functions.
        browser: What a guest's browser keeps.
        note: Where the reward functions are kept.
        loaded: The events after which the sliders have the weights of a saved or imported reward function.
    """

    selected: gr.Dropdown
    browser: gr.BrowserState
    note: gr.HTML
    loaded: tuple[Dependency, ...]


def build(services: AppServices, sliders: list[gr.Slider], download: gr.File) -> SavedComponents:
    """Build the accordion below the sliders.

    Args:
        services: The application's services.
        sliders: One slider per reward.
        download: Invisible component for downloads.
    """
    browser = gr.BrowserState(None, storage_key=BROWSER_KEY, secret=BROWSER_KEY)
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
        note = gr.HTML("", elem_id="saved-note", apply_default_css=False)

    def saved_of(request: gr.Request, content: Any) -> SavedFunctions:
        return SavedFunctions(services.store, visitor_of(services.access, request), content)

    def selection_changed(request: gr.Request, content: Any, selected: str | None) -> list[Any]:
        return load(saved_of(request, content), selected)

    def save_clicked(
        request: gr.Request, content: Any, selected: str | None, name: str | None, *weights: float
    ) -> tuple[Any, ...]:
        saved = saved_of(request, content)
        return save(saved, selected, name, *weights), browser_update(saved)

    def rename_clicked(request: gr.Request, content: Any, selected: str | None, name: str | None) -> tuple[Any, ...]:
        saved = saved_of(request, content)
        return rename(saved, selected, name), browser_update(saved)

    def delete_clicked(request: gr.Request, content: Any, selected: str | None) -> tuple[Any, ...]:
        saved = saved_of(request, content)
        return *delete(saved, selected), browser_update(saved)

    loaded = selected.input(selection_changed, [browser, selected], [*sliders, name], **PRIVATE)
    save_button.click(save_clicked, [browser, selected, name, *sliders], [selected, browser], **PRIVATE)
    rename_button.click(rename_clicked, [browser, selected, name], [selected, browser], **PRIVATE)
    delete_button.click(delete_clicked, [browser, selected], [selected, name, browser], **PRIVATE)
    imported = import_button.upload(import_file, import_button, [*sliders, name], **PRIVATE)
    download_on(export_button.click, export_file, [name, *sliders], download)
    return SavedComponents(selected, browser, note, (loaded, imported))


def browser_update(saved: SavedFunctions) -> Any:
    """Return what a guest's browser is to keep; the browsers of other visitors keep nothing new."""
    return saved.browser.content if saved.browser is not None else gr.skip()
