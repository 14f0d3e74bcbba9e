"""The candidate grid: one gr.HTML whose value is a snapshot as JSON; drawn by grid.js, scored by score.js.

The template is static. Gradio runs templates through Handlebars and then as a JavaScript template literal, where
`${...}` in a value would be executed: so no text of a model or a person may pass through one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from inference.types import SKILLS
from recipes import describe
from rewards import EQUAL_WEIGHTS, REWARDS
from ui.playground.compare import Card, Column, Comparison

HERE = Path(__file__).resolve().parent
SCORE_JS = (HERE / "score.js").read_text(encoding="utf-8")
GRID_JS = (HERE / "grid.js").read_text(encoding="utf-8")
GRID_HTML = (HERE / "grid.html").read_text(encoding="utf-8")


def candidate_grid() -> gr.HTML:
    """The component. It fires `download` with {model, index}."""
    return gr.HTML(
        value=None,
        weights=dict(EQUAL_WEIGHTS.weights),
        html_template=GRID_HTML,
        js_on_load=SCORE_JS + GRID_JS,
        apply_default_css=False,
        elem_id="candidates",
    )


def grid_value(comparison: Comparison, run: str, photo: dict[str, Any]) -> dict[str, Any]:
    """A snapshot as the grid draws it. `photo`: {src, width, height}; another `run` starts an empty grid."""
    return {
        "run": run,
        "photo": photo,
        "output": SKILLS[comparison.skill].output,
        "rewards": list(REWARDS),
        "status": _status(comparison),
        "over": comparison.status != "running",
        "columns": [_column(column, comparison.skill) for column in comparison.columns],
    }


def _status(comparison: Comparison) -> str:
    cards = [card for column in comparison.columns for card in column.cards]
    ready = sum(card.done and not card.error for card in cards)
    words = f"{ready} of {len(cards)} candidates"
    if comparison.status == "cancelled":
        return f"Cancelled with {words} ready."
    if comparison.status == "done":
        return f"{words} ready after {comparison.seconds:.1f} s."
    return f"{words} ready" if ready else f"{words} ready. A model's first run also loads it."


def _column(column: Column, skill: str) -> dict[str, Any]:
    return {
        "name": column.name,
        "title": column.title,
        "note": column.note,
        "status": column.status,
        "state": _state(column, skill),
        "error": column.error,
        "cards": [_card(card, column, skill) for card in column.cards],
    }


def _state(column: Column, skill: str) -> str:
    if column.status == "waiting":
        return f"{column.position} before you" if column.position else "Starting"
    read = sum(card.recipe is not None for card in column.cards)
    if column.status == "done" and skill == "recipe" and read < len(column.cards):
        return f"Done · {read} of {len(column.cards)} recipes could be read"
    return {"running": "Answering", "done": "Done", "failed": "Failed", "cancelled": "Cancelled"}[column.status]


def _card(card: Card, column: Column, skill: str) -> dict[str, Any]:
    return {
        "index": card.index,
        "done": card.done,
        "state": "failed" if card.error else "ready" if card.done else "gone" if column.over else "pending",
        "words": _words(card, column, skill),
        "recipe": str(card.recipe) if card.recipe else "",
        "problems": "; ".join(card.problems[:3]),
        "scores": card.scores,
        "fidelity": card.fidelity,
        "picture": card.picture,
        "alt": f"The photo after: {describe(card.recipe)}" if card.recipe else "",
        "boxes": [[box.x_min, box.y_min, box.x_max, box.y_max] for box in card.boxes],
        "points": [[point.x, point.y] for point in card.points],
        "path": card.path,
        "reasoning": _spans(card),
        "time": _facts(card) if card.done and not card.error else "",
    }


def _spans(card: Card) -> list[list[Any]]:
    """What was thought, in pieces: each with whether the points on the photo are what it speaks of."""
    pieces: list[list[Any]] = []
    place = 0
    for start, end in sorted(card.grounded):
        if place <= start < end <= len(card.reasoning):
            pieces += [[card.reasoning[place:start], False], [card.reasoning[start:end], True]]
            place = end
    return [piece for piece in [*pieces, [card.reasoning[place:], False]] if piece[0]]


def _words(card: Card, column: Column, skill: str) -> str:
    if card.error:
        return card.error
    if not card.done:
        return card.text or ("Not answered" if column.over else "")
    if card.recipe:
        return describe(card.recipe)
    if skill == "recipe":
        return f"No recipe could be read in: {card.text}" if card.text else "The answer was empty."
    return card.text or _found(card)


def _facts(card: Card) -> str:
    """Seconds, how far the colours are from the photo's (CIEDE2000), and what a lost try may have cost."""
    facts = [f"{card.seconds:.2f} s"]
    if card.fidelity is not None:
        facts.append(f"ΔE {card.fidelity:.1f}")
    if card.possible_extra_charges:
        facts.append(f"asked {card.possible_extra_charges + 1} times, may be charged as often")
    return " · ".join(facts)


def _found(card: Card) -> str:
    if card.path:
        return "An outline was found."
    boxes, points = len(card.boxes), len(card.points)
    if boxes or points:
        count, what = (boxes, "box") if boxes else (points, "point")
        return f"{count} {what}{'' if count == 1 else 'es' if what == 'box' else 's'}"
    return "Nothing was found."
