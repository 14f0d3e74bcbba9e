"""Saved reward functions: keep, load, rename, delete, import and export what the sliders say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from rewards import REWARDS, RewardFunction, RewardFunctionError
from storage.reward_functions import RewardFunctionStore, StoreError
from ui.files import new_file, writing
from ui.messages import inform, refusal, warn

TITLE = "Reward functions"
ZERO = "All sliders are at zero, which rewards nothing. Move one of them up first."


def names(store: RewardFunctionStore) -> list[str]:
    """What is saved, by name; none and a warning when the store cannot be read: the rest of the page works on."""
    try:
        return [saved.name for saved in store.list()]
    except StoreError as error:
        warn(str(error), TITLE)
        return []


def of_sliders(weights: tuple[float, ...]) -> RewardFunction:
    """The sliders as a reward function; gr.Error when all are at zero."""
    if not any(weights):
        raise refusal(ZERO, TITLE)
    return RewardFunction(dict(zip(REWARDS, weights, strict=True)))


def to_sliders(function: RewardFunction) -> list[float]:
    """One value per slider."""
    return [function.weights.get(name, 0.0) for name in REWARDS]


def load(store: RewardFunctionStore, name: str | None) -> list[Any]:
    """Sliders and name for a saved reward function."""
    if not name:
        return [gr.skip()] * (len(REWARDS) + 1)
    with _plainly():
        return [*to_sliders(store.get(name)), name]


def save(store: RewardFunctionStore, chosen: str | None, name: str | None, *weights: float) -> dict[str, Any]:
    """Keeps the sliders as `name`. Only the one that was chosen before is overwritten."""
    function = of_sliders(weights)
    with _plainly():
        kept = store.save(name or "", function, overwrite=bool(name) and name == chosen)
    inform(f"Kept as “{kept.name}”.", TITLE)
    return gr.update(choices=names(store), value=kept.name)


def rename(store: RewardFunctionStore, chosen: str | None, name: str | None) -> dict[str, Any]:
    """Gives the chosen one another name."""
    with _plainly():
        store.rename(_need(chosen), name or "")
    return gr.update(choices=names(store), value=(name or "").strip())


def delete(store: RewardFunctionStore, chosen: str | None) -> tuple[dict[str, Any], str]:
    """Forgets the chosen one; the sliders stay as they are."""
    with _plainly():
        store.delete(_need(chosen))
    inform(f"“{chosen}” was deleted.", TITLE)
    return gr.update(choices=names(store), value=None), ""


def read_file(path: str | None) -> list[Any]:
    """Sliders and name from a JSON file; its name is proposed for saving."""
    if not path:
        return [gr.skip()] * (len(REWARDS) + 1)
    try:
        with open(path, "rb") as file:
            function = RewardFunction.from_json(file.read(10_000))
    except (RewardFunctionError, OSError) as error:
        raise refusal(str(error), "This file holds no reward function") from None
    return [*to_sliders(function), Path(path).stem[:80]]


def write_file(name: str | None, *weights: float) -> str:
    """The path of a JSON file with the sliders as they are."""
    function = of_sliders(weights)
    with writing():
        path = new_file(f"{(name or '').strip() or 'reward'}.json")
        path.write_text(function.to_json() + "\n", encoding="utf-8")
    return str(path)


def _need(chosen: str | None) -> str:
    if not chosen:
        raise refusal("Choose a saved reward function first.", TITLE)
    return chosen


@contextmanager
def _plainly() -> Iterator[None]:
    try:
        yield
    except (StoreError, RewardFunctionError) as error:
        raise refusal(str(error), TITLE) from None


def build(store: RewardFunctionStore, sliders: list[gr.Slider], deliver: Any) -> gr.Dropdown:
    """The drawer under the sliders. `deliver(event, handler, inputs)` hands a file to the browser."""
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Accordion("Save, load and share reward functions", open=False, elem_id="reward-functions"):
        with gr.Row():
            chosen = gr.Dropdown([], value=None, label="Saved", elem_id="saved", min_width=180)
            name = gr.Textbox(label="Name", max_length=80, max_lines=1, elem_id="reward-name", min_width=180)
        with gr.Row(elem_classes="buttons"):
            keep = gr.Button("Save", size="sm", min_width=80)
            change = gr.Button("Rename", size="sm", min_width=80)
            forget = gr.Button("Delete", size="sm", min_width=80)
            take = gr.UploadButton("Import file", size="sm", file_types=[".json"], min_width=80)
            give = gr.Button("Export file", size="sm", min_width=80)
    chosen.input(partial(load, store), chosen, [*sliders, name], **private)
    keep.click(partial(save, store), [chosen, name, *sliders], chosen, **private)
    change.click(partial(rename, store), [chosen, name], chosen, **private)
    forget.click(partial(delete, store), chosen, [chosen, name], **private)
    take.upload(read_file, take, [*sliders, name], **private)
    deliver(give.click, write_file, [name, *sliders])
    return chosen
