"""The Fine-tune tab: retrain a model with the sliders' reward, watch it learn, and put it beside its base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from inference.registry import MODELS
from rewards import REWARDS
from storage.reward_functions import StoreError
from training.data import uploads
from training.hosted import trainer as hosted
from training.hosted.client import BASE
from training.runs import export
from training.runs.adapters import model_name, title
from training.runs.run import Run, RunConfig, RunError
from ui.files import deliver, new_file, writing
from ui.finetune.estimate import DEFAULT_HARDWARE, PLACES, estimate, steps_of
from ui.finetune.form import (
    FORM,
    PHOTOS,
    draw_form,
    draw_push_form,
    length_chosen,
    photos_chosen,
    place_chosen,
)
from ui.finetune.run_view import history_mark, history_value, history_view, run_mark, run_value, run_view
from ui.messages import inform, refusal
from ui.playground import reward_functions
from ui.playground.link import PlaygroundSettings
from ui.playground.picker import choices
from ui.services import AppServices, SharedComponents
from usage.budgets import BudgetExceeded

TAB = "Fine-tune"
NO_BASE = "No model can be trained on this deployment, which has no torch. Moondream's tuning API is left: see Where."
TITLE = "Fine-tuning"


@dataclass(frozen=True)
class RenderState:
    """What a page shows, so that nothing is sent twice."""

    run: tuple[Any, ...] = ()
    history: tuple[Any, ...] = ()
    version: int = -1
    front: tuple[str, ...] = ()
    active: bool = False


# ── Handlers: what is shown ─────────────────────────────────────────────────────────────────────────────────────────


def show(services: AppServices, chosen: str | None, seen: RenderState | None, names: Any, here: bool) -> list[Any]:
    """View, history, picker, bases, what is seen, timer: each anew where there is news, else as it was."""
    seen = seen or RenderState()
    run = current(services, chosen)
    active = bool(here or services.worker.waiting())
    now = RenderState(
        run_mark(services, run) if run else ("none",),
        history_mark(services, run.id if run else None),
        services.adapters.version,
        tuple(services.adapters.front()),
        active,
    )
    return [
        _value(services, run) if now.run != seen.run else gr.skip(),
        history_value(services, run.id if run else None) if now.history != seen.history else gr.skip(),
        _picked(names, seen, now),
        gr.update(choices=bases(services)) if now.history != seen.history else gr.skip(),
        now,
        gr.Timer(active=active) if active != seen.active else gr.skip(),
    ]


def current(services: AppServices, chosen: str | None) -> Run | None:
    """The run that was chosen; without a choice the one that works, else the newest; None where there is none."""
    if chosen:
        try:
            return services.runs.get(chosen)
        except RunError:
            pass  # somebody has deleted it
    waiting = services.worker.waiting()
    everything = services.runs.list()
    return waiting[0] if waiting else everything[-1] if everything else None


def _value(services: AppServices, run: Run | None) -> dict[str, Any] | None:
    try:
        return run_value(services, run) if run else None
    except RunError as error:
        return {"run": run.id if run else "", "error": str(error)}


def _picked(names: Any, seen: RenderState, now: RenderState) -> Any:
    """The picker after a change of what is in service: the newest tuned model beside its base comes to the front."""
    if now.version == seen.version or seen.version < 0:
        return gr.skip()
    kept = [name for name in names or [] if name in MODELS]
    if now.front and now.front != seen.front and now.front[1] not in seen.front:
        kept = list(now.front)
    return gr.HTML(value=kept or list(PlaygroundSettings().models), choices=choices())


def bases(services: AppServices) -> list[tuple[str, str]]:
    """What a run can start from: the local models with weights of their own, and what earlier runs have learned."""
    offered: dict[tuple[str, str | None], tuple[str, str]] = {}
    for entry in list(MODELS.values()):
        if entry.backend == "local" and entry.adapter is None and entry.unavailable() is None:
            offered.setdefault((entry.source, None), (entry.title, entry.name))
    for run in reversed(services.runs.list()):
        with suppress(RunError):
            if run.has_adapter and run.status().over:
                offered[run.id, None] = (f"{title(run)} ({run.id[:15]})", model_name(run.id))
    return list(offered.values())


def tab_opened(event: gr.SelectData) -> bool:
    """Whether it was this tab."""
    return event.value == TAB


# ── Handlers: what is done ──────────────────────────────────────────────────────────────────────────────────────────


def retrain(services: AppServices, *values: Any) -> str:
    """Queues a run as the form says (the parts of FORM, then the sliders) and returns its id; gr.Error says what to
    mend."""
    form = dict(zip(FORM, values[: len(FORM)], strict=True))
    function = reward_functions.of_sliders(values[len(FORM) :])
    with plainly():
        photos = _photos(services, form["kind"], form["files"], form["dataset"])
        where = PLACES.get(form["place"], "here")
        asked = {key: form[key] for key in ("learning_rate", "beta", "rollouts", "rank", "seed")}
        if where == "hosted":
            asked |= {"budget": form["budget"], "sft_steps": form["examples"]}
        missing = [key.replace("_", " ") for key, value in asked.items() if value is None]
        if missing:
            raise RunError(f"Fill in: {', '.join(missing)}.")
        asked |= {"steps": steps_of(form["length"], form["steps"]), "name": (form["name"] or "").strip()}
        asked |= {"photos": photos, "where": where, "hardware": form["hardware"] or DEFAULT_HARDWARE}
        secret = form["key"] if where == "hosted" else form["token"]
        try:
            return submit(services, form["base"], dict(function.weights), secret or "", **asked).id
        except RunError:
            uploads.forget(services.runs, photos)
            raise


def submit(services: AppServices, base: str, reward: dict[str, float], token: str = "", **asked: Any) -> Run:
    """Queues a run. `base`: a model on offer, or an earlier run by its model's name. Raises RunError.

    token: the user's own, of the Hub, which a run on Hugging Face Jobs needs; or of Moondream, whose tuning API trains
    one base only, whatever `base` is.
    """
    where = asked.get("where", "here")
    _may_begin(services, where, token)
    base = BASE if where == "hosted" else base
    offered = {name for _, name in bases(services)}
    if where != "hosted" and base not in offered:
        raise RunError("Choose a base from the list." if offered else NO_BASE)
    earlier = services.adapters.earlier(base)
    whole = {key: int(asked[key]) for key in ("seed", "steps", "rollouts", "rank", "sft_steps") if key in asked}
    source = str(earlier.folder.resolve()) if earlier else base
    return services.worker.submit(RunConfig.make(base=source, reward=reward, **(asked | whole)), token.strip())


def do_inside(services: AppServices, chosen: str | None) -> None:
    """Does the run in this request, if it is queued to be done so; see `RunQueue.do_inside`."""
    with plainly():
        if chosen:
            services.worker.do_inside(services.runs.get(chosen))


def _may_begin(services: AppServices, where: str, token: str) -> None:
    """Raises RunError where a run needs a token that is not there, or money that is spent."""
    if where == "jobs" and not token.strip():
        raise RunError("Give your Hugging Face token: the job runs on your account. It is used for this run only.")
    if where == "hosted" and not token.strip() and not hosted.has_key():
        raise RunError("Give your Moondream key: the tuning runs on your account. It is used for this run only.")
    if where == "hosted":
        try:
            services.budgets.check(services.meter.recorder.deployment.branch)
        except (BudgetExceeded, StoreError) as error:
            raise RunError(str(error)) from None


def _photos(services: AppServices, kind: str, files: list[str] | None, dataset: str) -> str:
    if kind == PHOTOS[1]:
        return uploads.keep(services.runs, files or [])
    if kind == PHOTOS[2]:
        return hub_photos(dataset)
    return "bundled"


def hub_photos(dataset: str) -> str:
    """What a config says of a dataset of the Hub. Raises RunError."""
    name = (dataset or "").strip().removeprefix("hub:")
    if not export.is_repository(name):
        raise RunError("Name the dataset like owner/name, as it stands in its address on the Hub.")
    return f"hub:{name}"


def act(services: AppServices, token: str, key: str, event: gr.EventData) -> str | None:
    """What a button of the view asks for; returns the run that is shown then. token, key: for a run that is resumed."""
    asked = event._data if isinstance(event._data, dict) else {}
    with plainly():
        run = services.runs.get(asked.get("run"))  # type: ignore[arg-type]
        action = _ACTIONS.get(str(asked.get("do")))
        if action is None:
            raise RunError("There is no such button. Reload the page.")
        if action is rename:
            rename(services, run, str(asked.get("name") or ""))
        elif action is resume:
            resume(services, run, (key if run.config().where == "hosted" else token) or "")
        else:
            action(services, run)
    return None if action is delete else run.id


def cancel(services: AppServices, run: Run) -> None:
    """Stops a run at its next step."""
    if run.status().over:
        raise RunError("This run is over already.")
    try:
        run.cancel()
    except OSError as error:
        raise RunError(f"The run could not be told ({error.strerror}). Try again.") from None
    services.worker.wake()


def resume(services: AppServices, run: Run, token: str = "") -> None:
    """Queues a stopped run again."""
    _may_begin(services, run.config().where, token)
    services.worker.resume(run, token.strip())


def use(services: AppServices, run: Run) -> None:
    """Puts a run's model beside its base."""
    if not run.status().over:
        raise RunError("This run is not over yet. Cancel it, or wait.")
    entry = services.adapters.use(run)
    inform(f"“{entry.title}” now stands beside its base in the playground.", TITLE)


def revert(services: AppServices, run: Run) -> None:
    """Takes a run's model out of the playground."""
    services.adapters.revert(run.id)
    inform("The playground is as it was before.", TITLE)


def delete(services: AppServices, run: Run) -> None:
    """Removes a run, and its photos if nobody else needs them."""
    if services.adapters.uses(run.id):
        raise RunError("This run's model is in use in the playground. Revert it first.")
    if any(other.config().base == str(run.folder.resolve()) for other in services.worker.waiting()):
        raise RunError("Another run is waiting to go on from this one. Delete it when that is done.")
    config = run.config()
    services.runs.delete(run.id)
    uploads.forget(services.runs, config.photos)
    inform("The run was deleted.", TITLE)


def rename(services: AppServices, run: Run, name: str) -> None:
    """Gives a run, and its model in use, another name."""
    try:
        run.rename(name)
    except OSError as error:
        raise RunError(f"The name could not be written ({error.strerror}). Try again later.") from None
    if services.adapters.uses(run.id):
        services.adapters.use(run)


_ACTIONS: dict[str, Any] = {action.__name__: action for action in (cancel, resume, use, revert, delete, rename)}


def pick(event: gr.EventData) -> str | None:
    """The run that was chosen in the history."""
    asked = event._data if isinstance(event._data, dict) else {}
    return str(asked.get("run") or "") or None


def download(services: AppServices, event: gr.EventData) -> str:
    """The path of a zip with everything of a run."""
    asked = event._data if isinstance(event._data, dict) else {}
    with plainly():
        run = services.runs.get(asked.get("run"))  # type: ignore[arg-type]
        base = services.adapters.base(run)
        with writing():
            path = new_file(f"{title(run)}-{run.id}.zip")
            export.pack(run, base, path)
    return str(path)


def push(services: AppServices, chosen: str | None, repository: str, token: str, private: bool) -> tuple[str, str]:
    """Pushes the shown run's adapter to the Hub; returns what to say, and the emptied token."""
    with plainly():
        run = current(services, chosen)
        if run is None:
            raise RunError("There is no run yet.")
        address = export.push(run, services.adapters.base(run), repository or "", token or "", private)
    return f"Pushed to {address}", ""


@contextmanager
def plainly() -> Iterator[None]:
    """What cannot be done with a run is a gr.Error that says why."""
    try:
        yield
    except RunError as error:
        raise refusal(str(error), TITLE) from None


# ── Layout ──────────────────────────────────────────────────────────────────────────────────────────────────────────

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
QUICK: dict[str, Any] = {"queue": False, **PRIVATE}
ONE_BY_ONE: dict[str, Any] = {"concurrency_id": "training", "concurrency_limit": 1, **PRIVATE}
# On a phone the run is below the form.
TO_THE_RUN_JS = """() => {
  const run = document.querySelector('#run-view');
  if (run.getBoundingClientRect().top > innerHeight * 0.7) run.scrollIntoView({block: 'start'});
  return [];
}"""
WEIGHTS_JS = "(...weights) => Object.fromEntries({names}.map((name, place) => [name, weights[place]]))"


def build(services: AppServices, shared_components: SharedComponents) -> None:
    """The tab: on the left what is asked, on the right the run; below it all runs."""
    chosen, seen, here, hourly = gr.State(None), gr.State(None), gr.State(False), gr.State({})
    timer = gr.Timer(1.0, active=False)
    delivery = gr.File(visible=False)
    with gr.Row(elem_id="tune"):
        with gr.Column(elem_id="tune-ask", min_width=300, scale=1):
            reward, form, groups, about, start = draw_form(services, bases(services))
        with gr.Column(elem_id="tune-results", min_width=320, scale=3):
            view = run_view()
            pushing = draw_push_form()
            history = history_view()

    def acted(token: str, key: str, event: gr.EventData) -> str | None:
        return act(services, token, key, event)

    def downloaded(event: gr.EventData) -> str:
        return download(services, event)

    shown = [view, history, shared_components.picker, form[0], seen, timer]
    asked = [chosen, seen, shared_components.picker, here]
    anew = partial(show, services)
    timer.tick(anew, asked, shown, **QUICK)
    gr.on(None, anew, asked, shown, **QUICK)  # when the page is opened
    shared_components.tabs.select(tab_opened, None, here, **QUICK).then(anew, asked, shown, **QUICK)
    part = dict(zip(FORM, form, strict=True))
    started = start.click(partial(retrain, services), [*form, *shared_components.sliders], chosen, **PRIVATE)
    secrets = [part["token"], part["key"]]
    started.success(lambda: ("", ""), None, secrets, **QUICK)
    started.success(anew, asked, shown, **QUICK).then(None, None, None, js=TO_THE_RUN_JS, **PRIVATE)
    changed_run = view.act(acted, secrets, chosen, **PRIVATE)
    changed_run.success(anew, asked, shown, **QUICK)
    if services.worker.inside:  # the request itself is the run
        for asking in (started, changed_run):
            asking.success(partial(do_inside, services), chosen, **ONE_BY_ONE)
    history.pick(pick, None, chosen, **QUICK).then(anew, asked, shown, **QUICK)
    deliver(view.download, downloaded, [], delivery)
    repository, token, private, send, said = pushing
    send.click(partial(push, services), [chosen, repository, token, private], [said, token], **PRIVATE)

    part["kind"].change(photos_chosen, part["kind"], [part["files"], part["dataset"]], **QUICK)
    part["length"].change(length_chosen, part["length"], part["steps"], **QUICK)
    by_place = [part["base"], part["learning_rate"], *groups, part["hardware"], hourly]
    part["place"].change(place_chosen, part["place"], by_place, **QUICK)
    timed = [part[name] for name in ("length", "steps", "rollouts", "place", "hardware")]
    more = [hourly, part["budget"], part["examples"]]
    changed = [component.change for component in (*timed, *more)]
    gr.on(changed, partial(estimate, services), [*timed, *more], about, **QUICK)
    names = WEIGHTS_JS.replace("{names}", str(list(REWARDS)))
    gr.on(
        [slider.change for slider in shared_components.sliders],
        None,
        shared_components.sliders,
        reward,
        js=names,
        **PRIVATE,
    )
