"""The Evaluate tab: choose models and photos, follow an evaluation, and read its leaderboard."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from access.permissions import AccessDenied
from access.roles import Visitor
from inference.types import SKILLS
from rewards import REWARDS, RewardFunction
from storage.reward_functions import StoreError
from training.data import uploads
from training.evaluations.evaluation import Evaluation, EvaluationConfig
from training.evaluations.export import FORMATS, write_export
from training.evaluations.queue import NEEDS_KEY
from training.evaluations.runner import ModelAccess
from training.runs.run import RunError
from ui.evaluate.form import HELD_OUT, SLIDERS, draw_form, estimate_text, temperatures_of
from ui.evaluate.permissions import MAX_UNFINISHED, check_may_evaluate, evaluation_refusal, get_evaluation, visible
from ui.evaluate.view import (
    evaluation_view,
    fingerprint,
    list_snapshot,
    list_view,
    photos_snapshot,
    photos_view,
    snapshot,
    title_of,
)
from ui.events import PRIVATE, UNQUEUED, UNQUEUED_EACH, tab_selected
from ui.files import download_on, new_file, writing
from ui.finetune.form import UPLOADED, photo_source_changed
from ui.finetune.tab import hub_dataset
from ui.messages import as_gradio_error, show_info
from ui.permissions import visitor_of
from ui.playground.models import VisitorModels, parse_key, public_models, visitor_models
from ui.playground.picker import MAX_MODELS as MAX_COMPARED
from ui.playground.reward_functions import BROWSER_KEY, to_sliders
from ui.playground.reward_functions import choices as saved_choices
from ui.playground.saved_functions import SavedFunctions
from ui.services import AppServices, SharedComponents

TAB = "Evaluate"
TITLE = "Evaluation"
ERRORS = (RunError, AccessDenied)


# ── Handlers: display ───────────────────────────────────────────────────────────────────────────────────────────────


def reward_of(weights: Sequence[float]) -> RewardFunction | None:
    """Return the reward on the sliders; None if all are zero."""
    return RewardFunction(dict(zip(REWARDS, weights, strict=True))) if any(weights) else None


def displayed(services: AppServices, visitor: Visitor, selected: str | None) -> str:
    """Return the id of the evaluation to display: the selected one, else the newest that the visitor sees, or ""."""
    ids = [evaluation.id for evaluation in visible(services, visitor)]
    return selected if selected in ids else ids[0] if ids else ""


def refresh(
    services: AppServices,
    visitor: Visitor,
    selected: str | None,
    state: tuple[Any, ...] | None,
    options: dict[str, Any] | None,
    tab_open: bool,
    weights: Sequence[float],
) -> tuple[Any, Any, Any, Any]:
    """Update the views if anything has changed, and the timer.

    Returns:
        Updates of the evaluation, the list, the fingerprint of what they show, and the timer.
    """
    if not tab_open:
        return gr.skip(), gr.skip(), gr.skip(), gr.Timer(active=False)
    shown, options = displayed(services, visitor, selected), options or {}
    new = fingerprint(services, visitor, shown, weights, options)
    working = any(not evaluation.status().finished for evaluation in visible(services, visitor))
    if new == state:
        return gr.skip(), gr.skip(), gr.skip(), gr.Timer(active=working)
    with as_gradio_error(*ERRORS, title=TITLE):
        detail = snapshot(services, visitor, shown, reward_of(weights), options)
    return detail, list_snapshot(services, visitor, shown), new, gr.Timer(active=working)


def model_choices(models: VisitorModels) -> list[tuple[str, str]]:
    """Return title and name of each model that can be used."""
    return [(spec.title, name) for name, spec in models.specs.items() if models.unavailable(name) is None]


def skill_prompt(skill: str) -> dict[str, Any]:
    """Return an update of the prompt for a skill."""
    chosen = SKILLS[skill]
    value = chosen.default_prompt if chosen.prompt == "required" else ""
    return gr.update(value=value, placeholder=chosen.placeholder, interactive=chosen.prompt != "none")


# ── Handlers: actions ───────────────────────────────────────────────────────────────────────────────────────────────


def model_access(services: AppServices, visitor: Visitor, models: VisitorModels) -> ModelAccess:
    """Return how the models are called, with the rights of a visitor."""
    return ModelAccess(models.specs, models.answer, services.meter, visitor.hash, models.payer)


def submit(
    services: AppServices,
    visitor: Visitor,
    models: VisitorModels,
    chosen: Sequence[tuple[str, float]],
    reward: Mapping[str, float],
    **settings: Any,
) -> Evaluation:
    """Queue an evaluation of a visitor.

    Args:
        services: The application's services.
        visitor: The visitor, who owns the evaluation.
        models: The models that the visitor may use.
        chosen: Name and temperature of each model.
        reward: Weight of each reward by name.
        **settings: Further settings of `EvaluationConfig`.

    Raises:
        RunError: A setting is invalid, a model is unavailable, or too many evaluations wait.
        AccessDenied: The visitor may not start this evaluation.
    """
    entries = []
    for name, temperature in chosen:
        if name not in models.specs:
            raise RunError(f"There is no model called {name[:80]!r}. Choose from the list.")
        if reason := models.unavailable(name):
            raise RunError(f"{models.specs[name].title} cannot be used: {reason}")
        if settings.get("skill") == "segment" and not models.specs[name].segments:
            raise RunError(f"{models.specs[name].title} cannot segment. Choose another skill.")
        entries.append({"name": name, "temperature": temperature, "title": models.specs[name].title})
    config = EvaluationConfig.create(models=entries, reward=dict(reward), **settings)
    check_may_evaluate(services.access, visitor, config)
    own_key = models.payer == "visitor" and any(models.specs[name].needs_key for name, _ in chosen)
    access = model_access(services, visitor, models)
    return services.evaluation_queue.submit(
        config, access, visitor.id, visitor.name, own_key, MAX_UNFINISHED[visitor.role]
    )


def start(services: AppServices, visitor: Visitor, form: dict[str, Any], weights: Sequence[float]) -> str:
    """Queue the evaluation that the form describes and return its id. Raises gr.Error if an input is invalid."""
    models = visitor_models(services.adapters, visitor, parse_key(form["key"]))
    with as_gradio_error(*ERRORS, title=TITLE):
        function = reward_of(weights)
        if function is None:
            raise RunError("All sliders are at zero. Increase at least one.")
        missing = [name.replace("_", " ") for name in ("max_photos", "candidates", "seed") if form[name] is None]
        if missing:
            raise RunError(f"Fill in: {', '.join(missing)}.")
        if refusal := evaluation_refusal(services.access, visitor, form["max_photos"]):
            raise AccessDenied(refusal)  # before files are copied
        skill = SKILLS[form["skill"]]
        prompt = (form["prompt"] or "").strip() or skill.default_prompt
        photos = _photo_source(services, form, visitor)
        try:
            settings = {name: int(form[name]) for name in ("max_photos", "candidates", "seed")}
            return submit(
                services,
                visitor,
                models,
                [(name, temperature) for name in form["models"] or [] for temperature in _temperatures(form)],
                dict(function.weights),
                photos=photos,
                skill=skill.name,
                prompt=prompt if skill.prompt != "none" else "",
                name=(form["name"] or "").strip(),
                **settings,
            ).id
        except ERRORS:
            uploads.delete_unused(services.runs, photos)
            raise


def _temperatures(form: dict[str, Any]) -> list[float]:
    try:
        return temperatures_of(form["temperatures"])
    except ValueError:
        raise RunError("Temperatures are numbers from 0 to 2.") from None


def _photo_source(services: AppServices, form: dict[str, Any], visitor: Visitor) -> str:
    if form["photo_source"] == HELD_OUT:
        return "bundled"
    if form["photo_source"] != UPLOADED:
        return hub_dataset(form["dataset"])
    saved = uploads.save_photos(services.runs, form["files"] or [], visitor.id, services.upload_quota)
    if saved.message:
        show_info(saved.message, TITLE)
    return saved.source


def act(services: AppServices, visitor: Visitor, key: str, event: gr.EventData) -> str | None:
    """Execute the action of a button; returns the id of the evaluation to display, None after it was deleted."""
    data = _event_data(event)
    with as_gradio_error(*ERRORS, OSError, title=TITLE):
        evaluation = get_evaluation(services, visitor, data.get("evaluation"))
        match data.get("action"):
            case "cancel":
                services.evaluation_queue.cancel(evaluation)
            case "resume":
                resume(services, visitor, evaluation, key)
            case "rename":
                evaluation.rename(str(data.get("name") or ""))
            case "delete":
                delete(services, evaluation)
                return None
            case _:
                raise RunError("Unknown action. Reload the page.")
    return evaluation.id


def clear_key() -> str:
    """Clear the input of the API key."""
    return ""


def resume(services: AppServices, visitor: Visitor, evaluation: Evaluation, key: str = "") -> None:
    """Queue a stopped evaluation again, with the models and the key of this visitor. Raises RunError, AccessDenied."""
    check_may_evaluate(services.access, visitor, evaluation.config())
    models = visitor_models(services.adapters, visitor, parse_key(key))
    if evaluation.own_key and models.payer != "visitor":
        raise RunError(NEEDS_KEY)
    access = model_access(services, visitor, models)
    services.evaluation_queue.resume(evaluation, access, MAX_UNFINISHED[visitor.role])


def delete(services: AppServices, evaluation: Evaluation) -> None:
    """Delete an evaluation and the upload that it has not copied yet. Raises RunError."""
    if not evaluation.status().finished:
        raise RunError("This evaluation has not ended. Cancel it first.")
    photos = evaluation.config().photos
    services.evaluations.delete(evaluation.id)
    uploads.delete_unused(services.runs, photos)
    show_info("The evaluation was deleted.", TITLE)


def download(services: AppServices, visitor: Visitor, weights: Sequence[float], event: gr.EventData) -> str:
    """Write an export with the reward on the sliders and return its path."""
    data = _event_data(event)
    with as_gradio_error(*ERRORS, title=TITLE):
        evaluation = get_evaluation(services, visitor, data.get("evaluation"))
        if data.get("format") not in FORMATS:
            raise RunError("Unknown format. Reload the page.")
        config = evaluation.config()
        with writing():
            path = new_file(f"{title_of(evaluation, config)[:40]}-{evaluation.id[:15]}.{data['format']}")
            reference = data.get("reference")
            write_export(evaluation, reward_of(weights) or config.function, path, reference)
    return str(path)


def open_comparison(services: AppServices, visitor: Visitor, event: gr.EventData) -> dict[str, Any]:
    """Return values of the Playground's inputs for the comparison of a cell, by name.

    The model of the cell is compared with the others of the same temperature, as far as the Playground takes them.
    """
    data = _event_data(event)
    with as_gradio_error(*ERRORS, title=TITLE):
        evaluation = get_evaluation(services, visitor, data.get("evaluation"))
        config, photo, model = evaluation.config(), data.get("photo"), data.get("model")
        known = evaluation.photos() or []
        if not (isinstance(photo, int) and 0 <= photo < len(known)) or not (
            isinstance(model, int) and 0 <= model < len(config.models)
        ):
            raise RunError("This photo is no longer available. Reload the page.")
        specs, chosen = visitor_models(services.adapters, visitor).specs, config.models[model]
        if chosen.name not in specs:
            raise RunError(f"{chosen.title} is no longer available.")
        names = [chosen.name, *(other.name for other in config.models if other.temperature == chosen.temperature)]
        names = [name for name in dict.fromkeys(names) if name in specs][:MAX_COMPARED]
        with writing():
            path = new_file(f"{Path(known[photo]['name']).stem}.jpg")
            shutil.copyfile(evaluation.photo_file(photo), path)
    return {
        "upload": str(path),
        "photo": "",
        "models": gr.HTML(value=[name for name in specs if name in names]),
        "skill": config.skill,
        "prompt": config.prompt if config.prompt != SKILLS[config.skill].default_prompt else "",
        "n": config.candidates,
        "temperature": chosen.temperature,
        "seed": config.seed,
    }


def _event_data(event: gr.EventData) -> dict[str, Any]:
    return event._data if isinstance(event._data, dict) else {}


# ── Layout ──────────────────────────────────────────────────────────────────────────────────────────────────────────

# The progress is above the button that starts an evaluation, or on a phone below it.
SCROLL_JS = "() => { document.querySelector('#evaluation').scrollIntoView({block: 'start'}); return []; }"
# Clicks the Playground's tab and Run, once its inputs have their new values.
OPEN_PLAYGROUND_JS = """() => {
  [...document.querySelectorAll('[role=tab]')].find(tab => tab.textContent.trim() === 'Playground').click();
  scrollTo({top: 0});
  setTimeout(() => document.querySelector('#run').click(), 300);
  return [];
}"""


def build(services: AppServices, shared_components: SharedComponents) -> None:
    """Build the tab: the form on the left, the chosen evaluation and all others on the right."""
    selected, state, options, tab_open = gr.State(None), gr.State(None), gr.State({}), gr.State(False)
    browser = gr.BrowserState(None, storage_key=BROWSER_KEY, secret=BROWSER_KEY)
    timer, delivery = gr.Timer(1.0, active=False), gr.File(visible=False)
    with gr.Row(elem_id="evaluate"):
        with gr.Column(elem_id="evaluate-form", min_width=300, scale=1):
            form = draw_form(model_choices(public_models()))
        with gr.Column(elem_id="evaluate-results", min_width=320, scale=3):
            view, photos, evaluations = evaluation_view(), photos_view(), list_view()
    fields, sliders = form.fields, form.sliders

    def visitor(request: gr.Request) -> Visitor:
        return visitor_of(services.access, request)

    # Display
    def refreshed(
        request: gr.Request,
        selected: str | None,
        state: tuple[Any, ...] | None,
        options: dict[str, Any] | None,
        tab_open: bool,
        *weights: float,
    ) -> tuple[Any, Any, Any, Any]:
        return refresh(services, visitor(request), selected, state, options, tab_open, weights)

    refresh_inputs, refresh_outputs = [selected, state, options, tab_open, *sliders], [view, evaluations, state, timer]

    def refresh_after(event: Any, **settings: Any) -> Any:
        return event(refreshed, refresh_inputs, refresh_outputs, **UNQUEUED | settings)

    def options_changed(event: gr.EventData) -> dict[str, Any]:
        data = _event_data(event)
        reference, compare = data.get("reference"), data.get("compare")
        return {
            "reference": reference if isinstance(reference, int) else None,
            "compare": compare[:40] if isinstance(compare, str) else "",
        }

    def pick(event: gr.EventData) -> str | None:
        return str(_event_data(event).get("evaluation") or "") or None

    def photos_shown(request: gr.Request, event: gr.EventData, *weights: float) -> dict[str, Any] | None:
        with as_gradio_error(*ERRORS, title=TITLE):
            return photos_snapshot(services, visitor(request), _event_data(event), reward_of(weights))

    def tab_opened(content: Any, request: gr.Request) -> tuple[Any, Any]:
        who = visitor(request)
        saved = SavedFunctions(services.store, who, content)
        return (
            gr.update(choices=model_choices(visitor_models(services.adapters, who))),
            gr.update(choices=[SLIDERS, *saved_choices(saved)]),
        )

    refresh_after(timer.tick)
    opened = shared_components.tabs.select(tab_selected(TAB), None, tab_open, **UNQUEUED_EACH)
    opened.then(tab_opened, browser, [fields["models"], form.reward], **UNQUEUED)
    refresh_after(opened.then)
    refresh_after(partial(gr.on, [slider.change for slider in sliders]), trigger_mode="always_last")
    refresh_after(evaluations.pick(pick, None, selected, **UNQUEUED).then)
    refresh_after(view.options(options_changed, None, options, **UNQUEUED).then)
    photos.show(photos_shown, sliders, photos, **UNQUEUED)

    # Form
    def reward_chosen(request: gr.Request, name: str | None, content: Any, *weights: float) -> list[float]:
        if not name or name == SLIDERS:
            return list(weights)
        with as_gradio_error(StoreError, title="Reward functions"):
            return to_sliders(SavedFunctions(services.store, visitor(request), content).get(name))

    estimate_inputs = {
        name: fields[name]
        for name in ("models", "temperatures", "photo_source", "files", "max_photos", "candidates", "skill")
    }

    def updated_estimate(values: dict[Any, Any], request: gr.Request) -> tuple[Any, Any, Any]:
        who = visitor(request)
        inputs = {name: values[component] for name, component in estimate_inputs.items()}
        waiting = sum(not item.status().finished for item in services.evaluations.list())
        specs = visitor_models(services.adapters, who).specs
        refusal = evaluation_refusal(services.access, who, inputs["max_photos"] or 0)
        text = estimate_text(inputs, specs, services.meter.prices, waiting)
        return text, gr.update(interactive=not refusal), gr.update(value=refusal, visible=bool(refusal))

    form.reward.input(reward_chosen, [form.reward, browser, *shared_components.sliders], sliders, **UNQUEUED)
    fields["photo_source"].change(
        photo_source_changed, fields["photo_source"], [fields["files"], fields["dataset"]], **UNQUEUED
    )
    fields["skill"].change(skill_prompt, fields["skill"], fields["prompt"], **UNQUEUED)
    estimate_outputs = [form.estimate, form.submit, form.note]
    changes = [component.change for component in estimate_inputs.values()]
    gr.on(changes, updated_estimate, set(estimate_inputs.values()), estimate_outputs, **UNQUEUED)
    opened.then(updated_estimate, set(estimate_inputs.values()), estimate_outputs, **UNQUEUED)

    # Actions
    def start_clicked(values: dict[Any, Any], request: gr.Request) -> str:
        inputs = {name: values[component] for name, component in fields.items()}
        return start(services, visitor(request), inputs, [values[slider] for slider in sliders])

    def action_clicked(key: str, request: gr.Request, event: gr.EventData) -> str | None:
        return act(services, visitor(request), key, event)

    def download_clicked(request: gr.Request, event: gr.EventData, *weights: float) -> str:
        return download(services, visitor(request), weights, event)

    def cell_opened(request: gr.Request, event: gr.EventData) -> list[Any]:
        values = open_comparison(services, visitor(request), event)
        return [values[name] for name in playground]

    playground = {
        name: shared_components.playground[name]
        for name in ("upload", "photo", "models", "skill", "prompt", "n", "temperature", "seed")
    }
    started = form.submit.click(start_clicked, {*fields.values(), *sliders}, selected, **PRIVATE)
    started.success(clear_key, None, fields["key"], **UNQUEUED)
    refresh_after(started.success).then(None, None, None, js=SCROLL_JS, **PRIVATE)
    refresh_after(view.act(action_clicked, fields["key"], selected, **PRIVATE).success)
    download_on(view.download, download_clicked, sliders, delivery)
    cell = photos.open(cell_opened, None, list(playground.values()), **UNQUEUED)
    cell.success(None, None, None, js=OPEN_PLAYGROUND_JS, **PRIVATE)
