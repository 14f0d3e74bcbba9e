"""A run as the page shows it: one gr.HTML whose value is a snapshot as JSON, drawn by run.js. So is the list of all.

The templates are static, as the grid's: no text of a model or a person passes through one.
"""

from __future__ import annotations

import logging
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr

from recipes import PhotoError, describe, load_photo, parse, render, shrink
from rewards import REWARDS
from training.data import uploads
from training.runs.adapters import reward_words, title
from training.runs.run import Run, RunConfig, RunError, Status
from ui.playground.compare import picture_url
from ui.services import AppServices

HERE = Path(__file__).resolve().parent
POINTS = 240  # steps that a curve shows at most
STRIP = 8  # earlier probe answers that are shown
PAIRS = 4  # held-out photos that are shown side by side
LOG_LINES = 120
SIDE, SMALL = 480, 128  # pixels of the long side of a picture, and of one in the strip
WORDS = {
    "queued": "Waiting",
    "running": "Running",
    "done": "Done",
    "cancelled": "Cancelled",
    "failed": "Failed",
    "interrupted": "Interrupted",
}
_log = logging.getLogger(__name__)


def run_view() -> gr.HTML:
    """The component for one run. It fires `act` with {run, do, name?} and `download` with {run}."""
    return _html("run", "run-view")


def history_view() -> gr.HTML:
    """The component for the list of runs. It fires `pick` with {run}."""
    return _html("history", "history")


def _html(name: str, elem_id: str) -> gr.HTML:
    return gr.HTML(
        value=None,
        html_template=(HERE / f"{name}.html").read_text(encoding="utf-8"),
        js_on_load=(HERE / f"{name}.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id=elem_id,
    )


# ── One run ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_value(services: AppServices, run: Run) -> dict[str, Any]:
    """A snapshot of a run. Raises RunError when it is no run (any more)."""
    config, status = run.config(), run.status()
    result = run.result() if status.over else None
    return {
        "run": run.id,
        "name": title(run),
        "state": status.state,
        "badge": WORDS[status.state],
        "about": _about(services, config, status),
        "message": status.message,
        "progress": _progress(services, run, status),
        "actions": _actions(services, run, status, result),
        "chart": _chart(run, config),
        "probe": _probe(run),
        "result": _result(services, run, result) if result else None,
        "log": run.log(LOG_LINES),
    }


def _about(services: AppServices, config: RunConfig, status: Status) -> str:
    base = config.base if config.base in services.adapters.models else "an earlier run"
    earlier = services.adapters.earlier(config.base)
    if earlier:
        base = title(earlier)
    parts = [f"Reward: {reward_words(config.reward)}", f"from {base}", uploads.words(services.runs, config.photos)]
    return " · ".join([*parts, f"{status.steps or config.steps:,} steps", f"seed {config.seed}"])


def _progress(services: AppServices, run: Run, status: Status) -> dict[str, Any] | None:
    if status.over:
        return None
    if status.state == "queued":
        ahead = services.worker.position(run)
        words = "Starting" if not ahead else f"Waiting for {ahead} run{'s' if ahead > 1 else ''} before it"
        return {"share": None if not ahead else 0, "words": words, "left": ""}
    phase = status.phase[:1].upper() + status.phase[1:]
    counted = f"step {status.step:,} of {status.steps:,}" if status.step else ""
    left = _seconds_left(run, status)
    return {
        "share": status.step / status.steps if status.step and status.steps else None,
        "words": " · ".join(filter(None, [phase or "Starting", counted])),
        "left": f"about {duration(left)} left" if left is not None and status.step < status.steps else "",
    }


def _seconds_left(run: Run, status: Status) -> float | None:
    """From the pace of the last steps, where they say it; else from the time since the start."""
    last = [line for line in run.metrics()[-20:] if _number(line.get("seconds")) is not None]
    if len(last) < 3 or last[-1]["seconds"] <= last[0]["seconds"]:
        return status.seconds_left()
    pace = (last[-1]["seconds"] - last[0]["seconds"]) / (len(last) - 1)
    return pace * (status.steps - status.step)


def _actions(services: AppServices, run: Run, status: Status, result: dict[str, Any] | None) -> dict[str, Any]:
    """What may be done with it now, and how it is called."""
    used = services.adapters.uses(run.id)
    usable = run.has_model and status.over and not used
    wins = bool(result and result.get("wins"))
    return {
        "cancel": not status.over and not run.cancelled,
        "cancelling": not status.over and run.cancelled,
        "resume": status.state in ("interrupted", "cancelled", "failed"),
        "use": ("Use it in the playground" if wins else "Use it all the same") if usable else "",
        "revert": used,
        "download": True,
        "delete": status.over and not used,
        "rename": True,
    }


def _chart(run: Run, config: RunConfig) -> dict[str, Any]:
    everything = run.metrics()
    lines = thinned(everything, POINTS)
    weights = {"reward": 1.0, "held_out": 1.0} | {name: config.reward.get(name, 0.0) for name in REWARDS}
    labels = {"held_out": "reward on unseen photos"}
    return {
        "steps": [_number(line.get("step")) or 0 for line in lines],
        "series": [
            {"name": name, "label": labels.get(name, name), "weight": weight, "values": _column(lines, name)}
            for name, weight in weights.items()
        ],
        "kl": _column(lines, "kl"),
        "facts": _spread(everything[-10:]),
    }


def _column(lines: list[dict[str, Any]], name: str) -> list[float | None]:
    return [_number(line.get(name)) for line in lines]


def _spread(lines: list[dict[str, Any]]) -> str:
    """How much the answers still differ, over the last steps: without differences there is nothing to learn from."""
    means = {}
    for name in ("entropy", "distinct", "valid", "no_signal"):
        known = [value for value in _column(lines, name) if value is not None]
        means[name] = sum(known) / len(known) if known else None
    words = []
    if means["distinct"] is not None:
        words.append(f"{means['distinct']:.0%} of the answers to a photo differ")
    if means["entropy"] is not None:
        words.append(f"entropy {means['entropy']:.2f}")
    if means["valid"] is not None:
        words.append(f"{means['valid']:.0%} valid recipes")
    if means["no_signal"]:
        words.append(f"no signal in {means['no_signal']:.0%} of the groups, whose answers all scored the same")
    return " · ".join(words)


def thinned(lines: list[Any], most: int) -> list[Any]:
    """At most `most` of the lines, evenly, with the first and the last."""
    if len(lines) <= most:
        return lines
    return [lines[round(place * (len(lines) - 1) / (most - 1))] for place in range(most)]


def _number(value: Any) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value and abs(value) < 1e12
    return value if good else None


def _probe(run: Run) -> dict[str, Any] | None:
    """The probe photo, its newest answer in full, and the earlier ones small."""
    answers, photo = run.probes(), run.folder / "probe.png"
    if not answers or not photo.is_file():
        return None
    last = answers[-1]
    read = parse(str(last.get("recipe") or ""))
    scores = last.get("scores") or {}
    return {
        "before": _picture(photo, "", SIDE),
        "after": _picture(photo, str(last.get("recipe") or ""), SIDE),
        "step": _number(last.get("step")) or 0,
        "words": describe(read.recipe) if read.ok else f"No recipe could be read in: {last.get('recipe')}",
        "recipe": str(read.recipe) if read.ok else "",
        "total": _number(last.get("total")),
        "scores": [{"name": name, "value": _number(scores.get(name))} for name in REWARDS],
        "strip": [
            {
                "step": _number(one.get("step")) or 0,
                "total": _number(one.get("total")),
                "src": _picture(photo, str(one.get("recipe") or ""), SMALL),
            }
            for one in thinned(answers, STRIP)
        ],
    }


def _result(services: AppServices, run: Run, result: dict[str, Any]) -> dict[str, Any]:
    base, tuned = (result.get(side) or {} for side in ("base", "tuned"))
    difference = result.get("difference") or {}
    rows = [
        {"name": name, "base": interval_words(base.get(name)), "tuned": interval_words(tuned.get(name))}
        for name in (*REWARDS, "total")
    ]
    wins = bool(result.get("wins"))
    return {
        "wins": wins,
        "verdict": verdict(result, services.adapters.uses(run.id)),
        "alarm": str(result.get("alarm") or ""),
        "rows": rows,
        "difference": interval_words(difference, sign=True),
        "facts": _facts(result),
        "pairs": [pair for one in (result.get("pairs") or [])[:PAIRS] if (pair := _pair(run, one))],
    }


def verdict(result: dict[str, Any], used: bool) -> str:
    """What came out, in a sentence or two."""
    difference = result.get("difference") or {}
    mean, low, high = (_number(difference.get(key)) for key in ("mean", "low", "high"))
    where = f"on {result.get('held_out') or 'the'} photos that it has not seen"
    if mean is None or low is None or high is None:
        return f"It could not be compared {where}."
    if result.get("wins"):
        span = f"{mean:.3f} higher than the base's (95 % interval {low:.3f} to {high:.3f})"
        place = "stands beside its base" if used else "is not in use: only its base is offered"
        return f"The tuned model wins: {where} its reward is {span}. It {place} in the playground."
    span = f"its reward differs from the base's by {mean:+.3f} (95 % interval {low:+.3f} to {high:+.3f})"
    why = "The tuned model is worse" if high < 0 else "The tuned model is not clearly better"
    place = "It is in use all the same." if used else "The base stays in the playground; you may use it all the same."
    return f"{why}: {where} {span}. {place}"


def interval_words(value: Any, sign: bool = False) -> str:
    """A mean with its interval: `0.41 (0.38 to 0.44)`."""
    if not isinstance(value, dict) or _number(value.get("mean")) is None:
        return "–"
    form = "{:+.3f}" if sign else "{:.3f}"
    mean, low, high = (_number(value.get(key)) for key in ("mean", "low", "high"))
    span = f" ({form.format(low)} to {form.format(high)})" if low is not None and high is not None else ""
    return form.format(mean) + span


def _facts(result: dict[str, Any]) -> str:
    seconds, memory = _number(result.get("seconds")), _number(result.get("peak_memory_bytes"))
    parts = [f"{_number(result.get('steps')) or 0:,.0f} steps"]
    parts += [duration(seconds)] if seconds is not None else []
    parts += [f"{memory / 2**30:.1f} GB of memory at most"] if memory else []
    for key, words in (("distinct", "different answers per photo"), ("entropy", "entropy")):
        ends = result.get(key) or {}
        first, last = _number(ends.get("first")), _number(ends.get("last"))
        if first is not None and last is not None:
            shown = f"{first:.0%} → {last:.0%}" if key == "distinct" else f"{first:.2f} → {last:.2f}"
            parts.append(f"{words} {shown}")
    return " · ".join(parts)


def _pair(run: Run, one: Any) -> dict[str, Any] | None:
    if not isinstance(one, dict):
        return None
    photo = run.folder / Path(str(one.get("picture"))).name
    sides = [_side(photo, name, one) for name in ("base", "tuned")]
    return {"photo": str(one.get("photo") or ""), "before": _picture(photo, "", SIDE), "sides": sides}


def _side(photo: Path, name: str, one: dict[str, Any]) -> dict[str, Any]:
    text = str(one.get(name) or "")
    read = parse(text)
    words = describe(read.recipe) if read.ok else "No recipe could be read."
    return {
        "name": name,
        "words": words,
        "total": _number(one.get(f"{name}_total")),
        "src": _picture(photo, text, SIDE),
    }


def _picture(photo: Path, recipe: str, side: int) -> str:
    """The photo after a recipe (as it is, where that cannot be read) as a data URL; empty when there is no photo."""
    try:
        return _drawn(str(photo), photo.stat().st_mtime_ns, recipe, side)
    except (OSError, PhotoError) as error:
        _log.warning("%s cannot be shown: %s", photo.name, error)
        return ""


@lru_cache(maxsize=128)
def _drawn(photo: str, _: int, recipe: str, side: int) -> str:
    pixels = load_photo(photo)
    read = parse(recipe)
    return picture_url(shrink(render(pixels, read.recipe) if recipe and read.ok else pixels, side))


def duration(seconds: float | None) -> str:
    """Seconds as a person says them: `45 s`, `3 min 20 s`, `1 h 5 min`."""
    if seconds is None:
        return "–"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    return f"{whole // 3600} h" + (f" {whole % 3600 // 60} min" if whole % 3600 // 60 else "")


# ── All runs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def history_value(services: AppServices, chosen: str | None) -> dict[str, Any]:
    """All runs, newest first, in a line each."""
    rows = []
    for run in reversed(services.runs.list()):
        try:
            rows.append(_row(services, run))
        except RunError as error:
            _log.warning("%s is left out: %s", run.id, error)
    return {"chosen": chosen or "", "runs": rows}


def _row(services: AppServices, run: Run) -> dict[str, Any]:
    status, config = run.status(), run.config()
    return {
        "run": run.id,
        "name": title(run),
        "reward": reward_words(config.reward) if config.name else "",
        "state": status.state,
        "badge": "In use" if services.adapters.uses(run.id) else WORDS[status.state],
        "used": services.adapters.uses(run.id),
        "when": time.strftime("%d %b %H:%M", time.localtime(status.created)) if status.created else "",
        "duration": duration(status.ended - status.started) if status.ended and status.started else "",
        "result": _short_result(run, status),
        "curve": [_number(line.get("reward")) for line in thinned(run.metrics(), 40)],
    }


def _short_result(run: Run, status: Status) -> str:
    result = run.result() if status.over else None
    if result:
        return interval_words(result.get("difference") or {}, sign=True)
    if status.state == "running" and status.steps:
        return f"step {status.step:,} of {status.steps:,}"
    return ""


# ── Whether there is news ───────────────────────────────────────────────────────────────────────────────────────────


def run_mark(services: AppServices, run: Run) -> tuple[Any, ...]:
    """Differs whenever `run_value` does; costs a few looks at the folder."""
    files = ("config.json", "status.json", "metrics.jsonl", "probes.jsonl", "log.txt", "result.json", "cancel")
    status = run.status()
    ahead = services.worker.position(run) if status.state == "queued" else 0
    return (
        run.id,
        status.state,
        ahead,
        services.adapters.uses(run.id),
        *(_version(run.folder / name) for name in files),
    )


def history_mark(services: AppServices, chosen: str | None) -> tuple[Any, ...]:
    """Differs whenever `history_value` does."""
    runs = services.runs.list()
    states = [
        (run.id, run.status().state, *(_version(run.folder / name) for name in ("config.json", "status.json")))
        for run in runs
    ]
    return (chosen, services.adapters.version, *states)


def _version(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
