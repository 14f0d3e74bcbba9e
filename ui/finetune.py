"""The Fine-tune tab: retrain a model with the sliders' reward, watch it learn, and put it beside its base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import gradio as gr

from inference.answers import MAX_SEED
from inference.models import MODELS
from recipes import MAX_BYTES
from rewards import REWARDS
from training import export, jobs, uploads
from training.adopt import model_name, title
from training.runs import MAX_NAME, MAX_STEPS, Run, RunConfig, RunError
from ui import reward_functions
from ui.files import deliver, new_file, writing
from ui.house import House, Shared
from ui.link import Setup
from ui.messages import inform, refusal
from ui.picker import choices
from ui.run_view import duration, history_mark, history_value, history_view, run_mark, run_value, run_view

TAB = "Fine-tune"
TITLE = "Fine-tuning"
SHORT = RunConfig.model_fields["steps"].default
LENGTHS = {"Smoke test": 10, "Short run": SHORT, "Custom": 0}
PHOTOS = ("Bundled photos", "My photos", "Hub dataset")
PLACES = {"This machine": "here", "Hugging Face Jobs": "jobs"}
DEFAULT_HARDWARE = RunConfig.model_fields["hardware"].default
START, PER_STEP = 20.0, 0.5  # seconds to start with and per step, before any run has been timed


@dataclass(frozen=True)
class Seen:
    """What a page shows, so that nothing is sent twice."""

    run: tuple[Any, ...] = ()
    history: tuple[Any, ...] = ()
    version: int = -1
    front: tuple[str, ...] = ()
    active: bool = False


# ── Handlers: what is shown ─────────────────────────────────────────────────────────────────────────────────────────


def show(house: House, chosen: str | None, seen: Seen | None, names: Any, here: bool) -> list[Any]:
    """View, history, picker, bases, what is seen, timer: each anew where there is news, else as it was."""
    seen = seen or Seen()
    run = current(house, chosen)
    active = bool(here or house.worker.waiting())
    now = Seen(
        run_mark(house, run) if run else ("none",),
        history_mark(house, run.id if run else None),
        house.adopted.version,
        tuple(house.adopted.front()),
        active,
    )
    return [
        _value(house, run) if now.run != seen.run else gr.skip(),
        history_value(house, run.id if run else None) if now.history != seen.history else gr.skip(),
        _picked(names, seen, now),
        gr.update(choices=bases(house)) if now.history != seen.history else gr.skip(),
        now,
        gr.Timer(active=active) if active != seen.active else gr.skip(),
    ]


def current(house: House, chosen: str | None) -> Run | None:
    """The run that was chosen; without a choice the one that works, else the newest; None where there is none."""
    if chosen:
        try:
            return house.runs.get(chosen)
        except RunError:
            pass  # somebody has deleted it
    waiting = house.worker.waiting()
    everything = house.runs.list()
    return waiting[0] if waiting else everything[-1] if everything else None


def _value(house: House, run: Run | None) -> dict[str, Any] | None:
    try:
        return run_value(house, run) if run else None
    except RunError as error:
        return {"run": run.id if run else "", "error": str(error)}


def _picked(names: Any, seen: Seen, now: Seen) -> Any:
    """The picker after a change of what is in service: the newest tuned model beside its base comes to the front."""
    if now.version == seen.version or seen.version < 0:
        return gr.skip()
    kept = [name for name in names or [] if name in MODELS]
    if now.front and now.front != seen.front and now.front[1] not in seen.front:
        kept = list(now.front)
    return gr.HTML(value=kept or list(Setup().models), choices=choices())


def bases(house: House) -> list[tuple[str, str]]:
    """What a run can start from: the local models with weights of their own, and what earlier runs have learned."""
    offered: dict[tuple[str, str | None], tuple[str, str]] = {}
    for entry in list(MODELS.values()):
        if entry.backend == "local" and entry.adapter is None and entry.unavailable() is None:
            offered.setdefault((entry.source, None), (entry.title, entry.name))
    for run in reversed(house.runs.list()):
        with suppress(RunError):
            if run.has_adapter and run.status().over:
                offered[run.id, None] = (f"{title(run)} ({run.id[:15]})", model_name(run.id))
    return list(offered.values())


def tab_opened(event: gr.SelectData) -> bool:
    """Whether it was this tab."""
    return event.value == TAB


def photos_chosen(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs for own photos and for a dataset, each only where it is wanted."""
    return gr.update(visible=kind == PHOTOS[1]), gr.update(visible=kind == PHOTOS[2])


def length_chosen(length: str) -> dict[str, Any]:
    """The input for the number of steps, where one is wanted."""
    return gr.update(visible=length == "Custom")


def place_chosen(place: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, float | None]]:
    """The inputs for a job, where one is wanted; the hardware on offer, and what it costs an hour."""
    if PLACES.get(place) != "jobs":
        return gr.update(visible=False), gr.skip(), {}
    try:
        offered = jobs.hardware()
    except RunError as error:
        reason = f"{error} So there are no prices; name the hardware if you know it."
        return gr.update(visible=True), gr.update(choices=[DEFAULT_HARDWARE], info=reason), {}
    choices = [(f"{one.name} · {_price(one.hourly)} an hour · {one.words}", one.name) for one in offered]
    hourly = {one.name: one.hourly for one in offered}
    return gr.update(visible=True), gr.update(choices=choices, info="Prices as the Hub tells them now."), hourly


def _price(dollars: float | None) -> str:
    return "unknown price" if dollars is None else f"${dollars:.2f}"


def estimate(
    house: House,
    length: str,
    steps: float | None,
    rollouts: float | None,
    place: str = "This machine",
    hardware: str | None = None,
    hourly: dict[str, float | None] | None = None,
) -> str:
    """How long it will take and what it costs, in words; from earlier runs where there are any."""
    wanted = steps_of(length, steps)
    there = PLACES.get(place, "here"), hardware or DEFAULT_HARDWARE
    past = [pace for run in house.runs.list() if (pace := _pace(run, *there)) is not None]
    seconds = guess(wanted, rollouts or 8) * (median(past[-5:]) if past else 1.0)
    waiting = len(house.worker.waiting())
    queue = f" It waits for {waiting} other run{'s' if waiting > 1 else ''} first." if waiting else ""
    if there[0] == "jobs":
        took = f"about {duration(seconds)}, as earlier ones there took," if past else "a time not known yet"
        return f"{wanted:,} steps on {there[1]} take {took} once the job runs. {_bound(hourly, there[1])}{queue}"
    source = "as earlier runs on this machine took" if past else "a first guess; it gets better with each run"
    return f"{wanted:,} steps take about {duration(seconds)} ({source}) and cost nothing.{queue}"


def _bound(hourly: dict[str, float | None] | None, hardware: str) -> str:
    """What a job can cost at most."""
    price = (hourly or {}).get(hardware)
    if price is None:
        return f"Its price is not known. The job is ended after {jobs.HOURS} hours at the latest."
    most = _price(price * jobs.HOURS)
    return f"It costs {_price(price)} an hour, and is ended after {jobs.HOURS} hours: {most} at most."


def _pace(run: Run, where: str, hardware: str) -> float | None:
    """How much longer than guessed a run took in that place, as a factor; None where it is not known."""
    result = run.result() or {}
    seconds, steps = (result.get(key) for key in ("seconds", "steps"))
    if not (isinstance(seconds, (int, float)) and isinstance(steps, (int, float)) and seconds > 0 and steps > 0):
        return None
    with suppress(RunError):
        config = run.config()
        if config.where == where and (where == "here" or config.hardware == hardware):
            return seconds / guess(steps, config.rollouts)
    return None


def guess(steps: float, rollouts: float) -> float:
    """Seconds that a run takes, before any was timed."""
    return START + PER_STEP * steps * rollouts / 8


def steps_of(length: str, steps: float | None) -> int:
    """The number of steps of a length."""
    return LENGTHS.get(length) or int(steps or SHORT)


# ── Handlers: what is done ──────────────────────────────────────────────────────────────────────────────────────────


def retrain(
    house: House,
    base: str,
    kind: str,
    files: list[str] | None,
    dataset: str,
    length: str,
    steps: float | None,
    seed: float | None,
    name: str,
    learning_rate: float | None,
    beta: float | None,
    rollouts: float | None,
    rank: float | None,
    place: str,
    hardware: str | None,
    token: str,
    *weights: float,
) -> str:
    """Queues a run as the form says and returns its id; gr.Error says what to mend."""
    function = reward_functions.of_sliders(weights)
    with plainly():
        photos = _photos(house, kind, files, dataset)
        asked = {"learning_rate": learning_rate, "beta": beta, "rollouts": rollouts, "rank": rank, "seed": seed}
        missing = [key.replace("_", " ") for key, value in asked.items() if value is None]
        if missing:
            raise RunError(f"Fill in: {', '.join(missing)}.")
        asked |= {"steps": steps_of(length, steps), "name": (name or "").strip(), "photos": photos}
        asked |= {"where": PLACES.get(place, "here"), "hardware": hardware or DEFAULT_HARDWARE}
        try:
            return submit(house, base, dict(function.weights), token or "", **asked).id
        except RunError:
            uploads.forget(house.runs, photos)
            raise


def submit(house: House, base: str, reward: dict[str, float], token: str = "", **asked: Any) -> Run:
    """Queues a run. `base`: a model on offer, or an earlier run by its model's name. Raises RunError.

    token: the user's own, of the Hub, which a run on Hugging Face Jobs needs.
    """
    _needs_token(asked.get("where", "here"), token)
    if base not in {name for _, name in bases(house)}:
        raise RunError("Choose a base from the list.")
    earlier = house.adopted.earlier(base)
    whole = {key: int(asked[key]) for key in ("seed", "steps", "rollouts", "rank") if key in asked}
    source = str(earlier.folder.resolve()) if earlier else base
    return house.worker.submit(RunConfig.make(base=source, reward=reward, **(asked | whole)), token.strip())


def do_inside(house: House, chosen: str | None) -> None:
    """Does the run in this request, if it is queued to be done so; see `Worker.do_inside`."""
    with plainly():
        if chosen:
            house.worker.do_inside(house.runs.get(chosen))


def _needs_token(where: str, token: str) -> None:
    if where == "jobs" and not token.strip():
        raise RunError("Give your Hugging Face token: the job runs on your account. It is used for this run only.")


def _photos(house: House, kind: str, files: list[str] | None, dataset: str) -> str:
    if kind == PHOTOS[1]:
        return uploads.keep(house.runs, files or [])
    if kind == PHOTOS[2]:
        return hub_photos(dataset)
    return "bundled"


def hub_photos(dataset: str) -> str:
    """What a config says of a dataset of the Hub. Raises RunError."""
    name = (dataset or "").strip().removeprefix("hub:")
    if not export.is_repository(name):
        raise RunError("Name the dataset like owner/name, as it stands in its address on the Hub.")
    return f"hub:{name}"


def act(house: House, token: str, event: gr.EventData) -> str | None:
    """What a button of the view asks for; returns the run that is shown then."""
    asked = event._data if isinstance(event._data, dict) else {}
    with plainly():
        run = house.runs.get(asked.get("run"))  # type: ignore[arg-type]
        action = _ACTIONS.get(str(asked.get("do")))
        if action is None:
            raise RunError("There is no such button. Reload the page.")
        if action is rename:
            rename(house, run, str(asked.get("name") or ""))
        elif action is resume:
            resume(house, run, token or "")
        else:
            action(house, run)
    return None if action is delete else run.id


def cancel(house: House, run: Run) -> None:
    """Stops a run at its next step."""
    if run.status().over:
        raise RunError("This run is over already.")
    try:
        run.cancel()
    except OSError as error:
        raise RunError(f"The run could not be told ({error.strerror}). Try again.") from None
    house.worker.wake()


def resume(house: House, run: Run, token: str = "") -> None:
    """Queues a stopped run again."""
    _needs_token(run.config().where, token)
    house.worker.resume(run, token.strip())


def use(house: House, run: Run) -> None:
    """Puts a run's model beside its base."""
    if not run.status().over:
        raise RunError("This run is not over yet. Cancel it, or wait.")
    entry = house.adopted.use(run)
    inform(f"“{entry.title}” now stands beside its base in the playground.", TITLE)


def revert(house: House, run: Run) -> None:
    """Takes a run's model out of the playground."""
    house.adopted.revert(run.id)
    inform("The playground is as it was before.", TITLE)


def delete(house: House, run: Run) -> None:
    """Removes a run, and its photos if nobody else needs them."""
    if house.adopted.uses(run.id):
        raise RunError("This run's model is in use in the playground. Revert it first.")
    if any(other.config().base == str(run.folder.resolve()) for other in house.worker.waiting()):
        raise RunError("Another run is waiting to go on from this one. Delete it when that is done.")
    config = run.config()
    house.runs.delete(run.id)
    uploads.forget(house.runs, config.photos)
    inform("The run was deleted.", TITLE)


def rename(house: House, run: Run, name: str) -> None:
    """Gives a run, and its model in use, another name."""
    try:
        run.rename(name)
    except OSError as error:
        raise RunError(f"The name could not be written ({error.strerror}). Try again later.") from None
    if house.adopted.uses(run.id):
        house.adopted.use(run)


_ACTIONS: dict[str, Any] = {action.__name__: action for action in (cancel, resume, use, revert, delete, rename)}


def pick(event: gr.EventData) -> str | None:
    """The run that was chosen in the history."""
    asked = event._data if isinstance(event._data, dict) else {}
    return str(asked.get("run") or "") or None


def download(house: House, event: gr.EventData) -> str:
    """The path of a zip with everything of a run."""
    asked = event._data if isinstance(event._data, dict) else {}
    with plainly():
        run = house.runs.get(asked.get("run"))  # type: ignore[arg-type]
        base = house.adopted.base(run)
        with writing():
            path = new_file(f"{title(run)}-{run.id}.zip")
            export.pack(run, base, path)
    return str(path)


def push(house: House, chosen: str | None, repository: str, token: str, private: bool) -> tuple[str, str]:
    """Pushes the shown run's adapter to the Hub; returns what to say, and the emptied token."""
    with plainly():
        run = current(house, chosen)
        if run is None:
            raise RunError("There is no run yet.")
        address = export.push(run, house.adopted.base(run), repository or "", token or "", private)
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
# On a phone the run is below the form.
TO_THE_RUN_JS = """() => {
  const run = document.querySelector('#run-view');
  if (run.getBoundingClientRect().top > innerHeight * 0.7) run.scrollIntoView({block: 'start'});
  return [];
}"""
WEIGHTS_JS = "(...weights) => Object.fromEntries({names}.map((name, place) => [name, weights[place]]))"


def build(house: House, shared: Shared) -> None:
    """The tab: on the left what is asked, on the right the run; below it all runs."""
    chosen, seen, here, hourly = gr.State(None), gr.State(None), gr.State(False), gr.State({})
    timer = gr.Timer(1.0, active=False)
    delivery = gr.File(visible=False)
    with gr.Row(elem_id="tune"):
        with gr.Column(elem_id="tune-ask", min_width=300, scale=1):
            reward, form, job, about, start = _form(house)
        with gr.Column(elem_id="tune-results", min_width=320, scale=3):
            view = run_view()
            pushing = _push_form()
            history = history_view()

    def acted(token: str, event: gr.EventData) -> str | None:
        return act(house, token, event)

    def downloaded(event: gr.EventData) -> str:
        return download(house, event)

    shown = [view, history, shared.picker, form[0], seen, timer]
    asked = [chosen, seen, shared.picker, here]
    anew = partial(show, house)
    timer.tick(anew, asked, shown, **QUICK)
    gr.on(None, anew, asked, shown, **QUICK)  # when the page is opened
    shared.tabs.select(tab_opened, None, here, **QUICK).then(anew, asked, shown, **QUICK)
    part = dict(zip(FORM, form, strict=True))
    started = start.click(partial(retrain, house), [*form, *shared.sliders], chosen, **PRIVATE)
    started.success(lambda: "", None, part["token"], **QUICK)
    started.success(anew, asked, shown, **QUICK).then(None, None, None, js=TO_THE_RUN_JS, **PRIVATE)
    changed_run = view.act(acted, part["token"], chosen, **PRIVATE)
    changed_run.success(anew, asked, shown, **QUICK)
    if house.worker.inside:  # the request itself is the run
        for asking in (started, changed_run):
            asking.success(partial(do_inside, house), chosen, **ONE_BY_ONE)
    history.pick(pick, None, chosen, **QUICK).then(anew, asked, shown, **QUICK)
    deliver(view.download, downloaded, [], delivery)
    repository, token, private, send, said = pushing
    send.click(partial(push, house), [chosen, repository, token, private], [said, token], **PRIVATE)

    part["kind"].change(photos_chosen, part["kind"], [part["files"], part["dataset"]], **QUICK)
    part["length"].change(length_chosen, part["length"], part["steps"], **QUICK)
    part["place"].change(place_chosen, part["place"], [job, part["hardware"], hourly], **QUICK)
    timed = [part[name] for name in ("length", "steps", "rollouts", "place", "hardware")]
    changed = [component.change for component in (*timed, hourly)]
    gr.on(changed, partial(estimate, house), [*timed, hourly], about, **QUICK)
    names = WEIGHTS_JS.replace("{names}", str(list(REWARDS)))
    gr.on([slider.change for slider in shared.sliders], None, shared.sliders, reward, js=names, **PRIVATE)


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
)


def _form(house: House) -> tuple[gr.HTML, list[Any], gr.Group, gr.Markdown, gr.Button]:
    """The left column: the reward, the parts in the order of FORM, those of a job, the estimate, and the button."""
    default = RunConfig.model_fields
    offered = bases(house)
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
    about = gr.Markdown(estimate(house, "Short run", SHORT, 8), elem_id="tune-estimate")
    start = gr.Button("Retrain with this reward", variant="primary", elem_id="tune-start")
    knobs = [base, kind, files, dataset, length, steps, seed, name, rate, beta, rollouts, rank]
    return reward, [*knobs, place, hardware, token], job, about, start


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


def _push_form() -> tuple[gr.Textbox, gr.Textbox, gr.Checkbox, gr.Button, gr.Textbox]:
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
