"""View of one run and list of all runs: gr.HTML components whose values are JSON snapshots, drawn by JavaScript.

The templates contain no placeholders: text of models and users reaches the page only as `textContent`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from access.roles import Role, Visitor
from recipes import PhotoError, describe, jpeg_data_url, load_photo, parse, render, shrink
from rewards import REWARDS
from training.data import uploads
from training.data.sources import HUB_PREFIX
from training.runs.adapters import format_weights, run_title
from training.runs.run import ALARM_KINDS, Run, RunConfig, RunError, Status
from ui.components import template_component
from ui.finetune.permissions import action_refusal, is_mine, owner_label, shows_log, shows_photos
from ui.playground.compare import PICTURE_QUALITY
from ui.services import AppServices

HERE = Path(__file__).resolve().parent
MAX_CHART_POINTS = 240
MAX_CURVE_POINTS = 40  # of the small curve in the list of runs
MAX_THUMBNAILS = 8  # earlier probe answers
MAX_PAIRS = 4  # held-out photos with the answers of base and tuned model
MAX_LOG_LINES = 120
DIVERSITY_STEPS = 10  # last steps that the diversity is averaged over
PICTURE_SIDE, THUMBNAIL_SIDE = 480, 128  # longest side in pixels
STATE_LABELS = {
    "queued": "Queued",
    "running": "Running",
    "done": "Done",
    "cancelled": "Cancelled",
    "failed": "Failed",
    "interrupted": "Interrupted",
}
SERIES_LABELS = {"held_out": "reward on held-out photos"}
Audience = Literal["visitor", "other", "everyone"]
_log = logging.getLogger(__name__)


def run_view() -> gr.HTML:
    """Create the component for one run. It fires `act` with {run, action, name?} and `download` with {run}."""
    return template_component(HERE, "run", "run-view")


def history_view() -> gr.HTML:
    """Create the component for the list of runs. It fires `pick` with {run}."""
    return template_component(HERE, "history", "history")


# ── One run ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_snapshot(services: AppServices, visitor: Visitor, run: Run) -> dict[str, Any]:
    """Return everything that the page shows a visitor of a run, as JSON. Raises RunError if it cannot be read.

    Others' runs come without their own photos, and without a log or message that may contain names of files.
    """
    config, status = run.config(), run.status()
    result = run.result() if status.finished else None
    with_log, with_photos = shows_log(visitor, run, config), shows_photos(visitor, run, config)
    actions, alarms = _actions(services, visitor, run, status, result), _alarms(run, with_photos)
    # The alarms' titles are the message of a run that is done.
    repeated = bool(alarms and result and status.message == result.get("alarm"))
    return {
        "run": run.id,
        "name": run_title(run),
        "state": status.state,
        "badge": STATE_LABELS[status.state],
        "summary": _summary(services, visitor, run, config, status),
        "message": status.message if with_log and not repeated else "",
        "progress": _progress(services, run, status),
        "actions": actions,
        "note": " ".join(dict.fromkeys(filter(None, (action["reason"] for action in actions.values())))),
        "alarms": alarms,
        "alarm_note": _alarm_note(services, visitor, run, result) if alarms else "",
        "chart": _chart(run, config),
        "probe": _probe(run) if with_photos else None,
        "result": _result(services, visitor, run, result, with_photos) if result else None,
        "log": run.log(MAX_LOG_LINES) if with_log else None,
    }


def _summary(services: AppServices, visitor: Visitor, run: Run, config: RunConfig, status: Status) -> str:
    base_run = services.adapters.find_run(config.base)
    if base_run:
        base = run_title(base_run)
    else:
        base = config.base if config.base in services.adapters.models else "an earlier run"
    owner = owner_label(services.access, visitor, run)
    photos = "DPO on choices" if config.method == "dpo" else uploads.describe_source(services.runs, config.photos)
    if config.photos.startswith(HUB_PREFIX) and not visitor.may_change(run.owner):
        photos = "a Hub dataset"  # which may be private
    return " · ".join(
        [
            *([f"Owner: {owner}"] if owner else []),
            f"Reward: {format_weights(config.reward)}",
            f"from {base}",
            photos,
            f"{status.steps or config.steps:,} steps",
            f"seed {config.seed}",
        ]
    )


def _progress(services: AppServices, run: Run, status: Status) -> dict[str, Any] | None:
    """Return the fraction done (None if unknown), a text and the time left; None for a finished run."""
    if status.finished:
        return None
    if status.state == "queued":
        ahead = services.worker.position(run)
        text = f"Waiting for {ahead} earlier run{'s' if ahead > 1 else ''}" if ahead else "Starting"
        return {"fraction": 0 if ahead else None, "text": text, "time_left": ""}
    phase = status.phase[:1].upper() + status.phase[1:]
    counted = f"step {status.step:,} of {status.steps:,}" if status.step else ""
    seconds = _seconds_left(run, status)
    return {
        "fraction": status.step / status.steps if status.step and status.steps else None,
        "text": " · ".join(filter(None, [phase or "Starting", counted])),
        "time_left": f"about {format_duration(seconds)} left"
        if seconds is not None and status.step < status.steps
        else "",
    }


def _seconds_left(run: Run, status: Status) -> float | None:
    """Extrapolate from the last 20 steps; from the time since the start if fewer than three steps are timed."""
    timed = [row for row in run.metrics()[-20:] if _number(row.get("seconds")) is not None]
    if len(timed) < 3 or timed[-1]["seconds"] <= timed[0]["seconds"]:
        return status.seconds_left()
    seconds_per_step = (timed[-1]["seconds"] - timed[0]["seconds"]) / (len(timed) - 1)
    return seconds_per_step * (status.steps - status.step)


def _actions(
    services: AppServices, visitor: Visitor, run: Run, status: Status, result: dict[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """Return the visible buttons by action: the label, and the reason if the visitor may not use the button."""
    in_use, shared = services.adapters.is_enabled(run.id), services.adapters.is_shared(run.id)
    mine, wins = is_mine(visitor, run), bool(result and result.get("wins"))
    has_finished_model = run.has_model and status.finished
    labels: dict[str, str] = {}
    if not status.finished:
        labels["cancel"] = "Stopping at the next step" if run.cancelled else "Cancel"
    if status.state in ("interrupted", "cancelled", "failed"):
        labels["resume"] = "Resume"
    if has_finished_model and not in_use:
        own = "Use in the Playground" if wins and not run.has_alarm else "Use anyway"
        labels["use"] = own if mine or visitor.role < Role.ADMIN else "Use for its owner"
    if in_use:
        labels["revert"] = "Revert"
    if services.access.mode != "local" and (shared or has_finished_model):
        labels["unshare" if shared else "share"] = "Stop using for everyone" if shared else "Use for everyone"
    labels |= {"download": "Download zip", "rename": "Rename"}
    if status.finished and not in_use:
        labels["delete"] = "Delete"
    reasons = {action: action_refusal(services, visitor, run, action) for action in labels}
    return {
        action: {
            "label": label,
            "reason": reasons[action],
            "disabled": bool(reasons[action]) or (action == "cancel" and run.cancelled),
        }
        for action, label in labels.items()
    }


def _chart(run: Run, config: RunConfig) -> dict[str, Any]:
    metrics = run.metrics()
    rows = downsample(metrics, MAX_CHART_POINTS)
    labels = SERIES_LABELS | ({"reward": "agreement with the choices"} if config.method == "dpo" else {})
    weights = {"reward": 1.0, "held_out": 1.0} | {name: config.reward.get(name, 0.0) for name in REWARDS}
    return {
        "steps": [_number(row.get("step")) or 0 for row in rows],
        "series": [
            {
                "name": name,
                "label": labels.get(name, name),
                "weight": weight,
                "values": _column(rows, name),
            }
            for name, weight in weights.items()
        ],
        "kl": _column(rows, "kl"),
        "diversity": _diversity(metrics[-DIVERSITY_STEPS:]),
    }


def _column(rows: list[dict[str, Any]], name: str) -> list[float | None]:
    return [_number(row.get(name)) for row in rows]


def _diversity(rows: list[dict[str, Any]]) -> str:
    """Describe how much the rollouts of a photo differ. Identical rollouts give GRPO no advantage to learn from."""
    means: dict[str, float | None] = {}
    for name in ("distinct", "entropy", "valid", "no_signal"):
        known = [value for value in _column(rows, name) if value is not None]
        means[name] = sum(known) / len(known) if known else None
    parts = []
    if means["distinct"] is not None:
        parts.append(f"{means['distinct']:.0%} distinct rollouts per photo")
    if means["entropy"] is not None:
        parts.append(f"entropy {means['entropy']:.2f}")
    if means["valid"] is not None:
        parts.append(f"{means['valid']:.0%} valid recipes")
    if means["no_signal"]:
        parts.append(f"no signal in {means['no_signal']:.0%} of the groups (all rollouts scored the same)")
    return " · ".join(parts)


def downsample(rows: Sequence[Any], limit: int) -> list[Any]:
    """Return at most `limit` evenly spaced rows, always with the first and the last."""
    if len(rows) <= limit:
        return list(rows)
    return [rows[round(index * (len(rows) - 1) / (limit - 1))] for index in range(limit)]


def _number(value: Any) -> float | None:
    """Return a finite number that JSON and a chart can hold; None for everything else."""
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value and abs(value) < 1e12
    return value if valid else None


def _probe(run: Run) -> dict[str, Any] | None:
    """Return the probe photo with the latest answer, and thumbnails of earlier ones."""
    answers, photo = run.probes(), run.folder / "probe.png"
    if not answers or not photo.is_file():
        return None
    latest = answers[-1]
    text, scores = str(latest.get("recipe") or ""), latest.get("scores") or {}
    parsed = parse(text)
    return {
        "before": _picture(photo, "", PICTURE_SIDE),
        "after": _picture(photo, text, PICTURE_SIDE),
        "step": _number(latest.get("step")) or 0,
        "description": describe(parsed.recipe) if parsed.ok else f"Not a valid recipe: {latest.get('recipe')}",
        "recipe": str(parsed.recipe) if parsed.ok else "",
        "total": _number(latest.get("total")),
        "scores": [{"name": name, "value": _number(scores.get(name))} for name in REWARDS],
        "thumbnails": [
            {
                "step": _number(answer.get("step")) or 0,
                "total": _number(answer.get("total")),
                "src": _picture(photo, str(answer.get("recipe") or ""), THUMBNAIL_SIDE),
            }
            for answer in downsample(answers, MAX_THUMBNAILS)
        ],
    }


def _alarms(run: Run, with_photos: bool) -> list[dict[str, Any]]:
    """Return the alarms of a run, each with the photo that shows it best if the visitor may see the run's photos."""
    return [
        {
            "title": str(row.get("title") or ""),
            "message": str(row.get("message") or ""),
            "advice": str(row.get("advice") or ""),
            "step": _alarm_steps(row),
            "photo": _alarm_photo(run, row) if with_photos else None,
        }
        for row in run.alarms()
    ]


def _alarm_steps(row: dict[str, Any]) -> str:
    """Say at which steps an alarm was seen: `step 20`, or `steps 20 to 60`."""
    first, last = _number(row.get("step")) or 0, _number(row.get("last_step")) or 0
    return f"steps {first:,} to {last:,}" if last > first else f"step {first:,}"


def _alarm_photo(run: Run, row: dict[str, Any]) -> dict[str, str] | None:
    if row.get("kind") not in ALARM_KINDS:
        return None
    before, after = run.alarm_pictures(row["kind"])
    if row.get("index") is None or not (before.is_file() and after.is_file()):
        return None
    parsed = parse(str(row.get("recipe") or ""))
    return {
        "name": str(row.get("photo") or ""),
        "before": _picture(before, "", PICTURE_SIDE),
        "after": _picture(after, "", PICTURE_SIDE),
        "description": describe(parsed.recipe) if parsed.ok else "Not a valid recipe.",
    }


def _alarm_note(services: AppServices, visitor: Visitor, run: Run, result: dict[str, Any] | None) -> str:
    """Say what the alarms of a run mean for the use of its model."""
    if not is_mine(visitor, run):
        return ""
    if services.adapters.is_enabled(run.id):
        return "The tuned model is in use in spite of the alarm. Compare its edits with those of its base model."
    if result:
        return "The tuned model is not taken over by itself. Look at the photos, then decide."
    return "You can cancel the run. If it goes on, its model is not taken over by itself, even if it wins."


def _result(
    services: AppServices, visitor: Visitor, run: Run, result: dict[str, Any], with_photos: bool
) -> dict[str, Any]:
    base, tuned = result.get("base") or {}, result.get("tuned") or {}
    shown = (result.get("pairs") or [])[:MAX_PAIRS] if with_photos else []
    pairs = [_pair(run, pair) for pair in shown if isinstance(pair, dict)]
    return {
        "wins": bool(result.get("wins")),
        "verdict": verdict(result, services.adapters.is_enabled(run.id), _audience(services, visitor, run)),
        "warning": "" if run.alarms() else str(result.get("alarm") or ""),
        "rows": [
            {"name": name, "base": format_interval(base.get(name)), "tuned": format_interval(tuned.get(name))}
            for name in (*REWARDS, "total")
        ],
        "difference": format_interval(result.get("difference"), sign=True),
        "statistics": _statistics(result),
        "pairs": pairs,
    }


def _audience(services: AppServices, visitor: Visitor, run: Run) -> Audience:
    """Return in whose Playground a run's model is, or would be, from the visitor's point of view."""
    if services.access.mode != "local" and services.adapters.is_shared(run.id):
        return "everyone"
    return "visitor" if is_mine(visitor, run) else "other"


def verdict(result: dict[str, Any], in_use: bool, audience: Audience = "visitor") -> str:
    """Say in one or two sentences whether the tuned model beats its base, and whether it is in use.

    Args:
        result: Content of result.json.
        in_use: Whether the tuned model is in a Playground.
        audience: Whose Playground that is.
    """
    difference = result.get("difference") or {}
    mean, low, high = (_number(difference.get(key)) for key in ("mean", "low", "high"))
    photos = f"on {result.get('held_out') or 'the'} held-out photos"
    if mean is None or low is None or high is None:
        return f"The models could not be compared {photos}."
    if result.get("wins"):
        interval = f"{mean:.3f} higher than the base model's (95 % interval {low:.3f} to {high:.3f})"
        outcome = f"The tuned model wins: {photos} its reward is {interval}."
        use = "It is selected beside its base model" if in_use else "It is not in use; only its base model is offered"
        use += " in the Playground."
    else:
        kind = "worse" if high < 0 else "not clearly better"
        interval = f"{mean:+.3f} (95 % interval {low:+.3f} to {high:+.3f})"
        outcome = f"The tuned model is {kind}: {photos} its reward differs from the base model's by {interval}."
        unused = "The Playground keeps the base model. You can use the tuned model anyway."
        use = "It is in use anyway." if in_use else unused
    use = {"everyone": "It is offered to everyone in the Playground.", "other": "", "visitor": use}[audience]
    return f"{outcome} {use}".strip()


def format_interval(value: Any, sign: bool = False) -> str:
    """Format a mean with its confidence interval: `0.410 (0.380 to 0.440)`."""
    if not isinstance(value, dict) or _number(value.get("mean")) is None:
        return "–"
    number = "{:+.3f}" if sign else "{:.3f}"
    mean, low, high = (_number(value.get(key)) for key in ("mean", "low", "high"))
    interval = f" ({number.format(low)} to {number.format(high)})" if low is not None and high is not None else ""
    return number.format(mean) + interval


def _statistics(result: dict[str, Any]) -> str:
    seconds, memory = _number(result.get("seconds")), _number(result.get("peak_memory_bytes"))
    parts = [f"{_number(result.get('steps')) or 0:,.0f} steps"]
    if seconds is not None:
        parts.append(format_duration(seconds))
    if memory:
        parts.append(f"{memory / 2**30:.1f} GB peak memory")
    for key, label, number in (("distinct", "distinct rollouts", "{:.0%}"), ("entropy", "entropy", "{:.2f}")):
        change = result.get(key) or {}
        first, last = _number(change.get("first")), _number(change.get("last"))
        if first is not None and last is not None:
            parts.append(f"{label} {number.format(first)} → {number.format(last)}")
    return " · ".join(parts)


def _pair(run: Run, pair: dict[str, Any]) -> dict[str, Any]:
    """Return a held-out photo with the recipe, picture and score of the base and the tuned model."""
    photo = run.folder / Path(str(pair.get("picture"))).name
    sides = []
    for name in ("base", "tuned"):
        text = str(pair.get(name) or "")
        parsed = parse(text)
        sides.append(
            {
                "name": name,
                "description": describe(parsed.recipe) if parsed.ok else "Not a valid recipe.",
                "total": _number(pair.get(f"{name}_total")),
                "src": _picture(photo, text, PICTURE_SIDE),
            }
        )
    return {"photo": str(pair.get("photo") or ""), "before": _picture(photo, "", PICTURE_SIDE), "sides": sides}


def _picture(photo: Path, recipe: str, side: int) -> str:
    """Return the photo after a recipe as a data URL: unedited if the recipe is invalid, "" if there is no photo."""
    try:
        return _rendered(str(photo), photo.stat().st_mtime_ns, recipe, side)
    except (OSError, PhotoError) as error:
        _log.warning("Could not show %s: %s", photo.name, error)
        return ""


@lru_cache(maxsize=128)
def _rendered(photo: str, _: int, recipe: str, side: int) -> str:
    pixels = load_photo(photo)
    parsed = parse(recipe)
    picture = render(pixels, parsed.recipe) if recipe and parsed.ok else pixels
    return jpeg_data_url(shrink(picture, side), PICTURE_QUALITY)


def format_duration(seconds: float | None) -> str:
    """Format a duration: `45 s`, `3 min 20 s`, `1 h 5 min`."""
    if seconds is None:
        return "–"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    return f"{whole // 3600} h" + (f" {whole % 3600 // 60} min" if whole % 3600 // 60 else "")


# ── All runs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def history_snapshot(services: AppServices, visitor: Visitor, selected: str | None) -> dict[str, Any]:
    """Return one row per run, newest first. Runs that cannot be read are logged and left out."""
    rows = []
    for run in reversed(services.runs.list()):
        try:
            rows.append(_history_row(services, visitor, run))
        except RunError as error:
            _log.warning("Run %s is not listed: %s", run.id, error)
    return {"selected": selected or "", "runs": rows}


def _history_row(services: AppServices, visitor: Visitor, run: Run) -> dict[str, Any]:
    status, config = run.status(), run.config()
    shared = services.access.mode != "local" and services.adapters.is_shared(run.id)
    in_use = shared or (is_mine(visitor, run) and services.adapters.is_enabled(run.id))
    result = run.result() if status.finished else None
    outcome = ""
    if result:
        outcome = format_interval(result.get("difference"), sign=True)
    elif status.state == "running" and status.steps:
        outcome = f"step {status.step:,} of {status.steps:,}"
    if run.has_alarm:
        outcome = " · ".join(filter(None, [outcome, "alarm"]))
    return {
        "run": run.id,
        "name": run_title(run),
        "reward": format_weights(config.reward) if config.name else "",
        "state": status.state,
        "badge": ("For everyone" if shared else "In use") if in_use else STATE_LABELS[status.state],
        "in_use": in_use,
        "mine": is_mine(visitor, run),
        "owner": owner_label(services.access, visitor, run),
        "created": time.strftime("%d %b %H:%M", time.localtime(status.created)) if status.created else "",
        "duration": format_duration(status.ended - status.started) if status.ended and status.started else "",
        "result": outcome,
        "curve": [_number(row.get("reward")) for row in downsample(run.metrics(), MAX_CURVE_POINTS)],
    }


# ── Change detection ────────────────────────────────────────────────────────────────────────────────────────────────


def run_fingerprint(services: AppServices, visitor: Visitor, run: Run) -> tuple[Any, ...]:
    """Return a cheap value that changes whenever `run_snapshot` changes."""
    names = "config.json status.json metrics.jsonl probes.jsonl alarms.json log.txt result.json cancel"
    state = run.status().state
    position = services.worker.position(run) if state == "queued" else 0
    versions = (_file_version(run.folder / name) for name in names.split())
    return (visitor.role, visitor.id, run.id, state, position, services.adapters.version, *versions)


def history_fingerprint(services: AppServices, visitor: Visitor, selected: str | None) -> tuple[Any, ...]:
    """Return a cheap value that changes whenever `history_snapshot` changes."""
    rows = [
        (run.id, run.status().state, *(_file_version(run.folder / name) for name in ("config.json", "status.json")))
        for run in services.runs.list()
    ]
    return (visitor.role, visitor.id, selected, services.adapters.version, *rows)


def _file_version(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size
