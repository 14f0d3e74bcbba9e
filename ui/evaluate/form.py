"""The form of the Evaluate tab: its inputs, and the estimate of time and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from inference.types import MAX_CANDIDATES, MAX_SEED, SKILLS, ModelSpec
from rewards import EQUAL_WEIGHTS, REWARDS
from training.data.bundled import bundled_photos
from training.evaluations.evaluation import DEFAULT_CANDIDATES, DEFAULT_PHOTOS, MAX_MODELS, POOL_SIZE
from training.evaluations.runner import POOL_SECONDS
from training.runs.run import MAX_NAME, MAX_PHOTOS
from ui.finetune.form import HUB_DATASET, NO_AUTOCOMPLETE, UPLOADED, draw_photo_inputs
from ui.finetune.run_view import format_duration
from usage.prices import Prices

HELD_OUT = "Held-out photos"
PHOTO_SOURCES = (HELD_OUT, UPLOADED, HUB_DATASET)
SLIDERS = "The Playground's sliders"
DEFAULT_MODELS = ["moondream-tiny", "moondream-tiny-balanced", "moondream-tiny-bold"]
SMALL_SECONDS, LARGE_SECONDS, HOSTED_SECONDS = 0.02, 0.5, 1.5  # assumed per candidate
TOKENS_IN, TOKENS_OUT = 760, 70  # assumed per candidate of a hosted model


@dataclass(frozen=True)
class EvaluateForm:
    """The components of the form.

    Attributes:
        fields: The inputs by name.
        reward: Chooses the Playground's sliders or a saved reward function.
        sliders: One per reward, in the order of REWARDS.
        estimate: Shows the estimated duration and cost.
        submit: The button that queues the evaluation.
        note: Says why the button is disabled.
    """

    fields: dict[str, Any]
    reward: gr.Dropdown
    sliders: list[gr.Slider]
    estimate: gr.Markdown
    submit: gr.Button
    note: gr.Markdown


def draw_form(models: list[tuple[str, str]]) -> EvaluateForm:
    """Draw the form in the current column. `models` are title and name of each model that everyone may choose."""
    fields: dict[str, Any] = {}
    names = [name for _, name in models]
    fields["models"] = gr.Dropdown(
        models,
        value=[name for name in DEFAULT_MODELS if name in names],
        multiselect=True,
        max_choices=MAX_MODELS,
        label="Models",
        elem_id="eval-models",
    )
    fields["temperatures"] = gr.Dropdown(
        ["0", "0.4", "0.7", "1", "1.3"],
        value=["1"],
        multiselect=True,
        allow_custom_value=True,
        label="Temperatures",
        info=f"Each model takes part at each one, {MAX_MODELS} entries in all.",
        elem_id="eval-temperatures",
    )
    fields |= draw_photo_inputs(PHOTO_SOURCES, "Photos", "eval")
    with gr.Row(elem_classes="settings-row"):
        fields["max_photos"] = gr.Number(
            DEFAULT_PHOTOS, label="At most", precision=0, minimum=1, maximum=MAX_PHOTOS, min_width=80
        )
        fields["candidates"] = gr.Number(
            DEFAULT_CANDIDATES, label="Candidates", precision=0, minimum=1, maximum=MAX_CANDIDATES, min_width=80
        )
        fields["seed"] = gr.Number(1, label="Seed", precision=0, minimum=0, maximum=MAX_SEED - 8, min_width=80)
    fields["skill"] = gr.Dropdown(
        [(skill.title, name) for name, skill in SKILLS.items()], value="recipe", label="Skill", elem_id="eval-skill"
    )
    fields["prompt"] = gr.Textbox(label="Prompt", lines=1, max_lines=4, placeholder="Optional", elem_id="eval-prompt")
    reward = gr.Dropdown([SLIDERS], value=SLIDERS, label="Reward", elem_id="eval-reward")
    with gr.Group(elem_id="eval-weights"):
        sliders = [
            gr.Slider(
                0,
                1,
                EQUAL_WEIGHTS.weights.get(name, 0.0),
                step=0.05,
                label=name.capitalize(),
                buttons=[],
                elem_id=f"eval-weight-{name}",
            )
            for name in REWARDS
        ]
    with gr.Accordion("Moondream API key", open=False):
        fields["key"] = gr.Textbox(
            label="API key",
            type="password",
            max_lines=1,
            info="For Moondream Cloud models. Used for this evaluation only and not stored.",
            html_attributes=NO_AUTOCOMPLETE,
            elem_id="eval-key",
        )
    fields["name"] = gr.Textbox(label="Name", placeholder="Optional", max_length=MAX_NAME, max_lines=1)
    estimate = gr.Markdown(elem_id="eval-estimate")
    submit = gr.Button("Evaluate", variant="primary", elem_id="eval-start")
    note = gr.Markdown(visible=False, elem_id="eval-note")
    return EvaluateForm(fields, reward, sliders, estimate, submit, note)


def temperatures_of(values: Sequence[str] | None) -> list[float]:
    """Parse the temperatures. Raises ValueError."""
    return list(dict.fromkeys(float(value) for value in values or []))


def estimate_text(form: dict[str, Any], specs: dict[str, ModelSpec], prices: Prices, waiting: int) -> str:
    """Return the estimated time and cost of an evaluation in Markdown, without formatting.

    Args:
        form: Values of `EvaluateForm.fields` by name.
        specs: The visitor's models by name.
        prices: Prices of hosted models.
        waiting: Number of evaluations that are ahead in the queue.
    """
    try:
        temperatures = temperatures_of(form["temperatures"])
    except ValueError:
        return "Temperatures are numbers from 0 to 2."
    models = [specs[name] for name in form["models"] or [] if name in specs]
    entries, candidates = len(models) * len(temperatures), int(form["candidates"] or 1)
    photos, exact = _photo_count(form)
    if not entries:
        return "Choose at least one model and one temperature."
    if entries > MAX_MODELS:
        return f"These are {entries} entries; at most {MAX_MODELS} models and temperatures can be compared."
    seconds, dollars, paid = 0.0, 0.0, 0
    for spec in models:
        calls = photos * candidates * len(temperatures)
        if spec.backend == "local":
            seconds += calls * (LARGE_SECONDS if spec.memory_bytes else SMALL_SECONDS)
            continue
        seconds += calls * max(HOSTED_SECONDS / 4, 1 / spec.rate)
        price = prices.call(spec.remote_id or spec.name, TOKENS_IN, TOKENS_OUT) if spec.needs_key else 0.0
        paid += calls if spec.needs_key else 0
        dollars = dollars + calls * price if price is not None and dollars is not None else None
    references = ""
    if form["skill"] == "recipe":
        longest = format_duration(photos * POOL_SECONDS)
        references = f" The {POOL_SIZE} reference recipes take up to {longest} more, for photos that are new here."
    cost = "It costs nothing." if not paid else f"{paid:,} paid calls cost about "
    if paid:
        cost += "an unknown amount." if dollars is None else f"${dollars:.2f}."
    queue = f" It waits for {waiting} other{'s' if waiting > 1 else ''} first." if waiting else ""
    return (
        f"{entries} model{'s' if entries > 1 else ''} × {'' if exact else 'up to '}{photos:,} photos × {candidates} "
        f"candidates: about {format_duration(seconds)}.{references} {cost}{queue}"
    )


def _photo_count(form: dict[str, Any]) -> tuple[int, bool]:
    """Return the number of photos, and whether it is exact."""
    limit = int(form["max_photos"] or 1)
    if form["photo_source"] == HELD_OUT:
        return min(limit, len(bundled_photos("held-out"))), True
    files = form["files"] or []
    if form["photo_source"] == UPLOADED and files and not str(files[0]).lower().endswith(".zip"):
        return min(limit, len(files)), True
    return limit, False
