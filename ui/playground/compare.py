"""Asks several models about one photo at once, reads and scores what they say: the path that screen and API share.

No Gradio here. `compare` is a generator of snapshots; everything in a snapshot is frozen.
"""

from __future__ import annotations

import base64
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace

import cv2
import numpy as np

from inference.registry import MODELS, answer
from inference.types import (
    SKILLS,
    Answer,
    Box,
    CandidateFailed,
    Event,
    InferenceError,
    Point,
    Queued,
    Request,
    TextUpdate,
)
from recipes import Recipe, parse, shrink
from rewards import score_recipes

Ask = Callable[[str, Request, threading.Event], Iterator[Event]]

PICTURE_QUALITY = 82  # JPEG; a 512 px picture takes 20-45 kB
UNEXPECTED = "The model stopped with an unexpected {}. Run again; if it stays, leave this model out."
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Card:
    """One candidate. `scores`, `fidelity` and `picture` (a data URL) are there once a recipe was read and rendered.

    error: why this candidate failed while others may not have. The rest is as in `inference.types.Answer`.
    """

    index: int
    text: str = ""
    done: bool = False
    recipe: Recipe | None = None
    problems: tuple[str, ...] = ()
    scores: dict[str, float | None] = field(default_factory=dict)
    fidelity: float | None = None
    picture: str | None = None
    boxes: tuple[Box, ...] = ()
    points: tuple[Point, ...] = ()
    seconds: float = 0.0
    queue_seconds: float = 0.0
    path: str = ""
    reasoning: str = ""
    grounded: tuple[tuple[int, int], ...] = ()
    perhaps_charged: int = 0
    error: str = ""


@dataclass(frozen=True)
class Column:
    """One model's part. status: waiting, running, done, failed or cancelled; position: how many are before it."""

    name: str
    title: str
    note: str = ""
    status: str = "waiting"
    position: int = 0
    error: str = ""
    cards: tuple[Card, ...] = ()

    @property
    def over(self) -> bool:
        return self.status in ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Comparison:
    """A snapshot of all columns; status is 'running', 'done' or 'cancelled'. `seconds` since the start."""

    skill: str
    columns: tuple[Column, ...] = ()
    status: str = "running"
    seconds: float = 0.0

    def without_pictures(self) -> Comparison:
        """The same without the rendered pictures: small enough to be kept for each session."""
        columns = (
            replace(column, cards=tuple(replace(card, picture=None) for card in column.cards))
            for column in self.columns
        )
        return replace(self, columns=tuple(columns))


def compare(
    names: list[str], request: Request, cancel: threading.Event, ask: Ask = answer, every: float = 0.1
) -> Generator[Comparison, None, None]:
    """Yields a snapshot whenever there is news, at most once per `every` seconds, and at least once a second.

    Each model answers in its own thread. Set `cancel` or close the iterator, and they stop at their next token.
    A model that fails is 'failed' in its own column; the others go on.
    """
    inbox: queue.Queue[tuple[int, object]] = queue.Queue()
    preview = shrink(request.photo)
    columns = [_column(name, request.n) for name in names]
    started = time.monotonic()
    for place, name in enumerate(names):
        arguments = (place, name, request, cancel, ask, inbox)
        threading.Thread(target=_work, args=arguments, name=f"ask-{name}", daemon=True).start()
    try:
        yield Comparison(request.skill, tuple(columns))
        while True:
            columns = _settle(columns, _news(inbox, 1.0), preview, request.skill)
            over = all(column.over for column in columns)
            status = ("cancelled" if cancel.is_set() else "done") if over else "running"
            yield Comparison(request.skill, tuple(columns), status, time.monotonic() - started)
            if over:
                return
            time.sleep(every)
    finally:
        cancel.set()


def picture_url(picture: np.ndarray) -> str:
    """A picture (uint8 [H, W, 3], RGB) as a JPEG data URL: it lives in this session's page and nowhere on the disk."""
    done, coded = cv2.imencode(
        ".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, PICTURE_QUALITY]
    )
    if not done:
        raise ValueError("The picture could not be written as a JPEG.")
    return "data:image/jpeg;base64," + base64.b64encode(coded.tobytes()).decode("ascii")


@dataclass(frozen=True)
class _Failed:
    message: str
    cancelled: bool = False


class _Finished:
    """A worker's last word."""


def _work(
    place: int, name: str, request: Request, cancel: threading.Event, ask: Ask, inbox: queue.Queue[tuple[int, object]]
) -> None:
    """One model's thread: events into the inbox, and its failure as an event, too."""
    try:
        for event in ask(name, request, cancel):
            inbox.put((place, event))
            if cancel.is_set():
                break
        inbox.put((place, _Failed("", cancelled=True) if cancel.is_set() else _Finished()))
    except InferenceError as error:
        inbox.put((place, _Failed(error.message, cancelled=error.kind == "cancelled" or cancel.is_set())))
    except Exception as error:
        _log.exception("%s failed", name)
        inbox.put((place, _Failed(UNEXPECTED.format(type(error).__name__))))


def _news(inbox: queue.Queue[tuple[int, object]], patience: float) -> list[tuple[int, object]]:
    """All that is in the inbox; waits for the first event, up to `patience` seconds."""
    news = []
    try:
        news.append(inbox.get(timeout=patience))
        while True:
            news.append(inbox.get_nowait())
    except queue.Empty:
        return news


def _column(name: str, n: int) -> Column:
    entry = MODELS.get(name)
    cards = tuple(Card(index) for index in range(n))
    return Column(name, entry.title if entry else name, entry.note if entry else "", cards=cards)


def _settle(columns: list[Column], news: list[tuple[int, object]], preview: np.ndarray, skill: str) -> list[Column]:
    """The columns after the news; a column with new recipes is scored anew, as one group."""
    columns = list(columns)
    answered = set()
    for place, event in news:
        columns[place] = _heard(columns[place], event, skill)
        if isinstance(event, Answer):
            answered.add(place)
    if SKILLS[skill].output == "recipe":
        for place in answered:
            columns[place] = replace(columns[place], cards=_scored(columns[place].cards, preview))
    return columns


def _heard(column: Column, event: object, skill: str) -> Column:
    match event:
        case Queued(position=position):
            return replace(column, status="waiting" if position else "running", position=position)
        case TextUpdate(index=index, text=text):
            return _with_card(replace(column, status="running"), replace(column.cards[index], text=text))
        case Answer():
            return _with_card(replace(column, status="running"), _card(event, skill))
        case CandidateFailed(index=index, message=message):
            return _with_card(column, replace(column.cards[index], done=True, error=message))
        case _Failed(message=message, cancelled=cancelled):
            return replace(column, status="cancelled" if cancelled else "failed", error=message)
        case _:
            return replace(column, status="done")


def _with_card(column: Column, card: Card) -> Column:
    return replace(column, cards=tuple(card if old.index == card.index else old for old in column.cards))


def _card(answer: Answer, skill: str) -> Card:
    card = Card(
        answer.index,
        answer.text,
        done=True,
        boxes=tuple(answer.boxes),
        points=tuple(answer.points),
        seconds=answer.seconds,
        queue_seconds=answer.queue_seconds,
        path=answer.path,
        reasoning=answer.reasoning,
        grounded=answer.grounded,
        perhaps_charged=answer.perhaps_charged,
    )
    if SKILLS[skill].output != "recipe":
        return card
    parsed = parse(answer.text)
    return replace(card, recipe=parsed.recipe if parsed.ok else None, problems=parsed.problems)


def _scored(cards: tuple[Card, ...], preview: np.ndarray) -> tuple[Card, ...]:
    """The group's scores and pictures. A picture that is there already is kept: its recipe has not changed."""
    group = [(card, card.recipe) for card in cards if card.recipe is not None]
    scored = score_recipes(preview, [recipe for _, recipe in group])
    news = {
        card.index: replace(
            card,
            scores=dict(score.scores),
            fidelity=score.fidelity,
            picture=card.picture or picture_url(score.picture),
        )
        for (card, _), score in zip(group, scored, strict=True)
    }
    return tuple(news.get(card.index, card) for card in cards)
