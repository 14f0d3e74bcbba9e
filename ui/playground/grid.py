"""The candidate grid: a gr.HTML whose value is a JSON snapshot, drawn by grid.js and scored by score.js.

The template contains no placeholders. Gradio renders templates with Handlebars and then as a JavaScript template
literal, which would execute `${...}` in a value: text of models and users must never pass through a template.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from inference.types import SKILLS
from recipes import describe
from rewards import EQUAL_WEIGHTS, REWARDS
from ui.playground.agreement import same_answers
from ui.playground.compare import Candidate, Column, Comparison

HERE = Path(__file__).resolve().parent
SCORE_JS = (HERE / "score.js").read_text(encoding="utf-8")
GRID_JS = (HERE / "grid.js").read_text(encoding="utf-8")
VIEWER_JS = (HERE / "viewer.js").read_text(encoding="utf-8")
GRID_HTML = (HERE / "grid.html").read_text(encoding="utf-8")
MAX_PROBLEMS = 3  # shown per candidate


def candidate_grid(value: dict[str, Any] | None = None) -> gr.HTML:
    """Create the component. It triggers `download` with {model, index} and `prefer` with {model, index, keep}.

    Args:
        value: The snapshot that is shown first; see `grid_snapshot`.
    """
    return gr.HTML(
        value=value,
        weights=dict(EQUAL_WEIGHTS.weights),
        html_template=GRID_HTML,
        js_on_load=SCORE_JS + GRID_JS + VIEWER_JS,
        apply_default_css=False,
        elem_id="candidates",
    )


def grid_snapshot(comparison: Comparison, run_id: str, photo: dict[str, Any]) -> dict[str, Any]:
    """Build the value of the grid.

    Args:
        comparison: A snapshot of the comparison.
        run_id: Id of the comparison; a new one clears the grid.
        photo: {src, width, height}: preview as a data URL, and the photo's size in pixels.

    Returns:
        A JSON object.
    """
    return {
        "run": run_id,
        "label": "",
        "photo": photo,
        "output": SKILLS[comparison.skill].output,
        "rewards": list(REWARDS),
        "status": _grid_status(comparison),
        "columns": [
            {
                "name": column.name,
                "title": column.title,
                "note": column.note,
                "status": column.status,
                "status_text": _column_status(column, comparison.skill),
                "error": column.error,
                "candidates": _candidate_snapshots(column, comparison.skill),
            }
            for column in comparison.columns
        ],
    }


def _grid_status(comparison: Comparison) -> str:
    candidates = [candidate for column in comparison.columns for candidate in column.candidates]
    ready = sum(candidate.done and not candidate.error for candidate in candidates)
    count = f"{ready} of {len(candidates)} candidates"
    if comparison.status == "cancelled":
        return f"Cancelled with {count} ready."
    if comparison.status == "done" and not ready:
        return "No candidate is ready. The models say why below."
    if comparison.status == "done":
        return f"{count} ready after {comparison.seconds:.1f} s."
    return f"{count} ready" if ready else f"{count} ready. The first run of a model includes loading it."


def _column_status(column: Column, skill: str) -> str:
    if column.status == "waiting":
        return f"{column.position} ahead in the queue" if column.position else "Starting"
    parsed = sum(candidate.recipe is not None for candidate in column.candidates)
    if column.status == "done" and skill == "recipe" and parsed < len(column.candidates):
        return f"Done · {parsed} of {len(column.candidates)} recipes are valid"
    return {"running": "Generating", "done": "Done", "failed": "Failed", "cancelled": "Cancelled"}[column.status]


def _candidate_snapshots(column: Column, skill: str) -> list[dict[str, Any]]:
    """Describe a column's candidates. `same_as` is the index of the first one with the same answer."""
    same = same_answers(column.candidates, skill)
    firsts = list(same.values())
    return [
        _candidate_snapshot(candidate, column, skill)
        | {"same_as": same.get(candidate.index, candidate.index), "agree": firsts.count(candidate.index)}
        for candidate in column.candidates
    ]


def _candidate_snapshot(candidate: Candidate, column: Column, skill: str) -> dict[str, Any]:
    if candidate.error:
        status = "failed"
    elif candidate.done:
        status = "ready"
    else:
        status = "missing" if column.finished else "pending"
    return {
        "index": candidate.index,
        "done": candidate.done,
        "status": status,
        "text": _text(candidate, column, skill),
        "recipe": str(candidate.recipe) if candidate.recipe else "",
        "problems": "; ".join(candidate.problems[:MAX_PROBLEMS]),
        "scores": candidate.scores,
        "picture": candidate.picture,
        "alt": f"The photo after: {describe(candidate.recipe)}" if candidate.recipe else "",
        "boxes": [[box.x_min, box.y_min, box.x_max, box.y_max] for box in candidate.boxes],
        "points": [[point.x, point.y] for point in candidate.points],
        "path": candidate.path,
        "reasoning": _reasoning_parts(candidate),
        "details": _details(candidate) if status == "ready" else "",
    }


def _reasoning_parts(candidate: Candidate) -> list[list[Any]]:
    """Split the reasoning into [text, grounded], where grounded text refers to the points on the photo."""
    parts: list[list[Any]] = []
    position = 0
    for start, end in sorted(candidate.grounded):
        if position <= start < end <= len(candidate.reasoning):
            parts += [[candidate.reasoning[position:start], False], [candidate.reasoning[start:end], True]]
            position = end
    return [part for part in [*parts, [candidate.reasoning[position:], False]] if part[0]]


def _text(candidate: Candidate, column: Column, skill: str) -> str:
    if candidate.error:
        return candidate.error
    if not candidate.done:
        return candidate.text or ("No answer" if column.finished else "")
    if candidate.recipe:
        return describe(candidate.recipe)
    if skill == "recipe":
        return f"No recipe found in the answer: {candidate.text}" if candidate.text else "The answer is empty."
    return candidate.text or _region_count(candidate)


def _details(candidate: Candidate) -> str:
    """Seconds, color difference to the photo (CIEDE2000), and possible charges for failed attempts."""
    details = [f"{candidate.seconds:.2f} s"]
    if candidate.fidelity is not None:
        details.append(f"ΔE {candidate.fidelity:.1f}")
    if candidate.possible_extra_charges:
        details.append(f"{candidate.possible_extra_charges + 1} attempts, each may be charged")
    return " · ".join(details)


def _region_count(candidate: Candidate) -> str:
    if candidate.path:
        return "1 outline"
    boxes, points = len(candidate.boxes), len(candidate.points)
    if boxes:
        return f"{boxes} box{'' if boxes == 1 else 'es'}"
    if points:
        return f"{points} point{'' if points == 1 else 's'}"
    return "Nothing found"
