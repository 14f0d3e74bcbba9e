"""Exports of an evaluation: CSV, Parquet, JSON, and an HTML report that contains its pictures."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from recipes import PhotoError, describe, jpeg_data_url, load_photo, parse, render, shrink
from rewards import REWARDS, RewardFunction
from storage.files import write_atomically
from training.evaluations.evaluation import Evaluation, Results
from training.evaluations.leaderboard import Totals, compute_totals, leaderboard, photo_order

FORMATS = ("csv", "parquet", "json", "html")
REPORT_PHOTOS = 60  # pictures of more photos would make a file of many megabytes
PICTURE_SIDE, PICTURE_QUALITY = 240, 80
REGION_COLOUR = (255, 60, 60)
STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 24px auto; max-width: 1400px; padding: 0 16px; color: #1f2937; }
table { border-collapse: collapse; margin: 12px 0 28px; } th, td { padding: 5px 9px; border-bottom: 1px solid #d1d5db; }
th { text-align: left; } td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.reference td { color: #4b5563; font-style: italic; } img { max-width: 240px; display: block; }
.photos td { vertical-align: top; max-width: 260px; overflow-wrap: anywhere; }
"""


def write_exports(evaluation: Evaluation, function: RewardFunction, folder: Path) -> list[Path]:
    """Write all exports into a folder and return their paths. Raises RunError or OSError."""
    files = [folder / f"evaluation.{suffix}" for suffix in FORMATS]
    for file in files:
        write_export(evaluation, function, file)
    return files


def write_export(evaluation: Evaluation, function: RewardFunction, path: Path, reference: int | None = None) -> None:
    """Write the export that the suffix of a path names, one of FORMATS. Raises RunError or OSError."""
    results = evaluation.results()
    if path.suffix == ".parquet":
        write_parquet(results, path, function)
    elif path.suffix == ".csv":
        write_atomically(path, to_csv(results, function))
    elif path.suffix == ".json":
        write_atomically(path, json.dumps(to_json(results, function, reference), indent=1, ensure_ascii=False))
    else:
        write_atomically(path, to_html(evaluation, results, function, reference))


def candidate_rows(results: Results, function: RewardFunction | None = None) -> Iterator[dict[str, Any]]:
    """Yield one row per photo, model and candidate: the answer, its scores, and the columns of its call."""
    for (photo, model), row in sorted(results.rows.items()):
        settings = results.config.models[model]
        texts, recipes, scores = row.get("texts", []), row.get("recipes"), row.get("scores")
        for index in range(max(1, len(texts))):
            values = dict(zip(REWARDS, scores[index])) if scores else {}
            yield {
                "photo": results.photos[photo]["name"],
                "digest": results.photos[photo]["digest"],
                "model": settings.name if "/" not in settings.name else Path(settings.name).name,
                "temperature": settings.temperature,
                "candidate": index,
                "text": texts[index] if index < len(texts) else "",
                "recipe": recipes[index] if recipes else None,
                **{name: values.get(name) for name in REWARDS},
                "total": function.total(values) if function and values else None,
                "seconds": row.get("seconds"),
                "batch": row.get("batch"),
                "tokens_in": row.get("tokens_in"),
                "tokens_out": row.get("tokens_out"),
                "cost": row.get("cost"),
                "error": row.get("error", ""),
            }


def write_parquet(results: Results, path: Path, function: RewardFunction | None = None) -> None:
    """Write `candidate_rows` as Parquet, atomically. Raises OSError."""
    import pyarrow as pa
    from pyarrow import parquet

    number, text = pa.float64(), pa.string()
    kinds = {"candidate": pa.int64(), "batch": pa.int64(), "tokens_in": pa.int64(), "tokens_out": pa.int64()}
    texts = ("photo", "digest", "model", "text", "recipe", "error")
    names = list(_COLUMNS)
    schema = pa.schema([(name, text if name in texts else kinds.get(name, number)) for name in names])
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(list(candidate_rows(results, function)), schema), buffer)
    write_atomically(path, buffer.getvalue())


_COLUMNS = (
    *("photo", "digest", "model", "temperature", "candidate", "text", "recipe", *REWARDS, "total"),
    *("seconds", "batch", "tokens_in", "tokens_out", "cost", "error"),
)


def to_csv(results: Results, function: RewardFunction) -> str:
    """Return `candidate_rows` as CSV. Texts that a spreadsheet would compute as a formula start with a quote."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _COLUMNS)
    writer.writeheader()
    for row in candidate_rows(results, function):
        writer.writerow({name: _plain(value) for name, value in row.items()})
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def to_json(results: Results, function: RewardFunction, reference: int | None = None) -> dict[str, Any]:
    """Return the settings, the leaderboard and all answers as a JSON object."""
    return {
        "config": public_config(results),
        "leaderboard": leaderboard(results, function, reference),
        "candidates": list(candidate_rows(results, function)),
    }


def public_config(results: Results) -> dict[str, Any]:
    """Return the settings without local paths."""
    values = results.config.model_dump(mode="json")
    if values["photos"] != "bundled" and not values["photos"].startswith("hub:"):
        values["photos"] = "own photos"
    for model in values["models"]:
        model["name"] = Path(model["name"]).name
    return values


def to_html(evaluation: Evaluation, results: Results, function: RewardFunction, reference: int | None = None) -> str:
    """Return a page with the leaderboard and the best candidate of each model, which needs no other file."""
    totals = compute_totals(results, function)
    table = leaderboard(results, function, reference, totals)
    title = html.escape(results.config.name or "Evaluation")
    weights = ", ".join(f"{name} {weight:g}" for name, weight in table["reward"].items())
    order = photo_order(results, totals, "disagree")[:REPORT_PHOTOS]
    more = f" The {len(order)} on which the models differ most are shown." if len(order) < len(results.photos) else ""
    about = (
        f"{len(results.photos)} photos, {results.config.candidates} candidates per photo and model, skill "
        f"{results.config.skill}, reward: {weights}. A photo counts with its best candidate; intervals are 95 % "
        f"bootstrap intervals over photos.{more}"
    )
    pictures = "".join(_report_row(evaluation, results, totals, photo) for photo in order)
    heads = "".join(f"<th>{html.escape(label)}</th>" for label in totals.labels[: len(results.config.models)])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title}</h1><p>{html.escape(about)}</p>{_report_table(table)}"
        f'<table class="photos"><thead><tr><th>Photo</th>{heads}</tr></thead><tbody>{pictures}</tbody></table></html>'
    )


def _report_table(table: dict[str, Any]) -> str:
    names = list(REWARDS) if table["scored"] else []
    against = html.escape(table["rows"][table["reference"]]["label"])
    heads = ["Model", *(["Reward", "Mean of candidates", *names, f"Wins against {against}"] if table["scored"] else [])]
    heads += ["Valid", "Latency (s)", "p95", "Tokens in / out", "Cost per photo ($)", "Reward per cent"]
    lines = []
    for row in table["rows"]:
        cells = []
        if table["scored"]:
            cells = [format_interval(row["reward"]), format_number(row["mean_candidate"])]
            cells += [format_number(row["parts"][name]) for name in names] + [
                format_interval(row["wins"], percent=True)
            ]
        tokens = " / ".join(format_number(row[name], 0) for name in ("tokens_in", "tokens_out"))
        cells += [format_number(row["valid"]), format_number(row["latency"]), format_number(row["latency_p95"]), tokens]
        cells += [format_number(row["cost"], 6), format_number(row["reward_per_cent"], 1)]
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        lines.append(f'<tr class="{row["kind"]}"><td>{html.escape(row["label"])}</td>{numbers}</tr>')
    head = "".join(f"<th>{head}</th>" for head in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _report_row(evaluation: Evaluation, results: Results, totals: Totals, photo: int) -> str:
    name = html.escape(results.photos[photo]["name"])
    cells = [f"<td>{_image(picture(evaluation.photo_file(photo)), 'The photo')}{name}</td>"]
    for model in range(len(results.config.models)):
        cell = cell_of(evaluation, results, totals, photo, model)
        total = f"<b>{cell['total']:.3f}</b> " if cell["total"] is not None else ""
        image = _image(cell["src"], cell["text"])
        cells.append(f"<td>{image}{total}{html.escape(cell['text'])}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _image(src: str, alt: str) -> str:
    return f'<img src="{src}" alt="{html.escape(alt)}">' if src else ""


def cell_of(evaluation: Evaluation, results: Results, totals: Totals, photo: int, model: int) -> dict[str, Any]:
    """Return the best candidate of a model for a photo: `total`, `text`, and `src`, the picture as a data URL."""
    row = results.rows.get((photo, model), {})
    texts, file = row.get("texts", []), evaluation.photo_file(photo)
    if not texts:
        return {"total": None, "text": row.get("error") or "No answer yet", "src": "", "index": 0}
    if not results.config.is_scored:
        regions = (row.get("regions") or [{}])[0]
        marked = json.dumps(regions) if regions.get("boxes") or regions.get("points") else ""
        return {"total": None, "text": texts[0] or "Nothing found", "src": picture(file, regions=marked), "index": 0}
    index = max(0, int(totals.chosen[photo, model]))
    recipe, total = row["recipes"][index], totals.best[photo, model]
    text = describe(parse(recipe).recipe) if recipe else f"Not a recipe: {texts[index]}"
    return {
        "total": None if np.isnan(total) else float(total),
        "text": text,
        "src": picture(file, recipe or ""),
        "index": index,
    }


def picture(photo: Path, recipe: str = "", regions: str = "", side: int = PICTURE_SIDE) -> str:
    """Return a photo after a recipe, or with regions, as a small JPEG data URL; "" if it cannot be read.

    Args:
        photo: The file.
        recipe: The recipe; "" leaves the photo untouched.
        regions: JSON object with `boxes` and `points`, in fractions of the photo.
        side: Long side in pixels.
    """
    try:
        return _render(str(photo), photo.stat().st_mtime_ns, recipe, regions, side)
    except (OSError, PhotoError):
        return ""


@lru_cache(maxsize=512)
def _render(photo: str, _: int, recipe: str, regions: str, side: int) -> str:
    pixels = load_photo(photo)
    edited = render(pixels, parse(recipe).recipe) if recipe else pixels
    small = np.ascontiguousarray(shrink(edited, side))
    if regions:
        _draw_regions(small, json.loads(regions))
    return jpeg_data_url(small, PICTURE_QUALITY)


def _draw_regions(pixels: np.ndarray, regions: dict[str, Any]) -> None:
    import cv2

    height, width = pixels.shape[:2]
    for left, top, right, bottom in regions.get("boxes", []):
        first, second = (round(left * width), round(top * height)), (round(right * width), round(bottom * height))
        cv2.rectangle(pixels, first, second, REGION_COLOUR, 2)
    for x, y in regions.get("points", []):
        cv2.circle(pixels, (round(x * width), round(y * height)), 4, REGION_COLOUR, -1)


def format_number(value: float | None, digits: int = 3) -> str:
    """Format a number, None as a dash."""
    return "–" if value is None else f"{value:,.{digits}f}"


def format_interval(interval: dict[str, float | None] | None, percent: bool = False) -> str:
    """Format a mean with its interval; `percent` for shares."""
    if interval is None or interval["mean"] is None:
        return "–"
    values = [interval[name] or 0.0 for name in ("mean", "low", "high")]
    pattern = "{:.0%} ({:.0%} to {:.0%})" if percent else "{:.3f} ({:.3f} to {:.3f})"
    return pattern.format(*values)


def markdown_table(table: dict[str, Any]) -> str:
    """Format a leaderboard as a Markdown table, the highest reward first."""
    names = list(REWARDS) if table["scored"] else []
    against = table["rows"][table["reference"]]["label"]
    heads = ["", *(["reward", *names, f"wins against {against}"] if table["scored"] else [])]
    heads += ["valid", "latency", "p95", "tokens", "$ per photo", "reward per cent"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in sorted(table["rows"], key=lambda row: -(row["reward"]["mean"] or 0)):
        cells = [row["label"]]
        if table["scored"]:
            cells += [format_interval(row["reward"]), *(format_number(row["parts"][name]) for name in names)]
            cells.append(format_interval(row["wins"], percent=True))
        cells += [format_number(row["valid"], 2), format_number(row["latency"]), format_number(row["latency_p95"])]
        cells += [format_number(row["tokens_out"], 0), format_number(row["cost"], 6)]
        cells.append(format_number(row["reward_per_cent"], 1))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
