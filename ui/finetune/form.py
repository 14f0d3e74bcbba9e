"""The form of the Fine-tune tab: its inputs, and which of them are visible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from access.roles import Role, Visitor
from inference.types import MAX_SEED
from recipes import MAX_BYTES
from rewards import REWARDS
from training.hosted.client import BASE
from training.hosted.trainer import has_api_key
from training.runs import hf_jobs
from training.runs.run import MAX_NAME, MAX_STEPS, RunConfig, RunError
from ui.finetune.estimate import (
    BACKENDS,
    DEFAULT_HARDWARE,
    DEFAULT_ROLLOUTS,
    DEFAULT_STEPS,
    LENGTHS,
    estimate,
    format_price,
)
from ui.services import AppServices

BUNDLED, UPLOADED, HUB_DATASET = PHOTO_SOURCES = ("Bundled photos", "My photos", "Hub dataset")
LEARNING_RATE = RunConfig.model_fields["learning_rate"].default
HOSTED_LEARNING_RATE = 2e-4  # the tuning API's default; its former default, 2e-3, was too high
REWARD_HTML = '<p class="tune-label">Reward</p><p class="tune-reward"></p><p class="tune-hint"></p>'
REWARD_JS = """
function draw() {
  const weights = Object.entries(props.value || {}).filter(([, weight]) => weight > 0);
  element.querySelector('.tune-reward').textContent =
    weights.map(([name, weight]) => name + ' ' + weight).join(' · ') || 'All sliders are at zero';
  element.querySelector('.tune-hint').textContent = 'Set by the sliders in the Playground.';
}
watch('value', draw);
draw();
"""
GUEST_BACKEND = "Guests cannot use Hugging Face Jobs and the tuning API."
NO_AUTOCOMPLETE = gr.InputHTMLAttributes(autocomplete="off")


@dataclass(frozen=True)
class RetrainForm:
    """The components of the form.

    Attributes:
        reward: Shows the reward weights of the Playground's sliders.
        fields: The inputs by name: the ones of RunConfig under its names, and `photo_source`, `files`, `dataset`,
            `length`, `hub_token` and `moondream_key`.
        jobs_group: Inputs that only Hugging Face Jobs needs.
        hosted_group: Inputs that only Moondream's tuning API needs.
        estimate: Shows the estimated duration and cost.
        submit: The button that queues the run.
        note: Says why the button is disabled.
    """

    reward: gr.HTML
    fields: dict[str, Any]
    jobs_group: gr.Group
    hosted_group: gr.Group
    estimate: gr.Markdown
    submit: gr.Button
    note: gr.Markdown


@dataclass(frozen=True)
class PushForm:
    """The components that push a model to the Hugging Face Hub. The note says why the button is disabled."""

    repository: gr.Textbox
    token: gr.Textbox
    private: gr.Checkbox
    submit: gr.Button
    note: gr.Markdown
    result: gr.Textbox


def draw_form(services: AppServices, base_models: list[tuple[str, str]]) -> RetrainForm:
    """Draw the form in the current column.

    Args:
        services: The application's services.
        base_models: Title and name of each model that a run can start from.
    """
    fields: dict[str, Any] = {}
    reward = gr.HTML(
        value=dict.fromkeys(REWARDS, 1),
        html_template=REWARD_HTML,
        js_on_load=REWARD_JS,
        apply_default_css=False,
        elem_id="tune-reward",
    )
    fields["base"] = gr.Dropdown(
        base_models, value=base_models[0][1] if base_models else None, label="Base model", elem_id="tune-base"
    )

    fields |= draw_photo_inputs(PHOTO_SOURCES, "Training photos", "tune")

    fields["length"] = gr.Radio(
        [(f"{name} ({steps} steps)" if steps else name, name) for name, steps in LENGTHS.items()],
        value="Short run",
        label="Length",
        elem_id="tune-length",
    )
    fields["steps"] = gr.Number(
        DEFAULT_STEPS, label="Steps", precision=0, minimum=1, maximum=MAX_STEPS, visible=False, elem_id="tune-steps"
    )
    with gr.Row(elem_classes="settings-row"):
        fields["seed"] = gr.Number(
            1, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=80, elem_id="tune-seed"
        )
        fields["name"] = gr.Textbox(
            label="Name",
            placeholder="Optional",
            max_length=MAX_NAME,
            max_lines=1,
            min_width=120,
            elem_id="tune-name",
        )
    defaults = RunConfig.model_fields
    with gr.Accordion("Advanced", open=False, elem_id="tune-advanced"):
        fields["learning_rate"] = gr.Number(LEARNING_RATE, label="Learning rate", minimum=0, maximum=1, step=1e-4)
        fields["beta"] = gr.Number(defaults["beta"].default, label="KL weight (beta)", minimum=0, maximum=10, step=0.01)
        fields["rollouts"] = gr.Slider(2, 32, DEFAULT_ROLLOUTS, step=1, label="Rollouts per photo")
        fields["rank"] = gr.Slider(1, 64, defaults["rank"].default, step=1, label="LoRA rank")

    fields["backend"] = gr.Radio(list(BACKENDS), value=next(iter(BACKENDS)), label="Train on", elem_id="tune-backend")
    with gr.Group(visible=False, elem_id="tune-jobs") as jobs_group:
        fields["hardware"] = gr.Dropdown(
            [DEFAULT_HARDWARE],
            value=DEFAULT_HARDWARE,
            label="Hardware",
            allow_custom_value=True,
            elem_id="tune-hardware",
        )
        fields["hub_token"] = gr.Textbox(
            label="Hugging Face token",
            type="password",
            max_lines=1,
            info="The job runs on your account. The token is used for this run only and is not stored.",
            html_attributes=NO_AUTOCOMPLETE,
            elem_id="tune-token",
        )
    with gr.Group(visible=False, elem_id="tune-hosted") as hosted_group:
        gr.Markdown(
            f"Trains **{BASE}**, the API's only base model, on your Moondream account. Photos are sent to it.",
            elem_id="tune-hosted-note",
        )
        fields["moondream_key"] = gr.Textbox(
            label="Moondream API key",
            type="password",
            max_lines=1,
            info="Used for this run only and not stored.",
            html_attributes=NO_AUTOCOMPLETE,
            elem_id="tune-key",
        )
        with gr.Row(elem_classes="settings-row"):
            fields["budget"] = gr.Number(
                5.0, label="Budget (US $)", minimum=0.01, maximum=10_000, min_width=90, elem_id="tune-budget"
            )
            fields["sft_steps"] = gr.Number(
                10, label="SFT steps", precision=0, minimum=0, maximum=200, min_width=90, elem_id="tune-sft-steps"
            )

    estimated = gr.Markdown(estimate(services, "Short run", DEFAULT_STEPS, DEFAULT_ROLLOUTS), elem_id="tune-estimate")
    submit = gr.Button("Retrain with this reward", variant="primary", elem_id="tune-start")
    note = gr.Markdown(visible=False, elem_id="tune-note")
    return RetrainForm(reward, fields, jobs_group, hosted_group, estimated, submit, note)


def draw_photo_inputs(sources: Sequence[str], label: str, prefix: str) -> dict[str, Any]:
    """Draw the inputs that choose a set of photos, with the first source chosen.

    Args:
        sources: The sources; `photo_source_changed` shows the input of UPLOADED or HUB_DATASET.
        label: Label of the sources.
        prefix: Prefix of the components' ids.

    Returns:
        The inputs `photo_source`, `files` and `dataset`.
    """
    return {
        "photo_source": gr.Radio(list(sources), value=sources[0], label=label, elem_id=f"{prefix}-photos"),
        "files": gr.File(
            label=f"Photos or one zip file, up to {MAX_BYTES // 1_000_000} MB each",
            file_count="multiple",
            file_types=["image", ".zip"],
            height=160,
            visible=False,
            elem_id=f"{prefix}-files",
        ),
        "dataset": gr.Textbox(
            label="Dataset on the Hub",
            placeholder="owner/name",
            max_length=200,
            max_lines=1,
            visible=False,
            elem_id=f"{prefix}-dataset",
        ),
    }


def draw_push_form() -> PushForm:
    """Draw the form that pushes the displayed run's model to the Hugging Face Hub."""
    with gr.Accordion("Push this model to the Hugging Face Hub", open=False, elem_id="push"):
        with gr.Row():
            repository = gr.Textbox(label="Repository", placeholder="owner/name", max_lines=1, min_width=160)
            token = gr.Textbox(
                label="Access token",
                type="password",
                max_lines=1,
                min_width=160,
                info="Used for this push only and not stored.",
                html_attributes=NO_AUTOCOMPLETE,
            )
        private = gr.Checkbox(True, label="Private repository")
        submit = gr.Button("Push", size="sm", min_width=80)
        note = gr.Markdown(visible=False, elem_id="push-note")
        result = gr.Textbox(label="Result", interactive=False, max_lines=2)
    return PushForm(repository, token, private, submit, note, result)


# ── Handlers: what the inputs offer ──────────────────────────────────────────────────────────────────────────────


def visitor_updates(visitor: Visitor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return updates of the backend, which guests cannot choose, and of the Moondream API key's placeholder."""
    is_guest = visitor.role == Role.GUEST
    uses_deployment_key = visitor.role == Role.ADMIN and has_api_key()
    placeholder = "Leave empty to use this deployment's key" if uses_deployment_key else ""
    backend = gr.update(interactive=not is_guest, info=GUEST_BACKEND if is_guest else None)
    return backend, gr.update(placeholder=placeholder)


def photo_source_changed(source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Show the file input for uploaded photos, or the dataset name for a dataset of the Hub."""
    return gr.update(visible=source == UPLOADED), gr.update(visible=source == HUB_DATASET)


def length_changed(length: str) -> dict[str, Any]:
    """Show the number of steps for a custom length."""
    return gr.update(visible=length == "Custom")


def backend_changed(backend: str) -> tuple[Any, ...]:
    """Adapt the form to a backend.

    Returns:
        Updates of the base model, the learning rate, the jobs group, the hosted group and the hardware; and the hourly
        prices in US dollars by hardware flavor.
    """
    backend_id = BACKENDS.get(backend)
    hosted, jobs = backend_id == "hosted", backend_id == "jobs"
    hardware, hourly_prices = _hardware_choices() if jobs else (gr.skip(), {})
    return (
        gr.update(visible=not hosted),
        gr.update(value=HOSTED_LEARNING_RATE if hosted else LEARNING_RATE),
        gr.update(visible=jobs),
        gr.update(visible=hosted),
        hardware,
        hourly_prices,
    )


def _hardware_choices() -> tuple[dict[str, Any], dict[str, float | None]]:
    try:
        flavors = hf_jobs.list_hardware()
    except RunError as error:
        info = f"{error} Prices are not available. Enter the name of a hardware flavor if you know it."
        return gr.update(choices=[DEFAULT_HARDWARE], info=info), {}
    choices = [
        (f"{flavor.name} · {format_price(flavor.hourly)} an hour · {flavor.description}", flavor.name)
        for flavor in flavors
    ]
    prices = {flavor.name: flavor.hourly for flavor in flavors}
    return gr.update(choices=choices, info="Current prices from the Hugging Face Hub."), prices
