"""The Fine-tune tab: train a model on the reward of the sliders, follow the run, and use the tuned model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import gradio as gr

from access.permissions import AccessDenied
from access.roles import Role, Visitor
from inference.availability import unavailable
from inference.registry import MODELS
from rewards import REWARDS
from storage.reward_functions import StoreError
from training.data import uploads
from training.hosted import trainer as hosted_trainer
from training.hosted.client import BASE
from training.runs import export
from training.runs.adapters import model_name, run_title
from training.runs.run import GUEST_PREFIX, Run, RunConfig, RunError
from ui.events import PRIVATE, UNQUEUED, UNQUEUED_EACH, UNQUEUED_LATEST, tab_selected
from ui.files import download_on, new_file, writing
from ui.finetune.estimate import BACKENDS, DEFAULT_HARDWARE, DEFAULT_ROLLOUTS, estimate, step_count_of
from ui.finetune.form import (
    HUB_DATASET,
    UPLOADED,
    backend_changed,
    draw_form,
    draw_push_form,
    length_changed,
    photo_source_changed,
    visitor_updates,
)
from ui.finetune.permissions import (
    MAX_GUEST_RUNS,
    MAX_UNFINISHED,
    action_refusal,
    check_action,
    is_mine,
    is_usable_base,
    training_refusal,
)
from ui.finetune.rollouts import rollout_range, rollout_snapshot, rollouts_view
from ui.finetune.run_view import (
    history_fingerprint,
    history_snapshot,
    history_view,
    run_fingerprint,
    run_snapshot,
    run_view,
)
from ui.messages import as_gradio_error, show_info, show_warning
from ui.permissions import visitor_of
from ui.playground import reward_functions
from ui.playground.link import PlaygroundSettings
from ui.playground.models import visitor_models
from ui.playground.picker import choices
from ui.services import AppServices, SharedComponents
from usage.budgets import BudgetExceededError

TAB = "Fine-tune"
TITLE = "Fine-tuning"
GUESTS_WAIT = "Other guests' runs are waiting already. Try again later."
NO_LOCAL_BASE = "This deployment cannot train locally: torch is not installed. Train on Moondream's tuning API instead."


@dataclass(frozen=True)
class RenderState:
    """What a page displays, so that a refresh sends only what has changed.

    Attributes:
        run: Fingerprint of the displayed run.
        history: Fingerprint of the list of runs.
        adapters_version: Version of the adapter registry; -1 before the first refresh.
        newest_with_base: Names of the newest enabled tuned model and its base.
        polling: Whether the timer runs.
    """

    run: tuple[Any, ...] = ()
    history: tuple[Any, ...] = ()
    adapters_version: int = -1
    newest_with_base: tuple[str, ...] = ()
    polling: bool = False


# ── Handlers: display ───────────────────────────────────────────────────────────────────────────────────────────────


def refresh(
    services: AppServices,
    visitor: Visitor,
    selected: str | None,
    state: RenderState | None,
    models: Any,
    tab_open: bool,
) -> list[Any]:
    """Update what has changed since the last refresh; everything else is skipped.

    Args:
        services: The application's services.
        visitor: The visitor.
        selected: ID of the run that the user selected.
        state: What the page displays now.
        models: Names of the models selected in the Playground.
        tab_open: Whether this tab is open.

    Returns:
        Updates of the run view, the history, the model picker, the base models, the buttons and notes of `PushForm`,
        the rollouts, the render state and the timer.
    """
    state = state or RenderState()
    unfinished = services.worker.unfinished()
    run = displayed_run(services, visitor, selected, unfinished)
    run_id = run.id if run else None
    new = RenderState(
        run=run_fingerprint(services, visitor, run) if run else ("none",),
        history=history_fingerprint(services, visitor, run_id),
        adapters_version=services.adapters.version,
        newest_with_base=tuple(services.adapters.newest_with_base(visitor.id)),
        polling=bool(tab_open or any(is_mine(visitor, other) for other in unfinished)),
    )
    run_changed, history_changed = new.run != state.run, new.history != state.history
    return [
        _snapshot_or_error(services, visitor, run) if run_changed else gr.skip(),
        history_snapshot(services, visitor, run_id) if history_changed else gr.skip(),
        _picker_update(services, visitor, models, state, new),
        gr.update(choices=base_models(services, visitor)) if history_changed else gr.skip(),
        *(_push_updates(services, visitor, run) if run_changed else (gr.skip(), gr.skip())),
        _rollout_range(visitor, run) if run_changed else gr.skip(),
        new,
        gr.Timer(active=new.polling) if new.polling != state.polling else gr.skip(),
    ]


def displayed_run(
    services: AppServices, visitor: Visitor, selected: str | None, unfinished: Sequence[Run] | None = None
) -> Run | None:
    """Return the run to display.

    Args:
        services: The application's services.
        visitor: The visitor.
        selected: ID of the run that the user selected.
        unfinished: The unfinished runs in execution order, if the caller has them already.

    Returns:
        The selected run; by default the visitor's active or next queued one, else their newest; of visitors without
        runs, likewise among the runs of all visitors. None without runs.
    """
    if selected:
        with suppress(RunError):  # it has been deleted
            return services.runs.get(selected)
    unfinished = services.worker.unfinished() if unfinished is None else unfinished
    runs = [*unfinished, *reversed(services.runs.list())]
    return next((run for run in runs if is_mine(visitor, run)), runs[0] if runs else None)


def _snapshot_or_error(services: AppServices, visitor: Visitor, run: Run | None) -> dict[str, Any] | None:
    try:
        return run_snapshot(services, visitor, run) if run else None
    except RunError as error:
        return {"run": run.id if run else "", "error": str(error)}


def _rollout_range(visitor: Visitor, run: Run | None) -> dict[str, Any] | None:
    try:
        return rollout_range(visitor, run)
    except RunError:  # the run view says why
        return None


def choose_rollouts(services: AppServices, visitor: Visitor, event: gr.EventData) -> dict[str, Any] | None:
    """Return the rollouts of the step that the user chose; None if the visitor may not see them."""
    data = _event_data(event)
    step = data.get("step")
    with as_gradio_error(RunError, title=TITLE):
        run = services.runs.get(data.get("run"))  # type: ignore[arg-type]
        return rollout_snapshot(visitor, run, step if isinstance(step, int) else 0)


def _push_updates(services: AppServices, visitor: Visitor, run: Run | None) -> tuple[Any, Any]:
    """Return updates of the button that pushes the displayed run, and of the note that says why it is disabled."""
    refusal = action_refusal(services, visitor, run, "push") if run else ""
    return gr.update(interactive=not refusal), gr.update(value=refusal, visible=bool(refusal))


def _picker_update(services: AppServices, visitor: Visitor, models: Any, old: RenderState, new: RenderState) -> Any:
    """Offer newly enabled models and remove disabled ones; select a newly enabled model together with its base."""
    if new.adapters_version == old.adapters_version or old.adapters_version < 0:
        return gr.skip()
    visible = visitor_models(services.adapters, visitor)
    selected = [name for name in models or [] if name in visible.specs]
    newest = new.newest_with_base
    if newest and newest != old.newest_with_base and newest[1] not in old.newest_with_base:
        selected = list(newest)
    return gr.HTML(value=selected or list(PlaygroundSettings().models), choices=choices(visible))


def base_models(services: AppServices, visitor: Visitor) -> list[tuple[str, str]]:
    """Return title and name of each model that a visitor's run can start from: local base models and tuned models."""
    by_weights: dict[str, tuple[str, str]] = {}
    for spec in list(MODELS.values()):
        if spec.backend == "local" and spec.adapter is None and unavailable(spec) is None:
            by_weights.setdefault(spec.source, (spec.title, spec.name))
    tuned = []
    for run in reversed(services.runs.list()):
        with suppress(RunError):
            if run.has_adapter and is_usable_base(services.adapters, visitor, run) and run.status().finished:
                tuned.append((f"{run_title(run)} ({run.id[:15]})", model_name(run.id)))
    return [*by_weights.values(), *tuned]


# ── Handlers: actions ───────────────────────────────────────────────────────────────────────────────────────────────


def retrain(services: AppServices, visitor: Visitor, form: dict[str, Any], weights: Sequence[float]) -> str:
    """Queue a run.

    Args:
        services: The application's services.
        visitor: The visitor.
        form: Values of `RetrainForm.fields` by name.
        weights: Weight of each reward, in the order of REWARDS.

    Returns:
        The run's ID.

    Raises:
        gr.Error: If an input is missing or invalid, or the visitor may not start the run. The message says which.
    """
    reward = reward_functions.from_sliders(tuple(weights))
    with as_gradio_error(RunError, AccessDenied, title=TITLE):
        backend = BACKENDS.get(form["backend"], "here")
        steps = step_count_of(form["length"], form["steps"])
        check_may_train(services, visitor, backend, steps, form["rollouts"] or 0)
        names = ["learning_rate", "beta", "rollouts", "rank", "seed"]
        names += ["budget", "sft_steps"] if backend == "hosted" else []
        missing = [name.replace("_", " ") for name in names if form[name] is None]
        if missing:
            raise RunError(f"Fill in: {', '.join(missing)}.")
        token = (form["moondream_key"] if backend == "hosted" else form["hub_token"]) or ""
        _check_credentials_and_budget(services, visitor, backend, token)
        photos = _photo_source(services, form, visitor.id)
        settings = {name: form[name] for name in names} | {
            "steps": steps,
            "name": (form["name"] or "").strip(),
            "photos": photos,
            "backend": backend,
            "hardware": form["hardware"] or DEFAULT_HARDWARE,
        }
        try:
            return submit(services, visitor, form["base"], dict(reward.weights), token, **settings).id
        except (RunError, AccessDenied):
            uploads.delete_unused(services.runs, photos)
            raise


def submit(
    services: AppServices, visitor: Visitor, base: str, reward: dict[str, float], token: str = "", **settings: Any
) -> Run:
    """Queue a run of a visitor.

    Args:
        services: The application's services.
        visitor: The visitor, who owns the run.
        base: Name of a model in `base_models`. Ignored on Moondream's tuning API, which has one base model.
        reward: Weight of each reward by name.
        token: The user's Hugging Face token for Hugging Face Jobs, or Moondream API key for the tuning API.
        **settings: Further settings of `RunConfig`.

    Raises:
        RunError: If a setting is invalid, a credential is missing, the budget is spent, or too many runs wait.
        AccessDenied: If the visitor may not start this run.
    """
    backend = settings.get("backend", "here")
    steps, rollouts = settings.get("steps", 0), settings.get("rollouts", DEFAULT_ROLLOUTS)
    check_may_train(services, visitor, backend, steps, rollouts)
    _check_credentials_and_budget(services, visitor, backend, token)
    if backend == "hosted":
        base = BASE
    else:
        names = [name for _, name in base_models(services, visitor)]
        if base not in names:
            raise RunError("Choose a base model from the list." if names else NO_LOCAL_BASE)
    base_run = services.adapters.find_run(base)
    source = str(base_run.folder.resolve()) if base_run else base
    integers = {
        name: int(settings[name]) for name in ("seed", "steps", "rollouts", "rank", "sft_steps") if name in settings
    }
    config = RunConfig.create(base=source, reward=reward, **(settings | integers))
    if visitor.role == Role.GUEST:
        _check_guest_runs(services)
    return services.worker.submit(config, token.strip(), visitor.id, visitor.name, MAX_UNFINISHED[visitor.role])


def form_updates(services: AppServices, visitor: Visitor, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """Return updates of the submit button, and of the note that says why it is disabled.

    Args:
        services: The application's services.
        visitor: The visitor.
        inputs: The form's `backend`, `length`, `steps` and `rollouts`.
    """
    backend, steps = BACKENDS.get(inputs["backend"], "here"), step_count_of(inputs["length"], inputs["steps"])
    refusal = training_refusal(services.access, visitor, backend, steps, inputs["rollouts"] or 0)
    return gr.update(interactive=not refusal), gr.update(value=refusal, visible=bool(refusal))


def run_inline(services: AppServices, visitor: Visitor, run_id: str | None) -> None:
    """Execute a queued run inside this request, where the deployment needs that; see `RunQueue.run_inline`."""
    with as_gradio_error(RunError, AccessDenied, title=TITLE):
        if run_id:
            run = services.runs.get(run_id)
            check_action(services, visitor, run, "run")
            services.worker.run_inline(run)


def check_may_train(services: AppServices, visitor: Visitor, backend: str, steps: float, rollouts: float) -> None:
    """Raise AccessDenied if a visitor may not start or resume such a run; see `training_refusal`."""
    refusal = training_refusal(services.access, visitor, backend, steps, rollouts)
    if refusal:
        raise AccessDenied(refusal)


def _check_guest_runs(services: AppServices) -> None:
    """Raise RunError if the guests together have too many unfinished runs."""
    if sum(run.owner.startswith(GUEST_PREFIX) for run in services.worker.unfinished()) >= MAX_GUEST_RUNS:
        raise RunError(GUESTS_WAIT)


def _check_credentials_and_budget(services: AppServices, visitor: Visitor, backend: str, token: str) -> None:
    """Check what the backend costs, and who pays.

    Only administrators may leave the Moondream key empty: the deployment's key pays then, within its budget.

    Raises:
        RunError: A credential is missing, or the branch's budget is spent.
    """
    if backend == "jobs" and not token.strip():
        raise RunError("Enter your Hugging Face token. The job runs on your account; the token is not stored.")
    if backend == "hosted" and not token.strip():
        if visitor.role < Role.ADMIN or not hosted_trainer.has_api_key():
            raise RunError("Enter your Moondream API key. The run is billed to your account; the key is not stored.")
        try:
            services.budgets.check(services.meter.recorder.deployment.branch)
        except (BudgetExceededError, StoreError) as error:
            raise RunError(str(error)) from None


def _photo_source(services: AppServices, form: dict[str, Any], owner: str) -> str:
    """Return the form's training photos as `RunConfig.photos`; uploaded files are copied."""
    if form["photo_source"] == UPLOADED:
        saved = uploads.save_photos(services.runs, form["files"] or [], owner, services.upload_quota)
        if saved.message:
            show_info(saved.message, TITLE)
        return saved.source
    if form["photo_source"] == HUB_DATASET:
        return hub_dataset(form["dataset"])
    return "bundled"


def hub_dataset(name: str) -> str:
    """Return a Hub dataset as `RunConfig.photos`. Raises RunError if the name is not valid."""
    name = (name or "").strip().removeprefix("hub:")
    if not export.is_repo_id(name):
        raise RunError("Enter the dataset as owner/name, as in its address on the Hub.")
    return f"hub:{name}"


def act(services: AppServices, visitor: Visitor, hub_token: str, moondream_key: str, event: gr.EventData) -> str | None:
    """Execute the action of a button in the run view. The credentials are for a run that is resumed.

    Returns:
        ID of the run to display; None after the displayed run was deleted.
    """
    data = _event_data(event)
    action = str(data.get("action"))
    with as_gradio_error(RunError, AccessDenied, title=TITLE):
        run = services.runs.get(data.get("run"))  # type: ignore[arg-type]
        if action == "resume":
            resume(services, visitor, run, (moondream_key if run.config().backend == "hosted" else hub_token) or "")
        elif action == "rename":
            rename(services, visitor, run, str(data.get("name") or ""))
        elif action in ACTIONS:
            ACTIONS[action](services, visitor, run)
        else:
            raise RunError("Unknown action. Reload the page.")
    return None if action == "delete" else run.id


def cancel(services: AppServices, visitor: Visitor, run: Run) -> None:
    """Stop a run at its next step. Raises RunError or AccessDenied, as do all actions."""
    check_action(services, visitor, run, "cancel")
    if run.status().finished:
        raise RunError("This run has already finished.")
    try:
        run.cancel()
    except OSError as error:
        raise RunError(f"Could not cancel the run ({error.strerror}). Try again.") from None
    services.worker.wake()


def resume(services: AppServices, visitor: Visitor, run: Run, token: str = "") -> None:
    """Queue a stopped run again."""
    check_action(services, visitor, run, "resume")
    _check_credentials_and_budget(services, visitor, run.config().backend, token)
    if visitor.role == Role.GUEST:
        _check_guest_runs(services)
    services.worker.resume(run, token.strip(), MAX_UNFINISHED[visitor.role])


def use(services: AppServices, visitor: Visitor, run: Run) -> None:
    """Offer a run's model beside its base in the Playground of the run's owner."""
    check_action(services, visitor, run, "use")
    _check_finished(run)
    spec = services.adapters.enable(run)
    playground = "the Playground" if is_mine(visitor, run) else "its owner's Playground"
    _show_use(run, f"“{spec.title}” is now available in {playground}, beside its base model.")


def share(services: AppServices, visitor: Visitor, run: Run) -> None:
    """Offer a run's model beside its base in everyone's Playground."""
    check_action(services, visitor, run, "share")
    _check_finished(run)
    spec = services.adapters.share(run)
    _show_use(run, f"“{spec.title}” is now available to everyone, beside its base model.")


def _show_use(run: Run, message: str) -> None:
    """Show that a run's model is in use, with a warning if the run raised an alarm."""
    if run.has_alarm:
        show_warning(f"{message} The run raised an alarm: compare its edits with those of its base model.", TITLE)
    else:
        show_info(message, TITLE)


def unshare(services: AppServices, visitor: Visitor, run: Run) -> None:
    """Offer a shared model in the Playground of the run's owner only."""
    check_action(services, visitor, run, "unshare")
    services.adapters.unshare(run.id)
    show_info("The tuned model is now available to the run's owner only.", TITLE)


def revert(services: AppServices, visitor: Visitor, run: Run) -> None:
    """Remove a run's model from the Playground, for everyone."""
    check_action(services, visitor, run, "revert")
    services.adapters.disable(run.id)
    show_info("The tuned model was removed from the Playground.", TITLE)


def delete(services: AppServices, visitor: Visitor, run: Run) -> None:
    """Delete a run, and its uploaded photos unless another run uses them."""
    check_action(services, visitor, run, "delete")
    if services.adapters.is_enabled(run.id):
        raise RunError("This run's model is in use in the Playground. Revert it first.")
    if any(other.config().base == str(run.folder.resolve()) for other in services.worker.unfinished()):
        raise RunError("An unfinished run starts from this one. Delete it when that run has finished.")
    photos = run.config().photos
    services.runs.delete(run.id)
    uploads.delete_unused(services.runs, photos)
    show_info("The run was deleted.", TITLE)


def rename(services: AppServices, visitor: Visitor, run: Run, name: str) -> None:
    """Rename a run, and its model in the Playground."""
    check_action(services, visitor, run, "rename")
    try:
        run.rename(name)
    except OSError as error:
        raise RunError(f"Could not save the name ({error.strerror}). Try again.") from None
    if services.adapters.is_enabled(run.id):
        services.adapters.enable(run)


def _check_finished(run: Run) -> None:
    if not run.status().finished:
        raise RunError("This run has not finished. Cancel it or wait.")


ACTIONS: dict[str, Callable[[AppServices, Visitor, Run], None]] = {
    "cancel": cancel,
    "use": use,
    "share": share,
    "unshare": unshare,
    "revert": revert,
    "delete": delete,
}


def clear_credentials() -> tuple[str, str]:
    """Clear the inputs for the Hugging Face token and the Moondream API key."""
    return "", ""


def pick(event: gr.EventData) -> str | None:
    """Return the ID of the run that was selected in the list."""
    return str(_event_data(event).get("run") or "") or None


def download(services: AppServices, visitor: Visitor, event: gr.EventData) -> str:
    """Write a run and its adapter to a zip file and return the file's path."""
    with as_gradio_error(RunError, AccessDenied, title=TITLE):
        run = services.runs.get(_event_data(event).get("run"))  # type: ignore[arg-type]
        check_action(services, visitor, run, "download")
        base = services.adapters.base_model(run)
        with writing():
            path = new_file(f"{run_title(run)}-{run.id}.zip")
            export.write_zip(run, base, path)
    return str(path)


def push(
    services: AppServices, visitor: Visitor, selected: str | None, repository: str, token: str, private: bool
) -> tuple[str, str]:
    """Push the displayed run's adapter to the Hub. Returns a result message, and "" to clear the token."""
    with as_gradio_error(RunError, AccessDenied, title=TITLE):
        run = displayed_run(services, visitor, selected)
        if run is None:
            raise RunError("There is no run to push. Train a model first.")
        check_action(services, visitor, run, "push")
        url = export.push_to_hub(run, services.adapters.base_model(run), repository or "", token or "", private)
    return f"Pushed to {url}", ""


def _event_data(event: gr.EventData) -> dict[str, Any]:
    return event._data if isinstance(event._data, dict) else {}


# ── Layout ──────────────────────────────────────────────────────────────────────────────────────────────────────────

ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "training", "concurrency_limit": 1, **PRIVATE}
# On a phone the run view is below the form.
SCROLL_TO_RUN_JS = """() => {
  const run = document.querySelector('#run-view');
  if (run.getBoundingClientRect().top > innerHeight * 0.7) run.scrollIntoView({block: 'start'});
  return [];
}"""
WEIGHTS_JS = "(...weights) => Object.fromEntries({names}.map((name, index) => [name, weights[index]]))"


def build(services: AppServices, shared_components: SharedComponents) -> None:
    """Build the tab: the form on the left, the displayed run on the right, and all runs below it."""
    selected, state, tab_open, hourly_prices = gr.State(None), gr.State(None), gr.State(False), gr.State({})
    timer = gr.Timer(1.0, active=False)
    delivery = gr.File(visible=False)
    with gr.Row(elem_id="tune"):
        with gr.Column(elem_id="tune-form", min_width=300, scale=1):
            form = draw_form(services, base_models(services, Visitor()))
        with gr.Column(elem_id="tune-results", min_width=320, scale=3):
            view = run_view()
            rollouts = rollouts_view()
            push_form = draw_push_form()
            history = history_view()
    fields, sliders = form.fields, shared_components.sliders
    credentials = [fields["hub_token"], fields["moondream_key"]]

    # Display
    refresh_inputs = [selected, state, shared_components.picker, tab_open]
    refresh_outputs = [view, history, shared_components.picker, fields["base"]]
    refresh_outputs += [push_form.submit, push_form.note, rollouts, state, timer]

    def visitor(request: gr.Request) -> Visitor:
        return visitor_of(services.access, request)

    def refreshed(
        selected: str | None, state: RenderState | None, models: Any, tab_open: bool, request: gr.Request
    ) -> list[Any]:
        return refresh(services, visitor(request), selected, state, models, tab_open)

    def refresh_after(event: Any) -> Any:
        return event(refreshed, refresh_inputs, refresh_outputs, **UNQUEUED)

    refresh_after(timer.tick)
    refresh_after(shared_components.page.load)
    refresh_after(shared_components.tabs.select(tab_selected(TAB), None, tab_open, **UNQUEUED_EACH).then)
    refresh_after(history.pick(pick, None, selected, **UNQUEUED).then)
    gr.on(
        [slider.change for slider in sliders],
        None,
        sliders,
        form.reward,
        js=WEIGHTS_JS.replace("{names}", str(list(REWARDS))),
        **PRIVATE,
    )

    # Visible inputs and the estimate
    fields["photo_source"].change(
        photo_source_changed, fields["photo_source"], [fields["files"], fields["dataset"]], **UNQUEUED
    )
    fields["length"].change(length_changed, fields["length"], fields["steps"], **UNQUEUED)
    fields["backend"].change(
        backend_changed,
        fields["backend"],
        [
            fields["base"],
            fields["learning_rate"],
            form.jobs_group,
            form.hosted_group,
            fields["hardware"],
            hourly_prices,
        ],
        **UNQUEUED,
    )
    names = ("length", "steps", "rollouts", "backend", "hardware", "budget", "sft_steps")
    estimate_inputs = {name: fields[name] for name in names} | {"hourly_prices": hourly_prices}

    def updated_estimate(values: dict[Any, Any], request: gr.Request) -> tuple[Any, ...]:
        inputs = {name: values[component] for name, component in estimate_inputs.items()}
        return estimate(services, **inputs), *form_updates(services, visitor(request), inputs)

    def form_opened(request: gr.Request) -> tuple[Any, ...]:
        return visitor_updates(visitor(request))

    estimate_outputs = [form.estimate, form.submit, form.note]
    estimate_events = [shared_components.page.load, *(component.change for component in estimate_inputs.values())]
    gr.on(estimate_events, updated_estimate, set(estimate_inputs.values()), estimate_outputs, **UNQUEUED_LATEST)
    gr.on(None, form_opened, None, [fields["backend"], fields["moondream_key"]], **UNQUEUED)

    # Actions
    def retrain_clicked(values: dict[Any, Any], request: gr.Request) -> str:
        inputs = {name: values[component] for name, component in fields.items()}
        return retrain(services, visitor(request), inputs, [values[slider] for slider in sliders])

    def action_clicked(hub_token: str, moondream_key: str, request: gr.Request, event: gr.EventData) -> str | None:
        return act(services, visitor(request), hub_token, moondream_key, event)

    def rollouts_chosen(request: gr.Request, event: gr.EventData) -> dict[str, Any] | None:
        return choose_rollouts(services, visitor(request), event)

    def run_submitted(run_id: str | None, request: gr.Request) -> None:
        run_inline(services, visitor(request), run_id)

    def download_clicked(request: gr.Request, event: gr.EventData) -> str:
        return download(services, visitor(request), event)

    def push_clicked(
        selected: str | None, repository: str, token: str, private: bool, request: gr.Request
    ) -> tuple[str, str]:
        return push(services, visitor(request), selected, repository, token, private)

    submitted = form.submit.click(retrain_clicked, {*fields.values(), *sliders}, selected, **PRIVATE)
    submitted.success(clear_credentials, None, credentials, **UNQUEUED)
    refresh_after(submitted.success).then(None, None, None, js=SCROLL_TO_RUN_JS, **PRIVATE)
    acted = view.act(action_clicked, credentials, selected, **PRIVATE)
    refresh_after(acted.success)
    if services.worker.inline:
        for event in (submitted, acted):
            event.success(run_submitted, selected, **ONE_AT_A_TIME)
    rollouts.choose(rollouts_chosen, None, rollouts, **UNQUEUED)
    download_on(view.download, download_clicked, [], delivery)
    push_form.submit.click(
        push_clicked,
        [selected, push_form.repository, push_form.token, push_form.private],
        [push_form.result, push_form.token],
        **PRIVATE,
    )
