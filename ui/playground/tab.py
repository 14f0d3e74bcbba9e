"""The Playground tab: a photo, a question and some models; what they answer, side by side, scored by the sliders."""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from pydantic import SecretStr

from inference.registry import MODELS, answer
from inference.types import (
    LENGTHS,
    MAX_CANDIDATES,
    MAX_SEED,
    MAX_TEMPERATURE,
    SKILLS,
    Event,
    Request,
    RequestError,
)
from recipes import Recipe, render, save_picture, shrink
from rewards import REWARDS, RewardFunction
from ui import files
from ui.api import compare as api
from ui.files import new_file, writing
from ui.messages import refusal, warn
from ui.playground import reward_functions
from ui.playground.compare import Ask, Comparison, compare, picture_url
from ui.playground.grid import candidate_grid, grid_value
from ui.playground.link import LINKED, PlaygroundSettings, link_js, read_link
from ui.playground.metering import ComparisonMeter
from ui.playground.photo import photo_input, read_photo
from ui.playground.picker import check_choice, choices
from ui.playground.report import report
from ui.playground.samples import SAMPLES, strip
from ui.services import AppServices, SharedComponents

SHOWN_BY_BROWSERS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif")


@dataclass(frozen=True)
class Session:
    """What one browser tab has on its screen. Setting `cancel` stops its run."""

    run: str
    cancel: threading.Event
    photo: str
    setup: PlaygroundSettings
    comparison: Comparison


# ── Handlers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def open_page(services: AppServices, request: gr.Request) -> list[Any]:
    """The page as its address wants it; what the address gets wrong is said and left at its default.

    Where it names no models, the newest tuned model in service stands beside what it came from.
    """
    setup, problems = read_link(dict(request.query_params))
    front = services.adapters.front()
    if front and not request.query_params.get("models"):
        setup = replace(setup, models=tuple(front))
    if problems:
        warn(f"Not everything in this link could be used. {'; '.join(problems)}.", "Link")
    prompt, length, reasoning = choose_skill(setup.skill, setup.prompt)
    length["value"] = setup.length
    return [
        gr.HTML(value=list(setup.models), choices=choices()),
        setup.skill,
        prompt,
        length,
        setup.n,
        setup.temperature,
        setup.seed,
        setup.photo,
        reasoning,
        *reward_functions.to_sliders(setup.reward),
        gr.update(choices=reward_functions.names(services.store)),
    ]


def choose_skill(name: str, prompt: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """How prompt, length and reasoning look for a skill. A prompt that is another skill's default is replaced."""
    skill = SKILLS[name]
    ours = {other.default_prompt for other in SKILLS.values()} | {""}
    if skill.prompt == "none" or (prompt in ours and skill.prompt == "optional"):
        prompt = ""
    elif prompt in ours:
        prompt = skill.default_prompt
    wanted = skill.prompt != "none"
    placeholder = skill.placeholder if wanted else f"{skill.title} needs no words"
    return (
        gr.update(value=prompt, placeholder=placeholder, interactive=wanted),
        gr.update(visible=name == "caption"),
        gr.update(visible=name == "query"),
    )


def choose_sample(event: gr.EventData) -> str:
    """The path of the sample photo that was clicked."""
    sample = SAMPLES.get(str(event._data.get("file")) if isinstance(event._data, dict) else "")
    if sample is None:
        raise refusal("There is no such sample photo. Reload the page.", "Sample photos")
    return str(sample.path)


def check_photo(path: str | None) -> tuple[str | None, str]:
    """What was uploaded, pasted or taken if it can be used, else nothing and a warning; and no sample's name.

    What no browser can show (a TIFF, say) is turned into a PNG.
    """
    if not path:
        return None, ""
    try:
        pixels = read_photo(path)
        if Path(path).suffix.lower() in SHOWN_BY_BROWSERS:
            return path, ""
        with writing():
            shown = new_file(f"{Path(path).stem}.png")
            save_picture(pixels, Recipe(), shown)
            return str(shown), ""
    except gr.Error as error:
        gr.Warning(error.message, title=error.title, duration=12)
        return None, ""


def run(
    photo: str | None,
    names: list[str],
    skill: str,
    prompt: str,
    length: str,
    n: float,
    temperature: float,
    seed: float,
    sample: str,
    reasoning: bool = False,
    key: str = "",
    meter: ComparisonMeter | None = None,
    visitor: str = "",
) -> Iterator[tuple[dict[str, Any], Session, Any, Any]]:
    """Asks the models; yields the grid, the session's state and the two buttons. gr.Error says what to mend.

    With a meter each model's call is recorded as one of `visitor`, a random name for the browser's tab. key: the
    visitor's own, of Moondream; it is used for this run, and kept nowhere.
    """
    names = check_choice(names)
    pixels = read_photo(photo)
    request = ask(pixels, skill, prompt, length, n, temperature, seed, reasoning)
    asking = asks_with(own_key(key))
    sample = sample if sample in SAMPLES else ""
    setup = PlaygroundSettings(
        sample, tuple(names), skill, request.prompt, length, request.n, request.temperature, request.seed
    )
    view = {"src": picture_url(shrink(pixels)), "width": pixels.shape[1], "height": pixels.shape[0]}
    session = Session(secrets.token_hex(8), threading.Event(), str(photo), setup, Comparison(skill))
    asked = (names, request, session.cancel)
    every = meter.compare(*asked, "playground", visitor, asking) if meter else compare(*asked, asking)
    with closing(every) as snapshots:
        for comparison in snapshots:
            session = replace(session, comparison=comparison.without_pictures())
            going = comparison.status == "running"
            grid = grid_value(comparison, session.run, view)
            yield grid, session, gr.update(interactive=not going), gr.update(interactive=going)


def ask(
    photo: Any,
    skill: str,
    prompt: str | None,
    length: str,
    n: float,
    temperature: float,
    seed: float,
    reasoning: bool = False,
) -> Request:
    """The request, checked; gr.Error says what to change."""
    thinks = bool(reasoning) and skill == "query"
    try:
        return Request(photo, skill, prompt or "", length, n, temperature, seed, thinks)  # type: ignore[arg-type]
    except RequestError as error:
        raise refusal(str(error), "This cannot be asked") from None


def own_key(text: str | None) -> SecretStr | None:
    """The visitor's key, checked; gr.Error, without it, where it cannot be one."""
    text = (text or "").strip()
    if not text:
        return None
    if not re.fullmatch(r"[!-~]{1,500}", text):
        raise refusal("The key has characters that no key has. Copy it again.", "Your own Moondream key")
    return SecretStr(text)


def asks_with(key: SecretStr | None) -> Ask:
    """What asks a model, with the visitor's key where it takes one."""

    def asked(name: str, request: Request, cancel: threading.Event) -> Iterator[Event]:
        entry = MODELS.get(name)
        return answer(entry.with_key(key) if entry else name, request, cancel)

    return asked


def choose_key(text: str | None) -> dict[str, Any]:
    """The picker, in which a key makes more models choosable."""
    return gr.HTML(choices=choices(key=own_key(text)))  # type: ignore[return-value]


def cancel(session: Session | None) -> None:
    """Stops this session's run: its models at their next token."""
    if session:
        session.cancel.set()


def full_picture(session: Session | None, event: gr.EventData) -> str:
    """The path of a candidate's picture in full size, with its recipe in the file's metadata."""
    card = _card(session, event._data)
    if session is None or card is None or card.recipe is None:
        raise refusal("That candidate is no longer here. Run again.", "Download")
    picture = render(read_photo(session.photo), card.recipe)
    with writing():
        path = new_file(f"{Path(session.photo).stem}-{session.setup.seed + card.index}.jpg")
        save_picture(picture, card.recipe, path)
    return str(path)


def json_report(session: Session | None, *weights: float) -> str:
    """The path of a JSON file with the settings, the answers, the scores and the rankings of what is on the screen."""
    if session is None:
        raise refusal("There is nothing to report yet. Run first.", "Report")
    words = json.dumps(report(session.setup, session.comparison, reward(weights)), indent=2)
    with writing():
        path = new_file("report.json")
        path.write_text(words + "\n", encoding="utf-8")
    return str(path)


def reward(weights: tuple[float, ...]) -> RewardFunction | None:
    """The sliders as a reward function; None when all are at zero."""
    return RewardFunction(dict(zip(REWARDS, weights, strict=True))) if any(weights) else None


def _card(session: Session | None, wanted: Any) -> Any:
    if session is None or not isinstance(wanted, dict):
        return None
    for column in session.comparison.columns:
        for card in column.cards:
            if (column.name, card.index) == (wanted.get("model"), wanted.get("index")):
                return card
    return None


# ── Layout ──────────────────────────────────────────────────────────────────────────────────────────────────────────

WEIGHTS_JS = """(...weights) => {
  const named = Object.fromEntries(NAMES.map((name, place) => [name, weights[place]]));
  document.dispatchEvent(new CustomEvent('playground-weights', {detail: named}));
  return [];
}""".replace("NAMES", json.dumps(list(REWARDS)))
SKILL_JS = (
    "skill => { document.querySelector('#results').dataset.skill = skill; return []; }"  # rewards are for recipes
)
# Tells programs that drive the page that its address has been applied: what they set before would be overwritten.
OPENED_JS = "() => { document.body.dataset.opened = 'yes'; return []; }"
# A click, for a tab that is chosen by an update tells nobody.
TO_FINE_TUNE_JS = """() => {
  [...document.querySelectorAll('[role=tab]')].find(tab => tab.textContent.trim() === 'Fine-tune').click();
  scrollTo({top: 0});
  return [];
}"""
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
QUICK: dict[str, Any] = {"queue": False, **PRIVATE}


def build(services: AppServices, shared_components: SharedComponents) -> None:
    """The tab: on the left what is asked, on the right what comes back."""
    sliders = shared_components.sliders
    session = gr.State(None, time_to_live=6 * 3600)
    delivery = gr.File(visible=False)

    def deliver(event: Any, handler: Any, inputs: list[Any]) -> None:
        files.deliver(event, handler, inputs, delivery)

    with gr.Row(elem_id="playground"):
        with gr.Column(elem_id="ask", min_width=320, scale=1):
            asked, another, start, stop = _question(shared_components.picker)
        with gr.Column(elem_id="results", min_width=320, scale=3):
            with gr.Row(elem_id="weights"):
                for slider in sliders:
                    slider.render()
            saved = reward_functions.build(services.store, sliders, deliver)
            grid = candidate_grid()
            with gr.Row(elem_id="outcome"):
                teach = gr.Button("Teach a model this reward", size="sm", elem_id="teach", min_width=120)
                link = gr.Button("Copy link", size="sm", elem_id="copy-link", min_width=120)
                reporting = gr.Button("Report (JSON)", size="sm", elem_id="report", min_width=120)
    api.build(services)

    photo, picker, skill, prompt, length, n, temperature, seed, sample, reasoning, key = asked

    def opened(request: gr.Request) -> list[Any]:
        return open_page(services, request)

    # Queued: only those events can show a warning.
    arrival = gr.on(None, opened, None, [*asked[1:-1], *sliders, saved], **PRIVATE)
    arrival.then(None, None, None, js=OPENED_JS, **PRIVATE)
    sample.choose(choose_sample, None, photo, **QUICK)
    photo.input(check_photo, photo, [photo, sample], **PRIVATE)
    skill.input(choose_skill, [skill, prompt], [prompt, length, reasoning], **QUICK)
    key.blur(choose_key, key, picker, **QUICK)
    key.submit(choose_key, key, picker, **QUICK)
    skill.change(None, skill, None, js=SKILL_JS, **PRIVATE)
    another.click(None, None, seed, js="() => Math.floor(Math.random() * 10000)", **PRIVATE)

    def started(
        photo: str | None,
        names: list[str],
        skill: str,
        prompt: str,
        length: str,
        n: float,
        temperature: float,
        seed: float,
        sample: str,
        reasoning: bool,
        key: str,
        request: gr.Request,
    ) -> Iterator[Any]:
        asked = (photo, names, skill, prompt, length, n, temperature, seed, sample, reasoning, key)
        yield from run(*asked, services.meter, request.session_hash or "")

    start.click(started, asked, [grid, session, start, stop], concurrency_limit=32, **PRIVATE)
    stop.click(cancel, session, None, **QUICK)
    gr.on([slider.change for slider in sliders], None, sliders, None, js=WEIGHTS_JS, **PRIVATE)
    deliver(grid.download, full_picture, [session])
    deliver(reporting.click, json_report, [session, *sliders])
    teach.click(None, None, None, js=TO_FINE_TUNE_JS, **PRIVATE)

    linked = [asked[ASKED.index(name)] for name in LINKED] + sliders
    changes = [sample.choose, picker.choose, seed.change, start.click]
    changes += [part.input for part in (skill, prompt, length, n, temperature, *sliders)]
    for change in changes:
        change(None, linked, None, js=link_js(list(REWARDS), now=False), **PRIVATE)
    copied = link.click(None, linked, link, js=link_js(list(REWARDS), now=True), **PRIVATE)
    copied.then(None, None, link, js="() => new Promise(then => setTimeout(then, 1500, 'Copy link'))", **PRIVATE)


ASKED = ("upload", "models", "skill", "prompt", "length", "n", "temperature", "seed", "photo", "reasoning", "key")


def _question(picker: gr.HTML) -> tuple[list[Any], gr.Button, gr.Button, gr.Button]:
    """The left column: the parts in the order of ASKED, then the buttons for a new seed, to run and to cancel."""
    default = PlaygroundSettings()
    photo = photo_input(label="Photo", height=240, elem_id="photo")
    sample = strip()
    skills = [(skill.title, name) for name, skill in SKILLS.items()]
    skill = gr.Radio(skills, value=default.skill, label="Skill", elem_id="skill")
    placeholder = SKILLS[default.skill].placeholder
    prompt = gr.Textbox(label="Prompt", lines=2, max_lines=6, placeholder=placeholder, elem_id="prompt")
    length = gr.Radio(list(LENGTHS), value=default.length, label="Length", visible=False, elem_id="length")
    reasoning = gr.Checkbox(
        False, label="Think first", info="Hosted models only.", visible=False, container=False, elem_id="reasoning"
    )
    picker.render()
    key = _key_field()
    with gr.Row(elem_classes="knobs"):
        settings: dict[str, Any] = {"min_width": 120, "buttons": []}
        n = gr.Slider(1, MAX_CANDIDATES, default.n, step=1, precision=0, label="Candidates", elem_id="n", **settings)
        temperature = gr.Slider(
            0, MAX_TEMPERATURE, default.temperature, step=0.1, label="Temperature", elem_id="temperature", **settings
        )
    with gr.Row(elem_classes="knobs"):
        seed = gr.Number(
            default.seed, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=120, elem_id="seed"
        )
        another = gr.Button("New seed", size="sm", min_width=90, elem_id="new-seed")
    with gr.Row(elem_id="actions"):
        start = gr.Button("Run", variant="primary", elem_id="run", min_width=120)
        stop = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel", min_width=120)
    asked = [photo, picker, skill, prompt, length, n, temperature, seed, sample, reasoning, key]
    return asked, another, start, stop


def _key_field() -> gr.Textbox:
    with gr.Accordion("Your own Moondream key", open=False, elem_id="own-key"):
        return gr.Textbox(
            label="Key",
            type="password",
            max_lines=1,
            info="For Moondream Cloud's models, on your account. It stays in this page, and is gone when you close it.",
            html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
            elem_id="key",
        )
