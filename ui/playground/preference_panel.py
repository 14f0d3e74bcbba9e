"""The panel of choices in the Playground: choose between candidates, and apply the weights that the choices fit."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import Dependency

from access.permissions import AccessDenied
from access.roles import Visitor
from rewards import EQUAL_WEIGHTS, REWARDS, RewardFunction
from storage.database import StoreError
from storage.preferences import OUTCOMES, JudgedCandidate, Preference
from training.data import uploads
from training.preferences.export import MIN_FOR_DPO, to_choices, write_folder
from training.preferences.fit import FittedReward, Scores, next_pair
from training.runs.run import Run, RunError
from ui.components import template_component
from ui.events import PRIVATE, UNQUEUED
from ui.files import download_on, writing
from ui.finetune import tab as finetune
from ui.messages import as_gradio_error, user_error
from ui.permissions import visitor_of
from ui.playground.compare import Candidate, Comparison
from ui.playground.photo import read_photo
from ui.playground.preferences import SAMPLE_FILES, count_for_dpo, fit_choices, save_choice, write_zip
from ui.playground.reward_functions import to_sliders
from ui.services import AppServices

TITLE = "Choices"
STEP = 0.05  # of the sliders
NO_PAIR = "There are no two different edits of a photo to choose between. Run the skill “Edit recipe” first."
NO_MORE_PAIRS = "All pairs of this comparison were shown. Run again for new candidates."
LEAD = "Choose the pictures that you prefer: the reward weights are fitted to your choices."
DPO_SETTINGS = {
    "name": "DPO on my choices",
    "steps": 60,
    "photos_per_step": 4,
    "rollouts": 2,
    "learning_rate": 1e-3,
    "beta": 0.1,
    "seed": 1,
}
NOTE = (
    "Stored with each choice: both recipes, their scores and models, and the sliders. Photos are stored only if you "
    "agree; sample photos by name. Only you see your choices. DPO, which trains a model on the choices themselves, is "
    "offered from {minimum} choices on sample photos or kept photos on; you have {count}."
)
_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class PairState:
    """The pairs that a page has shown.

    Attributes:
        run: Id of the comparison.
        shown: The pairs of this comparison that were chosen or skipped, as keys of candidates.
        pair: The pair that is shown, left and right.
    """

    run: str = ""
    shown: tuple[frozenset[str], ...] = ()
    pair: tuple[str, str] | None = None


@dataclass(frozen=True)
class ComparedPhoto:
    """The comparison that a page displays.

    Attributes:
        run: Its id.
        photo: Path of the photo.
        sample: File name of a sample photo, or "".
        comparison: The comparison.
    """

    run: str
    photo: str
    sample: str
    comparison: Comparison


def act(
    services: AppServices,
    visitor: Visitor,
    event: dict[str, Any],
    compared: ComparedPhoto | None,
    state: PairState,
    weights: RewardFunction,
) -> tuple[dict[str, Any], PairState, RewardFunction | None]:
    """Do what a visitor has clicked in the panel.

    Args:
        services: The application's services.
        visitor: The visitor, who owns the choices.
        event: `action`: "open", "choose" (with `left`, `right`, `outcome` and `keep`), "undo", "apply", "reset" or
            "delete".
        compared: The displayed comparison; None if there is none.
        state: The pairs shown so far.
        weights: The weights on the sliders.

    Returns:
        The panel's value, the new state, and weights for the sliders or None.
    """
    store, action, error, sliders = services.preferences, event.get("action"), "", None
    if compared is None or compared.run != state.run:
        state = PairState(compared.run if compared else "")
    try:
        if action == "choose" and compared:
            state = _choose(services, visitor, event, compared, state, weights)
        elif action == "undo":
            store.undo(visitor.id)
        elif action == "delete":
            store.delete_all(visitor.id)
        preferences = store.list(visitor.id)
    except StoreError as problem:
        error, preferences = str(problem), _list_or_empty(services, visitor)
    fitted = fit_choices(preferences, weights)
    if action == "apply" and fitted.usable:
        sliders = fitted.function
    elif action == "reset" and preferences:
        sliders = fitted.start
    if action in ("open", "choose") or state.pair:
        pair = _next_pair(compared, state, preferences, weights)
        state = replace(state, pair=pair)
        if pair is None and action in ("open", "choose") and not error:
            error = NO_MORE_PAIRS if state.shown else NO_PAIR
    return snapshot(preferences, fitted, state, error), state, sliders


def prefer(
    services: AppServices,
    visitor: Visitor,
    event: dict[str, Any],
    compared: ComparedPhoto | None,
    weights: RewardFunction,
) -> None:
    """Store that a card is preferred to the one that ranks first, or second if the card is the first itself.

    Raises:
        gr.Error: There is no other candidate, or the choice cannot be stored.
    """
    candidates = _candidates(compared)
    key = f"{event.get('model')}/{event.get('index')}"
    if compared is None or key not in candidates:
        raise user_error(NO_PAIR, TITLE)
    preferred = candidates[key]
    others = {name: other for name, other in candidates.items() if other.recipe != preferred.recipe}
    if not others:
        raise user_error(NO_PAIR, TITLE)
    other = others[max(others, key=lambda name: weights.total(others[name].scores) or 0.0)]
    is_left = bool(secrets.randbelow(2))
    pair = (preferred, other) if is_left else (other, preferred)
    with as_gradio_error(StoreError, title=TITLE):
        _save(services, visitor, compared, pair, "left" if is_left else "right", weights, bool(event.get("keep")))


def start_dpo(services: AppServices, visitor: Visitor, weights: RewardFunction) -> Run:
    """Queue a DPO run on a visitor's choices, judged by the fitted reward on photos without choices.

    Args:
        services: The application's services.
        visitor: The visitor, who owns the choices and the run.
        weights: The weights on the sliders.

    Raises:
        gr.Error: There are too few choices with a photo, or the visitor may not start the run.
    """
    with as_gradio_error(StoreError, RunError, AccessDenied, title=TITLE):
        preferences = services.preferences.list(visitor.id, photos=True)
        count = count_for_dpo(preferences)
        if count < MIN_FOR_DPO:
            raise RunError(f"DPO needs {MIN_FOR_DPO} choices on sample photos or kept photos; you have {count}.")
        reward = dict(fit_choices(preferences, weights).function.weights)
        bases = [name for _, name in finetune.base_models(services, visitor)]
        finetune.check_may_train(services, visitor, "here", DPO_SETTINGS["steps"], DPO_SETTINGS["rollouts"])
        with tempfile.TemporaryDirectory() as folder:
            with writing():
                write_folder(preferences, SAMPLE_FILES, Path(folder))
            source = uploads.save_folder(services.runs, Path(folder), visitor.id, services.upload_quota).source
        try:
            base = bases[0] if bases else ""
            return finetune.submit(services, visitor, base, reward, photos=source, method="dpo", **DPO_SETTINGS)
        except (RunError, AccessDenied):
            uploads.delete_unused(services.runs, source)
            raise


def snapshot(
    preferences: Sequence[Preference], fitted: FittedReward, state: PairState, error: str = ""
) -> dict[str, Any]:
    """Build the value of the panel.

    Args:
        preferences: The visitor's choices.
        fitted: The fit to them.
        state: The pair that is shown.
        error: What went wrong; may be empty.
    """
    weights, start = fitted.function.weights, fitted.start.weights
    scale = max(*fitted.high.values(), *start.values())
    return {
        "serial": secrets.token_hex(4),  # a repeated value is drawn as well
        "choices": len(preferences),
        "usable": fitted.usable,
        "lead": lead(fitted),
        "error": error,
        "note": NOTE.format(minimum=MIN_FOR_DPO, count=count_for_dpo(preferences)),
        "dpo": count_for_dpo(preferences) >= MIN_FOR_DPO,
        "pair": {"left": state.pair[0], "right": state.pair[1]} if state.pair else None,
        "weights": [
            {
                "name": name,
                "value": weights.get(name, 0.0) / scale,
                "low": fitted.low[name] / scale,
                "high": fitted.high[name] / scale,
                "before": start.get(name, 0.0) / scale,
                "text": f"{weights.get(name, 0.0):.2f} ({fitted.low[name]:.2f}–{fitted.high[name]:.2f})",
            }
            for name in REWARDS
        ],
    }


def lead(fitted: FittedReward) -> str:
    """Return the line that says how well the fitted weights agree with the choices."""
    if not fitted.choices:
        return LEAD
    if not fitted.usable:
        return fitted.message
    return f"Agrees with {fitted.agrees} of {fitted.decided} of your choices (before: {fitted.agrees_before})." + (
        f" {fitted.choices - fitted.decided} equal." if fitted.choices > fitted.decided else ""
    )


def slider_values(function: RewardFunction) -> list[float]:
    """Return the slider values of fitted weights, on the sliders' steps."""
    values = to_sliders(function)
    rounded = [round(round(value / STEP) * STEP, 2) for value in values]
    return rounded if any(rounded) else values


def _choose(
    services: AppServices,
    visitor: Visitor,
    event: dict[str, Any],
    compared: ComparedPhoto,
    state: PairState,
    weights: RewardFunction,
) -> PairState:
    """Store a choice, unless the pair is skipped. Raises StoreError."""
    candidates = _candidates(compared)
    left, right = str(event.get("left")), str(event.get("right"))
    if left not in candidates or right not in candidates:
        return state
    if event.get("outcome") in OUTCOMES:
        pair = (candidates[left], candidates[right])
        _save(services, visitor, compared, pair, str(event["outcome"]), weights, bool(event.get("keep")))
    return replace(state, shown=(*state.shown, frozenset((left, right))))


def _save(
    services: AppServices,
    visitor: Visitor,
    compared: ComparedPhoto,
    pair: tuple[JudgedCandidate, JudgedCandidate],
    outcome: str,
    weights: RewardFunction,
    keep: bool,
) -> None:
    photo = read_photo(compared.photo) if keep and not compared.sample else None
    save_choice(services.preferences, visitor, pair, outcome, weights, compared.sample, photo)


def _candidates(compared: ComparedPhoto | None) -> dict[str, JudgedCandidate]:
    """Return the candidates with scores by key, as the grid names them."""
    columns = compared.comparison.columns if compared else ()
    return {
        f"{column.name}/{candidate.index}": JudgedCandidate(column.name, str(candidate.recipe), candidate.scores)
        for column in columns
        for candidate in column.candidates
        if _is_scored(candidate)
    }


def _is_scored(candidate: Candidate) -> bool:
    return candidate.recipe is not None and bool(candidate.scores)


def _next_pair(
    compared: ComparedPhoto | None, state: PairState, preferences: Sequence[Preference], weights: RewardFunction
) -> tuple[str, str] | None:
    """Return the next pair in random order; None if all were shown. Of equal recipes, one is shown."""
    unique: dict[str, tuple[str, Scores]] = {}
    for key, candidate in _candidates(compared).items():
        unique.setdefault(candidate.recipe, (key, candidate.scores))
    keys = [key for key, _ in unique.values()]
    excluded = [(keys.index(a), keys.index(b)) for a, b in map(tuple, state.shown) if a in keys and b in keys]
    start = preferences[0].start if preferences else weights
    pair = next_pair([scores for _, scores in unique.values()], to_choices(preferences), start, excluded)
    if pair is None:
        return None
    left, right = (keys[index] for index in pair)
    return (left, right) if secrets.randbelow(2) else (right, left)


def _list_or_empty(services: AppServices, visitor: Visitor) -> list[Preference]:
    try:
        return services.preferences.list(visitor.id)
    except StoreError:
        return []


# ── Layout ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def to_function(weights: Sequence[float]) -> RewardFunction:
    """Return the reward function on the sliders; equal weights if all are zero."""
    return RewardFunction(dict(zip(REWARDS, weights, strict=True))) if any(weights) else EQUAL_WEIGHTS


def preference_panel() -> gr.HTML:
    """Create the panel. It triggers `act` with {action}, `retrain`, `dpo` and `download`."""
    return template_component(_HERE, "preference_panel", "preferences")


def build(
    services: AppServices,
    panel: gr.HTML,
    grid: gr.HTML,
    session: gr.State,
    sliders: list[gr.Slider],
    download: gr.File,
    open_fine_tune: str,
) -> tuple[Dependency, ...]:
    """Connect the panel and the grid's Prefer buttons.

    Args:
        services: The application's services.
        panel: The panel.
        grid: The candidate grid, which triggers `prefer` with {model, index, keep}.
        session: State with the displayed comparison; None or a `Session` of the Playground.
        sliders: One slider per reward.
        download: Invisible component for downloads.
        open_fine_tune: JavaScript that opens the Fine-tune tab.

    Returns:
        The events after which the sliders may have other weights.
    """
    state = gr.State(PairState())

    def acted(event: gr.EventData, request: gr.Request, session: Any, state: PairState, *weights: float) -> list[Any]:
        details = event._data if isinstance(event._data, dict) else {}
        visitor = visitor_of(services.access, request)
        value, state, function = act(services, visitor, details, compared(session), state, to_function(weights))
        updates = slider_values(function) if function else [gr.skip()] * len(sliders)
        return [value, state, *updates]

    def card_preferred(event: gr.EventData, request: gr.Request, session: Any, *weights: float) -> dict[str, Any]:
        details = event._data if isinstance(event._data, dict) else {}
        visitor, function = visitor_of(services.access, request), to_function(weights)
        prefer(services, visitor, details, compared(session), function)
        return opened(visitor, function)

    def panel_opened(request: gr.Request) -> dict[str, Any]:
        return opened(visitor_of(services.access, request), EQUAL_WEIGHTS)

    def opened(visitor: Visitor, function: RewardFunction) -> dict[str, Any]:
        try:
            preferences, error = services.preferences.list(visitor.id), ""
        except StoreError as problem:
            preferences, error = [], str(problem)
        return snapshot(preferences, fit_choices(preferences, function), PairState(), error)

    def retrain_clicked(request: gr.Request, *weights: float) -> list[float]:
        with as_gradio_error(StoreError, title=TITLE):
            preferences = services.preferences.list(visitor_of(services.access, request).id)
        fitted = fit_choices(preferences, to_function(weights))
        if not fitted.usable:
            raise user_error(fitted.message, TITLE)
        return slider_values(fitted.function)

    def dpo_clicked(request: gr.Request, *weights: float) -> None:
        run = start_dpo(services, visitor_of(services.access, request), to_function(weights))
        services.worker.run_inline(run)

    def download_choices(request: gr.Request) -> str:
        with as_gradio_error(StoreError, title=TITLE):
            preferences = services.preferences.list(visitor_of(services.access, request).id, photos=True)
        return write_zip(preferences)

    action = panel.act(acted, [session, state, *sliders], [panel, state, *sliders], **UNQUEUED)
    grid.prefer(card_preferred, [session, *sliders], panel, **UNQUEUED)
    retrain = panel.retrain(retrain_clicked, sliders, sliders, **UNQUEUED)
    retrain.success(None, None, None, js=open_fine_tune, **UNQUEUED)
    panel.dpo(dpo_clicked, sliders, None, **PRIVATE).success(None, None, None, js=open_fine_tune, **UNQUEUED)
    download_on(panel.download, download_choices, None, download)
    gr.on(None, panel_opened, None, panel, **UNQUEUED)
    return action, retrain


def compared(session: Any) -> ComparedPhoto | None:
    """Return the comparison of a session of the Playground."""
    if session is None:
        return None
    return ComparedPhoto(session.run_id, session.photo, session.settings.photo, session.comparison)
