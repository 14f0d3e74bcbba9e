"""What the Evaluate tab displays: the list of evaluations, one evaluation with its leaderboard, and its photos."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr

from access.roles import Visitor
from inference.types import SKILLS
from rewards import REWARDS, RewardFunction
from training.evaluations.evaluation import Evaluation, EvaluationConfig
from training.evaluations.export import cell_of, picture
from training.evaluations.leaderboard import (
    UNTOUCHED,
    compare_evaluations,
    compute_totals,
    leaderboard,
    photo_order,
)
from training.runs.adapters import format_weights
from training.runs.run import RunError, Status
from ui.components import template_component
from ui.evaluate.permissions import evaluation_refusal, get_evaluation, visible
from ui.finetune.permissions import owner_label
from ui.finetune.run_view import STATE_LABELS, format_duration
from ui.services import AppServices

HERE = Path(__file__).resolve().parent
PAGE_PHOTOS = 12
ORDERS = ("photo", "disagree", "loses")


def list_view() -> gr.HTML:
    """Create the component of the list of evaluations. It triggers `pick` with {evaluation}."""
    return template_component(HERE, "list", "evaluations")


def evaluation_view() -> gr.HTML:
    """Create the component of an evaluation.

    It triggers `act` with {evaluation, action, name}, `download` with {evaluation, format, reference} and `options`
    with {reference, compare}.
    """
    return template_component(HERE, "evaluation", "evaluation")


def photos_view() -> gr.HTML:
    """Create the component of the photos. It triggers `show` with {evaluation, order, a, b, page} and `open`."""
    return template_component(HERE, "photos", "evaluation-photos")


def title_of(evaluation: Evaluation, config: EvaluationConfig) -> str:
    """Return the display name of an evaluation, by default its models."""
    names = list(dict.fromkeys(model.title or model.name for model in config.models))
    return config.name or f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''}"


def fingerprint(services: AppServices, visitor: Visitor, selected: str, weights: Any, options: Any) -> tuple[Any, ...]:
    """Return a cheap value that changes whenever `snapshot` changes."""
    versions = []
    for evaluation in visible(services, visitor):
        names = ("config.json", "status.json")
        names += ("answers.jsonl", "references.npy", "photos.json") if evaluation.id == selected else ()
        versions.append(
            (evaluation.id, evaluation.status().state, *(_version(evaluation.folder / name) for name in names))
        )
    return (visitor.role, visitor.id, selected, tuple(weights), tuple(sorted((options or {}).items())), *versions)


def _version(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def list_snapshot(services: AppServices, visitor: Visitor, selected: str) -> dict[str, Any]:
    """Return the value of `list_view`: the evaluations that a visitor sees, newest first."""
    rows = []
    for evaluation in visible(services, visitor):
        with suppress(RunError):  # its config cannot be read
            rows.append(_list_row(services, visitor, evaluation))
    return {"list": rows, "selected": selected}


def _list_row(services: AppServices, visitor: Visitor, evaluation: Evaluation) -> dict[str, Any]:
    config, status = evaluation.config(), evaluation.status()
    return {
        "id": evaluation.id,
        "name": title_of(evaluation, config),
        "state": status.state,
        "badge": STATE_LABELS[status.state],
        "summary": " · ".join(
            filter(
                None,
                [
                    owner_label(services.access, visitor, evaluation),
                    f"{len(config.models)} model{'s' if len(config.models) > 1 else ''}",
                    config.skill,
                    time.strftime("%d %b %H:%M", time.localtime(status.created)) if status.created else "",
                ],
            )
        ),
    }


def snapshot(
    services: AppServices, visitor: Visitor, selected: str, function: RewardFunction | None, options: dict[str, Any]
) -> dict[str, Any] | None:
    """Return the value of `evaluation_view`; None if `selected` is empty.

    Args:
        services: The application's services.
        visitor: The visitor.
        selected: Id of an evaluation that the visitor sees, or "".
        function: The reward on the sliders; None (all are zero) shows the evaluation's own.
        options: `reference`, index of the row that wins are counted against, and `compare`, id of another evaluation.

    Raises:
        RunError: The evaluation cannot be read.
        AccessDenied: It belongs to another visitor.
    """
    if not selected:
        return None
    evaluation = get_evaluation(services, visitor, selected)
    config, status = evaluation.config(), evaluation.status()
    function = function or config.function
    results = evaluation.results()
    table = leaderboard(results, function, options.get("reference"))
    for row, model in zip(table["rows"], config.models):
        row["name"] = model.title or model.name
    earlier = [item for item in visible(services, visitor) if item.id != evaluation.id]
    compared = options.get("compare")
    if compared in [item.id for item in earlier]:
        differences = compare_evaluations(results, services.evaluations.get(str(compared)).results(), function)
        for row in table["rows"]:
            found = next((item for item in differences if item["label"] == row["label"]), None)
            row["earlier"] = found and {**found["difference"], "photos": found["photos"]}
    return {
        "id": evaluation.id,
        "name": title_of(evaluation, config),
        "state": status.state,
        "badge": STATE_LABELS[status.state],
        "message": status.message,
        "summary": _summary(config, len(results.photos)),
        "progress": _progress(services, evaluation, status),
        "actions": _actions(services, visitor, evaluation, status),
        "rewards": list(REWARDS) if config.is_scored else [],
        "reward": format_weights(dict(function.weights)) if config.is_scored else "",
        "table": table,
        "earlier": [{"id": item.id, "name": _earlier_title(item)} for item in earlier],
        "compare": compared or "",
        "version": [_version(evaluation.folder / "answers.jsonl"), *function.weights.values()],
    }


def _earlier_title(evaluation: Evaluation) -> str:
    try:
        return f"{title_of(evaluation, evaluation.config())} ({evaluation.id[:15]})"
    except RunError:
        return evaluation.id


def _summary(config: EvaluationConfig, photos: int) -> str:
    if config.photos == "bundled":
        source = "held-out photos"
    else:
        source = f"photos of {config.photos[4:]}" if config.photos.startswith("hub:") else "own photos"
    count = f"{photos} " if photos else ""
    prompt = config.prompt not in ("", SKILLS[config.skill].default_prompt)
    return (
        f"{count}{source} · {config.skill}{f' “{config.prompt}”' if prompt else ''} · "
        f"{config.candidates} candidate{'s' if config.candidates > 1 else ''} per photo · seed {config.seed}"
    )


def _progress(services: AppServices, evaluation: Evaluation, status: Status) -> dict[str, Any] | None:
    """Return the fraction done (None if unknown), a text and the time left; None for one that has ended."""
    if status.finished:
        return None
    if status.state == "queued":
        ahead = services.evaluation_queue.position(evaluation)
        return {
            "fraction": None,
            "text": f"Waiting for {ahead} other{'s' if ahead > 1 else ''}" if ahead else "Starting",
        }
    counted = f" · {status.step:,} of {status.steps:,}" if status.steps else ""
    left = status.seconds_left()
    return {
        "fraction": status.step / status.steps if status.steps else None,
        "text": f"{status.phase[:1].upper()}{status.phase[1:]}{counted}",
        "left": f"about {format_duration(left)} left" if left else "",
    }


def _actions(services: AppServices, visitor: Visitor, evaluation: Evaluation, status: Status) -> dict[str, str]:
    """Return the visible buttons, with the reason why one is disabled or ""."""
    if not status.finished:
        return {"cancel": "", "rename": ""}
    actions = {"rename": "", "delete": ""}
    if status.state != "done":
        refusal = evaluation_refusal(services.access, visitor, evaluation.config().max_photos)
        actions = {"resume": refusal, **actions}
    return actions | ({"export": ""} if evaluation.photos() else {})


def photos_snapshot(
    services: AppServices, visitor: Visitor, wanted: dict[str, Any], function: RewardFunction | None
) -> dict[str, Any] | None:
    """Return the value of `photos_view`: one page of photos with the best candidate of each model.

    Args:
        services: The application's services.
        visitor: The visitor.
        wanted: `evaluation`, `order` (one of ORDERS), `a` and `b` (indices of rows), `page`, and `stamp`, which is
            returned unchanged.
        function: The reward on the sliders; None shows the evaluation's own.

    Raises:
        RunError: There is no such evaluation.
        AccessDenied: It belongs to another visitor.
    """
    evaluation = get_evaluation(services, visitor, wanted.get("evaluation"))
    results = evaluation.results()
    function = function or results.config.function
    totals = compute_totals(results, function)
    order = wanted.get("order") if wanted.get("order") in ORDERS else "disagree"
    a, b = (_row_index(wanted.get(name), len(totals.labels), default) for name, default in (("a", 0), ("b", 1)))
    indices = photo_order(results, totals, str(order), a, b)
    pages = max(1, -(-len(indices) // PAGE_PHOTOS))
    page = min(_row_index(wanted.get("page"), pages, 0), pages - 1)
    shown = indices[page * PAGE_PHOTOS : (page + 1) * PAGE_PHOTOS]
    models = range(len(results.config.models))
    untouched = totals.labels.index(UNTOUCHED) if UNTOUCHED in totals.labels else None
    return {
        "evaluation": evaluation.id,
        "stamp": wanted.get("stamp"),
        "order": order,
        "a": a,
        "b": b,
        "page": page,
        "pages": pages,
        "count": len(indices),
        "labels": totals.labels,
        "models": len(models),
        "scored": results.config.is_scored,
        "photos": [
            {
                "index": photo,
                "name": results.photos[photo]["name"],
                "src": picture(evaluation.photo_file(photo)),
                "total": None if untouched is None else float(totals.best[photo, untouched]),
                "cells": [cell_of(evaluation, results, totals, photo, model) for model in models],
            }
            for photo in shown
        ],
    }


def _row_index(value: Any, count: int, default: int) -> int:
    return value if isinstance(value, int) and 0 <= value < count else min(default, max(0, count - 1))
