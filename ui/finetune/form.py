"""The form of the Fine-tune tab: what is asked, and which inputs are shown when."""

from __future__ import annotations

from typing import Any

import gradio as gr

from inference.types import MAX_SEED
from recipes import MAX_BYTES
from rewards import REWARDS
from training.hosted.client import BASE
from training.hosted.trainer import has_key
from training.runs import hf_jobs as jobs
from training.runs.run import MAX_NAME, MAX_STEPS, RunConfig, RunError
from ui.finetune.estimate import DEFAULT_HARDWARE, LENGTHS, PLACES, SHORT, estimate, price
from ui.services import AppServices

PHOTOS = ("Bundled photos", "My photos", "Hub dataset")
RATE_HERE = RunConfig.model_fields["learning_rate"].default
RATE_HOSTED = 2e-4  # the tuning API's own default; ten times that was its old one, and too much
REWARD_HTML = '<p class="tune-label">Reward</p><p class="tune-reward"></p><p class="tune-hint"></p>'
REWARD_JS = """
function draw() {
  const weights = Object.entries(props.value || {}).filter(([, weight]) => weight > 0);
  element.querySelector('.tune-reward').textContent =
    weights.map(([name, weight]) => name + ' ' + weight).join(' · ') || 'All sliders are at zero';
  element.querySelector('.tune-hint').textContent = 'As the sliders stand in the Playground.';
}
watch('value', draw);
draw();
"""
FORM = (
    "base",
    "kind",
    "files",
    "dataset",
    "length",
    "steps",
    "seed",
    "name",
    "learning_rate",
    "beta",
    "rollouts",
    "rank",
    "place",
    "hardware",
    "token",
    "key",
    "budget",
    "examples",
)


def draw_form(
    services: AppServices, offered: list[tuple[str, str]]
) -> tuple[gr.HTML, list[Any], list[gr.Group], gr.Markdown, gr.Button]:
    """The left column: the reward, the parts in the order of FORM, the groups for a job and for the tuning API, the
    estimate, and the button. offered: what a run can start from."""
    default = RunConfig.model_fields
    reward = gr.HTML(
        value=dict.fromkeys(REWARDS, 1),
        html_template=REWARD_HTML,
        js_on_load=REWARD_JS,
        apply_default_css=False,
        elem_id="tune-reward",
    )
    base = gr.Dropdown(offered, value=offered[0][1] if offered else None, label="Start from", elem_id="tune-base")
    kind = gr.Radio(list(PHOTOS), value=PHOTOS[0], label="Photos to learn from", elem_id="tune-photos")
    files = gr.File(
        label=f"Photos or one zip, up to {MAX_BYTES // 1_000_000} MB each",
        file_count="multiple",
        file_types=["image", ".zip"],
        height=160,
        visible=False,
        elem_id="tune-files",
    )
    dataset = gr.Textbox(
        label="Dataset on the Hub",
        placeholder="owner/name",
        max_length=200,
        max_lines=1,
        visible=False,
        elem_id="tune-dataset",
    )
    length = gr.Radio(
        [(f"{name} ({steps} steps)" if steps else name, name) for name, steps in LENGTHS.items()],
        value="Short run",
        label="Length",
        elem_id="tune-length",
    )
    steps = gr.Number(
        SHORT, label="Steps", precision=0, minimum=1, maximum=MAX_STEPS, visible=False, elem_id="tune-steps"
    )
    with gr.Row(elem_classes="knobs"):
        seed = gr.Number(1, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=80, elem_id="tune-seed")
        name = gr.Textbox(
            label="Name",
            placeholder="After its reward",
            max_length=MAX_NAME,
            max_lines=1,
            min_width=120,
            elem_id="tune-name",
        )
    with gr.Accordion("Advanced", open=False, elem_id="tune-advanced"):
        rate = gr.Number(default["learning_rate"].default, label="Learning rate", minimum=0, maximum=1, step=1e-4)
        beta = gr.Number(default["beta"].default, label="KL weight (beta)", minimum=0, maximum=10, step=0.01)
        rollouts = gr.Slider(2, 32, default["rollouts"].default, step=1, label="Answers per photo (rollouts)")
        rank = gr.Slider(1, 64, default["rank"].default, step=1, label="Rank of the adapter")
    place = gr.Radio(list(PLACES), value=next(iter(PLACES)), label="Where", elem_id="tune-place")
    job, hardware, token = _job_form()
    api, key, budget, examples = _hosted_form()
    about = gr.Markdown(estimate(services, "Short run", SHORT, 8), elem_id="tune-estimate")
    start = gr.Button("Retrain with this reward", variant="primary", elem_id="tune-start")
    knobs = [base, kind, files, dataset, length, steps, seed, name, rate, beta, rollouts, rank]
    return reward, [*knobs, place, hardware, token, key, budget, examples], [job, api], about, start


def _job_form() -> tuple[gr.Group, gr.Dropdown, gr.Textbox]:
    """What a run on Hugging Face Jobs needs."""
    with gr.Group(visible=False, elem_id="tune-job") as job:
        hardware = gr.Dropdown(
            [DEFAULT_HARDWARE],
            value=DEFAULT_HARDWARE,
            label="Hardware",
            allow_custom_value=True,
            elem_id="tune-hardware",
        )
        token = gr.Textbox(
            label="Your Hugging Face token",
            type="password",
            max_lines=1,
            info="The job runs on your account. The token is used for this run only, and kept nowhere.",
            html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
            elem_id="tune-token",
        )
    return job, hardware, token


def _hosted_form() -> tuple[gr.Group, gr.Textbox, gr.Number, gr.Number]:
    """What a run on Moondream's tuning API needs."""
    with gr.Group(visible=False, elem_id="tune-hosted") as group:
        gr.Markdown(
            f"Trains **{BASE}**, the one model of this API, on your Moondream account. The photos are sent there.",
            elem_id="tune-hosted-note",
        )
        key = gr.Textbox(
            label="Your Moondream key",
            type="password",
            max_lines=1,
            placeholder="Empty: this deployment's own" if has_key() else "",
            info="Used for this run only, and kept nowhere.",
            html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
            elem_id="tune-key",
        )
        with gr.Row(elem_classes="knobs"):
            budget = gr.Number(
                5.0, label="Budget (US $)", minimum=0.01, maximum=10_000, min_width=90, elem_id="tune-budget"
            )
            examples = gr.Number(
                10,
                label="Examples first (steps)",
                precision=0,
                minimum=0,
                maximum=200,
                min_width=90,
                elem_id="tune-examples",
            )
    return group, key, budget, examples


def draw_push_form() -> tuple[gr.Textbox, gr.Textbox, gr.Checkbox, gr.Button, gr.Textbox]:
    with gr.Accordion("Push this model to the Hugging Face Hub", open=False, elem_id="push"):
        with gr.Row():
            repository = gr.Textbox(label="Repository", placeholder="you/sharper-moondream", max_lines=1, min_width=160)
            token = gr.Textbox(
                label="Your access token",
                type="password",
                max_lines=1,
                min_width=160,
                info="Used once, kept nowhere.",
                html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
            )
        private = gr.Checkbox(True, label="Private")
        send = gr.Button("Push", size="sm", min_width=80)
        said = gr.Textbox(label="Result", interactive=False, max_lines=2)
    return repository, token, private, send, said


# ── What is shown when ──


def photos_chosen(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs for own photos and for a dataset, each only where it is wanted."""
    return gr.update(visible=kind == PHOTOS[1]), gr.update(visible=kind == PHOTOS[2])


def length_chosen(length: str) -> dict[str, Any]:
    """The input for the number of steps, where one is wanted."""
    return gr.update(visible=length == "Custom")


def place_chosen(place: str) -> list[Any]:
    """What the place of a run changes: base and learning rate, the groups for a job and for the tuning API, the
    hardware on offer, and what it costs an hour."""
    where = PLACES.get(place)
    rate = gr.update(value=RATE_HOSTED if where == "hosted" else RATE_HERE)
    same = [gr.update(visible=where != "hosted"), rate, gr.update(visible=where == "jobs")]
    same.append(gr.update(visible=where == "hosted"))
    return [*same, *(_hardware() if where == "jobs" else (gr.skip(), {}))]


def _hardware() -> tuple[dict[str, Any], dict[str, float | None]]:
    try:
        offered = jobs.hardware()
    except RunError as error:
        reason = f"{error} So there are no prices; name the hardware if you know it."
        return gr.update(choices=[DEFAULT_HARDWARE], info=reason), {}
    choices = [(f"{one.name} · {price(one.hourly)} an hour · {one.words}", one.name) for one in offered]
    return gr.update(choices=choices, info="Prices as the Hub tells them now."), {
        one.name: one.hourly for one in offered
    }
