"""The Playground tab: run several models on a photo and rank their answers with the reward sliders."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from access.roles import Visitor
from inference.types import (
    LENGTHS,
    MAX_CANDIDATES,
    MAX_SEED,
    MAX_TEMPERATURE,
    SKILLS,
    Request,
    RequestError,
)
from recipes import Recipe, jpeg_data_url, render, save_picture, shrink
from rewards import REWARDS, RewardFunction
from ui.api import compare as api
from ui.events import PRIVATE, UNQUEUED
from ui.files import download_on, new_file, writing
from ui.messages import as_gradio_error, show_warning, user_error
from ui.permissions import visitor_of
from ui.playground import code_panel, preference_panel, reward_functions
from ui.playground.compare import PICTURE_QUALITY, Candidate, Comparison, ComparisonMeter, compare
from ui.playground.example import EXAMPLE_SETTINGS, load_example
from ui.playground.grid import candidate_grid, grid_snapshot
from ui.playground.limits import LimitError
from ui.playground.link import LINK_FIELDS, PlaygroundSettings, link_js, read_link
from ui.playground.models import VisitorModels, parse_key, visitor_models
from ui.playground.photo import photo_input, read_photo
from ui.playground.picker import check_models, choices
from ui.playground.report import report
from ui.playground.samples import SAMPLES, sample_gallery
from ui.playground.saved_functions import SavedFunctions
from ui.services import AppServices, SharedComponents

TAB = "Playground"
NO_COMPARISON = "There is no comparison in this page. Run one first."
MAX_COMPARISONS = 32  # running at the same time on this deployment; Gradio queues the others
BROWSER_FORMATS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif")  # that browsers can display


@dataclass(frozen=True)
class Session:
    """The comparison that a browser tab displays.

    Attributes:
        run_id: Id of the comparison.
        cancel: Set it to stop the models.
        photo: Path of the photo.
        settings: The settings of the comparison.
        comparison: Its last snapshot, without pictures.
    """

    run_id: str
    cancel: threading.Event
    photo: str
    settings: PlaygroundSettings
    comparison: Comparison


# ── Handlers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def open_page(services: AppServices, visitor: Visitor, query: Mapping[str, str], browser: Any) -> dict[str, Any]:
    """Return the values of the page's components, by input name: those that its URL requests, and the visitor's own.

    Invalid parameters keep their default and are listed in a warning. If the URL names no models, the newest enabled
    tuned model that the visitor sees is selected beside its base model.

    Args:
        services: The application's services.
        visitor: The visitor.
        query: The URL's parameters.
        browser: The reward functions that a guest's browser keeps.

    Returns:
        The values, also of the grid and the session: the example if the URL requests nothing else.
    """
    models = visitor_models(services.adapters, visitor)
    saved = SavedFunctions(services.store, visitor, browser)
    settings, problems = read_link(query, models.specs)
    if not any(query.get(name) for name in LINK_FIELDS):
        settings = replace(settings, photo=EXAMPLE_SETTINGS.photo)
    example = example_session() if replace(settings, reward=EXAMPLE_SETTINGS.reward) == EXAMPLE_SETTINGS else None
    tuned = services.adapters.newest_with_base(visitor.id)
    if tuned and not query.get("models"):
        settings = replace(settings, models=tuple(tuned))
    if problems:
        show_warning(f"Some parameters of this link are invalid and were ignored: {'; '.join(problems)}.", "Link")
    prompt, length, reasoning = skill_changed(settings.skill, settings.prompt)
    length["value"] = settings.length
    return {
        "models": gr.HTML(value=list(settings.models), choices=choices(models)),
        "skill": settings.skill,
        "prompt": prompt,
        "length": length,
        "n": settings.n,
        "temperature": settings.temperature,
        "seed": settings.seed,
        "photo": settings.photo,
        "upload": str(SAMPLES[settings.photo].path) if settings.photo else None,
        "grid": gr.skip() if example else None,
        "session": example,
        "reasoning": reasoning,
        "sliders": reward_functions.to_sliders(settings.reward),
        "saved": gr.update(choices=reward_functions.choices(saved)),
        "saved_note": reward_functions.storage_note(visitor, services.access.mode),
    }


def example_session() -> Session | None:
    """Return a session that displays the example, or None if there is none."""
    example, sample = load_example(), SAMPLES.get(EXAMPLE_SETTINGS.photo)
    if example is None or sample is None:
        return None
    return Session("example", threading.Event(), str(sample.path), EXAMPLE_SETTINGS, example.without_pictures())


def example_snapshot() -> dict[str, Any] | None:
    """Return the first value of the grid, with which the page is painted: the example, or None if there is none."""
    session, example = example_session(), load_example()
    if session is None or example is None:
        return None
    snapshot = grid_snapshot(example, session.run_id, photo_preview(read_photo(session.photo)))
    columns = example.columns
    status = f"{len(columns[0].candidates)} answers of each of {len(columns)} models, computed beforehand."
    return snapshot | {"label": "Example", "status": f"{status} Move a slider, or choose a photo and run."}


def photo_preview(photo: np.ndarray) -> dict[str, Any]:
    """Return {src, width, height} of a photo for the grid; src is a small data URL."""
    height, width = photo.shape[:2]
    return {"src": jpeg_data_url(shrink(photo), PICTURE_QUALITY), "width": width, "height": height}


def skill_changed(name: str, prompt: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return updates of prompt, length and reasoning for a skill. A default prompt is replaced by the skill's own."""
    skill = SKILLS[name]
    takes_prompt = skill.prompt != "none"
    is_default = prompt in {"", *(other.default_prompt for other in SKILLS.values())}
    if not takes_prompt or (is_default and skill.prompt == "optional"):
        prompt = ""
    elif is_default:
        prompt = skill.default_prompt
    placeholder = skill.placeholder if takes_prompt else f"{skill.title} takes no prompt"
    return (
        gr.update(value=prompt, placeholder=placeholder, interactive=takes_prompt),
        gr.update(visible=name == "caption"),
        gr.update(visible=name == "query"),
    )


def sample_selected(event: gr.EventData) -> str:
    """Return the path of the sample photo that was clicked."""
    sample = SAMPLES.get(str(event._data.get("file")) if isinstance(event._data, dict) else "")
    if sample is None:
        raise user_error("Unknown sample photo. Reload the page.", "Sample photos")
    return str(sample.path)


def photo_changed(path: str | None) -> tuple[str | None, str]:
    """Validate an uploaded photo and deselect the sample; show a warning if the photo cannot be used.

    Returns:
        Path of the photo, or None, and an empty sample name. A format that browsers cannot display, such as TIFF, is
        converted to PNG.
    """
    if not path:
        return None, ""
    try:
        photo = read_photo(path)
        if Path(path).suffix.lower() in BROWSER_FORMATS:
            return path, ""
        with writing():
            converted = new_file(f"{Path(path).stem}.png")
            save_picture(photo, Recipe(), converted)
            return str(converted), ""
    except gr.Error as error:
        gr.Warning(error.message, title=error.title, duration=12)
        return None, ""


def run(
    inputs: Mapping[str, Any], models: VisitorModels, meter: ComparisonMeter | None = None, visitor: str = ""
) -> Iterator[tuple[dict[str, Any], Session, Any, Any]]:
    """Run the selected models on the photo.

    Args:
        inputs: Values of the inputs, by name; see `_draw_inputs`.
        models: The models that the visitor may use.
        meter: Records one usage event per model; None records none.
        visitor: Hash of the visitor, for the usage events.

    Yields:
        Updates of the grid, the session state and the buttons Run and Cancel.

    Raises:
        gr.Error: An input is invalid.
    """
    names = check_models(inputs["models"], models.specs)
    photo = read_photo(inputs["upload"])
    request = build_request(photo, inputs)
    settings = PlaygroundSettings(
        photo=inputs["photo"] if inputs["photo"] in SAMPLES else "",
        models=tuple(names),
        skill=request.skill,
        prompt=request.prompt,
        length=request.length,
        n=request.n,
        temperature=request.temperature,
        seed=request.seed,
    )
    preview = photo_preview(photo)
    session = Session(
        secrets.token_hex(8), threading.Event(), str(inputs["upload"]), settings, Comparison(request.skill)
    )
    if meter:
        snapshots = meter.compare(
            names, request, session.cancel, "playground", visitor, models.answer, payer=models.payer
        )
    else:
        snapshots = compare(names, request, session.cancel, models.answer)
    with closing(snapshots):
        for comparison in snapshots:
            session = replace(session, comparison=comparison.without_pictures())
            running = comparison.status == "running"
            grid = grid_snapshot(comparison, session.run_id, preview)
            yield grid, session, gr.update(interactive=not running), gr.update(interactive=running)


def build_request(photo: np.ndarray | None, inputs: Mapping[str, Any]) -> Request:
    """Build the request from the inputs. Raises gr.Error if an input is invalid."""
    with as_gradio_error(RequestError, title="Invalid input"):
        return Request(
            photo,  # type: ignore[arg-type]
            inputs["skill"],
            inputs["prompt"] or "",
            inputs["length"],
            inputs["n"],
            inputs["temperature"],
            inputs["seed"],
            bool(inputs["reasoning"]) and inputs["skill"] == "query",
        )


def cancel(session: Session | None) -> None:
    """Cancel the session's comparison; its models stop at their next token. Raises gr.Error if it has none."""
    if session is None:
        raise user_error(NO_COMPARISON, "Cancel")
    session.cancel.set()


def render_full_size(session: Session | None, event: gr.EventData) -> str:
    """Render a candidate's picture in full size, with the recipe in the file's metadata, and return its path."""
    if session is None:
        raise user_error(NO_COMPARISON, "Download")
    candidate = _find_candidate(session, event._data)
    if candidate is None or candidate.recipe is None:
        raise user_error("The candidate is no longer available. Run again.", "Download")
    picture = render(read_photo(session.photo), candidate.recipe)
    with writing():
        path = new_file(f"{Path(session.photo).stem}-{session.settings.seed + candidate.index}.jpg")
        save_picture(picture, candidate.recipe, path)
    return str(path)


def write_report(session: Session | None, *weights: float) -> str:
    """Write settings, answers, scores and totals of the displayed comparison to a JSON file and return its path."""
    if session is None:
        raise user_error(NO_COMPARISON, "Report")
    reward = RewardFunction(dict(zip(REWARDS, weights, strict=True))) if any(weights) else None
    content = json.dumps(report(session.settings, session.comparison, reward), indent=2)
    with writing():
        path = new_file("report.json")
        path.write_text(content + "\n", encoding="utf-8")
    return str(path)


def _find_candidate(session: Session, key: Any) -> Candidate | None:
    if not isinstance(key, dict):
        return None
    for column in session.comparison.columns:
        for candidate in column.candidates:
            if (column.name, candidate.index) == (key.get("model"), key.get("index")):
                return candidate
    return None


# ── Layout ──────────────────────────────────────────────────────────────────────────────────────────────────────────

# Sends the weights to grid.js.
WEIGHTS_JS = f"""(...weights) => {{
  const detail = Object.fromEntries({json.dumps(list(REWARDS))}.map((name, index) => [name, weights[index]]));
  document.dispatchEvent(new CustomEvent('playground-weights', {{detail}}));
  return [];
}}"""
# Lets style.css hide the sliders for skills that are not scored.
SKILL_JS = "skill => { document.querySelector('#results').dataset.skill = skill; return []; }"
# Marks that the URL has been applied: inputs that a browser test sets earlier would be overwritten.
OPENED_JS = "() => { document.body.dataset.opened = 'yes'; return []; }"
# Clicks the tab, because selecting it by an update triggers no `select` event.
OPEN_FINE_TUNE_JS = """() => {
  [...document.querySelectorAll('[role=tab]')].find(tab => tab.textContent.trim() === 'Fine-tune').click();
  scrollTo({top: 0});
  return [];
}"""
RANDOM_SEED_JS = "() => Math.floor(Math.random() * 10000)"
RESET_LABEL_JS = "() => new Promise(resolve => setTimeout(resolve, 1500, 'Copy link'))"


def build(services: AppServices, shared_components: SharedComponents) -> None:
    """Build the tab: the inputs on the left, the results on the right."""
    sliders = shared_components.sliders
    session = gr.State(None, time_to_live=6 * 3600)
    download = gr.File(visible=False)
    with gr.Row(elem_id="playground"):
        with gr.Column(elem_id="inputs", min_width=320, scale=1):
            inputs = _draw_inputs(shared_components.picker)
            shared_components.playground.update(inputs)
            with gr.Row(elem_id="run-actions"):
                run_button = gr.Button("Run", variant="primary", elem_id="run", min_width=120)
                cancel_button = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel", min_width=120)
        with gr.Column(elem_id="results", min_width=320, scale=3):
            with gr.Row(elem_id="weights"):
                for slider in sliders:
                    slider.render()
            saved = reward_functions.build(services, sliders, download)
            preferences = preference_panel.preference_panel()
            grid = candidate_grid(example_snapshot())
            with gr.Row(elem_id="result-actions"):
                fine_tune = gr.Button(
                    "Fine-tune with this reward", size="sm", elem_id="fine-tune-reward", min_width=120
                )
                copy_link = gr.Button("Copy link", size="sm", elem_id="copy-link", min_width=120)
                report_button = gr.Button("Download report", size="sm", elem_id="report", min_width=120)
            code = code_panel.code_panel()
    api.build(services)

    # Opening the page. Queued, because only queued events can show a warning. The only queued event of the page's load:
    # if a second one ends before its request is answered, Gradio's client opens a stream that nothing closes.
    outputs = {name: component for name, component in inputs.items() if name != "key"}
    outputs |= {"grid": grid, "session": session}

    def page_opened(request: gr.Request, browser: Any) -> dict[Any, Any]:
        if services.warm_up:
            services.warm_up.start()
        values = open_page(services, visitor_of(services.access, request), dict(request.query_params), browser)
        updates = {outputs[name]: values[name] for name in outputs}
        updates |= dict(zip(sliders, values["sliders"], strict=True))
        return updates | {saved.selected: values["saved"], saved.note: values["saved_note"]}

    opened = shared_components.page.load(
        page_opened, saved.browser, [*outputs.values(), *sliders, saved.selected, saved.note], **PRIVATE
    )
    opened.then(None, None, None, js=OPENED_JS, **PRIVATE)

    # Inputs
    upload, photo, skill, key = inputs["upload"], inputs["photo"], inputs["skill"], inputs["key"]
    photo.choose(sample_selected, None, upload, **UNQUEUED)
    photo_updated = upload.input(photo_changed, upload, [upload, photo], **PRIVATE)
    skill.input(
        skill_changed,
        [skill, inputs["prompt"]],
        [inputs["prompt"], inputs["length"], inputs["reasoning"]],
        **UNQUEUED,
    )
    skill.change(None, skill, None, js=SKILL_JS, **PRIVATE)

    def key_entered(text: str | None, request: gr.Request) -> dict[str, Any]:
        models = visitor_models(services.adapters, visitor_of(services.access, request), parse_key(text))
        return gr.HTML(choices=choices(models))  # type: ignore[return-value]

    gr.on([key.blur, key.submit], key_entered, key, inputs["models"], **UNQUEUED)

    # Running. The progress on the grid contains the position in the queue, which grid.js displays.
    def run_clicked(values: dict[Any, Any], request: gr.Request) -> Iterator[Any]:
        named = {name: values[component] for name, component in inputs.items()}
        visitor = visitor_of(services.access, request)
        with as_gradio_error(LimitError, title="Too many comparisons"), services.comparisons.admit(visitor):
            models = visitor_models(services.adapters, visitor, parse_key(named["key"]))
            yield from run(named, models, services.meter, visitor.hash)

    run_button.click(
        run_clicked,
        set(inputs.values()),
        [grid, session, run_button, cancel_button],
        concurrency_limit=MAX_COMPARISONS,
        **PRIVATE | {"show_progress": "minimal", "show_progress_on": grid},
    )
    cancel_button.click(cancel, session, None, **UNQUEUED)

    # Results
    gr.on([slider.change for slider in sliders], None, sliders, None, js=WEIGHTS_JS, **PRIVATE)
    download_on(grid.download, render_full_size, [session], download)
    download_on(report_button.click, write_report, [session, *sliders], download)
    fine_tune.click(None, None, None, js=OPEN_FINE_TUNE_JS, **PRIVATE)

    # Link and code. Changes that the server makes are written to the link when they have arrived.
    link_values = [*(inputs[name] for name in LINK_FIELDS), *sliders]
    code_panel.build(services, code, link_values)
    fitted = preference_panel.build(services, preferences, grid, session, sliders, download, OPEN_FINE_TUNE_JS)
    changes = [photo.choose, inputs["models"].choose, inputs["seed"].change, run_button.click]
    changes += [inputs["prompt"].change]  # emptying it triggers no `input`
    changes += [inputs[name].input for name in ("skill", "length", "n", "temperature")]
    changes += [slider.input for slider in sliders]
    changes += [update.then for update in (photo_updated, *fitted, *saved.loaded)]
    for change in changes:  # gr.on does not accept the events of gr.HTML
        change(None, link_values, None, js=link_js(copy=False), **PRIVATE)
    copied = copy_link.click(None, link_values, copy_link, js=link_js(copy=True), **PRIVATE)
    copied.then(None, None, copy_link, js=RESET_LABEL_JS, **PRIVATE)


def _draw_inputs(picker: gr.HTML) -> dict[str, Any]:
    """Draw the inputs. They are named like the fields of PlaygroundSettings, and `upload`, `reasoning` and `key`."""
    inputs: dict[str, Any] = {"models": picker}
    with gr.Column(elem_id="settings", min_width=0):
        with gr.Column(elem_id="photo-settings", min_width=0):
            sample = SAMPLES.get(EXAMPLE_SETTINGS.photo)
            photo = str(sample.path) if sample else None
            inputs["upload"] = photo_input(value=photo, label="Photo", height=240, elem_id="photo")
            inputs["photo"] = sample_gallery(sample.file if sample else "")
        with gr.Column(elem_id="model-settings", min_width=0):
            inputs |= _draw_model_settings(picker)
    return inputs


def _draw_model_settings(picker: gr.HTML) -> dict[str, Any]:
    """Draw the inputs other than the photo."""
    default = PlaygroundSettings()
    inputs: dict[str, Any] = {}
    inputs["skill"] = gr.Radio(
        [(skill.title, name) for name, skill in SKILLS.items()], value=default.skill, label="Skill", elem_id="skill"
    )
    inputs["prompt"] = gr.Textbox(
        label="Prompt", lines=1, max_lines=6, placeholder=SKILLS[default.skill].placeholder, elem_id="prompt"
    )
    inputs["length"] = gr.Radio(list(LENGTHS), value=default.length, label="Length", visible=False, elem_id="length")
    inputs["reasoning"] = gr.Checkbox(
        False, label="Reasoning", info="Hosted models only.", visible=False, container=False, elem_id="reasoning"
    )
    picker.render()
    with gr.Accordion("Moondream API key", open=False, elem_id="api-key"):
        inputs["key"] = gr.Textbox(
            label="API key",
            type="password",
            max_lines=1,
            info="For Moondream Cloud models, billed to your account. Kept in this page only, until you close it.",
            html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
            elem_id="key",
        )
    with gr.Row(elem_classes="settings-row"):
        slider: dict[str, Any] = {"min_width": 120, "buttons": []}
        inputs["n"] = gr.Slider(
            1, MAX_CANDIDATES, default.n, step=1, precision=0, label="Candidates", elem_id="n", **slider
        )
        inputs["temperature"] = gr.Slider(
            0, MAX_TEMPERATURE, default.temperature, step=0.1, label="Temperature", elem_id="temperature", **slider
        )
    with gr.Row(elem_classes="settings-row"):
        inputs["seed"] = gr.Number(
            default.seed, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=120, elem_id="seed"
        )
        new_seed = gr.Button("New seed", size="sm", min_width=90, elem_id="new-seed")
        new_seed.click(None, None, inputs["seed"], js=RANDOM_SEED_JS, **PRIVATE)
    return inputs
