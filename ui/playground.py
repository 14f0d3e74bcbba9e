"""The Playground tab: a photo, a question and some models; what they answer, side by side, scored by the sliders."""

from __future__ import annotations

import json
import secrets
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from inference.answers import LENGTHS, MAX_CANDIDATES, MAX_SEED, MAX_TEMPERATURE, SKILLS, Request, RequestError
from recipes import render, save_picture, shrink
from rewards import DEFAULT, REWARDS, RewardFunction
from ui.compare import Comparison, compare, picture_url
from ui.grid import candidate_grid, grid_value
from ui.link import Settings, read_link
from ui.messages import refusal, warn
from ui.photo import photo_input, read_photo
from ui.picker import ModelPicker, check_choice, choices
from ui.report import report
from ui.samples import SAMPLES, strip

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Session:
    """What one browser tab has on its screen. Setting `cancel` stops its run."""

    run: str
    cancel: threading.Event
    photo: str
    settings: Settings
    comparison: Comparison


# ── Handlers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def open_page(request: gr.Request) -> tuple[Any, ...]:
    """The page as its address wants it; what the address gets wrong is said and left at its default."""
    settings, problems = read_link(dict(request.query_params))
    if problems:
        warn("Not understood in the link: " + "; ".join(problems), "Some settings were left as they are")
    photo = str(SAMPLES[settings.photo].path) if settings.photo else None
    picker = gr.HTML(value=list(settings.models), choices=choices())
    weights = [settings.reward.weights.get(name, 0.0) for name in REWARDS]
    prompt, length = choose_skill(settings.skill, settings.prompt)
    return (
        photo, settings.photo, picker, settings.skill, prompt, length,
        settings.n, settings.temperature, settings.seed, *weights,
    )  # fmt: skip


def choose_skill(name: str, prompt: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """How the prompt and the caption's length look for a skill. A prompt that is another skill's default is replaced."""
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
    )


def choose_sample(event: gr.EventData) -> str:
    """The path of the sample photo that was clicked."""
    sample = SAMPLES.get(str(event._data.get("file")) if isinstance(event._data, dict) else "")
    if sample is None:
        raise refusal("There is no such sample photo. Reload the page.", "Sample photos")
    return str(sample.path)


def check_photo(path: str | None) -> tuple[Any, str]:
    """What was uploaded, pasted or taken, if it can be used; nothing and a warning if not. Either way it is no sample."""
    if not path:
        return None, ""
    try:
        read_photo(path)
    except gr.Error as error:
        gr.Warning(error.message, title=error.title, duration=12)
        return None, ""
    return gr.skip(), ""


def new_seed() -> int:
    """A seed that nobody chose."""
    return secrets.randbelow(10_000)


def run(
    photo: str | None, sample: str, names: list[str], skill: str, prompt: str, length: str, n: float,
    temperature: float, seed: float,
) -> Iterator[tuple[dict[str, Any], Session, Any, Any]]:  # fmt: skip
    """Asks the models; yields the grid, the session's state and the two buttons. gr.Error says what to mend."""
    names = check_choice(names)
    pixels = read_photo(photo)
    request = ask(pixels, skill, prompt, length, n, temperature, seed)
    settings = Settings(
        sample, tuple(names), skill, request.prompt, length, request.n, request.temperature, request.seed
    )
    small = shrink(pixels)
    view = {"src": picture_url(small), "width": pixels.shape[1], "height": pixels.shape[0]}
    session = Session(secrets.token_hex(8), threading.Event(), str(photo), settings, Comparison(skill))
    for comparison in compare(names, request, session.cancel):
        session = replace(session, comparison=comparison.without_pictures())
        going = comparison.status == "running"
        yield (
            grid_value(comparison, session.run, view),
            session,
            gr.update(interactive=not going),
            gr.update(interactive=going),
        )


def ask(photo: Any, skill: str, prompt: str | None, length: str, n: float, temperature: float, seed: float) -> Request:
    """The request, checked; gr.Error says what to change."""
    try:
        return Request(photo, skill, prompt or "", length, n, temperature, seed)  # type: ignore[arg-type]
    except RequestError as error:
        raise refusal(str(error), "This cannot be asked") from None


def cancel(session: Session | None) -> None:
    """Stops this session's run: its models at their next token."""
    if session:
        session.cancel.set()


def full_picture(session: Session | None, event: gr.EventData) -> str:
    """The path of a candidate's picture in full size, with its recipe in the file's metadata."""
    card = _card(session, event._data)
    if session is None or card is None or card.recipe is None:
        raise refusal("That candidate is no longer here. Run again.", "Download")
    pixels = read_photo(session.photo)
    path = _folder() / f"{Path(session.photo).stem[:60]}-{session.settings.seed + card.index}.jpg"
    save_picture(render(pixels, card.recipe), card.recipe, path)
    return str(path)


def json_report(session: Session | None, *weights: float) -> str:
    """The path of a JSON file with the settings, the answers, the scores and the rankings of what is on the screen."""
    if session is None:
        raise refusal("There is nothing to report yet. Run first.", "Report")
    path = _folder() / "report.json"
    path.write_text(
        json.dumps(report(session.settings, session.comparison, reward(weights)), indent=2), encoding="utf-8"
    )
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


def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="playground-"))


# ── Layout ──────────────────────────────────────────────────────────────────────────────────────────────────────────

WEIGHTS_JS = """(...weights) => { document.dispatchEvent(new CustomEvent('playground-weights',
  {detail: Object.fromEntries(NAMES.map((name, place) => [name, weights[place]]))})); return []; }""".replace(
    "NAMES", json.dumps(list(REWARDS))
)
DELIVER_JS = """file => { const link = document.createElement('a'); link.href = file.url; link.download = file.orig_name || '';
  document.body.append(link); link.click(); link.remove(); return []; }"""


def build() -> None:
    """The tab: on the left what is asked, on the right what comes back."""
    default = Settings()
    session = gr.State(None, time_to_live=6 * 3600)
    with gr.Row(elem_id="playground"):
        with gr.Column(elem_id="ask", min_width=320, scale=1):
            photo = photo_input()
            sample = strip()
            skill = gr.Radio(
                [(entry.title, name) for name, entry in SKILLS.items()],
                value=default.skill,
                label="Skill",
                elem_id="skill",
            )
            prompt = gr.Textbox(
                label="Prompt", lines=2, max_lines=6, elem_id="prompt", placeholder=SKILLS[default.skill].placeholder
            )
            length = gr.Radio(list(LENGTHS), value=default.length, label="Length", visible=False, elem_id="length")
            picker = ModelPicker(list(default.models), choices=choices(), elem_id="models")
            with gr.Row(elem_classes="settings"):
                n = gr.Slider(
                    1,
                    MAX_CANDIDATES,
                    default.n,
                    step=1,
                    precision=0,
                    label="Candidates per model",
                    min_width=120,
                    buttons=[],
                )
                temperature = gr.Slider(
                    0, MAX_TEMPERATURE, default.temperature, step=0.1, label="Temperature", min_width=120, buttons=[]
                )
            with gr.Row(elem_classes="settings"):
                seed = gr.Number(default.seed, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=120)
                another = gr.Button("New seed", size="sm", min_width=90, elem_id="new-seed")
            with gr.Row(elem_id="actions"):
                start = gr.Button("Run", variant="primary", elem_id="run")
                stop = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel")
        with gr.Column(elem_id="results", min_width=320, scale=3):
            with gr.Row(elem_id="weights"):
                sliders = [
                    gr.Slider(
                        0,
                        1,
                        DEFAULT.weights.get(name, 0.0),
                        step=0.05,
                        label=name.capitalize(),
                        min_width=140,
                        buttons=[],
                        elem_id=f"weight-{name}",
                    )
                    for name in REWARDS
                ]
            grid = candidate_grid()
            with gr.Row(elem_id="outcome"):
                link = gr.Button("Copy link", size="sm", elem_id="copy-link")
                reporting = gr.Button("Report (JSON)", size="sm", elem_id="report")
    delivery = gr.File(visible=False)

    asked = [photo, sample, picker, skill, prompt, length, n, temperature, seed]
    private: dict[str, Any] = {"api_visibility": "private"}
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", **private}
    context = gr.context.Context.root_block
    assert context is not None
    context.load(
        open_page, None, [photo, sample, picker, skill, prompt, length, n, temperature, seed, *sliders], **quick
    )
    sample.choose(choose_sample, None, photo, **quick)
    photo.input(check_photo, photo, [photo, sample], show_progress="hidden", **private)
    skill.input(choose_skill, [skill, prompt], [prompt, length], **quick)
    another.click(new_seed, None, seed, **quick)
    start.click(
        run, asked, [grid, session, start, stop],
        concurrency_limit=None, show_progress="hidden", **private,
    )  # fmt: skip
    stop.click(cancel, session, None, **quick)
    gr.on([slider.change for slider in sliders], None, sliders, None, js=WEIGHTS_JS, **private)
    for trigger, handler, inputs in (
        (grid.download, full_picture, [session]),
        (reporting.click, json_report, [session, *sliders]),
    ):
        trigger(handler, inputs, delivery, show_progress="hidden", **private).success(
            None, delivery, None, js=DELIVER_JS, **private
        )
